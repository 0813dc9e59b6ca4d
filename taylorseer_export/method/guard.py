"""Guards: rules that may turn a planned forecast step into a full one, by an error measured in that step.

A probe computes a cheap quantity q of every step exactly and compares it with what was expected of it:

    cg          q: output of the first block        expected: its Taylor forecast from the last full steps
    fbcache     q: what the first block adds        expected: as at the last full step
    teacache    q: modulated input of the first     expected: as at the step before; errors add up until
                   attention                                  the next full step

    error = mean |expected - q| / mean |q|   (cg),        mean |expected - q| / mean |expected|   (the others)

A guard only ever adds full steps: it never forecasts where the plan has a full one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from taylorseer_export.errors import ConfigError
from taylorseer_export.method.weights import check_order

Rule = Literal["cg", "fbcache", "teacache"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Guard:
    """A rule with its numbers.

        forecast  iff  error < threshold  and  forecasts since the last full step < cap

    where with `accumulate` the error is the sum of those measured since the last full step, this step's included.

    Args:
        rule: `cg`, `fbcache` or `teacache`.
        threshold: Dimensionless, above 0.
        order: Order of the expected q, for `cg` alone; that of the forecasts if left out.
        cap: Most forecast steps in a row; any number if left out. Unit: steps.
        accumulate: Whether errors add up. `teacache` always does so.

    Raises:
        ConfigError: A number is out of range, or `order` is given for a rule without one.

    Source:
        `cg`: arXiv:2508.02240; `teacache`: arXiv:2411.19108, without its fitted polynomial, which a threshold fitted
        to the model replaces; `fbcache`: the first-block cache of ParaAttention. Cap and accumulation are ours for `cg`
        and `fbcache`, which can forecast for ever in silence without them.
    """

    rule: Rule
    threshold: float
    order: int | None = None
    cap: int | None = None
    accumulate: bool = False

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not isinstance(self.threshold, Real) or not 0 < self.threshold < math.inf:
            raise ConfigError(
                f"threshold is {self.threshold}, expected a number above 0 (dimensionless); begin with 0.1, or let "
                "`taylorseer-export calibrate` find it"
            )
        if self.cap is not None and (not isinstance(self.cap, Integral) or self.cap < 1):
            raise ConfigError(f"cap is {self.cap}, expected at least 1 (forecast steps in a row); pass a whole number")
        if self.order is not None:
            if self.rule != "cg":
                raise ConfigError(f"order is given for guard `{self.rule}`, expected it for `cg` alone; leave it out")
            check_order(self.order)

    @property
    def every_step(self) -> bool:
        """Whether q is compared with that of the step before, and not with those of the last full steps."""
        return self.rule == "teacache"

    def forecasts(self, errors: Sequence[float]) -> bool:
        """Whether a planned forecast step stays one.

        Args:
            errors: Of every step since the last full one, this step's last. NaN is over any threshold.
        """
        error = sum(errors) if self.accumulate or self.rule == "teacache" else errors[-1]
        return error < self.threshold and (self.cap is None or len(errors) <= self.cap)

    def __str__(self) -> str:
        parts = [f"{self.rule} at {self.threshold:g}"]
        parts += [f"order {self.order}"] * (self.order is not None) + [f"cap {self.cap}"] * (self.cap is not None)
        parts += ["accumulated"] * (self.accumulate and self.rule != "teacache")
        return ", ".join(parts)


def check_rule(name: str) -> Rule:
    """The rule of that name; one that is not known is refused with a `ConfigError`."""
    for rule in RULES:
        if name == rule:
            return rule
    known = ", ".join(f"`{rule}`" for rule in RULES)
    raise ConfigError(f"guard is `{name[:64]}`, expected one of {known}; choose one of those")
