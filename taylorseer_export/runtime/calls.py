"""Requests, steps and branches, told apart by the calls that a pipeline makes of its transformer.

A pipeline calls once for every step and branch, and says neither where a loop begins nor how long it is:

- A *request* is a loop over the same conditioning tensors. It ends when the pipeline says that its call is over (all
  of diffusers' do), when an error passes through, and before a call that cannot belong to it: conditioning that is
  other tensors or was changed in place (other numbers, where the pipeline casts it at every call), latents of another
  shape, a step index that goes back (diffusers' `cache_context(name, step_index=...)`), and where no index is said, a
  timestep that returns to the first one or moves against the direction of the loop. Where a length was planned, a loop
  that ends before it is warned of.
- A *step* is a call on new latents, whatever its timestep, so a second-order scheduler's inner calls are steps too, and
  so are the first steps of a loop whose timesteps round to the same number. Nothing tells these from a loop that was
  left after such steps and begun again from other noise with the same conditioning; `reset` or `request` does.
- A *branch* of guidance is named by `cache_context`; without one, the calls on the very same latents are told apart by
  their order. Every branch has its own slot and all follow one plan; one that missed a step starts over, full.

Callers do not see each other's loops: `callers.py` keeps them apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from taylorseer_export.errors import StepError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.slot import Slot


class Seen(NamedTuple):
    """A value and its version when it was seen: the same tensor changed in place is another one.

    One that is `renewed` is made anew by the pipeline for every call, so that only its numbers tell it from others. So
    are lists, which offloading makes anew; one of tensors is its tensors, with a version of each.
    """

    value: Any
    version: Any
    renewed: bool = False

    @classmethod
    def of(cls, value: Any, renewed: bool = False) -> Seen:
        """The value now; inference tensors count no versions."""
        if _holds_tensors(value):
            return cls(value, tuple(cls.of(one).version for one in value), renewed)
        asked = getattr(value, "is_inference", None)
        return cls(value, 0 if asked is None or asked() else value._version, renewed)

    def same(self, other: Seen) -> bool:
        if _holds_tensors(self.value) and _holds_tensors(other.value):
            return self._each(other, Seen.same)
        if self.value is not other.value and (self.renewed or not hasattr(self.value, "detach")):
            return self.equal(other)
        return self.value is other.value and bool(self.version == other.version)

    def _each(self, other: Seen, alike: Callable[[Seen, Seen], bool]) -> bool:
        """Whether lists of tensors are as long, and alike one by one."""
        ours, theirs = (
            [Seen(value, version, self.renewed) for value, version in zip(seen.value, seen.version, strict=True)]
            for seen in (self, other)
        )
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))

    def equal(self, other: Seen) -> bool:
        """Whether the values are the same, where the tensors need not be; changed in place counts as changed."""
        if self.value is other.value:
            return bool(self.version == other.version)
        if _holds_tensors(self.value) and _holds_tensors(other.value):
            return self._each(other, Seen.equal)
        if hasattr(self.value, "is_cuda") and hasattr(other.value, "is_cuda"):  # on the device that they are on
            alike = self.value.dtype == other.value.dtype and self.value.device == other.value.device
            return alike and bool(self.value.equal(other.value))
        return np.array_equal(host_array(self.value), host_array(other.value))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(hasattr(one, "detach") for one in value)


class Context(NamedTuple):
    """What `cache_context` says: the name of the branch, and at which step the pipeline's loop is, if it says so."""

    name: str
    step_index: int | None = None


class TransformerCall(NamedTuple):
    """One call of the transformer: its context, latents and their shape, timestep and conditioning, and the timestep of
    the next step, where the model is told it."""

    context: Context | None
    latents: Seen
    shape: tuple[int, ...]
    timestep: float
    conditioning: dict[str, Seen]
    next_timestep: float | None = None


@dataclass
class Branch:
    """A branch of guidance: begun at step `begun`, the `next` step it runs, and what ran `before` that.

    The pipeline's latents have the `latent` of the bundle, of that shape, in front.
    """

    conditioning: dict[str, Seen]
    latent: tuple[int, ...]
    begun: int
    next: int
    before: str = ""

    def same(self, conditioning: Mapping[str, Seen]) -> bool:
        ours = self.conditioning
        return ours.keys() == conditioning.keys() and all(ours[n].same(seen) for n, seen in conditioning.items())

    def equal(self, conditioning: Mapping[str, Seen]) -> bool:
        ours = self.conditioning
        return ours.keys() == conditioning.keys() and all(ours[n].equal(seen) for n, seen in conditioning.items())


@dataclass(eq=False)
class LoopState:
    """A request and where it is.

    Attributes:
        forecasts: Its plan, which is lengthened as the loop goes on where it is not `fixed`, and how it is forecast.
        declared: Begun by the user, so that no call is taken for the first of another request.
        renewed: Opened only because the conditioning was new tensors, of equal values.
        timesteps: Of all steps, where they are known ahead.
        over: No further call belongs to it.
        step: The step under way, -1 before the first.
        ran: Branches that ran in it.
        decided: Under a guard, which kind of step it is, once its first branch ran.
        slots, shape: Branch -> its slot, and the shape of the latents that they are for.
        executed: Branch -> the steps that ran, `F` full and `.` forecast.
        earlier: Latents before the last ones, while timesteps have moved once at most and so say little.
        first, last, direction: Timesteps seen, and the sign of their movement, 0 while it is not known.
        said: Index of the step in the pipeline's loop, if it says so.
    """

    forecasts: Forecasts
    fixed: bool
    declared: bool = False
    renewed: bool = False
    timesteps: np.ndarray | None = None
    over: bool = False
    step: int = -1
    ran: set[str] = field(default_factory=set)
    decided: str | None = None
    branches: dict[str, Branch] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    executed: dict[str, str] = field(default_factory=dict)
    latents: Seen | None = None
    earlier: list[Seen] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    direction: float = 0.0
    said: int | None = None

    def branch_of(self, call: TransformerCall) -> tuple[str, bool]:
        """(branch of a call, whether it begins a step)."""
        same = self.latents is not None and self.latents.same(call.latents) and call.timestep == self.last
        if call.context is None:
            return str(len(self.ran) if same else 0), not same
        name, said = call.context
        return name, self.step < 0 or call.timestep != self.last or said != self.said or name in self.ran

    def continues(self, call: TransformerCall, name: str, begins: bool) -> bool:
        """Whether a call, of which `branch_of` says this, belongs to this request.

        Raises:
            StepError: The conditioning changed in a declared request, or is new at every call of one that is not.
        """
        if self.over or not (self.declared or self._fits(call, begins)):
            return False
        branch = self.branches.get(name)
        if branch is None or branch.same(call.conditioning):
            return True
        equal = branch.equal(call.conditioning)
        if self.declared:
            if not equal:
                raise StepError(
                    f"conditioning changed at step {self.step} of a request that was begun, expected the same "
                    "throughout; begin another request"
                )
            branch.conditioning = call.conditioning
            return True
        if equal and self.renewed and self.step == 0:
            raise StepError(
                "conditioning is new tensors of equal values at every call, expected the same tensors throughout a "
                "loop; run the loop inside `with transformer.request():`"
            )
        return False

    def renews(self, call: TransformerCall) -> bool:
        """Whether nothing but the identity of its conditioning tells a call from one of this request."""
        name, begins = self.branch_of(call)
        if self.over or not self._fits(call, begins):
            return False
        branch = self.branches.get(name)
        return branch is not None and branch.equal(call.conditioning)

    def resumes(self, call: TransformerCall) -> bool:
        """Whether a call may be a later step of this loop, had it not been left: the same tensors, time gone on."""
        if self.over or self.step < 0 or call.timestep == self.first:
            return False
        return self._fits(call, self.branch_of(call)[1]) and self.alike(call)

    def alike(self, call: TransformerCall) -> bool:
        """Whether a call has the very conditioning of this request, so that only inference tells them apart."""
        branch = self.branches.get(self.branch_of(call)[0])
        return branch is not None and branch.same(call.conditioning)

    def advance(self, call: TransformerCall) -> None:
        """Go on to the step that a call begins."""
        moved = self.step >= 0 and call.timestep != self.last
        if self.step < 0:
            self.first = call.timestep
        elif moved and self.direction:
            self.earlier = []
        elif self.latents is not None and (self.earlier or not moved):
            self.earlier.append(self.latents)
        if moved:
            self.direction = 1.0 if call.timestep > self.last else -1.0
        self.step += 1
        self.last = call.timestep
        self.said = call.context.step_index if call.context is not None else None
        self.ran, self.decided = set(), None

    def warn_if_short(self) -> None:
        """Warn where fewer steps ran than were planned.

        Warns:
            UserWarning: Of a loop of known length.
        """
        if self.fixed and not self.over and 0 <= self.step < len(self.plan) - 1:
            warnings.warn(
                f"the loop ended after {self.step + 1} steps, expected {len(self.plan)} (plan {self.plan}); it was "
                "interrupted, or a call was taken for the first of another loop: give a plan as long as the loop, or "
                "run it inside `with transformer.request():`",
                stacklevel=3,
            )

    @property
    def plan(self) -> Plan:
        """Which steps are full, as planned."""
        return self.forecasts.plan

    def forecasts_from(self, step: int) -> Forecasts:
        """The rest of the forecasts for a branch that starts at `step`: the first is full, whatever was planned."""
        return replace(self.forecasts, plan=Plan("F" + str(self.plan)[step + 1 :]))

    def _fits(self, call: TransformerCall, begins: bool) -> bool:
        """Whether latents and timestep of a call, which `begins` a step or not, may be those of this loop."""
        if self.latents is None or call.shape != self.latents.value.shape:
            return False
        if not begins:
            return True
        said = call.context.step_index if call.context is not None else None
        if said is not None and self.said is not None:
            return said >= max(self.said, 1)
        move = (call.timestep > self.last) - (call.timestep < self.last)
        if call.timestep == self.first:  # timesteps that have not moved may be rounded; equal latents are a loop anew
            done = self.fixed and self.step + 1 >= len(self.plan)
            return self.direction == 0 and not done and not self.latents.equal(call.latents)
        return bool(move == 0 or self.direction in (0, move))


def host_array(value: Any) -> np.ndarray:
    """The values on the host; bfloat16, which numpy lacks, as float32."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)
