"""cache-dit in `tools/bench.py`: it computes the steps of our plan, and as the model does, or the bench ends."""

import sys
from argparse import Namespace

import bench
import contestants
import numpy as np
import pytest
from tiny_models import tiny_flux

from taylorseer_export.method import Plan

PLAN = Plan("FFF..F..F.")


@pytest.fixture
def cache_dit():
    missing = f"cache-dit is not installed: {contestants.INSTALL_CACHE_DIT}"
    return pytest.importorskip("cache_dit", reason=missing)


@pytest.fixture
def args():
    """The bench's arguments for a loop of `PLAN` and the `residual` engine."""
    return Namespace(model="mid-flux", steps=len(PLAN), interval=3, warmup=3, order=[1], granularity=["residual"],
                     layout=["snapshots"], batch=1, image_tokens=16, text_tokens=6, threads=1, loops=1, turn=0,
                     hook=[], no_eager=True, cache_dit=True)  # fmt: skip


@pytest.fixture
def case(args, tmp_path, monkeypatch):
    """A FLUX of two double and two single blocks, in place of the bench's."""
    monkeypatch.setattr(contestants, "mid_flux", tiny_flux)
    return contestants.Case(args, tmp_path)


def run(loop):
    loop.begin()
    loop.advance(loop.steps)
    return np.stack(loop.outputs)


def test_every_loop_computes_the_steps_of_the_plan(cache_dit, case):
    loop, computed = case.cache_dit(PLAN, 1)
    plain, _ = case.eager()
    expected, full = run(plain), list(PLAN.full_steps)
    first = run(loop)
    assert computed == full
    assert np.array_equal(run(loop), first) and computed == full
    np.testing.assert_allclose(first[full], expected[full], rtol=1e-5, atol=1e-5)
    assert 1e-3 < bench.error(loop, plain) < 0.5


def test_a_plan_of_full_steps_is_the_plain_model(cache_dit, case):
    loop, computed = case.cache_dit(Plan.all_full(len(PLAN)), 1)
    plain, _ = case.eager()
    np.testing.assert_allclose(run(loop), run(plain), rtol=1e-5, atol=1e-5)
    assert computed == list(range(len(PLAN))) and bench.error(loop, plain) < 1e-5


def test_a_step_between_is_forecast_with_the_order(cache_dit, case):
    first, second = (run(case.cache_dit(PLAN, order)[0]) for order in (1, 2))
    forecast = [k for k, kind in enumerate(str(PLAN)) if kind == "."]
    assert np.abs(first[forecast] - second[forecast]).max() > 1e-3


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("FF...F..F.", "ran 1 of 4 blocks in step 2, expected 4 under plan FFF..F..F.; install the version"),
        ("FFFF.F..F.", "ran 4 of 4 blocks in step 3, expected 1 under plan FFF..F..F.; install the version"),
    ],
)
def test_other_steps_than_planned_end_the_bench(cache_dit, case, monkeypatch, mask, said):
    made, wrong = cache_dit.DBCacheConfig, [int(kind == "F") for kind in mask]
    monkeypatch.setattr(cache_dit, "DBCacheConfig", lambda **given: made(**given | {"steps_computation_mask": wrong}))
    loop, _ = case.cache_dit(PLAN, 1)
    with pytest.raises(SystemExit, match=said.replace(".", r"\.")):
        run(loop)


def test_a_loop_that_begins_on_the_state_of_the_last_ends_the_bench(cache_dit, case, monkeypatch):
    monkeypatch.setattr(cache_dit, "refresh_context", lambda model: None)
    loop, computed = case.cache_dit(PLAN, 1)
    run(loop)
    assert computed == list(PLAN.full_steps)
    with pytest.raises(SystemExit, match="expected 4 under plan"):
        run(loop)


@pytest.mark.slow
def test_the_bench_reports_it_beside_our_engines(cache_dit, case, args, tmp_path):
    result = bench.bench(args, tmp_path)
    (ours,), theirs = result["engines"], result["others"]["cache-dit"]
    assert result["plan"] == str(Plan.regular(len(PLAN), 3, 3)) and ours["error"] > 0 and theirs["error"] > 0
    assert theirs["computed_steps"] == [k for k, kind in enumerate(result["plan"]) if kind == "F"]
    assert theirs["loop_over"] == {ours["name"]: theirs["loop_over_ours"]} and theirs["order"] == 1
    assert "as planned; loop / ours: " in bench.table(result)
    assert result["others"]["untapped"]["error"] == 0 and result["others"]["fewer steps"]["error"] is None


def test_without_the_library_the_bench_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    said = r"^cache-dit is missing \(.*\), expected it installed for --cache-dit; pip install -c tools/constraints\.txt"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--cache-dit"])
    with pytest.raises(SystemExit, match=said):
        bench.main()


def test_another_model_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--cache-dit", "--model", "dit-xl"])
    with pytest.raises(SystemExit, match="--cache-dit is given for dit-xl, expected mid-flux; leave one"):
        bench.main()
