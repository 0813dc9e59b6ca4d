"""Reads requests on a thread of its own, so that whoever receives them only hands over.

Reading a request checks it, encodes its caption and draws its noise: milliseconds, in which the server could have taken
others. A request that cannot be read is answered here and costs nobody else anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Full, Queue
from threading import Event, Thread
from typing import NamedTuple

from taylorseer_export.serve.refusals import QueueFull, Stopping

Read = Callable[[float | None], object]
Refuse = Callable[[Exception], object]


class _Received(NamedTuple):
    read: Read
    refuse: Refuse
    until: float | None  # by the monotonic clock


class Reader:
    """Reads what it is handed, in turn.

    Args:
        room: Requests that may wait to be read; one more is refused at once.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._received: Queue[_Received | None] = Queue(room)
        self._closed = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait to be read; the one that is being read does not."""
        return self._received.qsize()

    def hand_over(self, read: Read, refuse: Refuse, timeout: float | None = None) -> None:
        """Take a request and return at once.

        Args:
            read: Reads it and passes it on; called on the reader's thread with the seconds that are left of `timeout`.
            refuse: Told the error of `read`, or why it was never called.
            timeout: Seconds from now after which the request is given up; never if left out.
        """
        until = None if timeout is None else time.monotonic() + timeout
        try:
            if self._closed.is_set():
                raise Stopping("the server is stopping, expected a running one; send it again")
            self._received.put_nowait(_Received(read, refuse, until))
        except Full:
            refuse(QueueFull(f"queue is full ({self._room} requests wait to be read), expected room; try again later"))
        except Stopping as error:
            refuse(error)

    def close(self) -> None:
        """Read what was handed over, then end the thread."""
        self._closed.set()
        self._received.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (received := self._received.get()) is not None:
            try:
                left = None if received.until is None else max(0.0, received.until - time.monotonic())
                received.read(left)
            except Exception as error:  # of this request; the others go on
                received.refuse(error)
