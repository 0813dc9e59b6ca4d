"""A request's forecasts: one value, one set of rules, and doors that accept and refuse the same in the same words."""

import json
import shutil
from dataclasses import fields, replace
from fractions import Fraction
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from harness import as_arrays
from hypothesis import given
from hypothesis import strategies as st
from profiles import made, weights_of

from taylorseer_export.bundle.profile import write_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.commands import bench, client, evaluate, replay, run
from taylorseer_export.commands.options import Parser
from taylorseer_export.commands.terminal import forecasts_of
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import (
    BundleDefaults,
    CalibratedPlan,
    Capacity,
    Forecasts,
    Guard,
    Plan,
    RequestOptions,
    exact_weights,
    forecasts_from_options,
)
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.dropin import DropIn
from taylorseer_export.serve import contract
from taylorseer_export.serve.api.fields import asked_of

FAST = "FF..F..."
DEFAULTS = BundleDefaults(20, 4, 2, "original", 2, 1000, Capacity(2, "snapshots", ("cg", "teacache")))

# What is asked for -> what comes of it, or what is said. Written by hand: the rules are not asked.
TABLE = [
    ({}, Forecasts(Plan("FF...F...F...F...F.."), 2)),
    ({"steps": 7}, Forecasts(Plan("FF...F."), 2)),
    ({"steps": 7, "order": 0}, Forecasts(Plan("FF...F."), 0)),
    ({"steps": 7, "interval": 3}, Forecasts(Plan("FF..F.."), 2)),
    ({"steps": 7, "warmup": 3}, Forecasts(Plan("FFF...F"), 2)),
    ({"steps": 7, "interval": 3, "dialect": "diffusers"}, Forecasts(Plan("FF.F..F"), 2)),
    ({"steps": 7, "form": "newton"}, Forecasts(Plan("FF...F."), 2, "newton")),
    ({"plan": "FF.F"}, Forecasts(Plan("FF.F"), 2)),
    ({"plan": "FF.F", "steps": 4, "order": 1, "form": "taylor"}, Forecasts(Plan("FF.F"), 1)),
    ({"profile": "fast"}, Forecasts(Plan(FAST), 1, weights=weights_of(Plan(FAST), 1))),
    ({"profile": "fast", "steps": 8}, Forecasts(Plan(FAST), 1, weights=weights_of(Plan(FAST), 1))),
    ({"steps": 7, "guard": "cg", "threshold": 0.5}, Forecasts(Plan("FF....F"), 2, guard=Guard("cg", 0.5))),
    (
        {"steps": 6, "guard": "cg", "threshold": 0.5, "warmup": 3, "order": 1, "form": "newton"},
        Forecasts(Plan("FFF..F"), 1, "newton", guard=Guard("cg", 0.5)),
    ),
    (
        {"plan": "F..F", "guard": "cg", "threshold": 0.5, "guard_order": 1, "cap": 2, "accumulate": True},
        Forecasts(Plan("F..F"), 2, guard=Guard("cg", 0.5, 1, 2, True)),
    ),
    ({"profile": "fast", "guard": "cg"}, Forecasts(Plan("FF.....F"), 1, guard=Guard("cg", 0.25))),
    (
        {"profile": "fast", "guard": "cg", "order": 2, "threshold": 0.5, "steps": 8},
        Forecasts(Plan("FF.....F"), 2, guard=Guard("cg", 0.5)),
    ),
    ({"profile": "fast", "guard": "cg", "plan": "FFF....."}, Forecasts(Plan("FFF....."), 1, guard=Guard("cg", 0.25))),
    ({"steps": 0}, "steps is 0, expected 1 to 1000 (steps)"),
    ({"steps": 1001}, "steps is 1001, expected 1 to 1000 (steps)"),
    ({"steps": -3}, "steps is -3, expected 1 to 1000 (steps)"),
    ({"interval": 0}, "interval is 0, expected at least 1 (steps)"),
    ({"warmup": 0}, "warmup is 0, expected at least 1 (steps)"),
    ({"dialect": "french"}, "dialect is `french`, expected one of `original`, `diffusers`"),
    ({"order": 5}, "order is 5, expected 0 to 4"),
    ({"order": 3}, "order is 3, expected at most 2, which the bundle's buffers hold"),
    ({"form": "simpson"}, "form is `simpson`, expected one of `taylor`, `newton`"),
    ({"plan": ".F"}, "step 0 is a forecast step"),
    ({"plan": "FxF"}, "plan has `x` at step 1"),
    ({"plan": "F" * 1001}, "plan is 1001 steps long, expected 1 to 1000 (steps)"),
    ({"plan": "FF.F", "steps": 5}, "plan FF.F is 4 steps long, expected 5 (steps)"),
    ({"plan": "FF.F", "interval": 2}, "interval is given beside plan, expected one of them; leave interval out"),
    ({"plan": "FF.F", "warmup": 2}, "warmup is given beside plan, expected one of them; leave warmup out"),
    ({"plan": "FF.F", "dialect": "original"}, "dialect is given beside plan, expected one of them"),
    ({"profile": "slow"}, "profile is `slow`, expected one of this bundle (fast)"),
    ({"profile": "fast", "steps": 9}, "profile `fast` is 8 steps long, expected 9 (steps)"),
    *(
        ({"profile": "fast", name: value}, f"{name} is given beside profile, expected one of them; leave {name} out")
        for name, value in (
            ("plan", FAST), ("interval", 3), ("warmup", 2), ("dialect", "original"), ("order", 1), ("form", "taylor"),
        )
    ),
    *(
        ({name: value}, f"{name} is given without a guard, expected one beside it")
        for name, value in (("threshold", 0.5), ("guard_order", 1), ("cap", 3), ("accumulate", True))
    ),
    ({"guard": "magic", "threshold": 0.5}, "guard is `magic`, expected one of `cg`, `fbcache`, `teacache`"),
    ({"guard": "fbcache", "threshold": 0.5}, "guard is `fbcache`, expected one that the bundle was exported with (cg)"),
    ({"guard": "cg"}, "threshold is missing, expected a number above 0 for guard cg"),
    ({"guard": "cg", "threshold": 0.0}, "threshold is 0.0, expected a number above 0"),
    ({"guard": "cg", "threshold": -0.5}, "threshold is -0.5, expected a number above 0"),
    ({"guard": "cg", "threshold": float("nan")}, "threshold is nan, expected a number above 0"),
    ({"guard": "cg", "threshold": float("inf")}, "threshold is inf, expected a number above 0"),
    ({"guard": "cg", "threshold": 0.5, "cap": 0}, "cap is 0, expected at least 1"),
    ({"guard": "cg", "threshold": 0.5, "guard_order": 3}, "order of the guard is 3, expected at most 2"),
    ({"guard": "cg", "threshold": 0.5, "guard_order": 9}, "order is 9, expected 0 to 4"),
    ({"guard": "cg", "threshold": 0.5, "interval": 3}, "interval is given beside guard, expected a plan, or steps and"),
    ({"guard": "cg", "threshold": 0.5, "dialect": "original"}, "dialect is given beside guard, expected a plan, or"),
    ({"guard": "cg", "threshold": 0.5, "plan": "F..F", "warmup": 1}, "warmup is given beside plan, expected one of"),
    ({"guard": "cg", "threshold": 0.5, "order": 3}, "order is 3, expected at most 2"),
    ({"guard": "cg", "profile": "slow"}, "profile is `slow`, expected one of this bundle (fast)"),
    ({"guard": "cg", "profile": "fast", "steps": 9}, "profile `fast` is 8 steps long, expected 9 (steps)"),
    ({"guard": "cg", "profile": "fast", "plan": "FF.."}, "profile `fast` is 8 steps long, expected 4 (steps)"),
    ({"guard": "cg", "profile": "fast", "interval": 2}, "interval is given beside guard, expected a plan, or steps"),
]  # fmt: skip


@pytest.fixture(scope="module")
def denoiser(bundles, onnx, tmp_path_factory):
    """The bundle `flux` with the profile `fast`, which has a threshold for `cg`."""
    folder, source = tmp_path_factory.mktemp("forecasts"), bundles("flux")
    bundle = open_bundle(Path(shutil.copytree(source, folder / "flux")))
    write_profile(bundle, made(bundle.manifest, thresholds={"cg": 0.25}))
    state = bundle.manifest.state.model_copy(update={"guards": ("cg",)})  # of the three that it has
    return Denoiser(bundle.manifest.model_copy(update={"state": state}), onnx("flux").runner, bundle)


def typed(module, options, *others):
    """What a command makes of options as they are typed."""
    parser = Parser(module.__name__.rsplit(".", 1)[-1], module.SUMMARY)
    module.options(parser)
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}={value}"] if value is not True else [f"--{name}"]
    return parser.parse_args([*others, *words])


def on_the_command_line(module):
    return lambda denoiser, options, _: forecasts_of(denoiser, typed(module, options, "bundle"))


def replayed(denoiser, options, _):
    given = typed(replay, {n: v for n, v in options.items() if n != "steps"}, "bundle", "--inputs=a", "--outputs=b")
    return forecasts_of(denoiser, given, options.get("steps"))


def dropped_in(denoiser, options, _):
    return denoiser.as_transformer(**options).forecasts


def served(denoiser, options, request):
    """As the protocol carries it: arrays of the type of each port."""
    kinds = {"INT32": np.int32, "FP64": np.float64, "BOOL": np.bool_}
    ports = {port.name: port.datatype for port in contract.inputs(denoiser.manifest, "denoiser")}
    values = dict(request)
    for name, value in options.items():
        sent = [value.encode()] if ports[name] == "BYTES" else [value]
        values[name] = np.array(sent, object if ports[name] == "BYTES" else kinds[ports[name]])
    return contract.ask(denoiser, "denoiser", values, dict(denoiser.profiles)).forecasts


def asked_for(denoiser, options, _):
    """As JSON carries it, for the images API."""
    values = json.loads(json.dumps({"prompt": "a red circle", **options}))
    return forecasts_from_options(asked_of(values, 1, 1.0).options, denoiser.defaults, dict(denoiser.profiles))


def sent(denoiser, options, request):
    values = client._values(typed(client, options, "model", "--out=a"))
    assert sorted(map(str, values.items())) == sorted(map(str, options.items()))  # nothing else and nothing less
    return served(denoiser, values, request)


DOORS = {
    "run": on_the_command_line(run),
    "bench": on_the_command_line(bench),
    "evaluate": on_the_command_line(evaluate),
    "replay": replayed,
    "drop-in": dropped_in,
    "server": served,
    "images API": asked_for,
    "client": sent,
}


def outcome(door, denoiser, options, request):
    try:
        return door(denoiser, options, request)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize(("options", "expected"), TABLE, ids=[str(options) for options, _ in TABLE])
def test_every_door_makes_the_same_of_the_same(denoiser, tiny, name, options, expected):
    latents, _, conditioning = tiny("flux").inputs(1, batch=1, height=2, width=2)
    request = {"latents": latents[0].numpy(), **as_arrays(conditioning)}
    seen = outcome(DOORS[name], denoiser, options, request)
    by_rule = outcome(lambda d, o, _: d.forecasts(**o), denoiser, options, request)
    if isinstance(expected, str):
        assert isinstance(seen, str) and expected in seen, seen
        assert seen == by_rule
        return
    assert by_rule == expected
    if name == "drop-in" and not {"steps", "plan", "profile"} & options.keys():
        expected = replace(expected, plan=Plan("FF...F...F...F...F.."))  # of a loop without a known end
    assert seen == expected


def test_the_comparison_can_fail(denoiser):
    assert on_the_command_line(run)(denoiser, {"steps": 7}, None) != Forecasts(Plan("FF...F."), 1)
    assert outcome(on_the_command_line(run), denoiser, {"steps": 0}, None) != outcome(
        on_the_command_line(run), denoiser, {"steps": -1}, None
    )


def test_every_option_is_in_the_table_and_at_every_door(denoiser):
    names = {field.name for field in fields(RequestOptions)}
    assert set().union(*(options for options, _ in TABLE)) == names
    assert names <= {port.name for port in contract.inputs(denoiser.manifest, "denoiser")}
    for module, others in ((run, ["b"]), (bench, ["b"]), (evaluate, ["b"]), (client, ["m", "--out=a"])):
        assert names <= vars(typed(module, {}, *others)).keys()
    assert names <= signature(DropIn).parameters.keys()


def test_a_guard_that_ends_with_an_unknown_loop(denoiser):
    """Its last step is like the others, since the loop may go on; the others know their end."""
    options = {"guard": "cg", "threshold": 0.5}
    assert str(denoiser.as_transformer(**options).forecasts.plan) == "FF" + 18 * "."
    assert str(denoiser.forecasts(**options).plan) == "FF" + 17 * "." + "F"


def test_a_guard_may_come_with_its_numbers(denoiser):
    guard = Guard("cg", 0.5, cap=3)
    assert denoiser.as_transformer(steps=4, guard=guard).forecasts == Forecasts(Plan("FF.F"), 2, guard=guard)
    with pytest.raises(ConfigError, match="cap is given beside guard, expected it in the guard; leave cap out"):
        denoiser.as_transformer(steps=4, guard=guard, cap=2)


def test_a_request_of_the_drop_in_is_judged_by_the_same_rules(denoiser):
    fixed = denoiser.as_transformer(plan="FF.F")
    with pytest.raises(ConfigError, match=r"plan FF\.F is 4 steps long, expected 6"):
        fixed.begin(timesteps=np.linspace(1, 0.1, 6))
    fixed.begin(plan="F.F.F.")
    assert str(fixed._callers.here.loop.plan) == "F.F.F."
    profiled = denoiser.as_transformer(profile="fast")
    with pytest.raises(ConfigError, match="order is given beside profile"):
        profiled.begin(order=2)
    profiled.begin(plan="FF.")
    assert profiled._callers.here.loop.forecasts == Forecasts(Plan("FF."), 2)


def test_evaluate_shows_what_was_asked_for(denoiser):
    from taylorseer_export.report.evaluate import cases

    asked = denoiser.forecasts(steps=8, guard="cg", threshold=0.5)
    rows = {case.name: case.forecasts for case in cases(denoiser, asked)}
    assert rows["as asked"] == asked and rows["profile fast"] == denoiser.forecasts(profile="fast")
    assert rows["regular, order 2"] == denoiser.forecasts(steps=8)  # the bundle's rule, since a guard brings its own
    assert "as asked" not in {case.name for case in cases(denoiser, denoiser.forecasts(steps=8))}


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "total"),
    [
        ((0.0, 0.0), "0"),
        ((-2.0, 4.0), "2"),
        ((1e20, 1e20), "2e+20"),
        ((1e20, -1e20), "0"),
        ((0.5, 0.5 + 1e-6), "1.000001"),
        ((float("nan"), 1.0), "nan"),
        ((float("inf"), 1.0), "nan"),
        ((1e308, 1e308), "nan"),
    ],
)
def test_weights_that_do_not_sum_to_one(denoiser, weights, total):
    plan, order = Plan("FF."), 1
    text = f"weights of step 2 sum to {total}, expected 1 (dimensionless); calibrate again"
    with pytest.raises(ConfigError) as error:
        Forecasts(plan, order, weights=((), (), weights))
    assert text in str(error.value)
    with pytest.raises(ValueError, match=r"weights of step 2 sum to|weights\.2\.0\n  Input should be a finite number"):
        made(denoiser.manifest, plan=str(plan), weights=((), (), weights))


plans = st.text("F.", max_size=40).map(lambda rest: Plan("F" + rest))


@given(plans, st.integers(0, 4), st.data())
def test_weights_that_were_rounded_sum_to_one(plan, order, data):
    """The paper's weights in float64 or float32, and mixtures of sum 1: rounding is never taken for a fault."""
    weights = []
    for step in range(len(plan)):
        if plan.is_full(step):
            weights.append(())
            continue
        exact = exact_weights(plan.history(step, order), step, order)
        size = st.fractions(-8, 8, max_denominator=64)
        changed = [w + data.draw(size) for w in exact[1:]]
        exact = (1 - sum(changed, Fraction()), *changed)
        kind = data.draw(st.sampled_from([np.float32, np.float64]))
        weights.append(tuple(float(kind(float(w))) for w in exact))
    made_of = Forecasts(plan, order, weights=tuple(weights))
    assert made_of.weights == tuple(weights)


@given(plans.filter(lambda plan: "." in str(plan)), st.integers(0, 4), st.floats(1e-5, 10), st.booleans())
def test_weights_that_are_off_by_more_than_rounding_are_refused(plan, order, by, up):
    """Scaled by 1 + by or 1 - by, a sum is off by `by`, which is above 2⁻²⁴ Σ|w| wherever the gain is below 100."""
    scale = 1 + by if up else 1 - by
    weights = [tuple(scale * w for w in step) for step in weights_of(plan, order)]
    step = str(plan).index(".")
    if sum(map(abs, weights[step])) < 100:
        with pytest.raises(ConfigError, match=f"weights of step {step} sum to"):
            Forecasts(plan, order, weights=tuple(weights))


# The rules -----------------------------------------------------------------------------------------------------------

numbers = st.none() | st.integers(-2, 6)
asked = st.builds(
    RequestOptions,
    steps=st.none() | st.integers(-1, 12),
    plan=st.none() | st.text("F.", max_size=12),
    interval=numbers,
    warmup=numbers,
    dialect=st.sampled_from([None, None, "original", "diffusers", "x"]),
    order=numbers,
    form=st.sampled_from([None, None, "taylor", "newton", "x"]),
    profile=st.sampled_from([None, None, "fast", "x"]),
    guard=st.sampled_from([None, None, "cg", "fbcache", "x"]),
    threshold=st.sampled_from([None, 0.5, -1.0]),
    guard_order=numbers,
    cap=numbers,
    accumulate=st.booleans(),
)


class Fast:
    name, plan, order, weights, thresholds = "fast", FAST, 1, weights_of(Plan(FAST), 1), {"cg": 0.25}


PROFILES: dict[str, CalibratedPlan] = {"fast": Fast()}


@given(asked)
def test_every_combination_is_honoured_or_refused_in_one_sentence(options):
    """Nothing that is given is ignored: what is accepted shows every option that was given in what comes of it."""
    try:
        found = forecasts_from_options(options, DEFAULTS, PROFILES)
    except ConfigError as error:
        assert "expected" in str(error) and "\n" not in str(error)
        return
    plan, guard = str(found.plan), found.guard
    assert options.steps in (None, len(plan)) and options.plan in (None, plan)
    assert options.order in (None, found.order) and options.form in (None, found.form)
    assert (found.weights is not None) == (options.profile is not None and options.guard is None)
    assert (guard is None) == (options.guard is None)
    if guard is None:
        assert (options.threshold, options.guard_order, options.cap, options.accumulate) == (None, None, None, False)
    else:
        assert guard.rule == options.guard and guard.threshold == (options.threshold or 0.25)
        assert (guard.order, guard.cap, guard.accumulate) == (options.guard_order, options.cap, options.accumulate)
        assert options.interval is None and options.dialect is None
    if options.profile is not None:
        assert len(plan) == len(FAST) and (guard is not None or plan == FAST)
    if options.warmup is not None:
        assert plan[: options.warmup] == "F" * min(options.warmup, len(plan))
    if options.interval is not None:
        warmup = options.warmup or DEFAULTS.warmup
        assert plan == str(Plan.regular(len(plan), options.interval, warmup, options.dialect or "original"))


@given(asked)
def test_a_longer_loop_of_unknown_length_begins_as_a_shorter_one(options):
    open_ended = replace(options, plan=None, profile=None, steps=6)
    try:
        short, long = (forecasts_from_options(replace(open_ended, steps=n), DEFAULTS, ends=False) for n in (6, 2000))
    except ConfigError:
        return
    assert str(long.plan).startswith(str(short.plan)) and replace(long, plan=short.plan) == short


def test_derivatives_have_no_newton():
    defaults = replace(DEFAULTS, capacity=Capacity(2, "derivatives"))
    with pytest.raises(ConfigError, match="form is `newton`, expected `taylor` with layout derivatives"):
        forecasts_from_options(RequestOptions(form="newton"), defaults)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": 1.5}, "order is 1.5, expected a whole number"),
        ({"steps": "7"}, "steps is '7', expected a whole number"),
        ({"cap": 2.0, "guard": "cg"}, "cap is 2.0, expected a whole number"),
        ({"threshold": "0.5", "guard": "cg"}, "threshold is '0.5', expected a number"),
    ],
)
def test_what_is_no_number_is_said(options, text):
    with pytest.raises(ConfigError) as error:
        forecasts_from_options(RequestOptions(**options), DEFAULTS)
    assert text in str(error.value)
