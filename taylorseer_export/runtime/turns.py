"""Turns at a GPU for a library whose captures are spoilt by what any thread of the process does beside them.

ONNX Runtime captures in a mode in which the driver refuses all threads of the process to allocate, copy and wait
(cudaStreamCaptureModeGlobal), and ends the capture that one of them disturbs. The CUDA graph belongs to the thread that
captured it: another one that asks for it captures again, at that very moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType


class _Process:
    """What the threads of a process do on its GPUs: one capture and nothing else, or anything but a capture."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._others = self._waiting = 0  # things under way that are no captures; captures that wait for their end

    @contextmanager
    def capturing(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._others)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            yield  # what would begin now waits for the lock

    def begin(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)  # else it would never be quiet
            self._others += 1

    def end(self) -> None:
        with self._changed:
            self._others -= 1
            self._changed.notify_all()


class Turn(AbstractContextManager[None]):
    """One thing at a time on the GPU of a runner: what is done `with` it, captures, and launches of what they left.

    Runners take turns with none but the captures of others. Captures and launches are made by one thread, so that each
    call has one CUDA graph whoever makes it, and the GPU that is current there stays that of the runner.
    """

    _process = _Process()  # of all runners

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "cuda-graphs")  # starts with the first capture, ends with this object

    def __enter__(self) -> None:
        self._lock.acquire()
        self._process.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.end()
        self._lock.release()

    def capture(self, run: Callable[[], object]) -> None:
        """Make a run that captures, while no runner of this process does anything."""
        self._thread.submit(self._alone, run).result()

    def launch(self, run: Callable[[], object]) -> None:
        """Make a run that launches what a run before it captured."""
        self._thread.submit(self._in_turn, run).result()

    def _alone(self, run: Callable[[], object]) -> None:
        with self._lock, self._process.capturing():
            run()

    def _in_turn(self, run: Callable[[], object]) -> None:
        with self:
            run()
