"""Thresholds: the error at which a guard runs as many full steps as a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Guard, Rule
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Pool, Request, denoise

_LEAST = 1e-30  # a threshold that no error is under
_HALVINGS = 8  # of the ratio between the highest and the lowest threshold that could be meant


def fit_threshold(
    denoiser: Denoiser,
    pool: Pool,
    requests: Sequence[Request],
    base: Forecasts,
    rule: Rule,
    full_steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> float:
    """The lowest threshold found at which loops of a guard have at most `full_steps` full steps on the average.

    The count falls as the threshold rises, so it is found by bisection of its logarithm, between the least error that
    an all-full loop shows and the sum of all of them.

    Args:
        denoiser: A bundle with a probe for `rule`.
        pool: Slots for the loops.
        requests: Groups of samples; all of one size.
        base: What the guard starts from, its plan as `Plan.guarded` gives it.
        rule: Of the guard.
        full_steps: Budget of one loop, steps.
        on_step: Called after every step of every loop.

    Raises:
        ConfigError: The budget is below the full steps of the plan, or leaves nothing to forecast.
    """
    plan, least = base.plan, len(base.plan.full_steps)
    if not least <= full_steps < len(plan):
        raise ConfigError(
            f"full steps are {full_steps}, expected {least} to {len(plan) - 1} under a guard that starts from {plan}; "
            "change their number, or the warm-up"
        )

    def run(threshold: float) -> tuple[float, list[float]]:
        counts, errors = [], []
        for request in requests:
            loop = Loop(denoiser, request, replace(base, guard=Guard(rule, threshold)))
            branches = pool.of(request)
            loop.begin(branches)
            for _ in denoise(loop, branches):
                on_step()
            counts.append(branches.executed.count("F"))
            errors += [error for error in branches.errors if math.isfinite(error)]
        return float(np.mean(counts)), errors

    _, errors = run(_LEAST)
    low, high = max(min(errors), _LEAST), 2 * sum(errors) / len(requests)
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        count, _ = run(middle)
        low, high = (low, middle) if count <= full_steps else (middle, high)
    return high
