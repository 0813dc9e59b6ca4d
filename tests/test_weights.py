"""Weights against the paper's recursion, in exact rationals and in both layouts."""

from fractions import Fraction as Q
from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import (
    Plan,
    derivative_weights,
    exact_weights,
    forecast_weights,
    gain,
    update_scales,
)

orders = st.integers(0, 4)
increasing = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(
    lambda gaps: tuple(sum(gaps[: i + 1]) for i in range(len(gaps)))
)
leads = st.integers(1, 12)


def recursion(values, full_steps, step, order):
    """The paper, on plain numbers: keep D_0 to D_order, update on full steps, sum the series."""
    kept, last = {}, None
    for at, value in zip(full_steps, values, strict=True):
        new = {0: value}
        for i in range(order):
            if i not in kept:
                break
            new[i + 1] = (new[i] - kept[i]) / Q(at - last)
        kept, last = new, at
    return sum(kept[i] * Q(step - last) ** i / factorial(i) for i in kept)


def applied(weights, values):
    """The forecast that weights give; they belong to the last of the values."""
    return sum(w * v for w, v in zip(weights, values[-len(weights) :], strict=True))


def assert_same(seen, expected, amplification):
    """Equal up to float64 rounding, which grows with the gain and no faster."""
    bound = 16 * 2.0**-53 * amplification
    assert abs(seen - expected) <= bound, f"{seen} is not {expected} within {bound}"


@given(increasing, leads, orders, st.data())
def test_weights_are_the_recursion(full_steps, lead, order, data):
    values = data.draw(st.lists(st.fractions(-9, 9), min_size=len(full_steps), max_size=len(full_steps)))
    step = full_steps[-1] + lead
    weights = exact_weights(full_steps, step, order)
    assert len(weights) == min(order + 1, len(full_steps))
    assert applied(weights, values) == recursion(values, full_steps, step, order)


@pytest.mark.parametrize(
    ("full_steps", "step", "order", "expected"),
    [
        ((1, 2), 3, 1, (-1, 2)),
        ((1, 2), 7, 1, (-5, 6)),
        ((1, 2, 8), 9, 1, (Q(-1, 6), Q(7, 6))),
        ((1, 2, 8), 13, 1, (Q(-5, 6), Q(11, 6))),
        ((1, 2, 8), 9, 2, (Q(1, 12), Q(-19, 72), Q(85, 72))),
        ((1, 2, 8), 13, 2, (Q(25, 12), Q(-235, 72), Q(157, 72))),
        ((1, 2, 8, 14), 15, 2, (Q(1, 72), Q(-7, 36), Q(85, 72))),
        ((1, 2, 8, 14), 19, 2, (Q(25, 72), Q(-55, 36), Q(157, 72))),
        ((1, 2), 5, 2, (-3, 4)),
        ((1, 2, 6), 9, 2, (Q(9, 8), Q(-69, 32), Q(65, 32))),
        ((0, 5, 10), 14, 2, (Q(8, 25), Q(-36, 25), Q(53, 25))),
    ],
)
def test_goldens(full_steps, step, order, expected):
    assert exact_weights(full_steps, step, order) == expected
    assert forecast_weights(full_steps, step, order) == tuple(map(float, expected))


def test_goldens_are_what_the_plans_of_the_models_give():
    flux, kontext = Plan.regular(50, 6, 3), Plan.regular(50, 4, 3)
    assert exact_weights(flux.history(13, 2), 13, 2) == (Q(25, 12), Q(-235, 72), Q(157, 72))
    assert exact_weights(kontext.history(9, 2), 9, 2) == (Q(9, 8), Q(-69, 32), Q(65, 32))


@given(increasing, leads, orders, st.sampled_from(["taylor", "newton"]))
def test_weights_sum_to_one(full_steps, lead, order, form):
    weights = exact_weights(full_steps, full_steps[-1] + lead, order, form)
    assert sum(weights) == 1
    assert gain(weights) >= 1


@given(increasing, leads, st.sampled_from(["taylor", "newton"]))
def test_order_0_reuses(full_steps, lead, form):
    assert exact_weights(full_steps, full_steps[-1] + lead, 0, form) == (1,)


@given(increasing, leads, orders, st.integers(-50, 50), st.integers(1, 9))
def test_weights_ignore_where_steps_start_and_how_long_they_are(full_steps, lead, order, shift, scale):
    step = full_steps[-1] + lead
    moved = [shift + scale * t for t in full_steps]
    assert exact_weights(moved, shift + scale * step, order) == exact_weights(full_steps, step, order)


@given(increasing.filter(lambda t: len(t) > 1), leads, st.integers(1, 4), st.fractions(-9, 9))
def test_linear_features_are_forecast_exactly(full_steps, lead, order, slope):
    step = full_steps[-1] + lead
    weights = exact_weights(full_steps, step, order)
    assert applied(weights, [slope * t + 3 for t in full_steps]) == slope * step + 3


@given(st.integers(1, 12), leads, st.integers(3, 6))
def test_error_on_the_square_of_the_step(gap, lead, count):
    full_steps = [gap * i for i in range(count)]
    step = full_steps[-1] + lead
    squares = [t * t for t in full_steps]
    assert applied(exact_weights(full_steps, step, 2), squares) - step**2 == -gap * lead
    assert applied(exact_weights(full_steps, step, 1), squares) - step**2 == -gap * lead - lead**2


@given(increasing, leads, orders, st.lists(st.fractions(-9, 9), min_size=5, max_size=5))
def test_newton_is_exact_on_polynomials(full_steps, lead, order, coefficients):
    step = full_steps[-1] + lead
    weights = exact_weights(full_steps, step, order, "newton")
    degrees = coefficients[: len(weights)]

    def polynomial(t):
        return sum(c * t**i for i, c in enumerate(degrees))

    assert applied(weights, [polynomial(t) for t in full_steps]) == polynomial(step)


def test_taylor_and_newton_part_at_order_2():
    steps = (0, 5, 10)
    assert exact_weights(steps, 14, 1) == exact_weights(steps, 14, 1, "newton")
    assert exact_weights(steps, 14, 2, "newton") == (Q(18, 25), Q(-56, 25), Q(63, 25))
    assert gain(forecast_weights(steps, 14, 2)) == pytest.approx(97 / 25)
    assert gain(exact_weights(steps, 14, 2, "newton")) == 137 / 25


def derivatives_layout(values, full_steps, order):
    """Run the `derivatives` buffers over the full steps, as the full graph does."""
    buffers = [0.0] * (order + 1)
    for i, (at, value) in enumerate(zip(full_steps, values, strict=True)):
        scales = update_scales(full_steps[:i], at, order)
        updated = [value]
        for scale, old in zip(scales, buffers, strict=False):
            updated.append(scale * (updated[-1] - old))
        buffers = updated
    return buffers


@given(increasing, leads, orders, st.data())
def test_layouts_agree(full_steps, lead, order, data):
    floats = st.floats(-1, 1)
    values = data.draw(st.lists(floats, min_size=len(full_steps), max_size=len(full_steps)))
    step = full_steps[-1] + lead
    terms = derivative_weights(len(full_steps), lead, order)
    derivatives = derivatives_layout(values, full_steps, order)
    assert len(terms) == len(derivatives) == order + 1
    snapshots = applied(forecast_weights(full_steps, step, order), values)
    # D_j holds up to (2 / gap)^j of the largest value and enters with lead^j / j!.
    amplification = sum(abs(t) * 2.0**j for j, t in enumerate(terms))
    assert_same(applied(terms, derivatives), snapshots, amplification)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), orders, st.data())
def test_layouts_agree_on_every_forecast_step_of_a_plan(steps, interval, warmup, order, data):
    plan = Plan.regular(steps, interval, warmup)
    values = data.draw(st.lists(st.floats(-1, 1), min_size=steps, max_size=steps))
    buffers = [0.0] * (order + 1)
    for step in range(steps):
        history = plan.history(step, order)
        if plan.is_full(step):
            updated = [values[step]]
            for scale, old in zip(update_scales(history, step, order), buffers, strict=False):
                updated.append(scale * (updated[-1] - old))
            buffers = updated
        else:
            terms = derivative_weights(len(history), step - history[-1], order)
            weights = forecast_weights(history, step, order)
            amplification = sum(abs(t) * 2.0**j for j, t in enumerate(terms))
            snapshots = applied(weights, [values[t] for t in history])
            assert_same(applied(terms, buffers), snapshots, amplification)


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError, match="within"):
        assert_same(1.0 + 2 * 16 * 2.0**-53 * 3, 1.0, 3)


def test_derivatives_that_do_not_exist_count_nothing():
    assert derivative_weights(1, 4, 2) == (1.0, 0.0, 0.0)
    assert derivative_weights(3, 4, 4) == (1.0, 4.0, 8.0, 0.0, 0.0)
    assert update_scales((), 0, 2) == (0.0, 0.0)
    assert update_scales((2,), 8, 2) == (1 / 6, 0.0)
    assert update_scales((1, 2), 8, 2) == (1 / 6, 1 / 6)
    assert update_scales((1, 2), 8, 0) == ()


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: exact_weights((), 3, 1), "begin the plan with `F`"),
        (lambda: exact_weights((2, 1), 3, 1), "pass full steps oldest first"),
        (lambda: exact_weights((1, 1), 3, 1), "pass full steps oldest first"),
        (lambda: exact_weights((1, 2), 2, 1), "`step` after them"),
        (lambda: forecast_weights((1, 2), 1, 1), "`step` after them"),
        (lambda: exact_weights((1, 2), 3, -1), r"order is -1, expected 0 to 4 .*; pass --order"),
        (lambda: exact_weights((1, 2), 3, 5), r"order is 5, expected 0 to 4 .*; pass --order"),
        (lambda: exact_weights((1, 2), 3, 1, "spline"), "use `taylor`"),
        (lambda: derivative_weights(0, 1, 2), r"history_length is 0.*; forecast after a full"),
        (lambda: derivative_weights(1, 0, 2), r"lead is 0, expected at least 1 \(steps\)"),
        (lambda: derivative_weights(1, 1, 5), "pass --order"),
        (lambda: update_scales((1, 2), 2, 2), "`step` after them"),
        (lambda: update_scales((1, 2), 3, 7), "pass --order"),
    ],
)
def test_refusals_say_the_fix(call, fix):
    with pytest.raises(ConfigError, match=fix):
        call()
