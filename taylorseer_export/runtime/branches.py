"""Branches: what answers a request, one slot, or several where guidance calls the transformer several times a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taylorseer_export.method import Forecasts
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.schedule import ForecastStep, FullStep
from taylorseer_export.runtime.slot import Slot


class Branches:
    """Slots for requests of one size, the conditional first. All run the same plan; under a guard the first decides.

    Args:
        slots: One for each call of the transformer in a step.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self._executed = ""  # of the loops of the request that are done
        self._errors: tuple[float, ...] = ()

    def start(
        self,
        conditioning: Sequence[Mapping[str, Any]],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """Begin a request, with constant inputs for each slot; the other arguments are those of `Slot.start`."""
        self._executed, self._errors = "", ()
        for slot, own in zip(self.slots, conditioning, strict=True):
            slot.start(own, forecasts, timesteps, lora)

    def go_on(
        self,
        conditioning: Sequence[Mapping[str, Any]],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """Begin the next loop of the request under way, as `start` does; what ran so far stays counted."""
        executed, errors = self.executed, self.errors
        self.start(conditioning, forecasts, timesteps, lora)
        self._executed, self._errors = executed, errors

    def holds(
        self, arrays: Sequence[Mapping[str, np.ndarray]], timesteps: np.ndarray, lora: Adapter | None = None
    ) -> bool:
        """Whether all slots are prepared for just this, as `Slot.holds` says."""
        return all(slot.holds(own, timesteps, lora) for slot, own in zip(self.slots, arrays, strict=True))

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
        return self._errors + self.slots[0].errors

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """As `Slot.try_weights`, in all slots."""
        return np.concatenate([slot.try_weights(latents, weights) for slot in self.slots])

    @property
    def executed(self) -> str:
        """The steps that ran, of all loops of the request."""
        first, *others = (slot.executed for slot in self.slots)
        assert all(first == other for other in others), "bug in taylorseer-export: branches ran different steps"
        return self._executed + first
