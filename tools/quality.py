"""Quality: what each granularity, order and interval costs in fidelity on the embedded models.

    python tools/quality.py                                the whole table, about five minutes on two idle cores
    python tools/quality.py --markdown FILE                and the same as markdown

Every row samples the same noise and the same conditioning as `all full`, all steps computed on the same engines, and is
compared by `report/evaluate.py` with what that drew: PSNR and SSIM of the pictures, and the relative L2 error of the
latents (the norm of the difference over the norm of all-full). The rows `fewer steps` are the honest baseline: loops
with only as many steps as a plan has full steps, all of them full. Orders below the bundle's are chosen at run time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo import CAPTIONS
from record import ROOT, circumstances, record_options, write_record
from tqdm import tqdm

from taylorseer_export.bundle.memory import size, state_bytes
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft, write_bundle
from taylorseer_export.compile.parts import parts_asked
from taylorseer_export.embedded import requests
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.evaluate import Case, Row, evaluate
from taylorseer_export.runtime import sampling
from taylorseer_export.runtime.denoiser import Denoiser, load

STEPS, WARMUP = 50, 3
GRANULARITIES = ("module", "residual", "last")
ORDERS = (0, 1, 2)
INTERVALS = (3, 5, 6, 9)
FLUX_SAMPLES = 16
LABELS, SEEDS = tuple(range(10)), 2


@dataclass(frozen=True)
class Numbers:
    """What one way gave.

    Attributes:
        granularity, order, interval: Of the forecasts; None in baselines.
        psnr: Of all pictures together, in dB; None where they are the same byte for byte.
        psnr_worst: Of the worst picture, in dB.
        ssim: Mean over the pictures.
        latent_error: Norm of the difference of the latents over the norm of those of all-full.
        state_bytes: Taylor buffers of one slot of one picture that this order needs.
        full_ms, forecast_ms: Median over the steps of a loop, for the whole batch; of each step the least over repeats.
        loop_ms: Prepare and all steps.
    """

    granularity: str | None
    order: int | None
    interval: int | None
    plan: str
    steps: int
    full_steps: int
    psnr: float | None
    psnr_worst: float | None
    ssim: float
    latent_error: float
    state_bytes: int
    full_ms: float
    forecast_ms: float | None
    loop_ms: float


def bundles(family: str, folder: Path, orders: tuple[int, ...]) -> Iterator[tuple[str, Denoiser]]:
    """Granularity and denoiser, one export each at the highest order."""
    checkpoint = open_checkpoint(None, FAMILIES[family])
    for granularity in GRANULARITIES:
        options = Options(order=max(orders), interval=6, warmup=WARMUP, steps=STEPS, granularity=granularity,
                          parts=parts_asked(checkpoint, False))  # type: ignore[arg-type]  # fmt: skip
        yield granularity, load(write_bundle(draft(checkpoint, options), folder, granularity))


def request_for(denoiser: Denoiser) -> sampling.Request:
    """FLUX: the demo's captions in turn, a seed each. DiT: every label with every seed."""
    if denoiser.manifest.family == "flux":
        captions = [CAPTIONS[k % len(CAPTIONS)] for k in range(FLUX_SAMPLES)]
        return requests.prompt_request(denoiser, captions, range(FLUX_SAMPLES))
    seeds = [seed for seed in range(SEEDS) for _ in LABELS]
    return requests.label_request(denoiser, LABELS * SEEDS, seeds)


def compare(
    family: str, folder: Path, orders: tuple[int, ...], intervals: tuple[int, ...], repeats: int
) -> list[Numbers]:
    """All rows of one model; the first is all-full. Each granularity is compared with all-full on its own engines."""
    plans = {n: Plan.regular(STEPS, n, WARMUP) for n in intervals}
    counts = sorted({len(p.full_steps) for p in plans.values()}, reverse=True)
    rows: list[Numbers] = []
    with tqdm(desc=f"sampling {family}", unit="step", file=sys.stderr) as bar:
        for granularity, denoiser in bundles(family, folder, orders):
            ways = [Case("all full", Forecasts(Plan.all_full(STEPS), 0))]
            kinds: list[tuple[str | None, int | None, int | None]] = [(None, None, None)]
            for count in () if rows else counts:
                ways.append(Case("fewer steps", Forecasts(Plan.all_full(count), 0)))
                kinds.append((None, None, None))
            for order in orders:
                for interval, plan in plans.items():
                    ways.append(Case(f"{granularity}, order {order}, interval {interval}", Forecasts(plan, order)))
                    kinds.append((granularity, order, interval))
            request = request_for(denoiser)
            sizes = sampling.Loop(denoiser, request, ways[0].forecasts).sizes
            entry = state_bytes(denoiser.manifest, sizes) // (max(orders) + 1) // len(request.latents)
            # All ways in turn, so that a busy minute of the machine hits all of them.
            turns = [evaluate(denoiser, [request], ways, on_step=bar.update) for _ in range(repeats)]
            for kind, seen in zip(kinds, zip(*turns, strict=True), strict=True):
                if seen[0].name != ways[0].name or not rows:
                    rows.append(_numbers(*kind, seen, entry))
            denoiser.close()
    return rows


def _numbers(
    granularity: str | None, order: int | None, interval: int | None, turns: Sequence[Row], entry: int
) -> Numbers:
    """Of one way: the first turn has the pictures; of each step the least time counts, when nobody interfered."""
    row, (executed,) = turns[0], turns[0].executed
    times, kinds = np.array([turn.step_ms for turn in turns]).min(0), np.array(list(executed))
    assert row.ssim is not None
    return Numbers(
        granularity=granularity,
        order=order,
        interval=interval,
        plan=executed,
        steps=len(times),
        full_steps=int((kinds == "F").sum()),
        psnr=row.psnr,
        psnr_worst=row.psnr_worst,
        ssim=row.ssim,
        latent_error=row.latent_error,
        state_bytes=0 if order is None else entry * (order + 1),
        full_ms=float(np.median(times[kinds == "F"])),
        forecast_ms=float(np.median(times[kinds == "."])) if "." in executed else None,
        loop_ms=float(times.sum() + min(turn.prepare_ms for turn in turns)),
    )


def speedup(row: Numbers, rows: list[Numbers]) -> float:
    """Of the steps of a loop over as many full steps as all-full has, dimensionless.

    Neither kind of step costs more at another order or interval on the same engines, so each is taken where it was
    least disturbed: as the least among the rows of that granularity.
    """
    same = [r for r in rows if r.granularity == row.granularity]
    full = min(r.full_ms for r in same)
    forecast = min((r.forecast_ms for r in same if r.forecast_ms is not None), default=0.0)
    return STEPS * full / (row.full_steps * full + (row.steps - row.full_steps) * forecast)


def markdown(family: str, rows: list[Numbers]) -> str:
    """One table per model; among rows with as many full steps the least latent error is bold."""
    lines = [
        f"### {FAMILIES[family].title} (embedded), {STEPS} steps, warmup {WARMUP}",
        "",
        "| full steps | granularity | order | interval | PSNR dB (worst) | SSIM | latent error | state per picture "
        "| forecast ms | speed-up |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    whole = rows[0]
    for full in sorted({row.full_steps for row in rows}, reverse=True):
        group = [row for row in rows if row.full_steps == full]
        least = min(row.latent_error for row in group)
        for row in group:
            bold = "**" if row.latent_error == least and len(group) > 1 else ""
            psnr = "same" if row.psnr is None else f"{row.psnr:.1f} ({row.psnr_worst:.1f})"
            name = row.granularity or ("all full" if row is whole else "fewer steps")
            forecast = "" if row.forecast_ms is None else f"{row.forecast_ms:.2f}"
            cells = [f"{full} of {row.steps}", name, _cell(row.order), _cell(row.interval), psnr, f"{row.ssim:.3f}",
                     f"{bold}{row.latent_error:.4f}{bold}", size(row.state_bytes) if row.state_bytes else "",
                     forecast, f"{speedup(row, rows):.2f}x"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "dit"), nargs="+", default=["flux", "dit"], help="(default: both)")
    parser.add_argument("--order", type=int, nargs="+", default=list(ORDERS), help="(default: 0 1 2)")
    parser.add_argument("--interval", type=int, nargs="+", default=list(INTERVALS), help="steps (default: 3 5 6 9)")
    parser.add_argument("--repeats", type=int, default=3, help="loops of each row, for times (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    record_options(parser)
    args = parser.parse_args()
    began = time.perf_counter()
    record = circumstances(args.out, args.allow_dirty)
    record |= {"steps": STEPS, "warmup": WARMUP, "repeats": args.repeats, "models": {}}
    tables = []
    for family in args.model:
        weights = open_checkpoint(None, FAMILIES[family]).sha256()
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(family, Path(folder), tuple(args.order), tuple(args.interval), args.repeats)
        if weights != open_checkpoint(None, FAMILIES[family]).sha256():
            raise SystemExit(f"the weights of {family} changed while they were measured; run this again")
        record["models"][family] = {"weights_sha256": weights, "rows": [asdict(row) for row in rows]}
        tables.append(markdown(family, rows))
        print(tables[-1] + "\n")
    record["seconds"] = round(time.perf_counter() - began, 1)
    path = write_record("quality", record, args.out, args.allow_dirty)
    if args.markdown:
        args.markdown.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
