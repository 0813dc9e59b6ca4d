"""Goals of the first hour: what each is, whether a number meets it, and the table of all of them.

A goal is a dict, as it is filed: `goal`, `limit`, `seen`, `verdict` and, where it was not judged, `why`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Goal = dict[str, Any]

EFFICIENCY = {"residual": 0.99, "module": 0.97}  # speed-up over the same engine all-full, over steps / full steps
FORECAST_OVER_FLOOR = 2.0  # of the time in which the bytes of a forecast step can be copied
FULL_OVER_COMPILED = 1.00  # of a step of the plain model, compiled and captured the same way
FEW_BITS_BYTES = 0.51  # of the weights of the full graph in bfloat16, with fp8: half, and the scales
FEW_BITS_FULL = 1.10  # of a full step in bfloat16, where each weight is widened before its product
OVER_RIVAL = 1.3  # loop of a rival over ours, with as many full steps
RIVALS = {"diffusers' hook": ("hook eager", "hook compiled"), "cache-dit": ("cache-dit eager", "cache-dit compiled")}

MET, MISSED, NOT_RUN, NOT_JUDGED = "met", "missed", "not run", "not judged"


def at_least(goal: str, limit: float, seen: float, trial: str = "") -> Goal:
    """A number that is to reach a limit; `trial` says why it is shown and not judged."""
    return _goal(goal, f"at least {limit:g}", seen, seen >= limit, trial)


def at_most(goal: str, limit: float, seen: float, trial: str = "") -> Goal:
    """A number that is not to pass a limit; `trial` says why it is shown and not judged."""
    return _goal(goal, f"at most {limit:g}", seen, seen <= limit, trial)


def holds(goal: str, seen: bool) -> Goal:
    """Something that is so or is not."""
    return _goal(goal, "yes", seen, seen, "")


def not_run(goal: str, why: str) -> Goal:
    """A goal that nothing was measured for."""
    return {"goal": goal, "limit": "", "seen": None, "verdict": NOT_RUN, "why": why}


def _goal(goal: str, limit: str, seen: float | bool, good: bool, trial: str) -> Goal:
    verdict = NOT_JUDGED if trial else MET if good else MISSED
    return {"goal": goal, "limit": limit, "seen": seen, "verdict": verdict, **({"why": trial} if trial else {})}


def of_contest(contest: Mapping[str, Any], trial: str = "") -> list[Goal]:
    """The goals of one model's bench, from the results of its contestants.

    Args:
        contest: As `contest.run` fills it.
        trial: Why speeds and bytes are not judged, where nothing was compiled or tiny models ran, whose weights are
            mostly not of their blocks. Numbers and calls still are.
    """
    results, model = contest["results"], contest["model"]
    found: list[Goal] = []
    for label, result in results.items():
        if not label.startswith("ours"):
            continue
        where = f"{model} {label.removeprefix('ours ')}"
        if why := missing(result):
            found.append(not_run(f"{where}: every goal", why))
        else:
            found += _alone(where, result, trial) + _beside_plain(where, label, results, trial)
    return found + _over_rivals(results, model, trial)


def _alone(where: str, result: Mapping[str, Any], trial: str) -> list[Goal]:
    """The goals of one of ours that need no other contestant."""
    floor, least = result["forecast_over_floor"], EFFICIENCY.get(result["granularity"], 0.97)
    found = [
        at_least(f"{where}: efficiency", least, result["efficiency"], trial),
        at_most(f"{where}: forecast over its floor", FORECAST_OVER_FLOOR, floor, trial),
        at_most(f"{where}: calls without a CUDA graph", 0, result["fallbacks"]),
    ]
    for plan, parity in result.get("parity", {}).items():
        found.append(at_most(f"{where}: error over its bound on {plan}", 1, parity["over_bound"]))
    if "parity_failed" in result:
        found.append(not_run(f"{where}: error over its bound", result["parity_failed"]))
    return found


def _beside_plain(where: str, label: str, results: Mapping[str, Any], trial: str) -> list[Goal]:
    """One of ours beside the compiled plain model, if that takes part; with quantised weights, beside ours in bfloat16,
    whose label is the same without its end."""
    result = results[label]
    if form := result["weights"]:
        plain = results[label.removesuffix(f" {form}")]
        if why := missing(plain):
            return [not_run(f"{where}: weights and full step over those in bfloat16", why)]
        share, cost = (result[key] / plain[key] for key in ("weights_bytes", "full_ms"))
        return [
            at_most(f"{where}: weights of the full graph over bfloat16", FEW_BITS_BYTES, share, trial),
            at_most(f"{where}: full step over bfloat16", FEW_BITS_FULL, cost, trial),
        ]
    if "compiled" not in results:
        return []
    goal = f"{where}: full over compiled"
    if "full_over_compiled" not in result:
        return [not_run(goal, missing(results["compiled"]) or "the compiled plain model has no time")]
    return [at_most(goal, FULL_OVER_COMPILED, result["full_over_compiled"], trial)]


def _over_rivals(results: Mapping[str, Any], model: str, trial: str) -> list[Goal]:
    """Ours at `residual` beside the fastest form of each rival that was in the contest."""
    found = []
    for rival, forms in RIVALS.items():
        there = {form: results[form] for form in forms if form in results}
        if not there:
            continue
        goal = f"{model}: {rival} over ours"
        ran = {form: result for form, result in there.items() if "loop_ms" in result}
        if not ran:
            found.append(not_run(goal, "; ".join(f"{form}: {missing(result)}" for form, result in there.items())))
            continue
        best = min(ran, key=lambda form: ran[form]["loop_ms"])
        ours = results.get(f"ours residual order {ran[best]['order']}", {})
        if "loop_ms" not in ours:
            found.append(not_run(goal, missing(ours) or "ours at `residual` and its order was not in the contest"))
        else:
            found.append(at_least(f"{goal} ({best})", OVER_RIVAL, ran[best]["loop_ms"] / ours["loop_ms"], trial))
    return found


def missing(result: Mapping[str, Any]) -> str:
    """Why a contestant has no numbers; empty where it has."""
    return str(result.get("failed") or result.get("left_out") or "")


def table(stages: Iterable[Mapping[str, Any]]) -> str:
    """Every stage and every goal of it, one a line: met, missed with its number, not run with its reason."""
    rows = []
    for stage in stages:
        took = f" in {stage['seconds']:.0f} s" if stage["seconds"] else ""
        rows.append(f"{stage['stage']}: {stage['status']}{took}{': ' + stage['why'] if stage['why'] else ''}")
        for goal in stage["goals"]:
            rows.append("    " + line(goal))
        if mend := stage.get("mend"):
            rows.append(f"    to mend this away from the GPU, you need: {mend['needs']}")
    return "\n".join(rows)


def line(goal: Goal) -> str:
    """One goal for a reader."""
    if goal["verdict"] == NOT_RUN:
        return f"{NOT_RUN:10}  {goal['goal']}: {goal['why']}"
    seen = goal["seen"]
    number = ("no", "yes")[seen] if isinstance(seen, bool) else f"{seen:.4g}"
    why = f" ({goal['why']})" if "why" in goal else ""
    return f"{goal['verdict']:10}  {goal['goal']} is {number}, expected {goal['limit']}{why}"
