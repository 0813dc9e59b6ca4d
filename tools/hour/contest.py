"""One model's contest: random bfloat16 weights, no downloads, one copy of the weights in one process.

The contestants come one after the other and free what they took:

    eager        the diffusers model, operator by operator
    compiled     the same under `torch.compile(fullgraph=True)`, captured as one CUDA graph
    ours         full and forecast steps per granularity and order, compiled by the same torch and captured the same way
    hook         diffusers' TaylorSeer hook, eager and compiled, on a plan with as many full steps as ours
    cache-dit    eager and compiled, on our plan, one first block and the TaylorSeer forecast of the rest

The floor of a step is the larger of its bytes over the copy bandwidth and its FLOPs over the bfloat16 matrix product
rate, both measured here. Loops are teacher-forced: the sampler is in no number. Times are milliseconds on the host's
clock between two synchronisations. What does not fit into the stage's time is left out, and the table says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from hour.goals import of_contest
from hour.machine import Machine, limited, short
from hour.ours import ours
from hour.report import Report
from hour.rivals import cache_dit, compiled, eager, hook
from hour.subjects import Case

Contestant = Callable[[], dict[str, Any]]
Choice = Callable[[Case, dict[str, float], Report], dict[str, Contestant]]


def run(name: str, args: Any, report: Report, chosen: Choice | None = None) -> None:
    """Every contestant of one model, as far as time allows; a failure of one is noted and the rest goes on.

    Args:
        name: Of the model.
        args, report: Of the stage.
        chosen: Who takes part; all of `contestants` if left out.

    Raises:
        RuntimeError: One of ours failed.
    """
    machine = Machine(args.device, args.compiles)
    case = Case(name, args, machine)
    floor = machine.floor()
    results: dict[str, Any] = {}
    weights = sum(p.nbytes for p in case.model.parameters())
    contest = {"model": name, "tiny": args.tiny, "compiled": args.compiles, "weights_bytes": weights, "floor": floor,
               "results": results}  # fmt: skip
    for label, contestant in (chosen or contestants)(case, floor, report).items():
        if report.left() <= 0:
            results[label] = {"left_out": "no time left"}
            continue
        began = time.perf_counter()
        try:
            with limited(report.left()):
                results[label] = contestant()
        except (Exception, SystemExit) as error:  # one that does not run here must not cost the numbers of the others
            results[label] = {"failed": short(error)}
        machine.free()
        print(f"{name}: {label} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        compared(contest)
        report.write(contest, of_contest(contest, args.trial))
    report.write(contest, of_contest(contest, args.trial))
    print(table(contest), flush=True)
    lost = {label: result["failed"] for label, result in results.items() if "ours" in label and "failed" in result}
    if lost:
        raise RuntimeError("; ".join(f"{label}: {why}" for label, why in lost.items()))


def contestants(case: Case, floor: dict[str, float], report: Report) -> dict[str, Contestant]:
    """Label -> what to run, the goals' own first: what comes later is left out first."""
    args, shared = case.args, {}  # type: ignore[var-annotated]
    found: dict[str, Contestant] = {"eager": lambda: eager(case), "compiled": lambda: compiled(case)}

    def add(order: int) -> None:
        for granularity in args.granularity or case.subject.granularities:
            found[f"ours {granularity} order {order}"] = lambda g=granularity: ours(  # type: ignore[misc]
                case, g, order, shared, floor, report.kept
            )

    first, *others = args.order
    add(first)
    if case.subject.rivals:  # diffusers' DiT has no cache
        for compiles, form in ((False, "eager"), (True, "compiled")):
            found[f"hook {form}"] = lambda c=compiles: hook(case, c, first)  # type: ignore[misc]
            found[f"cache-dit {form}"] = lambda c=compiles: cache_dit(case, c, first)  # type: ignore[misc]
    for order in others:
        add(order)
    return found


def compared(contest: dict[str, Any]) -> None:
    """Ratios between contestants, where both ran."""
    results, floor = contest["results"], contest["floor"]
    flops = results.get("eager", {}).get("flops")
    plain = results.get("compiled", {}).get("step_ms")
    peak = results.get("compiled", {}).get("peak_bytes")
    for label, result in results.items():
        if not label.startswith("ours") or "full_ms" not in result:
            continue
        if plain:
            result["full_over_compiled"] = result["full_ms"] / plain
        if flops:
            result["full_over_floor"] = 1e-3 * result["full_ms"] * floor["flops_per_s"] / flops
        if peak:
            result["peak_over_compiled_bytes"] = result["peak_bytes"] - peak - result["state_bytes"]
        for other in results:
            if other.split()[0] in ("hook", "cache-dit") and results[other].get("order") == result["order"]:
                result[f"{other} over ours"] = results[other]["loop_ms"] / result["loop_ms"]


def table(contest: dict[str, Any]) -> str:
    columns = ("step_ms", "full_ms", "forecast_ms", "prepare_ms", "loop_ms", "efficiency", "full_over_compiled",
               "forecast_over_floor", "state_bytes", "peak_bytes")  # fmt: skip
    heads = ("step", "full", "forecast", "prepare", "loop", "effic.", "/compiled", "/floor", "state MB", "peak MB")
    rows = [f"{contest['model']:28}" + "".join(f"{head:>11}" for head in heads)]
    for label, result in contest["results"].items():
        cells = []
        for column in columns:
            value = result.get(column)
            value = value / 1e6 if value is not None and column.endswith("bytes") else value
            cells.append(f"{value:11.3f}" if value is not None else f"{'':11}")
        note = result.get("failed") or result.get("left_out") or ""
        rows.append(f"{label:28}{''.join(cells)}  {note}")
        for plan, found in result.get("parity", {}).items():
            rows.append(f"{'':4}parity on {plan}: {found['over_bound']:.3f} of the derived bound")
    floor = contest["floor"]
    rows.append(f"copies {floor['bytes_per_s'] / 1e9:.0f} GB/s, products {floor['flops_per_s'] / 1e12:.1f} TFLOP/s")
    return "\n".join(rows)
