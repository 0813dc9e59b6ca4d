"""Who runs next: requests that wait, requests in slots, and whose steps go into one engine call.

Bookkeeping alone: no threads, no engine, and the time is an argument. A worker asks `take`, does what the turn says,
and hands each job back with `give_back` or `leave`.

    offer ─▶ waiting ─▶ start ─▶ ready ⇄ step ─▶ leave
                          └ needs a slot     └ with all that are ready and share its key

A job joins at the step after its start, and leaves at its last one: nobody waits for a batch to fill or to end. Of
those that wait, one that asks for less than half the work of all before it goes first, and nobody is overtaken more
than a few times: a short request does not wait for long ones, and these do not wait for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, NamedTuple

from taylorseer_export.serve.refusals import QueueFull, Stopping

_SHORTER = 0.5  # of the work of those that it overtakes
_OVERTAKEN = 4  # times, at most
_PATIENCE = 16  # steps; on the smallest models that many forecast steps take about as long as a full step


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        work: Whatever the workers need; not looked at here.
        samples: Of the batch dimension, those this request fills.
        deadline: When it is given up, in the time that `take` is told (seconds).
        cost: Work that it asks for, in any unit that all jobs share.
        cancelled: Whether its sender has left. It may be slow, so it is asked once per step.
        key: Jobs with equal keys share the engine call of their next step; None runs alone.
        passed: How often another was preferred since its last step; at most `_PATIENCE` times.
        overtaken: How often one that came later was given a slot; at most `_OVERTAKEN` times.
    """

    work: Any = None
    samples: int = 1
    deadline: float = inf
    cost: float = 1.0
    cancelled: Callable[[], bool] = field(default=lambda: False)
    key: Hashable = None
    passed: int = field(default=0, init=False)
    overtaken: int = field(default=0, init=False)


class Turn(NamedTuple):
    """What a worker does next. `drop`: answer a job that is cancelled or late; `start`: begin it; `step`: one call."""

    kind: Literal["drop", "start", "step"]
    jobs: list[Job]


class Batcher:
    """Requests and slots of one model.

    Args:
        slots: Requests that may be under way at one time.
        queue: Requests that may wait for a slot.
        batch: Requests that one engine call may serve; 1 turns sharing off.
        most: Samples that one engine call may have.
        workers: Engine calls that run at one time. Requests under way are spread over them.
    """

    def __init__(self, slots: int, queue: int, batch: int = 1, most: int = 1, workers: int = 1) -> None:
        self.slots, self.queue, self.batch, self.most, self.workers = slots, queue, batch, most, workers
        self._waiting: deque[Job] = deque()
        self._ready: deque[Job] = deque()
        self._seated: set[Job] = set()
        self._open = True

    @property
    def in_use(self) -> int:
        """Slots that hold a request."""
        return len(self._seated)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def offer(self, job: Job) -> None:
        """Put a request at the end of the queue.

        Raises:
            QueueFull: All slots are in use and so is the queue.
            Stopping: The server ends.
        """
        if not self._open:
            raise Stopping("the server is stopping, expected a running one; send the request again")
        # Whoever will get a free slot at once does not wait.
        if len(self._waiting) - (self.slots - len(self._seated)) >= self.queue:
            raise QueueFull(
                f"queue is full ({self.queue} requests wait for {self.slots} slots), expected room; try again later"
            )
        self._waiting.append(job)

    def take(self, now: float) -> Turn | None:
        """The next thing to do, or None while there is nothing or all of it is being done.

        Jobs to start come first, so that they join the next shared step; then steps that run alone, which are the short
        ones, so that the others gather; then the job that has been ready longest, with its partners. Whether a job is
        late is asked of all that wait; whether its sender has left, when its turn comes.
        """
        for job in self._waiting:
            if job.deadline <= now:
                self._waiting.remove(job)
                return Turn("drop", [job])
        if self._waiting and len(self._seated) < self.slots:
            job = self._from_queue()
            if job.cancelled():
                return Turn("drop", [job])
            self._seated.add(job)
            return Turn("start", [job])
        if not self._ready:
            return None
        first = self._first()
        if first.deadline <= now or first.cancelled():
            return Turn("drop", [first])
        jobs = [first]
        fair = min(self.batch, -(-len(self._seated) // self.workers))  # more would leave other workers idle
        samples = first.samples
        for job in tuple(self._ready) if first.key is not None else ():
            fits = job.key == first.key and samples + job.samples <= self.most
            # One that is to be dropped keeps its place: its own turn comes next.
            if len(jobs) < fair and fits and job.deadline > now and not job.cancelled():
                self._ready.remove(job)
                jobs.append(job)
                samples += job.samples
        return Turn("step", jobs)

    def _from_queue(self) -> Job:
        """Who gets the free slot: the one that waits longest, or the shortest that may overtake all before it."""
        chosen, least = 0, inf
        for place, job in enumerate(self._waiting):
            if job.cost < _SHORTER * least:
                chosen = place
            least = min(least, job.cost)
            if job.overtaken >= _OVERTAKEN:
                break
        for job in [self._waiting[place] for place in range(chosen)]:
            job.overtaken += 1
        job = self._waiting[chosen]
        del self._waiting[chosen]
        return job

    def _first(self) -> Job:
        """Who is next: the one ready longest, or one that runs alone if the other has not been passed too often."""
        first = self._ready[0]
        if first.key is not None and first.passed < _PATIENCE:
            lonely = next((job for job in self._ready if job.key is None), None)
            if lonely is not None:
                first.passed += 1
                first = lonely
        self._ready.remove(first)
        first.passed = 0
        return first

    @property
    def pending(self) -> bool:
        """Whether another `take` would find something to do."""
        return bool(self._ready) or (bool(self._waiting) and len(self._seated) < self.slots)

    def give_back(self, job: Job) -> None:
        """After a start or a step: the job is ready for its next one."""
        self._ready.append(job)

    def leave(self, job: Job) -> None:
        """A job is finished, failed or dropped; its slot is free."""
        self._seated.discard(job)

    def close(self) -> list[Job]:
        """Take no more requests; returns those that have no slot yet. Requests under way go on."""
        self._open = False
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    @property
    def idle(self) -> bool:
        """Whether no request waits or is under way."""
        return not self._waiting and not self._seated
