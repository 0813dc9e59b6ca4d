"""Quantised weights on the CPU: what each format costs in fidelity, and what it saves in bytes and in time.

    python tools/quantised.py --table cost                       less than three minutes on two idle cores
    python tools/quantised.py --table cost --engine inductor     the same as AOTInductor packages, which take longer
    python tools/quantised.py --table calibrated --way fp8       less than five
    python tools/quantised.py --table fidelity --way fp8         float32 and fp8 alone; with --model dit of digits

Fidelity, on the embedded FLUX or DiT by default: the same noise and prompts in bundles of each format. PSNR of all
steps full against the unquantised bundle is the quantisation error; that of the plan against the format's own all-full
is the forecast error; that of the plan against the unquantised all-full is both together.

Cost, on a FLUX of the bench model's width, 512, with one block of each kind instead of twelve, since exports take most
of the time: bytes on disk, memory of a process that has loaded the bundle and made full steps, without what is freed,
and the time of a full step as the median of ratios to float32, measured in turns, so that a busy minute hits all.

Calibrated, on the same model: a plan and weights fitted on the engines of the format, the paper's plan of as many
full steps and a loop of only as many, by the PSNR of their latents to the format's own all-full, on samples that took
no part.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from quality import request_for
from record import ROOT, circumstances, record_options, write_record
from tiny_models import mid_flux
from tqdm import tqdm

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft, trace_model, write_bundle
from taylorseer_export.compile.parts import parts_asked
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.calibrate import Calibrator
from taylorseer_export.report.evaluate import Case, evaluate
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.trajectory import random_trajectory

# Name -> (--weights, --activations).
WAYS: dict[str, tuple[str | None, str | None]] = {
    "fp32": (None, None),
    "fp8": ("fp8", "none"),
    "fp8 by token": ("fp8", "token"),
    "int8": ("int8", "none"),
    "int8 by token": ("int8", "token"),
    "nvfp4": ("nvfp4", "none"),
}
# Kind of engine -> the ways that it takes.
ENGINES = {
    "onnxruntime": ("fp32", "fp8", "fp8 by token", "int8", "int8 by token"),
    "inductor": ("fp32", "fp8", "fp8 by token", "int8", "int8 by token", "nvfp4"),
}
SAMPLES, SIZE, STEPS = 16, (64, 64), 2
BLOCKS = {"double": 1, "single": 1}
ORDER, FITTED, HELD_OUT, FIRST_FITTED = 2, 8, 8, 1_000_000  # the samples as of `calibrate`


def written(checkpoint: Any, options: dict[str, Any], folder: Path, ways: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Way and bundle, in their order; the model is traced once."""
    traced = None
    for name in ways:
        weights, activations = WAYS[name]
        chosen = Options(**options, weights=weights, activations=activations)
        traced = traced or trace_model(checkpoint, chosen)
        yield name, write_bundle(draft(traced, chosen), folder, name.replace(" ", "-"))
        print(f"{name}: done", file=sys.stderr, flush=True)


def psnr(seen: np.ndarray, expected: np.ndarray) -> float | None:
    """Of all pictures together, in dB; None where they are the same."""
    square = float(np.square(seen.astype(np.float64) - expected).mean())
    return round(10 * np.log10(255.0**2 / square), 2) if square else None


def embedded(family: str) -> tuple[Any, dict[str, Any]]:
    """The embedded model of a family and its usual options."""
    checkpoint = open_checkpoint(None, FAMILIES[family])
    default = checkpoint.family.defaults
    options = {name: getattr(default, name) for name in ("order", "interval", "warmup", "steps")}
    return checkpoint, {**options, "parts": parts_asked(checkpoint, False)}


def fidelity(folder: Path, ways: Sequence[str], family: str) -> list[dict[str, Any]]:
    """A row for each way, on the embedded model, float32 first."""
    checkpoint, options = embedded(family)
    rows: list[dict[str, Any]] = []
    exact: np.ndarray | None = None
    for name, bundle in written(checkpoint, options, folder, dict.fromkeys(("fp32", *ways))):
        with load(bundle, threads=1) as denoiser:
            plan = denoiser.forecasts().plan
            ways = [Case("all full", Forecasts(Plan.all_full(len(plan)), 0)), Case("plan", denoiser.forecasts())]
            full, planned = evaluate(denoiser, [request_for(denoiser)], ways, shown=SAMPLES)
        exact = full.shown if exact is None else exact
        errors = {
            "quantisation_psnr": psnr(full.shown, exact),
            "forecast_psnr": psnr(planned.shown, full.shown),
            "both_psnr": psnr(planned.shown, exact),
        }
        rows.append({"weights": name, "plan": str(plan), **errors, "samples": len(full.shown)})
        print(rows[-1], flush=True)
    return rows


def calibrated(folder: Path, ways: Sequence[str], family: str, steps: int, full_steps: int) -> list[dict[str, Any]]:
    """Three rows for each way, on the embedded model: what `calibrate` finds, and what it has to beat."""
    checkpoint, options = embedded(family)
    rows = []
    for name, bundle in written(checkpoint, {**options, "order": ORDER}, folder, ways):
        with load(bundle, threads=1) as denoiser, tqdm(desc=name, unit="loop step", file=sys.stderr) as bar:
            samples = groups(denoiser, FITTED, FIRST_FITTED, least=2)
            held_out = groups(denoiser, HELD_OUT, FIRST_FITTED + FITTED)
            window = min(steps - 1, 4 * -(-steps // full_steps))
            found = Calibrator(denoiser, samples, held_out, steps, window, bar.update).calibrate(full_steps, ORDER)
        found.check()
        of = {"calibrated": found.calibrated, "paper's plan": found.regular, "fewer steps": found.fewer_steps}
        for way, one in of.items():
            rows.append({
                "weights": name,
                "way": way,
                "plan": str(one.forecasts.plan),
                "full_steps": len(one.forecasts.plan.full_steps),
                "held_out_psnr": round(one.held_out, 2),
                "held_out_psnr_each": [round(float(each), 2) for each in one.held_out_each],
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def cost(folder: Path, ways: Sequence[str], repeats: int, engine: str) -> list[dict[str, Any]]:
    """A row for each way, on a FLUX of the bench model's width, float32 first."""
    model = mid_flux(**BLOCKS)
    model.save_pretrained(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"), FAMILIES["flux"])
    options: dict[str, Any] = {"order": 1, "interval": 6, "warmup": 3, "latent_size": SIZE, "batch": 1}
    options |= {"granularity": "last", "engine": engine}
    bundles = dict(written(checkpoint, options, folder, dict.fromkeys(("fp32", *ways))))
    with ExitStack() as stack:
        loaded = {name: stack.enter_context(load(bundle, threads=1)) for name, bundle in bundles.items()}
        times: dict[str, list[float]] = {name: [] for name in loaded}
        for turn in range(repeats + 1):
            for name, denoiser in loaded.items():
                seen = full_ms(denoiser)
                times[name] += seen if turn else []  # the first turn warms up
    rows = []
    for name, bundle in bundles.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["fp32"], strict=True))
        rows.append({
            "weights": name,
            "engine": engine,
            "disk_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
            "resident_bytes": int(subprocess.check_output([sys.executable, __file__, "--resident", str(bundle)])),
            "full_ms": round(statistics.median(times[name]), 2),
            "full_to_fp32": round(ratio, 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def full_ms(denoiser: Denoiser) -> list[float]:
    """Times of the full steps of a short loop."""
    import time

    data = random_trajectory(denoiser, STEPS)
    slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
    slot.start(data.conditioning, Forecasts(Plan.all_full(STEPS), 0), data.timesteps)
    found = []
    for latent in data.latents:
        began = time.perf_counter()
        slot.step(latent)
        found.append(1e3 * (time.perf_counter() - began))
    return found


def resident(bundle: Path) -> int:
    """Bytes that this process holds once a bundle is loaded and has made full steps, without what it held before."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = held()
    with load(bundle, threads=1) as denoiser:
        full_ms(denoiser)
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not given back yet is 20 to 70 MB, by chance
        return held() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="turns of each way, for times (default: %(default)s)")
    parser.add_argument("--resident", type=Path, metavar="BUNDLE", help="print the memory of one bundle alone")
    parser.add_argument("--table", choices=("cost", "fidelity", "calibrated"), nargs="+", default=["cost", "fidelity"])
    parser.add_argument(
        "--way", choices=WAYS, nargs="+", help="formats to compare (default: all that the engine takes)"
    )
    parser.add_argument("--model", choices=("flux", "dit"), default="flux", help="the embedded one (default: flux)")
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime", help="of the cost (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of a calibrated loop (default: %(default)s)")
    parser.add_argument("--full-steps", type=int, default=12, help="of them that are full (default: %(default)s)")
    record_options(parser)
    args = parser.parse_args()
    if args.resident:
        print(resident(args.resident))
        return 0
    ways = args.way or ENGINES[args.engine]
    if unknown := set(ways) - set(ENGINES[args.engine]):
        parser.error(
            f"--way is {', '.join(unknown)} with --engine {args.engine}, expected {', '.join(ENGINES[args.engine])}"
        )
    if "cost" in args.table and args.model != "flux":
        parser.error(f"--model is {args.model} with --table cost, which is of a FLUX alone, expected --table fidelity")
    if {*args.table} - {"cost"} and args.engine != "onnxruntime":
        parser.error(
            f"--engine is {args.engine} with --table {' '.join(args.table)}, expected it with --table cost alone"
        )
    record = circumstances(args.out, args.allow_dirty)
    tables = {
        "cost": partial(cost, repeats=args.repeats, engine=args.engine),
        "fidelity": partial(fidelity, family=args.model),
        "calibrated": partial(calibrated, family=args.model, steps=args.steps, full_steps=args.full_steps),
    }
    for name in args.table:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = tables[name](Path(folder), ways)
    others = [one for one, usual in ((args.engine, "onnxruntime"), (args.model, "flux")) if one != usual]
    kinds = [*args.table, *others]
    path = write_record(f"quantised-{'-'.join(kinds)}", record, args.out, args.allow_dirty)
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
