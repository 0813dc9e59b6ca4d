"""Branches: what answers a request, one slot, or two where guidance calls the transformer twice in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Request
from taylorseer_export.runtime.schedule import ForecastStep, FullStep
from taylorseer_export.runtime.slot import Slot


class Branches:
    """Slots for requests of one size, the conditional first; used like one slot. All run the same plan; under a
    guard the first one decides for all.

    Args:
        denoiser: The loaded bundle.
        sizes: Of each slot: `branches` of a loop.
    """

    def __init__(self, denoiser: Denoiser, sizes: Sequence[dict[str, int]]) -> None:
        self.slots: list[Slot] = [denoiser.slot(one) for one in sizes]

    def begin(self, loop: Loop) -> None:
        """Start the request of a loop."""
        for slot, conditioning in zip(self.slots, loop.request.branches, strict=True):
            loop.start(slot, conditioning)

    def start(self, request: Request, forecasts: Forecasts, timesteps: Sequence[float] | np.ndarray) -> None:
        """Start a request at steps of another loop; the arguments are those of `Slot.start`."""
        for slot, conditioning in zip(self.slots, request.branches, strict=True):
            slot.start(conditioning, forecasts, timesteps)

    def step(self, latents: Any) -> np.ndarray:
        """`noise_pred` of all slots, one after the other along the batch."""
        self.stage(latents)
        self.run()
        return self.finish()

    def stage(self, latents: Any) -> None:
        """The first third of `step`, as of a slot."""
        first, *others = self.slots
        first.stage(latents)
        decided = "." if isinstance(first.upcoming, ForecastStep) else "F"  # by the plan, or by a guard for all
        for slot in others:
            slot.stage(latents, decided=decided)

    def run(self) -> None:
        """The second third of `step`: an engine call of each slot."""
        for slot in self.slots:
            slot.run()

    def finish(self) -> np.ndarray:
        """The last third of `step`: count it and return what `step` does."""
        return np.concatenate([slot.finish() for slot in self.slots])

    @property
    def upcoming(self) -> FullStep | ForecastStep:
        """The step that comes next, as of a slot."""
        return self.slots[0].upcoming

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Of each slot."""
        return [slot.sizes for slot in self.slots]

    @property
    def errors(self) -> tuple[float, ...]:
        """What the probe of the first slot measured at each step; none without a guard."""
        return self.slots[0].errors

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """As `Slot.try_weights`, in all slots."""
        return np.concatenate([slot.try_weights(latents, weights) for slot in self.slots])

    @property
    def executed(self) -> str:
        """The steps that ran."""
        first, *others = (slot.executed for slot in self.slots)
        assert all(first == other for other in others), "bug in taylorseer-export: branches ran different steps"
        return first


class Pool:
    """Branches by the size of their requests, opened when first asked for."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._opened: dict[str, Branches] = {}

    def __len__(self) -> int:
        return len(self._opened)

    def of(self, request: Request) -> Branches:
        """Branches that fit a request; whoever holds them starts them anew."""
        sizes = Loop(self._denoiser, request, Forecasts(Plan("F"), 0)).branches
        key = str([sorted(one.items()) for one in sizes])
        if key not in self._opened:
            self._opened[key] = Branches(self._denoiser, sizes)
        return self._opened[key]


def latents_of(loop: Loop, branches: Branches, on_step: Callable[[], object]) -> np.ndarray:
    """Run a loop to its end: the final latents."""
    branches.begin(loop)
    for _ in range(len(loop.plan)):
        loop.accept(branches.step(loop.model_input()))
        on_step()
    return loop.latents
