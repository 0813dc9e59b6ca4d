"""Calibration: what a calibrated profile is worth on the embedded models, on samples that it has never seen.

    python tools/calibration.py                            both models, about an hour on two idle cores
    python tools/calibration.py --model dit --keep RECORD  the guards alone, beside the other rows of a filed record

Every row draws the same 64 samples (captions and seeds none of which were calibrated on) as the untouched model drew
them with all its steps, and is compared with what that drew: PSNR of all pictures together and how it spreads over the
pictures. Beside each profile stand the paper's plan of as many full steps at the same order, a loop of only as many
steps, and every guard over the paper's forecasts, at the threshold that gives as many full steps on the samples that
were calibrated on. A guard decides for one sample at a time, as it does when one picture is asked for. A profile that
`calibrate` would refuse is a row too, with the reason. The record is written after every budget. Nothing in it but the
seconds depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from record import circumstances, record_options, write_record
from tqdm import tqdm

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft, write_bundle
from taylorseer_export.compile.parts import parts_asked
from taylorseer_export.embedded import requests
from taylorseer_export.embedded.picture import grid
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import RULES, Forecasts, Guard, Plan
from taylorseer_export.report.calibrate import Calibration, Calibrator, Way
from taylorseer_export.report.guards import fit_threshold
from taylorseer_export.report.plan_search import regular_plan
from taylorseer_export.report.samples import groups, prompts_of
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import Denoiser, load

ORDER = 2
LOOPS = ((50, (18, 12, 10, 8)), (20, (10,)))  # steps, full steps
FITTED, HELD_OUT, JUDGED = 8, 8, 64  # the first two as of `calibrate`
FIRST_FITTED, FIRST_JUDGED = 1_000_000, 0  # seeds
SHOWN = 6  # samples in the picture


@dataclass(frozen=True)
class Row:
    """One way to sample, judged on samples that took no part in the calibration; PSNR in dB against all-full.

    `full_steps`: of the plan; of a guard, its budget. `executed`: full steps that ran, the mean over the samples.
    `gain_mean` and `gain_std`: over the paper's plan, picture by picture. The latent PSNR of the samples calibrated on
    is left out where a guard is judged. `refused`: what `calibrate` says in the place of writing a profile, if it does.
    `seconds`: that the search for the plan or the threshold took.
    """

    way: str
    steps: int
    full_steps: int
    executed: float
    plan: str
    psnr: float
    psnr_mean: float
    psnr_std: float
    psnr_worst: float
    latent_error: float
    fitted_latent_psnr: float | None = None
    held_out_latent_psnr: float | None = None
    threshold: float | None = None
    gain_mean: float | None = None
    gain_std: float | None = None
    refused: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Judged:
    """Latents `[N, ...]` and pictures of all samples, and the full steps that ran for each group."""

    latents: np.ndarray
    pictures: np.ndarray
    executed: list[int]


def judge(denoiser: Denoiser, samples: Sequence[sampling.Request], forecasts: Forecasts) -> Judged:
    """Draw all samples in one way."""
    latents, pictures, executed = [], [], []
    pool = sampling.Pool(denoiser)
    for request in samples:
        result = sampling.sample(denoiser, request, forecasts, pool.of(request))
        latents.append(result.latents)
        pictures.append(requests.pictures(denoiser, request, result))
        executed.append(result.executed.count("F"))
    drawn, made = (np.concatenate(parts).astype(np.float64) for parts in (latents, pictures))
    return Judged(drawn, made, executed)


def one_by_one(denoiser: Denoiser, count: int, seed: int, least: int = 1) -> Sequence[sampling.Request]:
    """The samples of `groups`, each as a request of its own."""
    size = len(groups(denoiser, count, seed, least=least)[0].latents)
    ranges = [range(first, first + size) for first in range(0, count, size)]
    prompts = [prompt for numbers in ranges for prompt in prompts_of(denoiser, numbers, seed)]
    return groups(denoiser, count, seed, prompts or None, least=count)


def row_of(name: str, steps: int, count: int, plan: Plan, seen: Judged, exact: Judged) -> tuple[Row, np.ndarray]:
    """The row of one way, and the PSNR of each picture in dB."""
    squares = np.maximum(((seen.pictures - exact.pictures) ** 2).reshape(len(exact.pictures), -1).mean(1), 1e-2)
    each = 10 * np.log10(255**2 / squares)
    row = Row(
        name, steps, count, float(np.mean(seen.executed)), str(plan), float(10 * np.log10(255**2 / squares.mean())),
        float(each.mean()), float(each.std(ddof=1)), float(each.min()),
        float(np.linalg.norm(seen.latents - exact.latents) / np.linalg.norm(exact.latents)),
    )  # fmt: skip
    return row, each


def refusal(found: Calibration) -> str | None:
    """What `calibrate` says in the place of writing a profile."""
    try:
        found.check()
    except ConfigError as error:
        return str(error)
    return None


def beside(paper: Row, kept: Sequence[Row]) -> list[Row]:
    """The rows of a filed record with as many full steps, if its row of the paper's plan is the one just made."""
    rows = [row for row in kept if (row.steps, row.full_steps) == (paper.steps, paper.full_steps)]
    filed = [row.psnr_mean for row in rows if row.way == paper.way and row.plan == paper.plan]
    if len(filed) != 1 or not np.isclose(filed[0], paper.psnr_mean, rtol=1e-4, atol=0):
        raise SystemExit(f"the paper's plan is at {filed} dB in the record, expected {paper.psnr_mean}; keep another")
    return rows


def rows_of(
    denoiser: Denoiser, steps: int, counts: tuple[int, ...], bar: tqdm, kept: Sequence[Row] = ()
) -> Iterator[tuple[list[Row], list[tuple[str, np.ndarray]]]]:
    """For each number of full steps its rows, the calibrated first, and the pictures of each.

    Rows of `kept` are not made again, but for the paper's plan, which tells whether the samples are the same.
    """
    fitted = groups(denoiser, FITTED, FIRST_FITTED, least=2)
    fitted_alone = one_by_one(denoiser, FITTED, FIRST_FITTED, least=2)
    calibrator, base = None, Forecasts(Plan.guarded(steps, denoiser.defaults.warmup), ORDER)
    if not kept:
        window = min(steps - 1, 4 * -(-steps // min(counts)))
        held_out = groups(denoiser, HELD_OUT, FIRST_FITTED + FITTED)
        calibrator = Calibrator(denoiser, fitted, held_out, steps, window, bar.update)
    judged, alone = groups(denoiser, JUDGED, FIRST_JUDGED), one_by_one(denoiser, JUDGED, FIRST_JUDGED)
    nothing, pool = np.zeros(1), sampling.Pool(denoiser)
    exact = judge(denoiser, judged, Forecasts(Plan.all_full(steps), 0))
    for count in counts:
        rows: list[Row] = []
        shown, each = [("all full", exact.pictures)], {}
        if calibrator is None:
            paper = Forecasts(regular_plan(steps, count, denoiser.defaults.warmup), ORDER)
            ways = {"paper's plan": Way(paper, nothing, nothing)}
        else:
            began = time.perf_counter()
            found = calibrator.calibrate(count, ORDER)
            seconds = time.perf_counter() - began
            ways = {"calibrated": found.calibrated, "paper's plan": found.regular, "fewer steps": found.fewer_steps}
        for name, way in ways.items():
            seen = judge(denoiser, judged, way.forecasts)
            row, each[name] = row_of(name, steps, len(way.forecasts.plan.full_steps), way.forecasts.plan, seen, exact)
            rows.append(replace(row, fitted_latent_psnr=way.fitted, held_out_latent_psnr=way.held_out))
            shown.append((f"{name}, {count}", seen.pictures))
        if calibrator is None:
            rows = beside(rows[0], kept)
        else:
            rows[0] = replace(rows[0], refused=refusal(found), seconds=round(seconds, 1))
        for rule in denoiser.manifest.state.guards:
            began = time.perf_counter()
            threshold = fit_threshold(denoiser, pool, fitted_alone, base, rule, count, bar.update)
            seconds = time.perf_counter() - began
            seen = judge(denoiser, alone, replace(base, guard=Guard(rule, threshold)))
            row, each[f"guard {rule}"] = row_of(f"guard {rule}", steps, count, base.plan, seen, exact)
            rows.append(replace(row, threshold=threshold, seconds=round(seconds, 1)))
            shown.append((f"guard {rule}, {count}", seen.pictures))
        for k, row in enumerate(rows):
            if row.way in each:
                gains = each[row.way] - each["paper's plan"]
                rows[k] = replace(row, gain_mean=float(gains.mean()), gain_std=float(gains.std(ddof=1)))
        yield rows, shown


def markdown(family: str, rows: list[Row]) -> str:
    """One table per model."""
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = [
        f"### {FAMILIES[family].title} (embedded), {JUDGED} samples not calibrated on: dB (spread) [full steps]",
        "",
        f"| full steps | {' | '.join(ways)} |",
        f"|---|{'--:|' * len(ways)}",
    ]
    for k in range(0, len(rows), len(ways)):
        cells = [
            f"{row.psnr_mean:.1f} ({row.psnr_std:.1f}) [{row.executed:.1f}]{' refused' if row.refused else ''}"
            for row in rows[k : k + len(ways)]
        ]
        lines.append(f"| {rows[k].full_steps} of {rows[k].steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "dit"), nargs="+", default=["flux", "dit"], help="(default: both)")
    record_options(parser)
    parser.add_argument("--keep", type=Path, help="record of one --model whose rows stand; only guards are judged")
    args = parser.parse_args()
    began = time.perf_counter()
    record = circumstances(args.out, args.allow_dirty) | {
        "order": ORDER, "fitted": FITTED, "held_out": HELD_OUT, "judged": JUDGED, "models": {}
    }  # fmt: skip
    name = "calibration" if len(args.model) == 2 else f"calibration-{args.model[0]}"
    filed = {}
    if args.keep:
        filed = json.loads(args.keep.read_text(encoding="utf-8"))
        record["kept"] = {"record": args.keep.name, "date": filed["date"], "commit": filed["commit"]}
    for family in args.model:
        checkpoint = open_checkpoint(None, FAMILIES[family])
        rows: list[Row] = []
        filed_rows = filed["models"][family]["rows"] if filed else []
        kept = [Row(**{"executed": row["full_steps"], **row}) for row in filed_rows if "guard" not in row["way"]]
        with tempfile.TemporaryDirectory() as folder, tqdm(desc=family, unit="loop step", file=sys.stderr) as bar:
            options = Options(order=ORDER, interval=6, warmup=3, guards=RULES, parts=parts_asked(checkpoint, False))
            denoiser = load(write_bundle(draft(checkpoint, options), Path(folder), "calibration"), threads=1)
            for steps, counts in LOOPS:
                for found, shown in rows_of(denoiser, steps, counts, bar, kept):
                    rows += found
                    done = {(row.steps, row.full_steps) for row in rows}
                    waiting = [row for row in kept if (row.steps, row.full_steps) not in done]
                    record["models"][family] = {
                        "weights_sha256": checkpoint.sha256(), "rows": [asdict(row) for row in rows + waiting]
                    }  # fmt: skip
                    record["seconds"] = round(time.perf_counter() - began, 1)
                    path = write_record(name, record, args.out, args.allow_dirty)
                    if not kept and (steps, found[0].full_steps) == (LOOPS[0][0], min(counts)):
                        made = [[p.astype(np.uint8) for p in pictures[:SHOWN]] for _, pictures in shown]
                        grid(made, 3, [title for title, _ in shown]).save(args.out / f"calibration-{family}.png")
        print(markdown(family, rows) + "\n", flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
