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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from record import RESULTS, circumstances, dirty_option, write_record
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from taylorseer_export import cli
from taylorseer_export.embedded import requests
from taylorseer_export.embedded.picture import grid
from taylorseer_export.method import Forecasts, Plan
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
SCALE = {"flux": 3, "dit": 4}


@dataclass(frozen=True)
class Row:
    """One way to sample: `latency_ms` is the whole loop of the denoiser, for all pictures of the row at once."""

    label: str
    plan: str
    full_steps: int
    full_ms: float
    forecast_ms: float | None
    latency_ms: float
    speedup: float
    psnr: float | None
    ssim: float


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
        results[family] = [row.__dict__ for row in rows]
        print(_table(family, rows))
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
    plans = [("all full", Plan.all_full(STEPS))]
    plans += [(f"interval {n}", Plan.regular(STEPS, n, WARMUP)) for n in INTERVALS]
    branches = sampling.Pool(denoiser).of(request)
    sampling.sample(denoiser, request, Forecasts(Plan("FF."), ORDER), branches=branches)  # warm up both engines
    made, rows = [], []
    with tqdm(total=STEPS * (len(plans) + 1), desc=f"sampling {family}", leave=False, file=sys.stderr) as bar:
        while len(rows) <= len(plans):
            label, plan = plans[len(rows)] if len(rows) < len(plans) else _fewer_steps(rows)
            result = sampling.sample(
                denoiser, request, Forecasts(plan, ORDER), branches=branches, on_step=lambda _: bar.update()
            )
            made.append(requests.pictures(denoiser, request, result))
            rows.append(_row(label, plan, result, made[0], made[-1], rows))
    names = [f"{x}" for x in (CAPTIONS if family == "flux" else LABELS)]
    labels = [f"{row.label}, {row.speedup:.1f}x" for row in rows]
    return rows, grid(made, SCALE[family], labels, names)


def _fewer_steps(rows: list[Row]) -> tuple[str, Plan]:
    """As many full steps as cost what the last plan cost."""
    steps = max(1, round(STEPS * rows[-1].latency_ms / rows[0].latency_ms))
    return f"{steps} steps", Plan.all_full(steps)


def _request(denoiser: Denoiser) -> sampling.Request:
    if denoiser.manifest.family == "flux":
        return requests.caption_request(denoiser, CAPTIONS, range(len(CAPTIONS)))
    return requests.label_request(denoiser, LABELS, range(len(LABELS)))


def _row(
    label: str, plan: Plan, result: sampling.Result, exact: np.ndarray, made: np.ndarray, before: list[Row]
) -> Row:
    times, kinds = np.array(result.milliseconds), np.array(list(result.executed))
    latency = float(times.sum() + result.prepare_ms)
    return Row(
        label=label,
        plan=result.executed,
        full_steps=result.executed.count("F"),
        full_ms=float(np.median(times[kinds == "F"])),
        forecast_ms=float(np.median(times[kinds == "."])) if "." in result.executed else None,
        latency_ms=latency,
        speedup=before[0].latency_ms / latency if before else 1.0,
        psnr=float(peak_signal_noise_ratio(exact, made)) if before else None,
        ssim=float(np.mean([structural_similarity(a, b, channel_axis=2) for a, b in zip(exact, made, strict=True)])),
    )


def _table(family: str, rows: list[Row]) -> str:
    lines = [
        f"{family:<11}{'full steps':>11}{'full ms':>9}{'forecast ms':>13}{'loop ms':>9}{'speed-up':>10}"
        f"{'PSNR dB':>9}{'SSIM':>7}  plan"
    ]
    for r in rows:
        forecast = "-" if r.forecast_ms is None else f"{r.forecast_ms:.2f}"
        psnr = "same" if r.psnr is None else f"{r.psnr:.1f}"
        lines.append(
            f"{r.label:<11}{f'{r.full_steps} of {len(r.plan)}':>11}{r.full_ms:>9.2f}{forecast:>13}{r.latency_ms:>9.0f}"
            f"{r.speedup:>9.2f}x{psnr:>9}{r.ssim:>7.3f}  {r.plan}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
