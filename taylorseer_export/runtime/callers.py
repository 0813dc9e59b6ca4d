"""Who calls a drop-in: every thread, and in a thread every asyncio task, has a loop of its own.

A loop holds its slots from its first call until it is said to be over; then they are idle and serve the next loop, of
any caller. Idle are kept: those of one loop, and of one more for every loop under way; all are freed when a loop over
latents of another shape needs slots. A caller that never says that its loop is over keeps the slots for its next one,
and they are freed when the thread or task ends.

Loops that take turns within one caller, and a loop that goes from thread to thread, cannot be kept apart: both are
refused, and known by their latents, which at every step are close to those of the step before.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary, WeakSet

from taylorseer_export.errors import StepError
from taylorseer_export.runtime.calls import Context, LoopState, Seen, TransformerCall
from taylorseer_export.runtime.slot import Slot

_KEPT = 4  # loops of one caller that others came between


class Caller:
    """One thread or task.

    Attributes:
        context: What `cache_context` says of the calls that it makes now.
        loop: Its loop under way, or else its last one.
        left: Loops that it had before, of which nobody said that they were over.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self.loop: LoopState | None = None
        self.left: deque[LoopState] = deque(maxlen=_KEPT)


class Callers:
    """Those who call one drop-in, and the slots of their loops."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._lock = threading.Lock()
        self._loops: WeakSet[LoopState] = WeakSet()
        self.idle: list[tuple[tuple[int, ...], dict[str, Slot]]] = []

    @property
    def here(self) -> Caller:
        """The caller who asks."""
        threads = self._threads
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop runs in this thread
            task = None
        if task is None:
            if not hasattr(threads, "caller"):
                threads.caller = Caller()
            own: Caller = threads.caller
            return own
        if not hasattr(threads, "tasks"):
            threads.tasks = WeakKeyDictionary()
        caller: Caller = threads.tasks.setdefault(task, Caller())
        return caller

    def begin(self, loop: LoopState) -> None:
        """Make it the caller's loop; slots that the one before still holds go over to it."""
        here = self.here
        before = here.loop
        if before is not None and not before.over:
            loop.slots, loop.shape, before.slots = before.slots, before.shape, {}
            here.left.append(before)
        here.loop = loop
        with self._lock:
            self._loops.add(loop)

    def end(self, loop: LoopState) -> None:
        """No further call belongs to a loop: its slots are idle."""
        with self._lock:
            loop.over = True
            if loop.slots:
                self.idle.append((loop.shape, loop.slots))
                loop.slots = {}
            under_way = sum(bool(other.slots) for other in self._loops)
            del self.idle[: -max(1, under_way)]

    def slot(
        self,
        loop: LoopState,
        name: str,
        sizes: Mapping[str, int],
        shape: tuple[int, ...],
        new: Callable[[Mapping[str, int]], Slot],
    ) -> Slot:
        """A branch's slot of these sizes; idle ones of other latents are freed before a new one is allocated."""
        if shape != loop.shape or not loop.slots:
            with self._lock:
                loop.slots.clear()
                loop.shape = shape
                found = [k for k, (idle, _) in enumerate(self.idle) if idle == shape]
                if found:
                    loop.slots = self.idle.pop(found[-1])[1]
                else:
                    self.idle.clear()
        if name not in loop.slots or loop.slots[name].whole != sizes:
            loop.slots.pop(name, None)
            loop.slots[name] = new(sizes)
        return loop.slots[name]

    def check_turns(self, call: TransformerCall, loop: LoopState | None) -> None:
        """Refuse a call that goes on with another loop than the one it would be counted to, or begin anew.

        Args:
            call: The first of a step.
            loop: Which it would belong to; None for a new one.

        Raises:
            StepError: It is clearly closer to another loop over the same conditioning.
        """
        if loop is not None and not loop.earlier and len(self._loops) == 1:  # its own, and so with every step of most
            return
        with self._lock:
            others = [other for other in self._loops if other is not loop and other.resumes(call)]
        rivals = [other.latents for other in others] + (loop.earlier if loop is not None else [])
        if not rivals:
            return
        own = 0.0 if loop is None or loop.latents is None else likeness(loop.latents, call.latents)
        for latents in rivals:
            near = 0.0 if latents is None else likeness(latents, call.latents)
            if near > 0.5 and 1 - near < (1 - own) / 2:
                raise StepError(
                    "latents of a call follow those of a loop that another one came between, or that another thread "
                    "began, expected each loop in one thread and one after the other; give every pipeline a drop-in of "
                    "its own by as_transformer(), and name the calls of guidance with cache_context"
                )


def likeness(before: Seen, now: Seen) -> float:
    """Cosine of the angle between latents, over the elements that differ: near 1 from step to step, 0 of other noise.

    Equal latents are no next step: 0. What is joined to the noise stays equal, and so is left out.
    """
    if before.value is now.value:
        return float(before.version != now.version)
    a, b = before.value, now.value
    if a.shape != b.shape or a.device != b.device:
        return 0.0
    moved = a != b
    a, b = a[moved].float(), b[moved].float()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 0.0
