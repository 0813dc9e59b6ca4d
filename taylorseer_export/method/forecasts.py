"""A request's forecasts as one value, and the one place where the options of a request become that value.

    Forecasts = plan, order, form, weights, guard

Every door (command line, drop-in, server, evaluation) collects `RequestOptions` and judges none of them:
`forecasts_from_options` holds all rules of precedence. In short, with `>` for "comes before":

    plan        plan > profile's > regular plan of (steps, interval, warmup, dialect);  under a guard, unless a plan is
                given: a warm-up, forecasts, and a full step at the end, as long as steps or the profile say
    order       order > profile's > the bundle's
    weights     a profile's without a guard, else the form's
    threshold   threshold > profile's

What is not read is refused, never ignored.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from numbers import Real
from typing import Literal, Protocol, get_args

from taylorseer_export.errors import ConfigError
from taylorseer_export.method.guard import Guard, Rule, check_rule
from taylorseer_export.method.plan import Dialect, Plan
from taylorseer_export.method.weights import Form, check_form, check_order, gain

Granularity = Literal["module", "residual", "last"]
Layout = Literal["snapshots", "derivatives"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Weights = tuple[tuple[float, ...], ...]

_SHOWN = 64  # characters of a name that a message repeats
_FLOAT32 = 2.0**-24  # unit roundoff of the engines' weights
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32
_HALF = 0.5  # a sum known no better than this cannot be told from 0 or 2


@dataclass(frozen=True)
class Forecasts:
    """What the forecasts of one request are.

    Args:
        plan: Which steps are full.
        order: Order of the forecasts, 0 to 4, dimensionless.
        form: `taylor` or `newton`.
        weights: Per step those of `plan.history(step, order)`, oldest first, none on a full step; in the place of the
            form's.
        guard: What may turn forecast steps of the plan into full ones.

    Raises:
        ConfigError: They contradict each other, or weights do not sum to 1.
    """

    plan: Plan
    order: int
    form: Form = "taylor"
    weights: Weights | None = None
    guard: Guard | None = None

    def __post_init__(self) -> None:
        check_order(self.order)
        check_form(self.form)
        if self.weights is None:
            return
        if self.guard is not None:
            raise ConfigError(
                f"weights are given beside guard {self.guard}, expected none, since they belong to one plan; leave one "
                "out"
            )
        object.__setattr__(self, "weights", tuple(tuple(map(float, step)) for step in self.weights))
        check_weights(self.plan, self.order, self.weights)

    def __len__(self) -> int:
        return len(self.plan)


def check_weights(plan: Plan, order: int, weights: Sequence[Sequence[float]]) -> None:
    """Refuse weights that are not those of the histories of a plan, or that do not sum to 1 on a forecast step.

    A sum is 1 as far as the engines can tell, which read every weight rounded to float32:

        |Σᵢ w[i] - 1|  ≤  min(2⁻²⁴ Σᵢ |w[i]|, 1/2),    every w[i] finite in float32

    Args:
        plan: Which steps are full.
        order: Of the forecasts, 0 to 4.
        weights: Per step, oldest first; what is given for a full step is not read.

    Raises:
        ConfigError: Names the step, and says what was seen.
    """
    plan.check_length(len(weights))
    for step, given in enumerate(weights):
        if plan.is_full(step):
            continue
        count = len(plan.history(step, order))
        if len(given) != count:
            raise ConfigError(
                f"step {step} has {len(given)} weights, expected {count}, one for each snapshot of its history; "
                "give weights made for this plan and order"
            )
        total = fsum(given) if all(abs(weight) <= _LARGEST for weight in given) else math.nan
        if math.isnan(total) or abs(total - 1) > min(_FLOAT32 * gain(given), _HALF):
            raise ConfigError(
                f"weights of step {step} sum to {total:.9g}, expected 1 (dimensionless); calibrate again, or divide "
                "them by their sum"
            )


@dataclass(frozen=True)
class Capacity:
    """What the buffers of a bundle can hold and its probe can measure.

    Attributes:
        order: Highest order of a forecast.
        layout: Of the Taylor buffers.
        guards: Rules whose errors the probe computes.
    """

    order: int
    layout: Layout = "snapshots"
    guards: tuple[Rule, ...] = ()

    def check(self, forecasts: Forecasts) -> None:
        """Refuse forecasts that need more.

        Raises:
            ConfigError: The order is too high, the form is not one that the layout can express, or there is no probe
                for the guard.
        """
        if forecasts.order > self.order:
            raise ConfigError(
                f"order is {forecasts.order}, expected at most {self.order}, which the bundle's buffers hold; "
                f"export again with --order {forecasts.order}"
            )
        if forecasts.form != "taylor" and self.layout == "derivatives":
            raise ConfigError(
                f"form is `{forecasts.form}`, expected `taylor` with layout derivatives; export again with --layout "
                "snapshots"
            )
        guard = forecasts.guard
        if guard is None:
            return
        if guard.rule not in self.guards:
            raise ConfigError(
                f"guard is `{guard.rule}`, expected one that the bundle was exported with "
                f"({', '.join(self.guards) or 'it has none'}); export again with --guard {guard.rule}"
            )
        if guard.order is not None and guard.order > self.order:
            raise ConfigError(
                f"order of the guard is {guard.order}, expected at most {self.order}, which the bundle's probe keeps; "
                f"export again with --order {guard.order}"
            )


@dataclass(frozen=True)
class BundleDefaults:
    """What a bundle says of requests that name nothing.

    Attributes:
        steps, interval, warmup: Of its regular plan. Unit: steps.
        dialect: Rule of that plan after warm-up.
        order: Of the forecasts.
        most_steps: Longest loop. Unit: steps.
        capacity: What no request may exceed.
    """

    steps: int
    interval: int
    warmup: int
    dialect: Dialect
    order: int
    most_steps: int
    capacity: Capacity


class CalibratedPlan(Protocol):
    """What a profile brings: a printed plan, the order and weights of its forecasts, and thresholds by rule."""

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def thresholds(self) -> Mapping[Rule, float]: ...


@dataclass(frozen=True)
class RequestOptions:
    """What a request asks for, as it came through a door; None is what was left out.

    Attributes:
        steps: Length of the loop. Unit: steps.
        plan: Explicit plan, printed or itself.
        interval, warmup, dialect: Of the regular plan.
        order: Of the forecasts.
        form: `taylor` or `newton`.
        profile: Name of a calibrated plan.
        guard: Name of a rule, to which the four options below belong, or a guard that has them.
        threshold: Error under which a step is forecast, dimensionless.
        guard_order: Order of the expected first block, for `cg`.
        cap: Most forecast steps in a row. Unit: steps.
        accumulate: Whether errors add up; False is as left out.
    """

    steps: int | None = None
    plan: str | Plan | None = None
    interval: int | None = None
    warmup: int | None = None
    dialect: str | None = None
    order: int | None = None
    form: str | None = None
    profile: str | None = None
    guard: str | Guard | None = None
    threshold: float | None = None
    guard_order: int | None = None
    cap: int | None = None
    accumulate: bool = False

    @property
    def fixes_length(self) -> bool:
        """Whether it says how long the loop is."""
        return any(value is not None for value in (self.steps, self.plan, self.profile))


_OF_A_GUARD = ("threshold", "guard_order", "cap", "accumulate")
_OF_A_REGULAR_PLAN = ("interval", "warmup", "dialect")
_WHOLE = ("steps", "interval", "warmup", "order", "guard_order", "cap")


def forecasts_from_options(
    options: RequestOptions,
    defaults: BundleDefaults,
    profiles: Mapping[str, CalibratedPlan] | None = None,
    ends: bool = True,
) -> Forecasts:
    """The forecasts that a request asks for, by the rules of the module docstring.

    Args:
        options: As they came.
        defaults: Of the bundle.
        profiles: Of the bundle, by name; read where one is named.
        ends: Whether the loop ends with the plan. If not, its length is not known: the plan is the first steps of a
            longer one, of any length, and a guard's last step is like the others.

    Raises:
        ConfigError: An option is out of range, unknown, contradicts another or would be ignored, or the bundle cannot
            express it.
    """
    _check_numbers(options)
    _check_company(options)
    profile = None if options.profile is None else _profile(options, profiles or {})
    guard = _guard(options, profile)
    plan = _plan(options, defaults, profile, guard, ends)
    order = options.order
    if order is None:
        order = defaults.order if profile is None else profile.order
    weights = profile.weights if profile is not None and guard is None else None
    found = Forecasts(plan, order, check_form(options.form or "taylor"), weights, guard)
    defaults.capacity.check(found)
    return found


def _check_numbers(options: RequestOptions) -> None:
    """Refuse what is no number, and sizes below 1; other ranges are checked where the numbers are used."""
    for name in _WHOLE:
        value = getattr(options, name)
        try:
            operator.index(0 if value is None else value)
        except TypeError:
            raise ConfigError(f"{name} is {value!r}, expected a whole number; round it") from None
    if options.threshold is not None and not isinstance(options.threshold, Real):
        raise ConfigError(f"threshold is {options.threshold!r}, expected a number above 0; pass one")
    if options.order is not None:
        check_order(options.order)


def _check_company(options: RequestOptions) -> None:
    """Refuse options that would be ignored beside others."""
    given = {name for name, value in vars(options).items() if value is not None and value is not False}

    def refuse(beside: str, names: Sequence[str], expected: str = "one of them") -> None:
        for name in names:
            if beside in given and name in given:
                raise ConfigError(f"{name} is given beside {beside}, expected {expected}; leave {name} out")

    if "guard" not in given:
        for name in _OF_A_GUARD:
            if name in given:
                raise ConfigError(f"{name} is given without a guard, expected one beside it; add guard, such as cg")
        refuse("profile", ("plan", *_OF_A_REGULAR_PLAN, "order", "form"))
    elif isinstance(options.guard, Guard):
        refuse("guard", _OF_A_GUARD, "it in the guard")
    refuse("plan", _OF_A_REGULAR_PLAN)
    refuse("guard", ("interval", "dialect"), "a plan, or steps and warmup")


def _profile(options: RequestOptions, profiles: Mapping[str, CalibratedPlan]) -> CalibratedPlan:
    """The profile that is named, refused if it is for loops of another length."""
    name = str(options.profile)
    if name not in profiles:
        raise ConfigError(
            f"profile is `{name[:_SHOWN]}`, expected one of this bundle ({', '.join(profiles) or 'it has none'}); "
            "choose one of those, or make it with `taylorseer-export calibrate`"
        )
    profile = profiles[name]
    steps = options.steps if options.plan is None else len(str(options.plan))
    if steps is not None and steps != len(profile.plan):
        raise ConfigError(
            f"profile `{name}` is {len(profile.plan)} steps long, expected {steps} (steps); run {len(profile.plan)} "
            f"steps, or calibrate with --steps {steps}"
        )
    return profile


def _guard(options: RequestOptions, profile: CalibratedPlan | None) -> Guard | None:
    """The guard that is asked for; a profile brings its threshold."""
    if options.guard is None or isinstance(options.guard, Guard):
        return options.guard
    rule = check_rule(options.guard)
    threshold = options.threshold
    if threshold is None and profile is not None:
        threshold = profile.thresholds.get(rule)
    if threshold is None:
        raise ConfigError(
            f"threshold is missing, expected a number above 0 for guard {rule}; give one, or a profile that was "
            "calibrated with it"
        )
    return Guard(rule, threshold, options.guard_order, options.cap, options.accumulate)


def _plan(
    options: RequestOptions, defaults: BundleDefaults, profile: CalibratedPlan | None, guard: Guard | None, ends: bool
) -> Plan:
    steps, most = options.steps, defaults.most_steps
    if ends and steps is not None and not 1 <= steps <= most:
        raise ConfigError(f"steps is {steps}, expected 1 to {most} (steps); ask for a number in that range")
    if options.plan is not None:
        plan = Plan.parse(str(options.plan))
        if len(plan) > most:
            raise ConfigError(f"plan is {len(plan)} steps long, expected 1 to {most} (steps); shorten it")
        if steps is not None:
            plan.check_length(steps)
        return plan
    if profile is not None and guard is None:
        return Plan.parse(profile.plan)
    if steps is None:
        steps = defaults.steps if profile is None else len(profile.plan)
    warmup = defaults.warmup if options.warmup is None else options.warmup
    if guard is not None:
        return Plan.guarded(steps, warmup) if ends else Plan.regular(steps, steps + 1, warmup)
    interval = defaults.interval if options.interval is None else options.interval
    return Plan.regular(steps, interval, warmup, options.dialect or defaults.dialect)  # type: ignore[arg-type]
