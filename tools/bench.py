"""Bench: full and forecast steps beside the untapped model, eager diffusers and its own TaylorSeer hook, in one run.

    python tools/bench.py                       FLUX of 12 blocks, 1024 image and 64 text tokens, random weights
    python tools/bench.py --cache-dit           the same with cache-dit beside, on the plan of our engines
    python tools/bench.py --model dit-xl        DiT-XL/2 at 256 pixels, random weights, batch 2

Every contestant runs the same loop: the transformer alone, teacher-forced (the latents of every step are given), so
that the cost of a sampler is in no number and outputs can be compared step by step. The contestants take turns of a few
steps (A B C A B C, rotated each turn), so noise of the machine hits all alike; a turn is `interval` steps long, so a
forecast step finds its buffers as warm as it would alone. Ratios are taken between steps of one turn and their median
is reported. Every loop includes its `prepare`. Times are milliseconds on the host clock. `error` is the difference of
all predictions of a loop to those of the untapped model, relative rms.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import HOOKS, Case, Loop, cache_dit_library, hook_schedule
from record import circumstances, record_options, write_record
from tqdm import tqdm

from taylorseer_export.bundle.memory import state_bytes
from taylorseer_export.method import Plan
from taylorseer_export.runtime.denoiser import Denoiser, load

PARITY = 1e-3  # largest difference to the eager model, relative to the largest output; float32 leaves about 1e-5


def run(loops: Mapping[str, Loop], repeats: int, turn: int) -> None:
    """Advance all loops in turns; the order rotates, so nobody always follows the same neighbour."""
    names = list(loops)
    total = repeats * sum(loop.steps for loop in loops.values())
    for loop in tqdm(loops.values(), desc="warm up", unit="loop"):
        loop.warm_up()
    with tqdm(total=total, desc="steps", unit="step") as bar:
        for repeat in range(repeats):
            for loop in loops.values():
                loop.begin()
            for k in range(math.ceil(max(loop.steps for loop in loops.values()) / turn)):
                shift = (k + repeat) % len(names)
                for name in names[shift:] + names[:shift]:
                    bar.set_postfix_str(name)
                    bar.update(loops[name].advance(turn))


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(times: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(times, 50)), "p90": float(np.percentile(times, 90))}


def difference(a: Loop, b: Loop) -> float:
    """Largest difference between two loops' outputs relative to the largest output."""
    pairs = zip(a.outputs, b.outputs, strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs) / max(float(np.abs(y).max()) for y in b.outputs)


def error(a: Loop, b: Loop) -> float:
    """Root mean square of the difference of all predictions of two loops, relative to that of `b`."""
    x, y = np.stack(a.outputs).astype(np.float64), np.stack(b.outputs).astype(np.float64)
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def report(name: str, loops: Mapping[str, Loop], plan: Plan, denoiser: Denoiser, sizes: dict[str, int]) -> dict:
    """The numbers of one engine; field names as `taylorseer-export bench --json`."""
    full, planned, untapped = loops[f"{name} all-full"], loops[f"{name} planned"], loops["untapped"]
    forecast = planned.times(str(plan), ".")
    speedup = ratio(full.loop_ms(), planned.loop_ms())
    middle = {"prepare": statistics.median(planned.start_ms), "F": statistics.median(full.times()),
              ".": statistics.median(forecast)}  # fmt: skip
    modelled = middle["prepare"] + sum(middle[kind] for kind in str(plan))
    state = denoiser.manifest.state
    return {
        "name": name, "granularity": state.granularity, "layout": state.layout, "order": state.order,
        "prepare_ms": middle["prepare"], "full_ms": spread(full.times()), "forecast_ms": spread(forecast),
        "full_in_plan_ms": spread(planned.times(str(plan), "F")),
        "full_over_untapped": ratio(full.times(), untapped.times()),
        "forecast_over_untapped": ratio(forecast, untapped.times(str(plan), ".")),
        "loop_ms": statistics.median(planned.loop_ms()), "all_full_loop_ms": statistics.median(full.loop_ms()),
        "speedup": speedup, "ideal_speedup": plan.ceiling, "efficiency": speedup / plan.ceiling,
        "efficiency_from_medians": (middle["prepare"] + len(plan) * middle["F"]) / modelled / plan.ceiling,
        "state_bytes": state_bytes(denoiser.manifest, sizes),
        "difference_all_full_eager": difference(full, loops["eager"]) if "eager" in loops else None,
        "difference_all_full_untapped": difference(full, untapped), "error": error(planned, untapped),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    rows = [f"{'engine':32}{'prepare':>9}{'full p50':>10}{'p90':>8}{'/untap':>8}{'forecast':>10}{'p90':>8}"
            f"{'loop':>10}{'speedup':>9}{'ideal':>7}{'effic.':>8}{'state MB':>10}{'error':>9}"]  # fmt: skip
    for e in result["engines"]:
        rows.append(
            f"{e['name']:32}{e['prepare_ms']:9.1f}{e['full_ms']['p50']:10.1f}{e['full_ms']['p90']:8.1f}"
            f"{e['full_over_untapped']:8.3f}{e['forecast_ms']['p50']:10.2f}{e['forecast_ms']['p90']:8.2f}"
            f"{e['loop_ms']:10.0f}{e['speedup']:9.2f}{e['ideal_speedup']:7.2f}{e['efficiency']:8.3f}"
            f"{e['state_bytes'] / 1e6:10.1f}{e['error']:9.1e}"
        )
    rows.append(f"\n{'others':32}{'step p50':>9}{'p90':>10}{'loop':>10}{'loop / ' + result['engines'][0]['name']:>36}"
                f"{'error':>9}")  # fmt: skip
    for name, o in result["others"].items():
        rows.append(f"{name:32}{o['step_ms']['p50']:9.1f}{o['step_ms']['p90']:10.1f}{o['loop_ms']:10.0f}"
                    f"{o['loop_over_ours']:36.3f}{'' if o['error'] is None else format(o['error'], '.1e'):>9}"
                    f"  {o['note']}")  # fmt: skip
    return "\n".join(rows)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    case = Case(args, folder)
    plan = Plan.regular(args.steps, args.interval, args.warmup)
    all_full = Plan.all_full(args.steps)
    configurations = [(g, y, o) for o in args.order for y in args.layout for g in args.granularity]
    loops, denoisers, names = {}, {}, []
    with tqdm(total=len(configurations) + 1, desc="export and load", unit="engine") as bar:
        loops["untapped"] = case.untapped()
        bar.update()
        for granularity, layout, order in configurations:
            name = f"{granularity} {layout} order {order}"
            denoisers[name] = load(case.bundle(granularity, layout, order), threads=args.threads)
            loops[f"{name} all-full"] = case.ours(denoisers[name], all_full, order)
            loops[f"{name} planned"] = case.ours(denoisers[name], plan, order)
            names.append(name)
            bar.update()
    first, order = names[0], configurations[0][2]
    loops["fewer steps"] = case.ours(denoisers[first], Plan.all_full(len(plan.full_steps)), order)
    counters, hook_plan, notes = {}, None, {"fewer steps": f"{len(plan.full_steps)} full steps of {first}"}
    if not args.no_eager:
        loops["eager"], _ = case.eager()
    if args.hook and case.family.name == "flux":  # diffusers' DiT has no cache support
        n, before, hook_plan = hook_schedule(plan, args.interval, args.warmup)
        loops["ours on hook's plan"] = case.ours(denoisers[first], hook_plan, order)
        for hook in args.hook:
            loops[f"hook {hook}"], counters[f"hook {hook}"] = case.eager(hook, n, before, order)
    if args.cache_dit:
        loops["cache-dit"], computed = case.cache_dit(plan, order)
    run(loops, args.loops, args.turn or args.interval)

    sizes = denoisers[first].sizes(tuple(case.latents.shape[1:]), case.arrays)
    engines = [report(name, loops, plan, denoisers[name], sizes) for name in names]
    for name, counter in counters.items():
        seen, asked = counter[0], len(hook_plan.full_steps)
        if seen != asked:
            raise SystemExit(f"{name} computed {seen} steps, expected {asked}; its cache is not what was asked for")
        relative = difference(loops["ours on hook's plan"], loops[name])
        notes[name] = f"{seen} of {args.steps} steps computed, output differs from ours on its plan by {relative:.1e}"
        if relative > PARITY and engines[0]["granularity"] == "module":
            notes[name] += " (TOO MUCH)"
    if args.cache_dit:
        ratios = {name: ratio(loops["cache-dit"].loop_ms(), loops[f"{name} planned"].loop_ms()) for name in names}
        beside = ", ".join(f"{times:.2f} of {name}" for name, times in ratios.items())
        notes["cache-dit"] = f"{len(computed)} of {args.steps} steps computed, as planned; loop / ours: {beside}"
    others = {}
    for name, loop in loops.items():
        if name.rsplit(" ", 1)[0] in names:
            continue
        others[name] = {
            "step_ms": spread(loop.times()), "loop_ms": statistics.median(loop.loop_ms()),
            "loop_over_ours": ratio(loop.loop_ms(), loops[f"{first} planned"].loop_ms()), "note": notes.get(name, ""),
            "error": error(loop, loops["untapped"]) if loop.steps == len(plan) else None,
        }  # fmt: skip
    if args.cache_dit:
        others["cache-dit"] |= {"order": order, "computed_steps": computed, "loop_over": ratios}
    worst = max(e["difference_all_full_untapped"] for e in engines)
    if worst > PARITY:
        raise SystemExit(f"all-full differs from the untapped model by {worst:.1e}, expected at most {PARITY}")
    return {
        "plan": str(plan), "steps": len(plan), "full_steps": len(plan.full_steps),
        "hook_plan": hook_plan and str(hook_plan), "engine": "onnxruntime", "precision": "fp32", "device": "cpu",
        "engines": engines, "others": others,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mid-flux", "dit-xl"), default="mid-flux")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interval", type=int, help="default: 6 for mid-flux, 4 for dit-xl")
    parser.add_argument("--warmup", type=int, help="default: 3 for mid-flux, 2 for dit-xl")
    parser.add_argument("--order", type=int, nargs="+", help="default: 1 for mid-flux, 4 for dit-xl")
    parser.add_argument("--granularity", nargs="+", help="default: all; module and residual for dit-xl")
    parser.add_argument("--layout", nargs="+", default=["snapshots"])
    parser.add_argument("--batch", type=int, help="default: 1 for mid-flux, 2 for dit-xl")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=28, help="of dit-xl; fewer for a trial")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loops", type=int, default=2, help="whole loops per contestant")
    parser.add_argument("--turn", type=int, default=0, help="steps per turn; default: the interval")
    parser.add_argument("--hook", nargs="*", choices=tuple(HOOKS), default=list(HOOKS), help="diffusers' TaylorSeer")
    parser.add_argument("--cache-dit", action="store_true", help="cache-dit on our plan, one first block, TaylorSeer")
    parser.add_argument("--no-eager", action="store_true", help="leave out eager diffusers without a cache")
    parser.add_argument("--work", type=Path, help="keep exported engines here and reuse them; default: a new folder")
    record_options(parser)
    args = parser.parse_args()
    flux = args.model == "mid-flux"
    args.interval = args.interval or (6 if flux else 4)
    args.warmup = args.warmup or (3 if flux else 2)
    args.order = args.order or ([1] if flux else [4])
    args.granularity = args.granularity or (["module", "residual", "last"] if flux else ["module", "residual"])
    args.batch = args.batch or (1 if flux else 2)
    if args.cache_dit and not flux:
        raise SystemExit(f"--cache-dit is given for {args.model}, expected mid-flux; leave one of the two out")
    if args.cache_dit:
        cache_dit_library()  # refuses before the work, and is imported before anything is timed
    where = circumstances(args.out, args.allow_dirty) | {"threads": args.threads}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = bench(args, folder)
    print(f"{args.model}, plan {result['plan']}, {where['cpu']}, {args.threads} threads, {where['date']}")
    print(table(result))
    record = where | result
    print(write_record(f"bench-{args.model}", record, args.out, args.allow_dirty))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
