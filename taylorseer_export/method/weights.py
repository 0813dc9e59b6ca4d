r"""The method as arithmetic: a forecast is a weighted sum of what full steps left behind.

Two layouts of the Taylor buffers give the same forecast. With `snapshots` the buffers hold the
features y of the last full steps, and `forecast_weights` are their weights. With `derivatives` they
hold D₀ … D_order, `update_scales` advance them on a full step and `derivative_weights` sum them:

    snapshots      P = Σᵢ w[i] · y(full_steps[i])
    derivatives    D'₀ = y,   D'ⱼ₊₁ = scale[j] · (D'ⱼ - Dⱼ),   P = Σⱼ v[j] · Dⱼ

Every Dⱼ is itself a fixed combination Σᵢ c[j][i] · y(full_steps[i]), because it comes from the
features by differences and divisions alone. Hence P = Σᵢ (Σⱼ v[j] · c[j][i]) · y(full_steps[i]):
the bracket is w[i], and `exact_weights` computes it by running the recursion on c.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import factorial, fsum, prod
from numbers import Integral
from typing import Literal, get_args

from taylorseer_export.errors import ConfigError

Form = Literal["taylor", "newton"]

HIGHEST_ORDER = 4


def exact_weights(full_steps: Sequence[int], step: int, order: int, form: Form = "taylor") -> tuple[Fraction, ...]:
    r"""Exact weights of the past full steps in the forecast of `step`.

    The forecast is linear in the features y of the full steps, so the method is one short vector:

        y(step)  ≈  Σᵢ w[i] · y(full_steps[i]),        Σᵢ w[i] = 1

    `taylor` is the paper's recursion. On every full step, with g the gap to the one before it,

        D₀ = y,    Dⱼ₊₁ = (Dⱼ - previous Dⱼ) / g,    y(step) ≈ Σⱼ Dⱼ · leadʲ / j!

    where all orders divide by the same latest g, however the earlier full steps were spaced. It is
    exact for features constant or linear in the step and not for quadratics: with equal gaps g and
    order 2 the error on t² is -g·lead. `newton` is the polynomial through the same features, exact
    up to degree `order`, at a higher gain:

        w[i] = Πⱼ≠ᵢ (step - tⱼ) / (tᵢ - tⱼ)

    Args:
        full_steps: The full steps since the history began, oldest first. Unit: steps, not sigmas.
            Only the last `order + 1` matter; fewer lower the effective order, as after warm-up.
        step: The step to forecast, after every full step. Unit: steps.
        order: Highest order used, 0 to 4, dimensionless. 0 reuses the last feature.
        form: `taylor`, the method of the paper and so the default, or `newton`.

    Returns:
        `min(order + 1, len(full_steps))` rationals, oldest first, dimensionless.

    Raises:
        ConfigError: `order` or `form` is unknown, `full_steps` is empty or not increasing, or
            `step` is not after it.

    Source:
        Liu et al. 2025, *From Reusing to Forecasting*, arXiv:2503.06923, equations 7 to 9.
    """
    check_order(order)
    if not full_steps:
        raise ConfigError(
            f"history of step {step} is empty, expected at least 1 full step before it; begin the plan with `F`"
        )
    _check_increasing(full_steps, step)
    distances = tuple(step - earlier for earlier in full_steps[-(order + 1) :])
    return _taylor(distances) if check_form(form) == "taylor" else _newton(distances)


def forecast_weights(full_steps: Sequence[int], step: int, order: int, form: Form = "taylor") -> tuple[float, ...]:
    """The `exact_weights`, each rounded once to float64; same arguments and errors.

        forecast_weights((1, 2), 3, order=1)  =  (-1.0, 2.0)

    Rounding can leave their sum off 1 by a few units in the last place of the largest weight.
    """
    return tuple(map(float, exact_weights(full_steps, step, order, form)))


def gain(weights: Iterable[float | Fraction]) -> float:
    """Amplification of noise in the features by a forecast, dimensionless.

        gain = Σᵢ |w[i]|  ≥  1

    An error of at most ε in every feature becomes one of at most gain · ε in the forecast.
    """
    return fsum(abs(float(weight)) for weight in weights)


def derivative_weights(history_length: int, lead: int, order: int) -> tuple[float, ...]:
    """Weights of the derivatives D₀ … D_order in a forecast, for the `derivatives` layout.

        v[j] = leadʲ / j!    if j < history_length    else 0

    Args:
        history_length: Full steps since the history began, the last included; Dⱼ needs j + 1.
        lead: Distance from the last full step to the step to forecast. Unit: steps.
        order: Highest order kept, 0 to 4, dimensionless.

    Returns:
        `order + 1` float64 weights, lowest order first, each rounded once.

    Raises:
        ConfigError: `order` is not 0 to 4, or `history_length` or `lead` is below 1.

    Source:
        The module docstring shows that they agree with `forecast_weights`.
    """
    check_order(order)
    for name, value in (("history_length", history_length), ("lead", lead)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1 (steps); forecast after a full step")
    return tuple(lead**j / factorial(j) if j < history_length else 0.0 for j in range(order + 1))


def from_snapshots(weights: Sequence[float], full_steps: Sequence[int]) -> tuple[float, ...]:
    """The weights of the derivatives that give the same forecast as `weights` of the snapshots.

    With Dⱼ = Σᵢ c[j][i] · y(full_steps[i]) as in the module docstring, solves w[i] = Σⱼ v[j] · c[j][i] for v. Dⱼ is
    made of the last j + 1 features and no others, so each v follows from the oldest snapshot not yet accounted for.

    Args:
        weights: One for each full step, oldest first, dimensionless.
        full_steps: As many full steps, the last of the history, oldest first. Unit: steps.

    Returns:
        As many float64 weights, lowest order first.

    Raises:
        ConfigError: The steps are not increasing.
    """
    _check_increasing(full_steps, full_steps[-1] + 1)
    left, shares = list(map(float, weights)), _shares(full_steps)
    found = []
    for oldest, share in enumerate(reversed(shares)):
        found.append(left[oldest] / float(share[oldest]))
        left = [weight - found[-1] * float(c) for weight, c in zip(left, share, strict=True)]
    return tuple(reversed(found))


def update_scales(full_steps_before: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """Factors that advance the derivatives on the full step `step`, for the `derivatives` layout.

        D'₀ = y,    D'ⱼ₊₁ = scale[j] · (D'ⱼ - Dⱼ),    scale[j] = 1 / gap  if Dⱼ exists  else 0

    Dⱼ exists once j + 1 full steps came before; a factor of 0 leaves its derivative 0, which
    `derivative_weights` does not count either. The old Dⱼ are read before they are replaced.

    Args:
        full_steps_before: The full steps since the history began, without `step`, oldest first;
            empty on the first. Unit: steps.
        step: The full step. Unit: steps.
        order: Highest order kept, 0 to 4, dimensionless.

    Returns:
        `order` float64 factors, lowest order first. Unit: 1/steps.

    Raises:
        ConfigError: `order` is not 0 to 4, or the steps are not increasing.

    Source:
        Same as `exact_weights`; the module docstring shows that both layouts agree.
    """
    check_order(order)
    _check_increasing(full_steps_before, step)
    known = len(full_steps_before)
    return tuple(1 / (step - full_steps_before[-1]) if j < known else 0.0 for j in range(order))


def check_form(form: str) -> Form:
    """The form itself; one that is not known is refused with a `ConfigError`."""
    for known in get_args(Form):
        if form == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(
        f"form is `{form[:64]}`, expected one of {', '.join(f'`{name}`' for name in get_args(Form))}; "
        "use `taylor` for the method of the paper"
    )


def check_order(order: int) -> None:
    """Refuse an order that is not 0 to 4 with a `ConfigError`."""
    if not isinstance(order, Integral) or not 0 <= order <= HIGHEST_ORDER:
        raise ConfigError(
            f"order is {order}, expected a whole number, 0 to {HIGHEST_ORDER} (dimensionless); pass "
            "--order 2 or another of these"
        )


def _check_increasing(full_steps: Sequence[int], step: int) -> None:
    for earlier, later in pairwise((*full_steps, step)):
        if later <= earlier:
            raise ConfigError(
                f"step {later} comes after step {earlier} in the history, expected increasing "
                "steps; pass full steps oldest first and `step` after them"
            )


def _shares(steps: Sequence[int]) -> list[list[Fraction]]:
    """c[j][i]: the share of the feature of steps[i] in D_j after the last of the steps."""
    derivatives: list[list[Fraction]] = []
    for now, current in enumerate(steps):
        updated = [[Fraction(now == i) for i in range(len(steps))]]
        for previous in derivatives:
            gap = current - steps[now - 1]
            pairs = zip(updated[-1], previous, strict=True)
            updated.append([(new - old) / gap for new, old in pairs])
        derivatives = updated
    return derivatives


@lru_cache(maxsize=1024)  # a loop has many forecast steps and few patterns of distances
def _taylor(distances: tuple[int, ...]) -> tuple[Fraction, ...]:
    """Weights of the full steps that lie so many steps back, the last one nearest."""
    derivatives = _shares([-distance for distance in distances])
    terms = [Fraction(distances[-1] ** j, factorial(j)) for j in range(len(derivatives))]
    shares = zip(*derivatives, strict=True)
    return tuple(
        sum((term * share for term, share in zip(terms, column, strict=True)), Fraction()) for column in shares
    )


def _newton(distances: Sequence[int]) -> tuple[Fraction, ...]:
    """As `_taylor`; (step - tⱼ) / (tᵢ - tⱼ) is the distance of j over how much farther j is than i."""
    return tuple(
        prod((Fraction(other, other - own) for other in distances if other != own), start=Fraction(1))
        for own in distances
    )
