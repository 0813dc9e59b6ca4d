"""The probe of one slot: what it keeps between steps, its bound call, and what the guard makes of its errors.

Every step of a guarded request begins with the probe. It leaves the values that the rest of a full step goes on from,
and one error; the guard decides by that error, and nothing else comes back from the device.

Shapes: B batch, P snapshots kept: order + 1 for `cg`, 1 for the other rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Role, Tensor
from taylorseer_export.method import Capacity, Forecasts, Guard, Plan, Rule
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.runner import Buffer, Runner
from taylorseer_export.runtime.schedule import forecast_step, full_step


class Deciding(Protocol):
    """What ranks that decide alike sum an error over."""

    def summed(self, values: np.ndarray) -> np.ndarray:
        """As `Group.summed`."""

    def together(self, step: int | None = None) -> AbstractContextManager[None]:
        """As `Group.together`."""


class Probe:
    """Measures the error of every step of a slot and decides by its guard.

    Args:
        manifest: Of a bundle with a probe graph.
        runner: The loaded engines.
        buffers: Name -> buffer of every tensor that the probe shares with the slot.
        new: Allocates a buffer for a tensor of the contract.
        group: The ranks that share the rows out: all of them decide by the error of all rows.

    Attributes:
        group: What its error is summed over, if anything.
        errors: Of every step of the request so far, dimensionless; NaN where nothing was compared.
    """

    def __init__(
        self,
        manifest: Manifest,
        runner: Runner,
        buffers: Mapping[str, Buffer],
        new: Callable[[Tensor], Buffer],
        group: Group | None = None,
    ) -> None:
        self.group: Deciding | None = group
        graph = manifest.graphs["probe"]
        rings = {t.name: new(t) for t in graph.inputs if t.role == "probe_in"}
        inputs = {t.name: rings.get(t.name) or buffers[t.name] for t in graph.inputs}
        outputs = {t.name: buffers[t.name] for t in graph.outputs}
        self._call = runner.bind("probe", inputs, outputs)

        def by_rule(role: Role, tensors: tuple[Tensor, ...], bound: Mapping[str, Buffer]) -> dict[Rule, Buffer]:
            return {t.rule: bound[t.name] for t in tensors if t.role == role and t.rule is not None}

        self._rings = by_rule("probe_in", graph.inputs, inputs)
        self._weights = by_rule("weights", graph.inputs, inputs)
        self._snapshots = by_rule("probe_out", graph.outputs, outputs)
        self._measured = by_rule("error", graph.outputs, outputs)
        self._guard: Guard | None = None
        self._order = 0
        self._since_full: list[float] = []
        self.errors: list[float] = []

    def start(self, forecasts: Forecasts) -> None:
        """Begin a request with a guard."""
        for buffer in (*self._rings.values(), *self._weights.values()):
            buffer.clear()
        guard = forecasts.guard
        assert guard is not None
        self._guard, self._since_full, self.errors = guard, [], []
        asked = forecasts.order if guard.order is None else guard.order
        self._order = min(asked, self._ring.shape[0] - 1)

    def measure(self, executed: str) -> None:
        """Run the probe for the step behind `executed`; its inputs are in place."""
        guard = self._guard
        assert guard is not None
        if executed:
            # What was kept of the last full steps, or of the step before, in the place of a full one.
            past = "F" if guard.every_step else executed
            expected = forecast_step(Forecasts(Plan(past + "."), self._order), len(past), self._capacity)
            self._weights[guard.rule].write(expected.weights)
        with nullcontext() if self.group is None else self.group.together(len(executed)):
            self._call()

    def forecasts(self) -> bool:
        """Whether the measured step, planned as a forecast step, stays one: the one value that the host waits for."""
        assert self._guard is not None
        sums = self._measured[self._guard.rule].read().astype(np.float64).sum(0)
        if self.group is not None:
            with self.group.together(len(self.errors)):
                sums = self.group.summed(sums)  # of means over equally many rows
        difference, against = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            self.errors.append(float(difference / against))
        self._since_full.append(self.errors[-1])
        return self._guard.forecasts(self._since_full)

    def keep(self, executed: str, compared: bool) -> None:
        """After a step: keep its snapshot where the rule says so, on the device.

        Args:
            executed: All steps that ran, this one included.
            compared: Whether `forecasts` was asked about it.
        """
        guard, full = self._guard, executed[-1] == "F"
        assert guard is not None
        if not compared:
            self.errors.append(math.nan)
        if full:
            self._since_full = []
        if full or guard.every_step:
            past = "F" if guard.every_step else executed
            entry = full_step(Forecasts(Plan(past), 0), len(past) - 1, self._capacity).entry
            self._ring.entry(entry).copy(self._snapshots[guard.rule])

    @property
    def _capacity(self) -> Capacity:
        """Of what the request's rule keeps."""
        return Capacity(self._ring.shape[0] - 1)

    @property
    def _ring(self) -> Buffer:
        """What the request's rule keeps, `[P, ...]`."""
        assert self._guard is not None
        return self._rings[self._guard.rule]


def warning_of(guard: Guard, planned: str, executed: str, errors: Sequence[float]) -> str | None:
    """A warning where a guard decided nothing: it always forecast, or never did.

    Args:
        guard: As it was.
        planned, executed: Steps of the request.
        errors: Of its steps, NaN where nothing was compared.
    """
    asked = [k for k, kind in enumerate(planned) if kind == "."]
    seen = [errors[k] for k in asked if math.isfinite(errors[k])]
    full = sum(executed[k] == "F" for k in asked)
    if not asked or not seen or 0 < full < len(asked):
        return None
    what, remedy = ("never", "raise") if full else ("always", "lower")
    return (
        f"guard {guard} {what} forecast, expected some of {len(asked)} steps; its errors were {min(seen):.3g} to "
        f"{max(seen):.3g}: {remedy} the threshold"
    )
