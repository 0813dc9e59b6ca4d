"""The tools that measure: what they make of runs, without the runs."""

import math
from dataclasses import replace

import calibration
import numpy as np
import prefix
import pytest
import quality
import quantised
import readme
from weight_formats import flops

from taylorseer_export.method import Plan
from taylorseer_export.report.evaluate import Row


def row(step_ms, executed, prepare_ms=1.0, error=0.5):
    """Of one way, as `evaluate` returns it."""
    shown = np.zeros((0, 1, 1, 3), np.uint8)
    return Row("way", executed, 0, 0, prepare_ms, step_ms, error, 30.0, 20.0, 0.9, {}, (), (executed,), shown)


def test_quality_takes_the_least_of_each_step_and_the_ideal_loop_of_its_rows():
    turns = [row((10.0, 30.0, 2.0, 2.0), "FF..", 3.0), row((20.0, 12.0, 4.0, 1.0), "FF..")]
    full = quality._numbers(None, None, None, [row((10.0,) * 50, "F" * 50, error=0.0)], 100)
    made = quality._numbers("module", 1, 3, turns, 100)
    assert (made.full_steps, made.steps, made.state_bytes, full.state_bytes) == (2, 4, 200, 0)
    assert (made.full_ms, made.forecast_ms, made.loop_ms) == (11.0, 1.5, 10 + 12 + 2 + 1 + 1.0)
    assert quality.speedup(made, [full, made]) == pytest.approx(50 * 11.0 / (2 * 11.0 + 2 * 1.5))
    few = replace(made, granularity=None, order=None, interval=None, psnr=None, forecast_ms=None, latent_error=0.7)
    lines = quality.markdown("dit", [full, made, few]).splitlines()
    assert [line.split(" | ")[1] for line in lines[4:]] == ["all full", "module", "fewer steps"]
    assert [("**" in line, "same" in line) for line in lines[4:]] == [(False, False), (True, False), (False, True)]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_calibration_judges_pictures_by_definition_and_keeps_rows_of_the_same_samples_alone():
    exact = calibration.Judged(np.full((2, 3), 2.0), np.full((2, 4, 4, 3), 100.0), [4, 4])
    seen = calibration.Judged(exact.latents + 1, exact.pictures + np.array([1.0, 10.0])[:, None, None, None], [2, 1])
    paper, each = calibration.row_of("paper's plan", 4, 2, Plan.parse("FF.."), seen, exact)
    assert each == pytest.approx([20 * math.log10(255), 20 * math.log10(25.5)])
    assert (paper.executed, paper.latent_error) == (1.5, pytest.approx(0.5))
    assert paper.psnr == pytest.approx(10 * math.log10(255**2 / 50.5)) and paper.psnr_worst == each.min()
    same, _ = calibration.row_of("x", 4, 2, Plan.parse("FF.."), exact, exact)
    assert same.psnr == pytest.approx(10 * math.log10(255**2 / 1e-2))  # a bound in the place of infinity
    others = [replace(paper, way="calibrated", refused="why"), replace(paper, full_steps=3)]
    assert calibration.beside(paper, [paper, *others]) == [paper, others[0]]
    with pytest.raises(SystemExit, match=r"the paper's plan is at \[.*\] dB in the record, expected"):
        calibration.beside(replace(paper, psnr_mean=paper.psnr_mean + 0.1), [paper])
    last = calibration.markdown("dit", [paper, others[0]]).splitlines()[-1]
    assert last.startswith("| 2 of 4 |") and last.endswith("[1.5] refused |") and last.count("[1.5]") == 2


def test_of_keys_made_once_a_full_step_costs_the_same_however_many_pictures(drafts, traced):
    """But for attention over them; where their rows go through every full step that grows by their products."""
    forms = {name: (drafts(name, "residual"), traced(name).trace.names) for name in prefix.FORMS}
    lines = prefix.table(forms, (1, 4), 64)
    assert [line.split(" | ")[1] for line in lines[2:]] == 2 * list(prefix.FORMS.values())

    def products(family, graph):
        """Of one picture and of four, without attention."""
        made, names = forms[family]
        cut = getattr(made.split, graph)
        sizes = [replace(made, typical={**made.typical, "condition_tokens": 64 * count}) for count in (1, 4)]
        return [flops(one, cut, names, cut.parameters()) for one in sizes]

    (few, many), (same, still) = products("flux2-edit", "full"), products("flux2-kv", "full")
    assert many > few and same == still
    before, after = products("flux2-kv", "prepare")
    assert after > before


def test_a_page_says_what_is_faster_from_its_record():
    def of(**ratios):
        cells = {"disk_bytes": 2e6, "resident_bytes": 3e6, "full_ms": 4.0}
        return {"cost": [{"weights": n, "full_to_fp32": r, **cells} for n, r in {"fp32": 1.0, **ratios}.items()]}

    assert readme.faster(of(fp8=0.99, int8=0.9)) == ["int8"]
    said = readme.quantised_cost_table(of(fp8=0.99, int8=0.9)).splitlines()
    assert said[2] == "| fp32 | 2.0 MB | 3 MB | 4 ms | 1.00 |" and said[-2] == ""
    assert said[-1].startswith("Faster than float32 is `int8` alone.") and said[-1].endswith("this engine: `fp8`.")
    none = readme.quantised_cost_table(of(fp8=1.1)).splitlines()[-1]
    assert none.startswith("None is faster.") and "not recommended for speed" in none
    assert readme.quantised_cost_table(of(int8=0.9)).endswith("`int8` alone.")
    exact = np.full((2, 4, 4, 3), 7, np.uint8)
    assert quantised.psnr(exact, exact) is None and quantised.psnr(exact + 1, exact) == 48.13
    one = {"weights": "fp8", "quantisation_psnr": 46.09, "forecast_psnr": 42.93, "both_psnr": None}
    assert readme.quantised_fidelity_table({"fidelity": [one]}).endswith("| fp8 | 46.1 dB | 42.9 dB | none |")
