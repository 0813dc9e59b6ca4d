"""Calibration: what a calibrated profile is worth on the embedded models, on samples that it has never seen.

    python tools/calibration.py                            both models, about fifteen minutes on two idle cores

Every row draws the same 64 samples (captions and seeds none of which were calibrated on) as the untouched model drew
them with all its steps, and is compared with what that drew: PSNR of all pictures together and how it spreads over the
pictures. Beside each profile stand the paper's plan of as many full steps at the same order, and a loop of only as many
steps. A profile that `calibrate` would refuse is a row too, with the reason. The record is written after every budget.
Nothing in it but the seconds depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from record import RESULTS, ROOT, circumstances, write_record
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from taylorseer_export.build.export import Options, draft, write_bundle
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.checkpoint import open_checkpoint
from taylorseer_export.method import Plan
from taylorseer_export.report.calibrate import Calibrator, Way
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.picture import grid

ORDER = 2
LOOPS = ((50, (18, 12, 10, 8)), (20, (10,)))  # steps, full steps
FITTED, HELD_OUT, JUDGED = 8, 8, 64  # the first two as of `calibrate`
FIRST_FITTED, FIRST_JUDGED = 1_000_000, 0  # seeds
SHOWN = 6  # samples in the picture


@dataclass(frozen=True)
class Row:
    """One way to sample, judged on samples that took no part in the calibration; PSNR in dB against all-full.

    `gain_mean` and `gain_std`: of a calibrated way over the paper's plan, picture by picture. `refused`: what
    `calibrate` says in the place of writing it, if it does. `seconds`: that the search for it took.
    """

    way: str
    steps: int
    full_steps: int
    plan: str
    psnr: float
    psnr_mean: float
    psnr_std: float
    psnr_worst: float
    latent_error: float
    fitted_latent_psnr: float
    held_out_latent_psnr: float
    gain_mean: float | None = None
    gain_std: float | None = None
    refused: str | None = None
    seconds: float | None = None


def judge(denoiser: Denoiser, requests: list[sampling.Request], way: Way) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[N, ...]` and pictures of all requests."""
    latents, pictures = [], []
    slot = None
    for request in requests:
        loop = sampling.Loop(denoiser, request, way.plan)
        slot = slot or denoiser.slot(loop.sizes)
        result = sampling.sample(denoiser, request, way.plan, way.order, slot=slot, weights=way.weights)
        latents.append(result.latents)
        pictures.append(sampling.pictures(denoiser, request, result))
    return np.concatenate(latents).astype(np.float64), np.concatenate(pictures).astype(np.float64)


def rows_of(
    denoiser: Denoiser, steps: int, counts: tuple[int, ...], bar: tqdm
) -> Iterator[tuple[list[Row], list[tuple[str, np.ndarray]]]]:
    """For each number of full steps its three rows, and the pictures of each."""
    window = min(steps - 1, 4 * -(-steps // min(counts)))
    fitted = groups(denoiser, FITTED, FIRST_FITTED, least=2)
    held_out = groups(denoiser, HELD_OUT, FIRST_FITTED + FITTED)
    calibrator = Calibrator(denoiser, fitted, held_out, steps, window, bar.update)
    judged = groups(denoiser, JUDGED, FIRST_JUDGED)
    nothing = np.zeros(1)
    exact, drawn = judge(denoiser, judged, Way(Plan("F" * steps), 0, None, nothing, nothing))
    for count in counts:
        began = time.perf_counter()
        found = calibrator.calibrate(count, ORDER)
        seconds, refused = time.perf_counter() - began, None
        try:
            found.check()
        except ConfigError as error:
            refused = str(error)
        ways = (("calibrated", found.calibrated), ("paper's plan", found.regular), ("fewer steps", found.fewer_steps))
        rows, shown, each = [], [("all full", drawn)], {}
        for name, way in ways:
            latents, pictures = judge(denoiser, judged, way)
            squares = np.maximum(((pictures - drawn) ** 2).reshape(len(drawn), -1).mean(1), 1e-2)
            each[name] = 10 * np.log10(255**2 / squares)
            rows.append(
                Row(
                    name, steps, len(way.plan.full_steps), str(way.plan),
                    float(10 * np.log10(255**2 / squares.mean())), float(each[name].mean()),
                    float(each[name].std(ddof=1)), float(each[name].min()),
                    float(np.linalg.norm(latents - exact) / np.linalg.norm(exact)), way.fitted, way.held_out,
                )
            )  # fmt: skip
            shown.append((f"{name}, {count}", pictures))
        gains = each["calibrated"] - each["paper's plan"]
        rows[0] = replace(
            rows[0], gain_mean=float(gains.mean()), gain_std=float(gains.std(ddof=1)), refused=refused,
            seconds=round(seconds, 1),
        )  # fmt: skip
        yield rows, shown


def markdown(family: str, rows: list[Row]) -> str:
    """One table per model."""
    lines = [
        f"### {FAMILIES[family].title} (embedded), {JUDGED} samples not calibrated on",
        "",
        "| full steps | calibrated dB (spread) | paper's plan dB (spread) | fewer steps dB (spread) |",
        "|---|--:|--:|--:|",
    ]
    for k in range(0, len(rows), 3):
        cells = [
            f"{row.psnr_mean:.1f} ({row.psnr_std:.1f}){' refused' if row.refused else ''}" for row in rows[k : k + 3]
        ]
        lines.append(f"| {rows[k].full_steps} of {rows[k].steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "dit"), nargs="+", default=["flux", "dit"], help="(default: both)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default: tools/results)")
    args = parser.parse_args()
    began = time.perf_counter()
    record = circumstances() | {
        "order": ORDER, "fitted": FITTED, "held_out": HELD_OUT, "judged": JUDGED, "models": {}
    }  # fmt: skip
    name = "calibration" if len(args.model) == 2 else f"calibration-{args.model[0]}"
    for family in args.model:
        checkpoint = open_checkpoint(None, FAMILIES[family])
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder, tqdm(desc=family, unit="loop step", file=sys.stderr) as bar:
            options = Options(order=ORDER, interval=6, warmup=3)
            denoiser = load(write_bundle(draft(checkpoint, options), Path(folder), "calibration"), threads=1)
            for steps, counts in LOOPS:
                for found, shown in rows_of(denoiser, steps, counts, bar):
                    rows += found
                    record["models"][family] = {
                        "weights_sha256": checkpoint.sha256(), "rows": [asdict(row) for row in rows]
                    }  # fmt: skip
                    record["seconds"] = round(time.perf_counter() - began, 1)
                    path = write_record(name, record, args.out)
                    if (steps, found[0].full_steps) == (LOOPS[0][0], min(counts)):
                        made = [[p.astype(np.uint8) for p in pictures[:SHOWN]] for _, pictures in shown]
                        grid(made, 3, [title for title, _ in shown]).save(args.out / f"calibration-{family}.png")
        print(markdown(family, rows) + "\n", flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
