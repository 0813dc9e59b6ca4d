"""Guards: the rule against an independent oracle, decisions included, and what a guarded request is equal to."""

# Shapes: S steps, B batch

import math
from functools import cache
from itertools import pairwise

import oracle
import pytest
import torch
from harness import FLOAT32, advance, allowed, as_arrays, begin, eager_denoiser, open_slot, run
from oracle import assert_close
from tiny_bundles import MODELS

from taylorseer_export import cli
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.method import RULES, Forecasts, Guard, Plan
from taylorseer_export.runtime.probe import warning_of

STEPS, ORDER = 10, 2
PLAN = str(Plan.guarded(STEPS, 2))


@pytest.fixture(scope="session")
def guarded(drafts):
    """Name -> denoiser over the eager graphs of a bundle with all rules."""
    return cache(lambda name: eager_denoiser(drafts(name, "module" if name == "flux" else "residual", guards=RULES)))


def threshold_of(values, rule, order=ORDER, cap=None):
    """A threshold that is far from every number compared with it, and gives steps of both kinds."""
    found = {}
    for level in (0.0, math.inf):
        _, _, compared = oracle.guarded(values, PLAN, rule, level, order, cap)
        found.update(dict.fromkeys(c for c in compared if c is not None))
    ordered = sorted(found)
    candidates = {}
    for low, high in pairwise(ordered):
        executed, _, compared = oracle.guarded(values, PLAN, rule, (low + high) / 2, order, cap)
        kinds = {kind for kind, planned in zip(executed, PLAN, strict=True) if planned == "."}
        if len(kinds) == 2:
            candidates[(low + high) / 2] = min(abs(c - (low + high) / 2) for c in compared if c is not None)
    assert candidates, f"no threshold of {rule} gives steps of both kinds, expected one; change the inputs"
    return max(candidates, key=candidates.get)


def error_bound(model, values, gain, error):
    """Largest difference expected of an error in float32: |expected - q| and |q| are each off by the bound of q.

    Of a quotient n / d with n off by (gain + 1) b and d by b, that is ((gain + 1) b + error b) / d.
    """
    worst = max(v.abs().max().item() / v.abs().mean().item() for v in values)
    unit = oracle.bound(torch.ones(1), 1.0, FLOAT32, *oracle.extent(model))
    return (gain + 1 + error) * worst * unit


def guarded_run(denoiser, inputs, guard, plan=PLAN, slot=None):
    """(noise_pred [S, ...], slot) of a guarded request."""
    slot = slot or open_slot(denoiser, inputs)
    begin(slot, inputs, plan, guard=guard)
    return torch.stack([advance(slot, inputs, step) for step in range(len(plan))]), slot


# The rule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_the_rule_equals_the_oracle(guarded, tiny, name, rule):
    model, inputs = tiny(name).model, tiny(name).inputs(STEPS, batch=2)
    values = oracle.quantities(model, *inputs, rule)
    threshold = threshold_of(values, rule)
    executed, errors, _ = oracle.guarded(values, PLAN, rule, threshold)
    predictions, slot = guarded_run(guarded(name), inputs, Guard(rule, threshold))
    assert slot.executed == executed
    gains = oracle.gains(executed, ORDER)
    for step, expected in enumerate(errors):
        assert (expected is None) == math.isnan(slot.errors[step])
        if expected is not None:
            gain = sum(map(abs, oracle.weights(executed, step, ORDER).values())) if rule == "cg" else 1.0
            limit = error_bound(model, values, float(gain), expected)
            assert abs(slot.errors[step] - expected) <= limit, (step, slot.errors[step], expected, limit)
    granularity = "module" if name == "flux" else "residual"
    reference = oracle.replay(model, *inputs, executed, ORDER, granularity)
    assert len(gains) == STEPS
    assert_close(f"{name} {rule}", predictions, reference, allowed(model, reference, executed, ORDER))


def test_the_oracle_s_rules_differ(tiny):
    model, inputs = tiny("flux").model, tiny("flux").inputs(STEPS, batch=2)
    measured = {rule: oracle.guarded(oracle.quantities(model, *inputs, rule), PLAN, rule, 0.0)[1] for rule in RULES}
    for one in RULES:
        for other in RULES:
            if one != other:
                values = oracle.quantities(model, *inputs, one)
                pairs = zip(measured[one], measured[other], strict=True)
                apart = max(abs(a - b) for a, b in pairs if a is not None)
                assert apart > error_bound(model, values, 8.0, 1.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cap", [1, 2, 4])
def test_a_cap_limits_forecasts_in_a_row(guarded, tiny, rule, cap):
    model, inputs = tiny("dit").model, tiny("dit").inputs(STEPS, batch=2)
    values = oracle.quantities(model, *inputs, rule)
    _, slot = guarded_run(guarded("dit"), inputs, Guard(rule, 1e9, cap=cap))
    assert slot.executed == oracle.guarded(values, PLAN, rule, 1e9, cap=cap)[0]
    assert "." * cap in slot.executed and "." * (cap + 1) not in slot.executed


def test_accumulated_errors_add_up(guarded, tiny):
    model, inputs = tiny("dit").model, tiny("dit").inputs(STEPS, batch=2)
    values = oracle.quantities(model, *inputs, "fbcache")
    threshold = 2.5 * max(e for e in oracle.guarded(values, PLAN, "fbcache", 0.0)[1] if e is not None)
    _, slot = guarded_run(guarded("dit"), inputs, Guard("fbcache", threshold, accumulate=True))
    expected, _, compared = oracle.guarded(values, PLAN, "fbcache", threshold, accumulate=True)
    assert slot.executed == expected
    assert {"F", "."} <= set(expected[2:-1])
    limit = STEPS * error_bound(model, values, 1.0, 1.0)
    assert min(abs(c - threshold) for c in compared if c is not None) > limit


def test_the_order_of_the_expected_block_may_be_another(guarded, tiny):
    model, inputs = tiny("flux").model, tiny("flux").inputs(STEPS, batch=2)
    values = oracle.quantities(model, *inputs, "cg")
    for order in (0, 1):
        threshold = threshold_of(values, "cg", order)
        executed, errors, _ = oracle.guarded(values, PLAN, "cg", threshold, order)
        _, slot = guarded_run(guarded("flux"), inputs, Guard("cg", threshold, order=order))
        assert slot.executed == executed
        limit = error_bound(model, values, 8.0, 1.0)
        assert all(abs(a - b) <= limit for a, b in zip(slot.errors, errors, strict=True) if b is not None)


def test_a_guard_never_forecasts_where_the_plan_is_full(guarded, tiny):
    inputs = tiny("dit").inputs(STEPS, batch=2)
    for plan in ("FFFFFFFFFF", "F.F.F.F.F.", "FF..FF...F"):
        _, slot = guarded_run(guarded("dit"), inputs, Guard("cg", 1e9), plan)
        assert slot.executed == plan
        _, slot = guarded_run(guarded("dit"), inputs, Guard("cg", 1e-9), plan)
        assert slot.executed == "F" * STEPS


def test_an_error_that_is_no_number_is_over_every_threshold():
    guard = Guard("cg", 1e9)
    assert guard.forecasts([0.5]) and not guard.forecasts([math.nan])
    assert Guard("teacache", 1.0).forecasts([0.4, 0.5]) and not Guard("teacache", 1.0).forecasts([0.4, 0.7])
    assert Guard("cg", 1.0).forecasts([5.0, 0.5]) and not Guard("cg", 1.0, accumulate=True).forecasts([0.6, 0.5])
    assert not Guard("cg", 1.0).forecasts([1.0])


# What a guarded request is equal to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnx flux", "onnx dit", "onnx plain", "inductor plain", "eager hunyuan"])
def test_a_guarded_run_is_the_replay_of_what_it_executed(request, guarded, tiny, engine):
    """Probe and rest equal the full graph bit for bit: a guard changes which steps are full and nothing else."""
    kind, name = engine.split()
    denoiser = guarded(name) if kind == "eager" else request.getfixturevalue(kind)(name)
    sizes = {"height": 2, "width": 3, "text_tokens": 5} if engine == "onnx plain" else {}
    inputs = tiny(name).inputs(STEPS, batch=2, **sizes)
    for rule in denoiser.manifest.state.guards:
        values = oracle.quantities(tiny(name).model, *inputs, rule)
        for threshold in (threshold_of(values, rule), 1e-9):
            predictions, slot = guarded_run(denoiser, inputs, Guard(rule, threshold))
            again = run(denoiser, inputs, slot.executed)
            assert torch.equal(predictions, again), (rule, threshold, slot.executed)


def test_interleaved_guarded_requests_equal_the_same_alone(guarded, tiny):
    denoiser = guarded("dit")
    requests = [tiny("dit").inputs(STEPS, batch=2, seed=seed) for seed in (0, 1)]
    guards = [Guard("cg", threshold_of(oracle.quantities(tiny("dit").model, *requests[0], "cg"), "cg")), None]
    alone = [run(denoiser, inputs, PLAN, guard=guard) for inputs, guard in zip(requests, guards, strict=True)]
    slots = [open_slot(denoiser, inputs) for inputs in requests]
    for slot, inputs, guard in zip(slots, requests, guards, strict=True):
        begin(slot, inputs, PLAN, guard=guard)
    seen = [[advance(s, i, step) for s, i in zip(slots, requests, strict=True)] for step in range(STEPS)]
    for k in range(2):
        assert torch.equal(torch.stack([row[k] for row in seen]), alone[k])


def test_nothing_leaks_into_the_next_request(guarded, tiny):
    denoiser, inputs = guarded("dit"), tiny("dit").inputs(STEPS, batch=2)
    guard = Guard("teacache", threshold_of(oracle.quantities(tiny("dit").model, *inputs, "teacache"), "teacache"))
    first, slot = guarded_run(denoiser, inputs, guard)
    errors, executed = slot.errors, slot.executed
    guarded_run(denoiser, tiny("dit").inputs(STEPS, batch=2, seed=3), Guard("cg", 0.01), slot=slot)
    assert torch.equal(run(denoiser, inputs, PLAN, slot=slot), run(denoiser, inputs, PLAN))
    again, slot = guarded_run(denoiser, inputs, guard, slot=slot)
    assert torch.equal(again, first) and slot.executed == executed
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(slot.errors, errors, strict=True))


def test_one_decision_for_the_samples_of_a_batch(guarded, tiny):
    """The error of a batch is of all its elements: neither that of a sample, nor the mean of theirs."""
    model, (latents, timestep, conditioning) = tiny("dit").model, tiny("dit").inputs(STEPS, batch=2)
    latents = latents * torch.tensor([1.0, 3.0]).reshape(1, 2, *[1] * (latents.ndim - 2))
    inputs = (latents, timestep, conditioning)
    values = oracle.quantities(model, *inputs, "cg")
    _, slot = guarded_run(guarded("dit"), inputs, Guard("cg", 1e-9))
    _, expected, _ = oracle.guarded(values, PLAN, "cg", 1e-9)
    halves = [oracle.guarded([v[k : k + 1] for v in values], PLAN, "cg", 1e-9)[1] for k in range(2)]
    step = PLAN.index(".")
    limit = error_bound(model, values, 8.0, 1.0)
    assert abs(slot.errors[step] - expected[step]) <= limit
    assert all(abs(slot.errors[step] - half[step]) > limit for half in halves)


def test_a_branch_takes_the_decision_of_another(guarded, tiny):
    denoiser, inputs = guarded("dit"), tiny("dit").inputs(STEPS, batch=2)
    latents, _, _ = inputs
    for decided, expected in (("F" * STEPS, "F" * STEPS), (PLAN, PLAN), ("FF.F.F...F", "FF.F.F...F")):
        slot = open_slot(denoiser, inputs)
        begin(slot, inputs, PLAN, guard=Guard("cg", 1e-9 if "." in decided else 1e9))
        seen = [
            torch.from_numpy(slot.advance(x.numpy(), None, d).read()) for x, d in zip(latents, decided, strict=True)
        ]
        assert slot.executed == expected
        assert torch.equal(torch.stack(seen), run(denoiser, inputs, expected))


# The drop-in ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_branches_of_guidance_share_the_decision(guarded, tiny):
    denoiser = guarded("wan")
    latents, timestep, conditioning = tiny("wan").inputs(STEPS)
    values = oracle.quantities(tiny("wan").model, latents, timestep, conditioning, "cg")
    guard = Guard("cg", threshold_of(values, "cg"))
    transformer = denoiser.as_transformer(steps=STEPS, warmup=2, guard=guard)
    other = {n: v * 0.5 if v.is_floating_point() else v for n, v in conditioning.items()}
    for x, t in zip(latents, timestep, strict=True):
        for branch, given in (("cond", conditioning), ("uncond", other)):
            with transformer.cache_context(branch):
                transformer(hidden_states=x, timestep=t.expand(1), **given)
    expected = oracle.guarded(values, PLAN, "cg", guard.threshold)[0]
    assert transformer.executed == {"cond": expected, "uncond": expected}


def test_a_guarded_loop_of_unknown_length(guarded, tiny):
    denoiser, (latents, timestep, conditioning) = guarded("dit"), tiny("dit").inputs(STEPS)
    transformer = denoiser.as_transformer(warmup=3, guard=Guard("cg", 1e9))
    for x, t in zip(latents, timestep, strict=True):
        transformer(hidden_states=x, timestep=t.expand(1), **conditioning)
    assert transformer.executed == {"0": "FFF......."}


# Errors and warnings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("magic", 0.1), "guard is `magic`, expected one of `cg`, `fbcache`, `teacache`"),
        (("cg", 0.0), "threshold is 0.0, expected a number above 0"),
        (("cg", math.nan), "threshold is nan, expected a number above 0"),
        (("cg", math.inf), "threshold is inf, expected a number above 0"),
        (("cg", 0.1, 5), "order is 5, expected 0 to 4"),
        (("fbcache", 0.1, 1), "order is given for guard `fbcache`, expected it for `cg` alone"),
        (("cg", 0.1, None, 0), "cap is 0, expected at least 1"),
    ],
)
def test_a_guard_that_is_none(arguments, text):
    with pytest.raises(ConfigError) as error:
        Guard(*arguments)
    assert text in str(error.value)


def test_a_bundle_without_the_rule(eager, guarded, tiny):
    with pytest.raises(ConfigError, match=r"guard is `cg`, expected one .*it has none.*; export again with --guard cg"):
        eager("dit").defaults.capacity.check(Forecasts(Plan("F"), 0, guard=Guard("cg", 0.1)))
    with pytest.raises(ConfigError, match="order of the guard is 4, expected at most 2"):
        guarded("dit").defaults.capacity.check(Forecasts(Plan("F"), 0, guard=Guard("cg", 0.1, order=4)))
    with pytest.raises(ConfigError, match="guard is `cg`, expected one"):
        eager("dit").as_transformer(guard=Guard("cg", 0.1))
    with pytest.raises(ConfigError, match="interval is given beside guard, expected a plan, or steps and warmup"):
        guarded("dit").as_transformer(guard=Guard("cg", 0.1), interval=3)


def test_weights_of_a_profile_do_not_go_with_a_guard(guarded, tiny):
    inputs = tiny("dit").inputs(STEPS, batch=2)
    slot = open_slot(guarded("dit"), inputs)
    with pytest.raises(ConfigError, match=r"weights are given beside guard cg at 0\.1"):
        begin(slot, inputs, PLAN, guard=Guard("cg", 0.1), weights=[[]] * STEPS)


def test_a_step_that_is_not_settled(guarded, tiny):
    inputs = tiny("dit").inputs(STEPS, batch=2)
    slot = open_slot(guarded("dit"), inputs)
    begin(slot, inputs, PLAN, guard=Guard("cg", 0.1))
    with pytest.raises(StepError, match="step 0 is not settled, expected it staged under a guard; call stage"):
        _ = slot.upcoming


def test_a_guard_that_decides_nothing_is_reported():
    errors = [math.nan, math.nan, 0.3, 0.5, math.nan]
    never = warning_of(Guard("cg", 0.1), "FF..F", "FFFFF", errors)
    assert never is not None and "never forecast" in never and "0.3 to 0.5: raise the threshold" in never
    always = warning_of(Guard("cg", 0.9), "FF..F", "FF..F", errors)
    assert always is not None and "always forecast" in always and "lower the threshold" in always
    assert warning_of(Guard("cg", 0.4), "FF..F", "FF.FF", errors) is None
    assert warning_of(Guard("cg", 0.4), "FFFFF", "FFFFF", errors) is None


# The command line ----------------------------------------------------------------------------------------------------


def replayed(bundle, tmp_path, inputs, *options):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    latents, timestep, conditioning = inputs
    given, made = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"latents": latents.numpy(), "timestep": timestep.float().numpy(), **as_arrays(conditioning)}, given)
    code = cli.main(["replay", str(bundle), "--inputs", str(given), "--outputs", str(made), *options])
    if code:
        return code, None, None
    with safe_open(made, "pt") as file:
        return code, file.get_tensor("noise_pred"), file.metadata()["plan"]


def test_replay_under_a_guard(bundles, onnx, tiny, tmp_path, capsys):
    inputs = tiny("flux").inputs(STEPS)
    threshold = threshold_of(oracle.quantities(tiny("flux").model, *inputs, "cg"), "cg")
    code, seen, executed = replayed(bundles("flux"), tmp_path, inputs, "--guard", "cg", "--threshold", str(threshold))
    assert code == 0 and {"F", "."} <= set(executed[2:-1])
    assert torch.equal(seen, run(onnx("flux"), inputs, executed))
    assert "errors" in capsys.readouterr().out
    assert replayed(bundles("flux"), tmp_path, inputs, "--guard", "cg", "--threshold", "1e-9")[2] == "F" * STEPS
    assert "never forecast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--guard", "fbcache", "--threshold", "0.1"), "guard is `fbcache`, expected one"),
        (("--guard", "cg"), "threshold is missing, expected a number above 0 for guard cg"),
        (("--guard", "cg", "--threshold", "0"), "threshold is 0.0, expected a number above 0"),
        (("--guard", "cg", "--threshold", "nan"), "threshold is nan, expected a number above 0"),
        (("--threshold", "0.1"), "threshold is given without a guard, expected one beside it"),
        (("--cap", "3"), "cap is given without a guard"),
        (("--guard", "cg", "--threshold", "0.1", "--plan", "FF.."), "plan FF.. is 4 steps long, expected 10"),
    ],
)
def test_bad_guards_on_the_command_line(bundles, tiny, tmp_path, capsys, options, text):
    inputs = tiny("plain").inputs(STEPS, batch=2, height=2, width=3)
    code, _, _ = replayed(bundles("plain"), tmp_path, inputs, *options)
    assert code == 2
    said = capsys.readouterr().err
    assert text in said and "Traceback" not in said
