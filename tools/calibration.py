"""Calibration: what a calibrated profile is worth on the embedded models, on samples that it has never seen.

    python tools/calibration.py                            both models, about ten minutes on two idle cores

Every row draws the same 64 samples (captions and seeds none of which were calibrated on) as the untouched model drew
them with all its steps, and is compared with what that drew: PSNR of all pictures together and how it spreads over the
pictures. Beside each profile stand the paper's plan of as many full steps at the same order, and a loop of only as many
steps. Nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from record import RESULTS, ROOT, circumstances, write_record
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from taylorseer_export.build.export import Options, draft, write_bundle
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
FITTED, HELD_OUT, JUDGED = 8, 4, 64
FIRST_FITTED, FIRST_JUDGED = 1_000_000, 0  # seeds
SHOWN = 6  # samples in the picture


@dataclass(frozen=True)
class Row:
    """One way to sample, judged on samples that took no part in the calibration; PSNR in dB against all-full."""

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
) -> tuple[list[Row], list[tuple[str, np.ndarray]]]:
    """The rows of one loop length, and the pictures of the smallest number of full steps."""
    window = min(steps - 1, 4 * -(-steps // min(counts)))
    fitted, held_out = (
        groups(denoiser, count, FIRST_FITTED + first) for count, first in ((FITTED, 0), (HELD_OUT, FITTED))
    )
    calibrator = Calibrator(denoiser, fitted, held_out, steps, window, bar.update)
    judged = groups(denoiser, JUDGED, FIRST_JUDGED)
    exact, drawn = judge(denoiser, judged, Way(Plan("F" * steps), 0, None, 0.0, 0.0))
    rows, shown = [], [("all full", drawn)]
    for count in counts:
        found = calibrator.calibrate(count, ORDER)
        ways = (("calibrated", found.calibrated), ("paper's plan", found.regular), ("fewer steps", found.fewer_steps))
        for name, way in ways:
            latents, pictures = judge(denoiser, judged, way)
            squares = np.maximum(((pictures - drawn) ** 2).reshape(len(drawn), -1).mean(1), 1e-2)
            each = 10 * np.log10(255**2 / squares)
            rows.append(
                Row(
                    name, steps, count if name == "fewer steps" else len(way.plan.full_steps), str(way.plan),
                    float(10 * np.log10(255**2 / squares.mean())), float(each.mean()), float(each.std(ddof=1)),
                    float(each.min()), float(np.linalg.norm(latents - exact) / np.linalg.norm(exact)),
                    way.fitted, way.held_out,
                )
            )  # fmt: skip
            if count == min(counts):
                shown.append((f"{name}, {count}", pictures))
            bar.update()
    return rows, shown


def markdown(family: str, rows: list[Row]) -> str:
    """One table per model."""
    lines = [
        f"### {FAMILIES[family].title} (embedded), {JUDGED} samples not calibrated on",
        "",
        "| full steps | calibrated dB (spread) | paper's plan dB (spread) | fewer steps dB (spread) |",
        "|---|--:|--:|--:|",
    ]
    for k in range(0, len(rows), 3):
        cells = [f"{row.psnr:.1f} ({row.psnr_std:.1f})" for row in rows[k : k + 3]]
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
    for family in args.model:
        checkpoint = open_checkpoint(None, FAMILIES[family])
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder, tqdm(desc=family, unit="loop step", file=sys.stderr) as bar:
            options = Options(order=ORDER, interval=6, warmup=3)
            denoiser = load(write_bundle(draft(checkpoint, options), Path(folder), "calibration"), threads=1)
            for steps, counts in LOOPS:
                found, shown = rows_of(denoiser, steps, counts, bar)
                rows += found
                if steps == LOOPS[0][0]:
                    made = [[p.astype(np.uint8) for p in pictures[:SHOWN]] for _, pictures in shown]
                    args.out.mkdir(parents=True, exist_ok=True)
                    grid(made, 3, [name for name, _ in shown]).save(args.out / f"calibration-{family}.png")
        record["models"][family] = {"weights_sha256": checkpoint.sha256(), "rows": [asdict(row) for row in rows]}
        print(markdown(family, rows) + "\n", flush=True)
    record["seconds"] = round(time.perf_counter() - began, 1)
    print(write_record("calibration" if len(args.model) == 2 else f"calibration-{args.model[0]}", record, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
