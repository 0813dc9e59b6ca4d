"""The demo: export the embedded models, sample them with and without forecasting, and show what it costs and gives.

    make demo
    python tools/demo.py --file      also files numbers and pictures in tools/results/

Prints one table per model and writes demo/flux.png, demo/dit.png and demo/results.json. Speeds are of this machine;
the ratios within a table come from one run. The last row is the honest baseline: a loop with fewer steps, all of them
full, as many as cost what the interval-6 loop costs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, circumstances, dirty_option, write_record
from tqdm import tqdm

from taylorseer_export import cli
from taylorseer_export.embedded import requests
from taylorseer_export.embedded.picture import grid
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.evaluate import Case, Row, evaluate, number
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import Denoiser, load

STEPS, ORDER, WARMUP = 50, 2, 3
INTERVALS = (3, 5, 6)
OUT = Path("demo")
CAPTIONS = (
    "a red circle",
    "a blue square left of a yellow triangle",
    "a green triangle above a red square",
    "a purple cross",
    "a yellow circle right of a blue cross",
    "an orange square below a green circle",
)
LABELS = tuple(range(10))
SCALE = {"flux": 2, "dit": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description="Export and sample the embedded models.")
    parser.add_argument("--file", action="store_true", help="file numbers and pictures in tools/results/")
    dirty_option(parser)
    given = parser.parse_args()
    where = circumstances(RESULTS if given.file else None, given.allow_dirty)
    OUT.mkdir(exist_ok=True)
    began = time.perf_counter()
    results = {}
    for family in ("flux", "dit"):
        if code := cli.main([family, "--order", str(ORDER), "--warmup", str(WARMUP), "--interval", "6"]):
            return code
        rows, picture = _compare(family, Path("engines") / f"{family}-tiny")
        picture.save(OUT / f"{family}.png")
        results[family] = [_numbers(row, rows[0]) for row in rows]
        print(_table(family, results[family]))
    (OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if given.file:
        write_record("demo", {**where, "models": results}, allow_dirty=given.allow_dirty)
        for family in results:
            shutil.copy(OUT / f"{family}.png", RESULTS / f"{family}.png")
    print(f"pictures: {OUT}/flux.png, {OUT}/dit.png  ({time.perf_counter() - began:.0f} s)")
    return 0


def _compare(family: str, folder: Path) -> tuple[list[Row], object]:
    denoiser = load(folder)
    request = _request(denoiser)
    ways = [Case("all full", Forecasts(Plan.all_full(STEPS), 0))]
    ways += [Case(f"interval {n}", Forecasts(Plan.regular(STEPS, n, WARMUP), ORDER)) for n in INTERVALS]
    count = len(request.latents)
    with tqdm(desc=f"sampling {family}", unit="step", leave=False, file=sys.stderr) as bar:
        rows = evaluate(denoiser, [request], ways, shown=count, on_step=bar.update)
        fewer = max(1, round(STEPS * _latency(rows[-1]) / _latency(rows[0])))  # as many as cost what the last plan cost
        baseline = [ways[0], Case(f"{fewer} steps", Forecasts(Plan.all_full(fewer), 0))]
        rows.append(evaluate(denoiser, [request], baseline, shown=count, on_step=bar.update)[1])
    names = [f"{x}" for x in (CAPTIONS if family == "flux" else LABELS)]
    labels = [f"{row.name}, {_latency(rows[0]) / _latency(row):.1f}x" for row in rows]
    return rows, grid([row.shown for row in rows], SCALE[family], labels, names)


def _latency(row: Row) -> float:
    """Prepare and all steps, in ms."""
    return row.prepare_ms + row.loop_ms


def _request(denoiser: Denoiser) -> sampling.Request:
    if denoiser.manifest.family == "flux":
        return requests.prompt_request(denoiser, CAPTIONS, range(len(CAPTIONS)))
    return requests.label_request(denoiser, LABELS, range(len(LABELS)))


def _numbers(row: Row, first: Row) -> dict[str, Any]:
    """A row of the record; `latency_ms` is the whole loop of the denoiser, for all pictures of the row at once."""
    return {
        "label": row.name,
        "plan": row.executed[0],
        "full_steps": row.executed[0].count("F"),
        "full_ms": row.median_ms("F"),
        "forecast_ms": row.median_ms("."),
        "latency_ms": _latency(row),
        "speedup": _latency(first) / _latency(row),
        "psnr": row.psnr,
        "ssim": row.ssim,
    }


def _table(family: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{family:<11}{'full steps':>11}{'full ms':>9}{'forecast ms':>13}{'loop ms':>9}{'speed-up':>10}"
        f"{'PSNR dB':>9}{'SSIM':>7}  plan"
    ]
    for r in rows:
        forecast = "-" if r["forecast_ms"] is None else f"{r['forecast_ms']:.2f}"
        of = f"{r['full_steps']} of {len(r['plan'])}"
        lines.append(
            f"{r['label']:<11}{of:>11}{r['full_ms']:>9.2f}{forecast:>13}"
            f"{r['latency_ms']:>9.0f}{r['speedup']:>9.2f}x{number(r['psnr'], 1):>9}{r['ssim']:>7.3f}  {r['plan']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
