"""The schedule of a request: graphs, ring entries and numbers of every step, against the recursion in fractions."""

from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Capacity, Forecasts, Plan
from taylorseer_export.runtime.schedule import ForecastStep, FullStep, schedule

LAYOUTS = ("snapshots", "derivatives")
plans = st.text("F.", min_size=0, max_size=20).map(lambda rest: Plan(f"F{rest}"))


@st.composite
def requests(draw):
    """(plan, order, capacity), the order within the capacity."""
    capacity = draw(st.integers(0, 4))
    return draw(plans), draw(st.integers(0, capacity)), capacity


def scheduled(plan, order, capacity, layout, form="taylor"):
    return schedule(Forecasts(plan, order, form), Capacity(capacity, layout))


def assert_rounded(seen, expected, name):
    """Every number is the exact one rounded to float64 and then to float32."""
    for k, (number, exact) in enumerate(zip(seen, expected, strict=True)):
        error = abs(Fraction(float(number)) - exact)
        limit = abs(exact) * (Fraction(1, 2**24) + Fraction(1, 2**52))
        assert error <= limit, f"{name}[{k}] is {number}, expected {exact}"


def last_written(plan, before, ring):
    """Entry of the ring -> the full step it holds at step `before`: full steps fill the ring in turn."""
    return {k % ring: s for k, s in enumerate(plan.full_steps) if s < before}


@given(requests(), st.sampled_from(LAYOUTS))
def test_every_step_runs_the_graph_of_its_plan(request_, layout):
    plan, order, capacity = request_
    steps = scheduled(plan, order, capacity, layout)
    assert "".join("F" if isinstance(s, FullStep) else "." for s in steps) == str(plan)
    assert sum(isinstance(s, FullStep) for s in steps) == len(plan.full_steps)


@given(requests(), st.sampled_from(LAYOUTS))
def test_full_steps_fill_the_ring_in_turn(request_, layout):
    plan, order, capacity = request_
    ring = capacity + 1 if layout == "snapshots" else 2
    steps = scheduled(plan, order, capacity, layout)
    entries = [s.entry for s in steps if isinstance(s, FullStep)]
    assert entries == [k % ring for k in range(len(entries))]
    latest = None
    for step in steps:
        latest = step.entry if isinstance(step, FullStep) else latest
        assert step.entry == latest


@given(requests())
def test_snapshots_get_the_weights_of_the_steps_they_hold(request_):
    plan, order, capacity = request_
    for number, step in enumerate(scheduled(plan, order, capacity, "snapshots")):
        if isinstance(step, FullStep):
            continue
        exact = oracle.weights(str(plan), number, order)
        held = last_written(plan, number, capacity + 1)
        assert exact.keys() <= set(held.values())  # nothing that a forecast needs has been overwritten
        expected = [exact.get(held.get(entry), Fraction()) for entry in range(capacity + 1)]
        assert step.weights.dtype == np.float32
        assert_rounded(step.weights, expected, f"weights of step {number} of {plan}")


@given(requests())
def test_weights_sum_to_one(request_):
    """Each is rounded to float32, so their sum is off 1 by at most the gain times the unit roundoff."""
    plan, order, capacity = request_
    for step in scheduled(plan, order, capacity, "snapshots"):
        if isinstance(step, ForecastStep):
            total = sum(Fraction(float(w)) for w in step.weights)
            assert abs(total - 1) <= Fraction(step.gain) * (Fraction(1, 2**24) + Fraction(1, 2**51))


@given(requests())
def test_derivatives_replayed_give_the_same_forecast(request_):
    """Feed unit features through the scales as the full graph does: what comes out are the oracle's weights."""
    plan, order, capacity = request_
    steps = scheduled(plan, order, capacity, "derivatives")
    for source in plan.full_steps:
        sets = [[Fraction()] * (capacity + 1) for _ in range(2)]
        for number, step in enumerate(steps):
            if isinstance(step, FullStep):
                scales = [Fraction(float(s)).limit_denominator(64) for s in step.scales]
                old, new = sets[1 - step.entry], [Fraction(number == source)]
                for scale, before in zip(scales, old, strict=False):
                    new.append(scale * (new[-1] - before))
                sets[step.entry] = new
                continue
            exact = oracle.weights(str(plan), number, order)
            # Terms lead^j / j! are rounded to float32; their exact values have denominators up to 4!.
            terms = [Fraction(float(w)).limit_denominator(24) for w in step.weights]
            seen = sum(t * d for t, d in zip(terms, sets[step.entry], strict=True))
            assert seen == exact.get(source, 0), f"step {number} of {plan}, feature of step {source}"


@given(requests())
def test_scales_are_one_over_the_gap(request_):
    plan, order, capacity = request_
    kept = [s for s in plan.full_steps if s >= plan.history_start]
    for number, step in enumerate(scheduled(plan, order, capacity, "derivatives")):
        if isinstance(step, ForecastStep):
            continue
        before = [s for s in kept if s < number]
        known = min(len(before), order)
        gap = Fraction(1, number - before[-1]) if before else Fraction()
        assert_rounded(step.scales, [gap] * known + [Fraction()] * (capacity - known), f"scales of step {number}")


@given(requests(), st.sampled_from(LAYOUTS))
def test_gains(request_, layout):
    plan, order, capacity = request_
    steps = scheduled(plan, order, capacity, layout)
    seen = [s.gain if isinstance(s, ForecastStep) else 1.0 for s in steps]
    assert seen == pytest.approx(oracle.gains(str(plan), order), rel=1e-12)


@given(requests())
def test_newton_is_exact_on_polynomials_by_entry(request_):
    """The features t^d of the full steps held by the ring give t^d of the forecast step."""
    plan, order, capacity = request_
    for number, step in enumerate(scheduled(plan, order, capacity, "snapshots", "newton")):
        if isinstance(step, FullStep):
            continue
        held = last_written(plan, number, capacity + 1)
        degree = min(order, len(plan.history(number, order)) - 1)
        for d in range(degree + 1):
            seen = sum(Fraction(float(w)) * held.get(e, 0) ** d for e, w in enumerate(step.weights))
            error = abs(seen - number**d)
            assert error <= Fraction(step.gain) * number**d / 2**23


def test_a_plan_by_hand():
    steps = scheduled(Plan("FFF..F."), 1, 1, "snapshots")
    assert [s.entry for s in steps] == [0, 1, 0, 0, 0, 1, 1]
    weights = [s.weights.tolist() for s in steps if isinstance(s, ForecastStep)]
    assert weights == [[2.0, -1.0], [3.0, -2.0], [pytest.approx(-1 / 3), pytest.approx(4 / 3)]]
    steps = scheduled(Plan("FFF..F."), 1, 2, "derivatives")
    assert [s.entry for s in steps] == [0, 1, 0, 0, 0, 1, 1]
    assert [s.scales.tolist() for s in steps if isinstance(s, FullStep)] == [
        [0.0, 0.0],
        [0.0, 0.0],
        [1.0, 0.0],
        [pytest.approx(1 / 3), 0.0],
    ]
    assert [s.weights.tolist() for s in steps if isinstance(s, ForecastStep)] == [[1, 1, 0], [1, 2, 0], [1, 1, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_above_capacity(layout):
    with pytest.raises(ConfigError, match=r"order is 3, expected at most 2.* export again with --order 3"):
        scheduled(Plan("F."), 3, 2, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_negative_order(layout):
    with pytest.raises(ConfigError, match="order is -1, expected 0 to 4"):
        scheduled(Plan("FF."), -1, 2, layout)


def test_newton_needs_snapshots():
    with pytest.raises(ConfigError, match=r"`taylor` with layout derivatives; export again with --layout snapshots"):
        scheduled(Plan("F."), 1, 2, "derivatives", "newton")


@pytest.mark.parametrize(
    "wrong", [[Fraction(1, 3), Fraction(2, 3)], [Fraction(2, 3), Fraction(1, 3) + Fraction(1, 10**6)]]
)
def test_the_comparison_can_fail(wrong):
    with pytest.raises(AssertionError, match="expected"):
        assert_rounded(np.float32([2 / 3, 1 / 3]), wrong, "weights")
