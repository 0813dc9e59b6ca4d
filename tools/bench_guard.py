"""What a guard costs: its probe beside the share of the work that it does, and both halves of a full step beside it.

    python tools/bench_guard.py                     FLUX of 12 blocks, 1024 image and 64 text tokens, random weights

    share = FLOPs of the probe graph / FLOPs of the full graph
    excess = probe / full - share                   goal: at most 0.02

The calls of probe, rest, full and forecast take turns on one slot, so noise of the machine hits all alike; ratios are
taken between calls of one turn, and their median is reported. One bundle for each rule: a bundle with several rules
computes all their errors in one probe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from contestants import Case
from record import RESULTS, circumstances, dirty_option, write_record
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from taylorseer_export.bundle.memory import probe_bytes, size
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.compile.export import Draft, draft, write_bundle
from taylorseer_export.graph.cut import Cut
from taylorseer_export.method import RULES, Guard
from taylorseer_export.runtime.denoiser import Denoiser, load

GOAL = 0.02


def flops(made: Draft, cut: Cut) -> int:
    """Multiplications and additions of the matrix products and attentions of a graph, at the draft's typical sizes."""
    mode = detect_fake_mode(list(cut.module.parameters()))  # the draft holds no weights
    assert mode is not None
    with mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        cut.module(*[torch.empty(resolve(t.shape, made.typical), dtype=getattr(torch, t.dtype)) for t in cut.inputs])
    return counter.get_total_flops()


def measure(case: Case, denoiser: Denoiser, rule: Any, turns: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of call, turn by turn."""
    latents, timesteps = case.latents.numpy(), case.timesteps.float().numpy()
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], case.arrays))
    plain, begun = denoiser.slot(slot.sizes), denoiser.forecasts(plan="FF.")
    times: dict[str, list[float]] = {"probe": [], "rest": [], "full": [], "forecast": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        times[name].append(1e3 * (time.perf_counter() - began))

    probe = slot.memory.probe
    assert probe is not None
    for turn in tqdm(range(turns + 1), desc=rule, unit="turn"):
        slot.start(case.arrays, replace(begun, guard=Guard(rule, 1e-30)), timesteps[:3])
        plain.start(case.arrays, begun, timesteps[:3])
        for step in range(3):
            slot.stage(latents[step])
            plain.stage(latents[step])
            if step == 1:
                timed("probe", lambda: (probe._call(), slot.memory.buffers[f"error.{rule}"].read()))
                timed("rest", slot.run)
                timed("full", plain.run)
            elif step == 2:
                slot.run()
                timed("forecast", plain.run)
            else:
                slot.run()
                plain.run()
            slot.finish()
            plain.finish()
        if not turn:
            times = {name: [] for name in times}
    return times


def bench(args: argparse.Namespace, folder: Path, where: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    case = Case(args, folder)
    rows = []
    for rule in RULES:
        made = draft(case.checkpoint, replace(case.options(args.state, "snapshots", args.order), guards=(rule,)))
        bundle = write_bundle(made, folder, f"guard-{rule}")
        assert made.split.probe is not None and made.split.rest is not None
        counted = {cut.name: flops(made, cut) for cut in (made.split.probe, made.split.rest, made.split.full)}
        with load(bundle, threads=args.threads) as denoiser:
            times = measure(case, denoiser, rule, args.repeats)
            kept = probe_bytes(denoiser.manifest, made.typical)
        pairs = list(zip(times["probe"], times["rest"], times["full"], strict=True))
        share = counted["probe"] / counted["full"]
        probe = statistics.median(p / f for p, _, f in pairs)
        rows.append({
            "rule": rule, "share": share, "probe_over_full": probe, "excess": probe - share,
            "probe_and_rest_over_full": statistics.median((p + r) / f for p, r, f in pairs),
            "forecast_over_full": statistics.median(map(truediv, times["forecast"], times["full"])),
            "ms": {name: statistics.median(values) for name, values in times.items()}, "probe_bytes": kept,
            "flops": counted,
        })  # fmt: skip
    return {**where, "model": args.model, "state": args.state, "order": args.order, "turns": args.repeats,
            "threads": args.threads, "goal": GOAL, "rows": rows}  # fmt: skip


def table(record: dict[str, Any]) -> str:
    lines = [f"{'guard':10}{'probe ms':>10}{'full ms':>10}{'share':>8}{'probe/full':>12}{'excess':>9}"
             f"{'(probe+rest)/full':>19}{'kept':>12}"]  # fmt: skip
    for row in record["rows"]:
        lines.append(
            f"{row['rule']:10}{row['ms']['probe']:10.2f}{row['ms']['full']:10.1f}{row['share']:8.4f}"
            f"{row['probe_over_full']:12.4f}{row['excess']:9.4f}{row['probe_and_rest_over_full']:19.4f}"
            f"{size(row['probe_bytes']):>12}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", choices=("module", "residual", "last"), default="residual")
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="counted turns of each rule")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="file the record in tools/results/")
    dirty_option(parser)
    args = parser.parse_args()
    args.model, args.batch, args.steps, args.interval, args.warmup = "mid-flux", 1, 3, 3, 2
    args.threads = args.threads or torch.get_num_threads()
    where = circumstances(RESULTS if args.write else None, args.allow_dirty)
    with tempfile.TemporaryDirectory() as folder:
        record = bench(args, Path(folder), where)
    print(table(record))
    if args.write:
        print("wrote", write_record("guard", record, allow_dirty=args.allow_dirty))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
