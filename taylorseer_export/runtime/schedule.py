"""The schedule: what every step does, decided before the first one.

Plan, order and layout fix for each step which graph runs, which entry of the Taylor buffers it writes, and with which
numbers: the weights of a forecast step, the scales of a full step. Nothing is decided inside a graph or during a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Plan, derivative_weights, forecast_weights, gain, update_scales
from taylorseer_export.method.weights import Form


@dataclass(frozen=True)
class FullStep:
    """Runs the full graph. `entry`: where its snapshot goes; `scales`: `[order]`, 1/steps, for `derivatives`."""

    entry: int
    scales: np.ndarray


@dataclass(frozen=True)
class ForecastStep:
    """Runs the forecast graph. `weights`: `[order + 1]`, by entry of the Taylor buffers; `entry`: the last written."""

    entry: int
    weights: np.ndarray
    gain: float


def schedule(
    plan: Plan,
    order: int,
    capacity: int,
    layout: Literal["snapshots", "derivatives"],
    form: Form = "taylor",
) -> tuple[FullStep | ForecastStep, ...]:
    """What each step of `plan` does.

    With `snapshots`, the k-th full step writes entry `k mod (capacity + 1)` of the ring, and a forecast step gives
    each entry the weight of the full step whose snapshot it holds. With `derivatives`, full steps alternate between
    two sets of buffers, entry 0 and 1, because a graph must not write what it reads.

    Args:
        plan: The steps.
        order: Order of the forecasts, at most `capacity`.
        capacity: Order that the bundle's buffers were made for.
        layout: Of the Taylor buffers.
        form: `taylor`, or `newton` (which derivatives cannot express).

    Raises:
        ConfigError: `order` is above `capacity`, or `form` does not fit the layout.
    """
    if order > capacity:
        raise ConfigError(
            f"order is {order}, expected at most {capacity}, which the bundle's buffers hold; "
            f"export again with --order {order}"
        )
    if form != "taylor" and layout == "derivatives":
        raise ConfigError(
            f"form is `{form}`, expected `taylor` with layout derivatives; export again with --layout snapshots"
        )
    ring = capacity + 1 if layout == "snapshots" else 2
    entries = {full: k % ring for k, full in enumerate(plan.full_steps)}
    steps: list[FullStep | ForecastStep] = []
    for step in range(len(plan)):
        if plan.is_full(step):
            scales = np.zeros(capacity, np.float32)
            scales[:order] = update_scales(plan.history(step, order), step, order)
            steps.append(FullStep(entries[step], scales))
            continue
        past = plan.history(step, order)
        exact = forecast_weights(past, step, order, form)
        weights = np.zeros(capacity + 1, np.float32)
        if layout == "snapshots":
            for source, weight in zip(past, exact, strict=True):
                weights[entries[source]] = weight
        else:
            weights[: order + 1] = derivative_weights(len(past), step - past[-1], order)
        steps.append(ForecastStep(entries[past[-1]], weights, gain(exact)))
    return tuple(steps)
