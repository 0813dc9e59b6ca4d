"""The service: many requests over one loaded bundle, with slots, shared engine calls, deadlines and cancellation.

Triton's model file only translates between its tensors and this; a program without Triton can use it as well.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf
from threading import Condition, Thread
from typing import Protocol

from taylorseer_export.bundle.memory import CONDITIONING_ROOM, request_bytes, size
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.errors import ConfigError, RankError, ServeError, TaylorSeerError, first_line
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.batch import SharedCalls, ids_of
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.lead import leave
from taylorseer_export.runtime.sampling import Loop, Request
from taylorseer_export.runtime.schedule import ForecastStep
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.tensors import latent_sizes
from taylorseer_export.runtime.trajectory import random_trajectory
from taylorseer_export.serve.batcher import Batcher, Job, Turn
from taylorseer_export.serve.refusals import FAILED, Late, Stopping, stopped


class Caller(Protocol):
    """Who sent a request. Its methods are called from the threads of the service, one at a time."""

    def cancelled(self) -> bool:
        """Whether it no longer wants the answer; asked once per step."""
        ...

    def advanced(self, loop: Loop) -> None:
        """A step is done, not the last one."""
        ...

    def finished(self, loop: Loop, executed: str) -> None:
        """All steps are done; `executed` is the plan as run."""
        ...

    def failed(self, error: TaylorSeerError) -> None:
        """No answer will come."""
        ...


@dataclass
class Limits:
    """What a service may use.

    Attributes:
        slots: Requests under way at one time.
        queue: Requests that wait for a slot.
        batch: Requests that share one engine call; 1 turns sharing off.
        workers: Engine calls at one time, each with the threads the bundle was loaded with; 0 is one per core.
        slot_bytes: Taylor buffers and step tables of one request; 0 is no limit.
        conditioning_cache: Bytes in which what prompts become is kept, so that none is encoded twice; 0 keeps nothing.
        warm: Sizes in pixels, (height, width) or (frames, height, width), that are warmed up besides the typical ones.
    """

    slots: int = 4
    queue: int = 64
    batch: int = 4
    workers: int = 0
    slot_bytes: int = 0
    conditioning_cache: int = CONDITIONING_ROOM
    warm: tuple[tuple[int, ...], ...] = ()


@dataclass
class _Ticket:
    """What a worker needs to know of one request."""

    loop: Loop
    caller: Caller
    ids: object
    branches: Branches = field(default_factory=lambda: Branches([]))
    staged: bool = False


def _cost(loop: Loop) -> float:
    """Work of a request, to be compared with others of one model: values of its latents, at every full step."""
    return float(str(loop.plan).count("F") * loop.latents.size)


class Service:
    """Serves requests over one denoiser until it is closed.

    Args:
        denoiser: The loaded bundle. The service does not close it.
        limits: What it may use.

    Attributes:
        conditioning: What prompts became, for whoever makes requests of them.
        broken: Why it draws nothing more, where ranks draw and one of them is gone; None as long as it does.
        counts: What happened since the start: `steps.<kind>`, `calls.<kind>` and `seconds.<kind>` of full and forecast
            steps; `planned.full` and `executed.full`, steps of the requests done; `requests.<outcome>` (done, failed,
            cancelled, late, refused); `prepared.hit` and `prepared.miss`, requests whose slot was prepared for the same
            before, and others; `fallbacks.shared`, calls meant to be shared that each request had to make alone.
    """

    def __init__(self, denoiser: Denoiser, limits: Limits) -> None:
        self.denoiser, self.limits = denoiser, limits
        self.conditioning = ConditioningCache(limits.conditioning_cache)
        self.counts: defaultdict[str, float] = defaultdict(float)
        workers = limits.workers or len(os.sched_getaffinity(0))
        self._calls = [SharedCalls(denoiser) for _ in range(workers)]
        self._batcher = Batcher(limits.slots, limits.queue, limits.batch, self._calls[0].most, workers)
        self._idle: list[Branches] = []
        self._changed = Condition()
        self._stopping = False
        self._turns: dict[SharedCalls, float] = {}  # of each worker that has a turn under way, when that began
        self.broken: RankError | None = None
        self._end: Callable[[RankError], object] | None = None
        if denoiser.share.lead is not None:
            denoiser.share.lead.failed = self._break
        self._workers = [Thread(target=self._work, args=(calls,), daemon=True) for calls in self._calls]
        for worker in self._workers:
            worker.start()

    def warm_up(self) -> None:
        """Run both kinds of step, alone and shared, at the bundle's typical sizes and at those of the limits.

        Shared calls are compared with calls alone while this runs, so the first requests need not do it. Slots stay for
        the first requests: of the sizes named as long as there is room, and of the typical ones.

        Ranks have run both kinds when they loaded the bundle, and open their slot for the first request.

        Raises:
            ConfigError: The bundle takes no such size; none is warmed up.
        """
        if self.denoiser.share.ranks > 1:
            return
        manifest = self.denoiser.manifest
        named = [latent_sizes(manifest, pixels, "--warm")[0] for pixels in self.limits.warm]
        kept = [self._warm_up(sizes) for sizes in ({}, *named)]
        self._idle = [Branches([slots[0]]) for slots in kept[1:]][: self.limits.slots - 1]
        self._idle += [Branches([slot]) for slot in kept[0]][: self.limits.slots - len(self._idle)]

    def _warm_up(self, named: Mapping[str, int]) -> list[Slot]:
        """At sizes of which some are named; returns the slots."""
        trajectory = random_trajectory(self.denoiser, 2, named)
        sizes = self.denoiser.sizes(trajectory.latents.shape[1:], trajectory.conditioning)
        slots = [self.denoiser.slot(sizes) for _ in range(min(self.limits.batch, self.limits.slots))]
        for slot in slots:
            slot.reuses = True
        for calls in self._calls:
            for count in range(1, len(slots) + 1):
                for slot in slots[:count]:
                    slot.start(trajectory.conditioning, Forecasts(Plan("F."), 0), trajectory.timesteps)
                for latents in trajectory.latents:
                    for slot in slots[:count]:
                        slot.stage(latents)
                    key = calls.key(slots[0], None)
                    if key is None or count * sizes["batch"] > calls.most or not calls.run(slots[:count]):
                        for slot in slots[:count]:
                            slot.run()
                    for slot in slots[:count]:
                        slot.finish()
        return slots

    @property
    def slots_in_use(self) -> int:
        return self._batcher.in_use

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    @property
    def stalled(self) -> float:
        """Seconds that the longest turn under way has taken; 0 while there is none.

        A worker that hangs in an engine call, or that died, never ends its turn.
        """
        with self._changed:
            return time.monotonic() - min(self._turns.values()) if self._turns else 0.0

    @property
    def unequal(self) -> set[object]:
        """Calls that gave other bits shared than alone, and so are not shared: (graph, sizes)."""
        return set().union(*(calls.unequal for calls in self._calls))

    def snapshot(self) -> dict[str, float]:
        """The counts at this moment.

        With `fallbacks.cuda_graph`, calls that ran without the graph asked for, and `conditioning.hit` and
        `conditioning.miss`, prompts that had been encoded before and those that had not.
        """
        kept = self.conditioning.counts
        more = {"conditioning.hit": kept.hits, "conditioning.miss": kept.misses}
        with self._changed:
            return {**self.counts, "fallbacks.cuda_graph": self.denoiser.runner.fallbacks, **more}

    def submit(
        self,
        request: Request,
        forecasts: Forecasts,
        caller: Caller,
        timeout: float | None = None,
    ) -> None:
        """Take a request; its answer comes through `caller`.

        Args:
            request, forecasts: As for `sample`.
            caller: Who gets the answer.
            timeout: Seconds after which it is given up; never if left out.

        Raises:
            ConfigError, StepError: The request does not fit the bundle or a slot; nothing was queued.
            QueueFull: As many wait as may wait.
            Stopping: The service is closing.
        """
        loop = Loop(self.denoiser, request, forecasts)
        self._check_size(loop)
        ticket = _Ticket(loop, caller, ids_of(self.denoiser, request.conditioning, request.lora))
        deadline = inf if timeout is None else time.monotonic() + timeout
        job = Job(ticket, loop.sizes["batch"], deadline, _cost(loop), caller.cancelled)
        with self._changed:
            try:
                if self.broken is not None:
                    raise stopped(self.broken)
                self._batcher.offer(job)
            except ServeError:
                self.counts["requests.refused"] += 1
                raise
            self._changed.notify()

    def ends(self, end: Callable[[RankError], object]) -> None:
        """Call `end`, from any thread, once it is broken."""
        self._end = end

    def close(self) -> None:
        """Refuse what waits, finish what is under way, and end the threads."""
        with self._changed:
            waiting = self._batcher.close()
            self._stopping = True
            self._changed.notify_all()
        for job in waiting:
            job.work.caller.failed(Stopping("the server stopped, expected it to run on; send it again"))
        for worker in self._workers:
            worker.join()

    def _check_size(self, loop: Loop) -> None:
        """Refuse what a slot may not hold."""
        share, steps = self.denoiser.share, {"steps": len(loop.forecasts)}
        manifest = share.contract.manifest
        needed = sum(request_bytes(manifest, {**share.sizes(sizes), **steps}) for sizes in loop.branches)
        if self.limits.slot_bytes and needed > self.limits.slot_bytes:
            raise ConfigError(
                f"request needs {size(needed)} of Taylor buffers and step tables, expected at most "
                f"{size(self.limits.slot_bytes)} for one slot; ask for a smaller size or fewer steps"
            )

    # Workers -------------------------------------------------------------------------------------------------------

    def _work(self, calls: SharedCalls) -> None:
        while (turn := self._next(calls)) is not None:
            if turn.kind == "drop":
                self._drop(turn.jobs[0])
                continue
            if turn.kind == "start":
                moved = [job for job in turn.jobs if self._tried(self._start, job)]
            else:
                moved = self._step(turn.jobs, calls)
            ended = [job for job in moved if job.work.loop.step == len(job.work.loop.plan)]
            going_on = [job for job in moved if job not in ended]
            going_on = [job for job in going_on if self._tried(self._settle, job)]
            for job in going_on:
                job.key = self._key(job.work, calls)
            with self._changed:
                for job in going_on:
                    self._batcher.give_back(job)
                if ended:  # others may go on with the rest while the answers are sent
                    self._changed.notify()
            for job in ended:
                self._finish(job)

    def _next(self, calls: SharedCalls) -> Turn | None:
        """Wait for something to do; None at the end of the service."""
        with self._changed:
            self._turns.pop(calls, None)
            while (turn := self._batcher.take(time.monotonic())) is None:
                if self._stopping and self._batcher.idle:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            # A worker goes on with its own jobs: another is woken only if there is more to do.
            if self._batcher.pending:
                self._changed.notify()
            self._turns[calls] = time.monotonic()
            return turn

    def _drop(self, job: Job) -> None:
        outcome = "cancelled" if job.cancelled() else "late"
        done, steps = job.work.loop.step, len(job.work.loop.plan)
        self._give_up(job.work)
        self._leave(job, outcome)
        if outcome == "late":
            message = f"request is late after {done} of {steps} steps, expected to end in its time; give it more"
            job.work.caller.failed(Late(message))
        else:
            message = f"request is cancelled after {done} of {steps} steps, expected to run to its end; send it again"
            job.work.caller.failed(ServeError(message, "CANCELLED"))

    def _give_up(self, ticket: _Ticket) -> None:
        """Where ranks draw, let all of them end a request."""
        share = self.denoiser.share
        if share.group is None or not ticket.branches.slots:
            return
        try:
            leave(share.group, share.lead, ticket.loop, ticket.branches, ticket.staged)
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Draw nothing more: the ranks are no longer together."""
        if not isinstance(error, RankError):
            error = RankError(
                f"rank 0 failed within a request ({first_line(error)}), expected all ranks to go on; see what it says, "
                "and start all again"
            )
        with self._changed:
            if self.broken is not None:
                return
            self.broken = error
            waiting = self._batcher.close()
        for job in waiting:
            job.work.caller.failed(stopped(error))
        if self._end is not None:
            self._end(error)

    def _start(self, job: Job) -> None:
        loop = job.work.loop
        job.work.branches = self._seat(loop)
        loop.begin(job.work.branches)
        reused = all(slot.reused for slot in job.work.branches.slots)
        with self._changed:
            self.counts["prepared.hit" if reused else "prepared.miss"] += 1

    def _stage(self, job: Job) -> None:
        ticket = job.work
        if not ticket.staged:
            ticket.branches.stage(ticket.loop.model_input())
        ticket.staged = False

    def _settle(self, job: Job) -> None:
        """Under a guard the probe says which kind of step comes, and so with whom it may share a call."""
        if job.work.loop.forecasts.guard is not None:
            job.work.branches.stage(job.work.loop.model_input())
            job.work.staged = True

    def _run(self, job: Job) -> None:
        job.work.branches.run()

    def _accept(self, job: Job) -> None:
        loop = job.work.loop
        loop.accept(job.work.branches.finish())
        if loop.step < len(loop.plan):
            job.work.caller.advanced(loop)
        if loop.begins:  # the next section, in the same slots
            loop.begin(job.work.branches)
            job.work.ids = ids_of(self.denoiser, loop.conditioning[0], loop.request.lora)

    def _key(self, ticket: _Ticket, calls: SharedCalls) -> Hashable:
        """Requests with equal keys may share the call of their next step; several branches in a step share none."""
        first, *others = ticket.branches.slots
        return None if others else calls.key(first, ticket.ids)

    def _seat(self, loop: Loop) -> Branches:
        """Slots of its sizes: idle ones, or new ones, which take the place of idle ones of other sizes.

        Of idle ones those that are prepared for such a request, else those that have its LoRA, else those that were
        used longest ago: so slots are an LRU of what prepared them.
        """
        asked, lora = [self.denoiser.contract.arrays(own) for own in loop.conditioning], loop.request.lora
        with self._changed:
            sizes = [self.denoiser.share.sizes(own) for own in loop.branches]
            fitting = [branches for branches in self._idle if branches.sizes == sizes]
            if fitting:
                prepared = (branches for branches in fitting if branches.holds(asked, loop.model_timesteps, lora))
                adapted = (branches for branches in fitting if all(slot.has(lora) for slot in branches.slots))
                chosen = next(prepared, None) or next(adapted, fitting[0])
                self._idle.remove(chosen)
                return chosen
            del self._idle[: max(0, len(self._idle) + self._batcher.in_use - self.limits.slots)]
        opened = loop.open(self.denoiser)
        for slot in opened.slots:
            slot.reuses = True
        return opened

    def _step(self, jobs: list[Job], calls: SharedCalls) -> list[Job]:
        """One step of every job, in one engine call if it can be; returns those that did not fail."""
        began = time.perf_counter()
        jobs = [job for job in jobs if self._tried(self._stage, job)]
        if not jobs:
            return []
        kind = "forecast" if isinstance(jobs[0].work.branches.upcoming, ForecastStep) else "full"
        shared = len(jobs) > 1 and calls.run([job.work.branches.slots[0] for job in jobs])
        count = 1 if shared else len(jobs)
        if not shared:
            jobs = [job for job in jobs if self._tried(self._run, job)]
        with self._changed:
            self.counts["fallbacks.shared"] += count > 1
            self.counts[f"calls.{kind}"] += count
            self.counts[f"steps.{kind}"] += len(jobs)
            self.counts[f"seconds.{kind}"] += time.perf_counter() - began
        return [job for job in jobs if self._tried(self._accept, job)]

    def _finish(self, job: Job) -> None:
        """Free the slot and deliver the answer."""
        executed = job.work.branches.executed
        self._leave(job, "done", executed)
        job.work.caller.finished(job.work.loop, executed)

    def _tried(self, action: Callable[[Job], object], job: Job) -> bool:
        """Do something for one request. If that fails it fails alone: its slot is freed and its caller is told."""
        try:
            action(job)
        except Exception as error:
            known: TaylorSeerError | None = None
            if isinstance(error, TaylorSeerError) and job.work.loop.step == 0:
                known = error
            lead = self.denoiser.share.lead
            if isinstance(error, RankError) or (lead is not None and lead.busy):
                self._break(error)
                known = stopped(self.broken or error)
            self._leave(job, "failed")
            job.work.caller.failed(known or ServeError(f"{FAILED}: {error}", "INTERNAL"))
            return False
        return True

    def _leave(self, job: Job, outcome: str, executed: str = "") -> None:
        with self._changed:
            self._batcher.leave(job)
            if job.work.branches.slots:
                self._idle.append(job.work.branches)
            self.counts[f"requests.{outcome}"] += 1
            if outcome == "done":
                self.counts["planned.full"] += str(job.work.loop.plan).count("F")
                self.counts["executed.full"] += executed.count("F")
            self._changed.notify()
