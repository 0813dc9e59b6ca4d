"""Quantised weights on the CPU: what each format costs in fidelity, and what it saves in bytes and in time.

    python tools/quantised.py                                both tables, about ten minutes on two idle cores
    python tools/quantised.py --table fidelity --way fp8     one of them, of float32 and fp8 alone

Fidelity, on the embedded FLUX with its defaults: the same noise and prompts in bundles of each format. PSNR of all
steps full against the unquantised bundle is the quantisation error; that of the plan against the format's own all-full
is the forecast error; that of the plan against the unquantised all-full is both together.

Cost, on the bench FLUX of width 512: bytes on disk, memory of a process that has loaded the bundle and made a full
step, and the time of a full step as the median of ratios to float32, measured in turns, so that a busy minute hits all.
"""

from __future__ import annotations

import argparse
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

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft, trace_model, write_bundle
from taylorseer_export.compile.parts import parts_asked
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.evaluate import Case, evaluate
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.trajectory import random_trajectory

# Name -> (--weights, --activations).
WAYS: dict[str, tuple[str | None, str | None]] = {
    "fp32": (None, None),
    "fp8": ("fp8", "none"),
    "fp8 by token": ("fp8", "token"),
    "int8": ("int8", "none"),
    "int8 by token": ("int8", "token"),
}
SAMPLES, SIZE, STEPS = 16, (64, 64), 3


def written(checkpoint: Any, options: dict[str, Any], folder: Path, ways: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Way and bundle, float32 first; the model is traced once."""
    traced = None
    for name in dict.fromkeys(("fp32", *ways)):
        weights, activations = WAYS[name]
        chosen = Options(**options, weights=weights, activations=activations)
        traced = traced or trace_model(checkpoint, chosen)
        yield name, write_bundle(draft(traced, chosen), folder, name.replace(" ", "-"))


def psnr(seen: np.ndarray, expected: np.ndarray) -> float | None:
    """Of all pictures together, in dB; None where they are the same."""
    square = float(np.square(seen.astype(np.float64) - expected).mean())
    return round(10 * np.log10(255.0**2 / square), 2) if square else None


def fidelity(folder: Path, ways: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way, on the embedded FLUX."""
    checkpoint = open_checkpoint(None, FAMILIES["flux"])
    default = checkpoint.family.defaults
    options = {name: getattr(default, name) for name in ("order", "interval", "warmup", "steps")}
    options["parts"] = parts_asked(checkpoint, False)
    rows: list[dict[str, Any]] = []
    exact: np.ndarray | None = None
    for name, bundle in written(checkpoint, options, folder, ways):
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


def cost(folder: Path, ways: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A row for each way, on the bench FLUX."""
    model = mid_flux()
    model.save_pretrained(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"), FAMILIES["flux"])
    options: dict[str, Any] = {"order": 1, "interval": 6, "warmup": 3, "latent_size": SIZE, "batch": 1}
    bundles = dict(written(checkpoint, options, folder, ways))
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
        return held() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way, for times (default: %(default)s)")
    parser.add_argument("--resident", type=Path, metavar="BUNDLE", help="print the memory of one bundle alone")
    parser.add_argument("--table", choices=("cost", "fidelity"), nargs="+", default=["cost", "fidelity"])
    parser.add_argument("--way", choices=WAYS, nargs="+", default=list(WAYS), help="beside float32 (default: all)")
    record_options(parser)
    args = parser.parse_args()
    if args.resident:
        print(resident(args.resident))
        return 0
    record = circumstances(args.out, args.allow_dirty)
    tables = {"cost": partial(cost, repeats=args.repeats), "fidelity": fidelity}
    for name in args.table:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = tables[name](Path(folder), args.way)
    path = write_record(f"quantised-{'-'.join(args.table)}", record, args.out, args.allow_dirty)
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
