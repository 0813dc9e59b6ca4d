"""Calibration: plans against exhaustive search, fits against their definition, the command on embedded models."""

import shutil
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from taylorseer_export import cli
from taylorseer_export.bundle.profile import read_profile
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Guard, Plan, forecast_weights
from taylorseer_export.report import calibrate
from taylorseer_export.report.calibrate import Calibrator, psnr_of_each
from taylorseer_export.report.guards import fit_threshold
from taylorseer_export.report.plan_search import Planner, best_weights, directions, regular_plan
from taylorseer_export.report.reuse import ReuseErrors, all_full
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Pool, sample
from taylorseer_export.runtime.trajectory import random_conditioning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits(residual_digits, tmp_path_factory):
    """The embedded DiT at granularity `residual`, in a folder that profiles may be added to."""
    return Path(shutil.copytree(residual_digits, tmp_path_factory.mktemp("calibrate") / "dit-tiny"))


@pytest.fixture(scope="module")
def calibrator(digits):
    denoiser = load(digits, threads=1)
    return Calibrator(denoiser, groups(denoiser, 4, 50, least=2), groups(denoiser, 2, 60), steps=8, window=7, moves=2)


def random_errors(steps, window, seed=0):
    errors = ReuseErrors(steps, window)
    rows = np.random.default_rng(seed).standard_normal((len(errors.index), 5))
    # An error grows with the distance, as those of a model do.
    rows *= np.array([s - t for t, s in errors.index]).reshape(-1, 1)
    errors.products = rows @ rows.T
    return errors


def cost_of(errors, plan, order, coherent, tilt):
    """The cost that `Planner` minimises, from its definition: vectors of the errors instead of their products."""
    values, vectors = np.linalg.eigh(errors.products)
    rows = vectors * np.sqrt(np.maximum(values, 0))
    total, sum_of_segment = 0.0, 0.0
    for step in range(len(plan)):
        if plan.is_full(step):
            sum_of_segment = np.zeros(len(rows))
            continue
        own = rows[[errors.index[t, step] for t in plan.history(step, order)]] * np.exp(tilt * step / len(plan) / 2)
        weights = best_weights(own @ own.T, np.array(forecast_weights(plan.history(step, order), step, order)))
        total += (1 - coherent) * np.square(weights @ own).sum()
        total -= coherent * np.square(sum_of_segment).sum()
        sum_of_segment = sum_of_segment + weights @ own
        total += coherent * np.square(sum_of_segment).sum()
    return total


@pytest.mark.parametrize(("coherent", "tilt"), [(1.0, 0.0), (0.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("order", [0, 1])
def test_planning_finds_what_exhaustive_search_finds(order, coherent, tilt):
    """Two snapshots of history are all in the state, so the search is exact."""
    for seed in range(3):
        errors = random_errors(9, 8, seed)
        plans = [
            Plan("".join("F" if s in (0, *rest) else "." for s in range(9))) for rest in combinations(range(1, 9), 3)
        ]
        least = min(cost_of(errors, plan, order, coherent, tilt) for plan in plans)
        found = Planner(errors, order, tilt).best(4, coherent)
        assert len(found.full_steps) == 4
        assert cost_of(errors, found, order, coherent, tilt) == pytest.approx(least, rel=1e-9)


def test_weights_sum_to_one_and_are_the_best_that_do():
    rows = np.random.default_rng(0).standard_normal((3, 40))
    products = rows @ rows.T
    start = np.array([1.0, -3.0, 3.0])
    found = best_weights(products, start)
    assert found.sum() == pytest.approx(1)
    ridge = calibrate.RIDGE * np.trace(products) / 3

    def loss(weights):
        return weights @ products @ weights + ridge * np.square(weights - start).sum()

    for direction in directions(3).T:
        for step in (1e-3, -1e-3):
            assert loss(found) < loss(found + step * direction)


def test_a_short_window_still_gives_a_plan():
    found = Planner(random_errors(20, 3), 2).best(3, 1.0)
    assert len(found.full_steps) == 3


@pytest.mark.parametrize(
    ("full", "expected"), [(10, "FFF.....F.....F"), (18, "FFF..F..F"), (50, "FFFFF"), (1, "F....")]
)
def test_the_regular_plan_of_as_many_full_steps(full, expected):
    plan = regular_plan(50, full, 3)
    assert len(plan.full_steps) == full and str(plan).startswith(expected)
    assert len(regular_plan(8, 7, 2).full_steps) == 5  # none has 7, and all full would be no comparison


def test_reuse_errors_are_what_they_say(digits):
    """Two pairs, from their definition: a request whose only full step is the source."""
    denoiser = load(digits, threads=1)
    (request,) = groups(denoiser, 1, 7)
    slot, errors = Pool(denoiser).of(request), ReuseErrors(6, 5)
    trajectory = all_full(denoiser, slot, request, 6, lambda: None)
    errors.add(denoiser, slot, trajectory, lambda: None)
    plan = Plan("F..")
    slot.start(request.branches, Forecasts(plan, 0), trajectory.model_timesteps[2:5])
    expected = []
    for step, noise_pred in enumerate([slot.step(np.concatenate([x, x]))[:, :1] for x in trajectory.latents[2:5]], 2):
        conditional, unconditional = np.split(noise_pred, 2)
        guided = unconditional + request.guidance_scale * (conditional - unconditional)
        expected.append(np.square(trajectory.reach[step] * (trajectory.predictions[step] - guided)).sum())
    pairs = [errors.index[2, 3], errors.index[2, 4]]
    assert errors.products[pairs[0], pairs[0]] / errors.products[pairs[1], pairs[1]] == pytest.approx(
        expected[1] / expected[2], rel=1e-4
    )
    assert np.trace(errors.products) == pytest.approx(1) == errors.samples
    assert np.linalg.eigvalsh(errors.products).min() > -1e-6 * errors.products.max()


def test_memory_does_not_grow_with_the_samples(digits):
    """At its end numpy holds as much for 4 groups as for 2, and at its highest less than half of what the latents of
    the others would add; the rest is Python's own small objects, freed when it likes."""
    denoiser, steps, size, few, many = load(digits, threads=1), 4, 8, 2, 4
    Calibrator(denoiser, groups(denoiser, 2, 0, least=2), [], steps, 3)  # what is loaded once is there by now
    peaks, kept = [], []
    for count in (few, many):
        samples = groups(denoiser, count * size, 0, least=count)
        one = samples[0].latents.nbytes
        assert len(samples) == count and len(samples[0].latents) == size
        tracemalloc.start(1)
        calibrator = Calibrator(denoiser, samples, samples, steps, 3, moves=0)
        calibrator.calibrate(2, 1)
        kept.append(sum(trace.size for trace in tracemalloc.take_snapshot().traces if trace.size >= one))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert kept[0] == kept[1]
    assert peaks[1] - peaks[0] < 2 * (many - few) * (steps + 1) * one / 2, peaks


def test_samples_that_are_kept_would_be_counted(digits):
    """The other side of the test above: with all latents in memory it fails."""
    denoiser = load(digits, threads=1)
    samples = groups(denoiser, 8, 0, least=4)
    tracemalloc.start(1)
    before = tracemalloc.get_traced_memory()[0]
    kept = [samples[k] for k in range(4)]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown >= sum(r.latents.nbytes for r in kept)


def test_calibrated_is_nearer_on_samples_it_was_fitted_to(calibrator):
    found = calibrator.calibrate(4, 2)
    assert len(found.calibrated.forecasts.plan.full_steps) == 4
    assert found.calibrated.fitted > max(found.regular.fitted, found.fewer_steps.fitted)
    assert all(sum(w) == pytest.approx(1) for w in found.calibrated.forecasts.weights if w)


def test_a_gain_that_does_not_carry_over_is_refused(calibrator):
    found = calibrator.calibrate(4, 2)
    found.check()
    lost = replace(found.calibrated, held_out_each=found.regular.held_out_each - 1)
    with pytest.raises(ConfigError, match=r"-1.0 dB on 2 others, expected at least half as much; raise --samples"):
        replace(found, calibrated=lost).check()
    fewer = replace(found.fewer_steps, held_out_each=found.calibrated.held_out_each + 1)
    with pytest.raises(ConfigError, match="of 4 steps, all full; sample with --steps 4, or raise --full-steps"):
        replace(found, fewer_steps=fewer).check()


def test_the_verdict_says_whether_any_plan_beats_fewer_steps(calibrator):
    found = calibrator.calibrate(4, 2)
    assert found.verdict == f"the plan beats fewer steps: {found.margin:+.1f} dB at 4 full steps"
    worse = replace(found.fewer_steps, held_out_each=found.calibrated.held_out_each + 1)
    lost = replace(found, fewer_steps=worse)
    assert lost.verdict == "the plan does not beat fewer steps: -1.0 dB at 4 full steps"
    none = replace(lost, others={2: -3.0, 3: 0.0})
    assert none.verdict == (
        "no plan of 8 steps beats fewer steps (-3.0 dB at 2, +0.0 dB at 3, -1.0 dB at 4 full steps): take fewer, and "
        "forecast nothing"
    )
    assert replace(none, others={3: 2.0}).verdict.startswith("a plan of 8 steps beats fewer steps at 1 of 2 budgets: ")


def test_chance_alone_is_no_reason_to_refuse(calibrator):
    """A third of the gain remains: refused where held-out samples agree on that, not where they scatter widely."""
    found = calibrator.calibrate(4, 2)
    found = replace(found, fewer_steps=replace(found.fewer_steps, held_out_each=np.zeros(2)))
    gain = found.calibrated.fitted - found.regular.fitted
    for scatter, refused in ((0.01, True), (1.0, False)):
        each = found.regular.held_out_each + gain / 3 + gain * scatter * np.array([-1, 1])
        with pytest.raises(ConfigError, match="raise --samples") if refused else nullcontext():
            replace(found, calibrated=replace(found.calibrated, held_out_each=each)).check()


def test_psnr_is_of_each_sample_by_itself():
    """Against its definition; and a sample of a wide range leaves the others' as they are."""
    exact = np.random.default_rng(0).standard_normal((3, 4, 4))
    seen = exact + 0.01 * np.random.default_rng(1).standard_normal(exact.shape)
    found = psnr_of_each(seen, exact)
    for k in range(3):
        error = np.sqrt(np.mean((seen[k] - exact[k]) ** 2))
        assert found[k] == pytest.approx(20 * np.log10((exact[k].max() - exact[k].min()) / error))
    exact[0] *= 100
    assert psnr_of_each(seen, exact)[1:] == pytest.approx(found[1:]) and psnr_of_each(seen, exact)[0] < 20


def test_a_psnr_is_reached_with_the_fewest_full_steps(calibrator):
    target = calibrator.calibrate(4, 2).calibrated.held_out
    found = calibrator.calibrate_to(target, 2)
    assert found.calibrated.held_out >= target and len(found.calibrated.forecasts.plan.full_steps) <= 4
    with pytest.raises(ConfigError, match="--psnr is 300, expected at most"):
        calibrator.calibrate_to(300, 2)


def test_command_line(digits, tmp_path, capsys):
    arguments = ["calibrate", str(digits), "--steps", "8", "--samples", "2", "--held-out", "2", "--threads", "1"]
    assert cli.main([*arguments, "--speedup", "2", "--name", "half"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 8 steps full" in printed and "2 fitted, 2 held out" in printed
    assert "guard cg at" in printed
    profile = read_profile(open_bundle(digits), "half")
    # A loop of few steps: every number of full steps was tried against a loop of as many, and the verdict says so.
    assert list(profile.margins) == [str(n) for n in range(1, 8)]
    assert profile.margins["4"] == profile.calibrated.held_out - profile.fewer_steps.held_out
    won = sum(margin > 0 for margin in profile.margins.values())
    assert f"verdict   a plan of 8 steps beats fewer steps at {won} of 7 budgets: " in printed
    assert profile.thresholds.keys() == {"cg"}
    picture = tmp_path / "seven.png"
    run = ["run", str(digits), "--label", "7", "--profile", "half", "--out", str(picture), "--threads", "1"]
    assert cli.main(run) == 0 and picture.exists()
    assert profile.plan in capsys.readouterr().out
    guarded = ["run", str(digits), "--profile", "half", "--guard", "cg", "--out", str(picture), "--threads", "1"]
    assert cli.main(guarded) == 0
    assert f"guard cg at {profile.thresholds['cg']:g}" in capsys.readouterr().out


def test_a_threshold_keeps_the_budget_and_spends_it(digits):
    """With any lower threshold that bisection could have told apart, there would be more full steps than allowed."""
    denoiser = load(digits, threads=1)
    requests, plan = groups(denoiser, 4, 80, least=2), Plan.guarded(12, 3)
    pool = Pool(denoiser)
    base = denoiser.forecasts(plan=plan)
    threshold = fit_threshold(denoiser, pool, requests, base, "cg", 7)

    def full_steps(at):
        runs = [sample(denoiser, r, replace(base, guard=Guard("cg", at))).executed for r in requests]
        return np.mean([executed.count("F") for executed in runs])

    assert full_steps(threshold) <= 7 < full_steps(threshold * 0.8)
    with pytest.raises(ConfigError, match=r"full steps are 3, expected 4 to 11 under a guard that starts from FFF\."):
        fit_threshold(denoiser, pool, requests, base, "cg", 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--full-steps", "8", "--steps", "8"], "full steps are 8, expected 1 to 7"),
        (["--speedup", "1"], "--speedup is 1, expected a number above 1"),
        (["--speedup", "nan"], "is nan, expected a number above 1"),
        (["--speedup", "100"], "full steps are 0, expected 1 to 49"),
        (["--psnr", "-3"], "is -3, expected a number above 0"),
        (["--full-steps", "4", "--order", "4"], "--order is 4, expected at most 2"),
        (["--full-steps", "4", "--prompts", "{empty}"], "is empty, expected one caption or class per line"),
        (["--full-steps", "4", "--prompts", "/no/such/file"], "is not readable"),
        (["--full-steps", "4", "--prompts", "{words}"], "has the line `seven`, expected a class per line"),
        ([], "one of the arguments --full-steps --speedup --psnr is required"),
    ],
)
def test_bad_input_is_one_sentence(digits, tmp_path, capsys, arguments, expected):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "words").write_text("seven\n")
    given = [a.format(empty=tmp_path / "empty", words=tmp_path / "words") for a in arguments]
    assert cli.main(["calibrate", str(digits), "--name", "x", *given]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_profile_excludes_a_plan(digits, capsys):
    assert cli.main(["run", str(digits), "--profile", "x", "--plan", "FF.."]) == 2
    assert "plan is given beside profile, expected one of them" in capsys.readouterr().err


SIZES = {"wan": {"frames": 3, "rows": 2, "columns": 3}, "hunyuan-replace": {"frames": 3, "rows": 2, "columns": 3}}


@pytest.mark.parametrize("name", SIZES)
def test_other_families_from_tensors(eager, name):
    """Guidance in two calls, and a given first frame: all-full is what `sample` makes, and calibration comes nearer."""
    denoiser = eager(name, "residual")
    typical = {dimension: d.typical for dimension, d in denoiser.manifest.dimensions.items()}
    sizes = {**typical, **SIZES[name], "text_tokens": 4}
    tensors = random_conditioning(denoiser, {**sizes, "batch": 4}, guided=True)
    samples = groups(denoiser, 4, 0, None, tensors, 2, sizes=(SIZES[name], None))
    others = groups(denoiser, 2, 9, None, tensors, sizes=(SIZES[name], None))
    calibrator = Calibrator(denoiser, samples, others, 6, 5, moves=0)
    for k, request in enumerate(samples):
        exact = sample(denoiser, request, Forecasts(Plan.all_full(6), 0)).latents
        assert np.array_equal(calibrator.fitted.latents(k)[-1], exact)
        assert (request.negative is not None) == (name == "wan")
    found = calibrator.calibrate(3, 1)
    assert found.calibrated.fitted > found.regular.fitted and len(found.calibrated.forecasts.plan.full_steps) == 3


def test_what_tensors_must_say(eager):
    denoiser = eager("wan", "residual")
    rows = np.zeros((3, 4, int(denoiser.constants["encoder_hidden_states"].shape[-1])), np.float32)
    both = {"encoder_hidden_states": rows, "negative_encoder_hidden_states": rows[:2]}
    for tensors, scale, expected in (
        (both, None, "2 rows of `negative_encoder_hidden_states` and 3 of `encoder_hidden_states`, expected as many"),
        ({"encoder_hidden_states": rows}, None, "has no tensor `negative_...`.*or pass --guidance-scale 1"),
        (None, None, "--inputs is missing"),
    ):
        with pytest.raises(ConfigError, match=expected):
            groups(denoiser, 2, 0, None, tensors, guidance_scale=scale)
    with pytest.raises(ConfigError, match=r"--prompts is given for wan.*pass its outputs with --inputs"):
        groups(denoiser, 2, 0, ["a cat"], None)
