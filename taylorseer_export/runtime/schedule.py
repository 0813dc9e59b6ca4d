"""The schedule: what every step does, decided before the first one.

Plan, order and layout fix for each step which graph runs, which entry of the Taylor buffers it writes, and with which
numbers: the weights of a forecast step, the scales of a full step. Nothing is decided inside a graph or during a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Plan, derivative_weights, forecast_weights, from_snapshots, gain, update_scales
from taylorseer_export.method.weights import Form

Layout: TypeAlias = Literal["snapshots", "derivatives"]


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
    layout: Layout,
    form: Form = "taylor",
    weights: Sequence[Sequence[float]] | None = None,
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
        weights: Per step the weights of `plan.history(step, order)`, oldest first, in the place of the form's; what
            is given for a full step is not read.

    Raises:
        ConfigError: `order` is above `capacity`, `form` does not fit the layout, or `weights` the plan.
    """
    check_request(order, capacity, layout, form)
    if weights is not None:
        plan.check_length(len(weights))
    return tuple(
        full_step(plan, step, order, capacity, layout)
        if plan.is_full(step)
        else forecast_step(plan, step, order, capacity, layout, form, None if weights is None else weights[step])
        for step in range(len(plan))
    )


def check_request(order: int, capacity: int, layout: Layout, form: Form) -> None:
    """Refuse an order above the capacity, or a form that the layout cannot express, with a `ConfigError`."""
    if order > capacity:
        raise ConfigError(
            f"order is {order}, expected at most {capacity}, which the bundle's buffers hold; "
            f"export again with --order {order}"
        )
    if form != "taylor" and layout == "derivatives":
        raise ConfigError(
            f"form is `{form}`, expected `taylor` with layout derivatives; export again with --layout snapshots"
        )


def full_step(plan: Plan, step: int, order: int, capacity: int, layout: Layout) -> FullStep:
    """What the full step `step` does; arguments as of `schedule`, and `plan` need not go beyond the step."""
    scales = np.zeros(capacity, np.float32)
    scales[:order] = update_scales(plan.history(step, order), step, order)
    return FullStep(_entry(plan, step, capacity, layout), scales)


def forecast_step(
    plan: Plan,
    step: int,
    order: int,
    capacity: int,
    layout: Layout,
    form: Form = "taylor",
    weights: Sequence[float] | np.ndarray | None = None,
) -> ForecastStep:
    """What the forecast step `step` does; arguments as of `schedule`, and `plan` need not go beyond the step."""
    past = plan.history(step, order)
    exact = forecast_weights(past, step, order, form) if weights is None else tuple(weights)
    if len(exact) != len(past):
        raise ConfigError(
            f"step {step} has {len(exact)} weights, expected {len(past)}, one for each snapshot of its history; "
            "give weights made for this plan and order"
        )
    entries = np.zeros(capacity + 1, np.float32)
    if layout == "snapshots":
        for source, weight in zip(past, exact, strict=True):
            entries[_entry(plan, source, capacity, layout)] = weight
    elif weights is None:
        entries[: order + 1] = derivative_weights(len(past), step - past[-1], order)
    else:
        entries[: len(past)] = from_snapshots(exact, past)
    return ForecastStep(_entry(plan, past[-1], capacity, layout), entries, gain(exact))


def _entry(plan: Plan, full: int, capacity: int, layout: Layout) -> int:
    """Where the snapshot of a full step goes: full steps take the entries in turn."""
    before = str(plan)[:full].count("F")
    return before % (capacity + 1 if layout == "snapshots" else 2)
