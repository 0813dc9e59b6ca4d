"""One order for all that a torch runner does on its GPU, whichever threads and streams of its callers it comes from.

A slot is filled on one stream and may be run on another; it may go back while a third still reads it. torch orders none
of that: what is freed it gives out again as soon as the stream it was allocated on gets there, unless it was told which
other streams use it (Tensor.record_stream). In one order the stream of the last work is the only one to tell of.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from taylorseer_export.bundle.device import Device

if TYPE_CHECKING:
    import torch


class Order(AbstractContextManager[None]):
    """`with order` a thread has its turn, and its stream comes after the one that the last work went to.

    Args:
        device: The GPU, with its number.

    Attributes:
        last: The stream that the last work went to; None before any.
    """

    def __init__(self, device: Device) -> None:
        self.last: Any = None
        self._number, self._lock = device.number, threading.Lock()

    def __enter__(self) -> None:
        import torch

        here: Any = torch.cuda.current_stream(self._number)
        self._lock.acquire()
        try:
            if self.last is not None and self.last != here:
                here.wait_stream(self.last)
        except BaseException:
            self._lock.release()
            raise
        self.last = here

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def wait(self) -> None:
        """Wait until all of it is done."""
        with self._lock:
            if self.last is not None:
                self.last.synchronize()

    def outlast(self, owner: object, tensors: Iterable[torch.Tensor]) -> None:
        """When `owner` goes, which users of its tensors keep, let what is queued end before their memory is used."""
        weakref.finalize(owner, _let_go, tuple(tensors), self).atexit = False


def empty_after(owner: object, tensors: Iterable[torch.Tensor], order: Order | None) -> None:
    """When `owner` goes, take the memory from its tensors, which others hold on to; on a GPU after what is queued."""
    weakref.finalize(owner, _let_go, tuple(tensors), order, empty=True).atexit = False


def _let_go(tensors: tuple[torch.Tensor, ...], order: Order | None, empty: bool = False) -> None:
    """Called by the garbage collector, at any moment in any thread: it takes no lock and waits for nothing."""
    last = None if order is None else order.last
    for tensor in tensors:
        if last is not None:
            tensor.record_stream(last)
        if empty:
            tensor.data = tensor.new_empty(0)
