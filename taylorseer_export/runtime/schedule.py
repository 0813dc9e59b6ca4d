"""The schedule: what every step does, decided before the first one.

Plan, order and layout fix for each step which graph runs, which entry of the Taylor buffers it writes, and with which
numbers: the weights of a forecast step, the scales of a full step. Nothing is decided inside a graph or during a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taylorseer_export.method import (
    Capacity,
    Forecasts,
    Plan,
    derivative_weights,
    forecast_weights,
    from_snapshots,
    gain,
    update_scales,
)


@dataclass(frozen=True)
class FullStep:
    """Runs the full graph. `entry`: where its snapshot goes; `scales`: `[order]`, 1/steps, for `derivatives`."""

    entry: int
    scales: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """What the graph is given."""
        return self.scales


@dataclass(frozen=True)
class ForecastStep:
    """Runs the forecast graph. `weights`: `[order + 1]`, by entry of the Taylor buffers; `entry`: the last written."""

    entry: int
    weights: np.ndarray
    gain: float

    @property
    def numbers(self) -> np.ndarray:
        """What the graph is given."""
        return self.weights


def schedule(forecasts: Forecasts, capacity: Capacity) -> tuple[FullStep | ForecastStep, ...]:
    """What each step of a plan does; a guard is not asked.

    With `snapshots`, the k-th full step writes entry `k mod (capacity + 1)` of the ring, and a forecast step gives
    each entry the weight of the full step whose snapshot it holds. With `derivatives`, full steps alternate between
    two sets of buffers, entry 0 and 1, because a graph must not write what it reads.

    Args:
        forecasts: Of the request.
        capacity: Of the bundle's buffers.

    Raises:
        ConfigError: The buffers cannot express the forecasts.
    """
    capacity.check(forecasts)
    kinds = (full_step if forecasts.plan.is_full(step) else forecast_step for step in range(len(forecasts)))
    return tuple(kind(forecasts, step, capacity) for step, kind in enumerate(kinds))


def full_step(forecasts: Forecasts, step: int, capacity: Capacity) -> FullStep:
    """What the full step `step` does; the plan need not go beyond it."""
    scales = np.zeros(capacity.order, np.float32)
    order = forecasts.order
    scales[:order] = update_scales(forecasts.plan.history(step, order), step, order)
    return FullStep(_entry(forecasts.plan, step, capacity), scales)


def forecast_step(
    forecasts: Forecasts, step: int, capacity: Capacity, weights: Sequence[float] | np.ndarray | None = None
) -> ForecastStep:
    """What the forecast step `step` does; the plan need not go beyond it.

    Args:
        forecasts, capacity: As of `schedule`.
        step: A forecast step of the plan.
        weights: Of its history, oldest first, to be tried in the place of its own.
    """
    order, past = forecasts.order, forecasts.plan.history(step, forecasts.order)
    if weights is None and forecasts.weights is not None:
        weights = forecasts.weights[step]
    exact = forecast_weights(past, step, order, forecasts.form) if weights is None else tuple(map(float, weights))
    entries = np.zeros(capacity.order + 1, np.float32)
    if capacity.layout == "snapshots":
        for source, weight in zip(past, exact, strict=True):
            entries[_entry(forecasts.plan, source, capacity)] = weight
    elif weights is None:
        entries[: order + 1] = derivative_weights(len(past), step - past[-1], order)
    else:
        entries[: len(past)] = from_snapshots(exact, past)
    return ForecastStep(_entry(forecasts.plan, past[-1], capacity), entries, gain(exact))


def _entry(plan: Plan, full: int, capacity: Capacity) -> int:
    """Where the snapshot of a full step goes: full steps take the entries in turn."""
    before = str(plan)[:full].count("F")
    return before % (capacity.order + 1 if capacity.layout == "snapshots" else 2)
