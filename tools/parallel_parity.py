"""Run every model that is shared out on 2 and 4 ranks, at every granularity and layout, and hold it to itself alone.

    python tools/parallel_parity.py [--model NAME ...] [--ranks 2 4] [--granularity ...] [--layout ...] [--in-turn]

The tiny models of the tests, with 4 heads, on ranks that are threads with groups of gloo and eager graphs, by gathers
and by exchanges of heads: `tests/parity_on_ranks.py`, in a process of its own, says what a case is. Prints a line for
each, files what there is under tools/results after each model, and exits with 1 where one is not as it should be. Takes
half an hour on two cores; a few minutes with `--in-turn`, where each mode, number of ranks and size of the latent has
one granularity and layout, and the next one the next.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import ROOT, circumstances, dirty_option, write_record
from tiny_models import MODELS

GRANULARITIES, LAYOUTS = ("module", "residual", "last"), ("snapshots", "derivatives")
HELD = ("full", "forecast", "all full")  # steps of a plan with forecasts, and of one without
Case = dict[str, Any]


def cases(asked: dict[str, Any]) -> Iterator[Case]:
    """What comes of each, as it comes.

    Raises:
        SystemExit: The process ended before all was done.
    """
    command = [sys.executable, str(ROOT / "tests" / "parity_on_ranks.py"), json.dumps(asked)]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tools"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as work:
        yield from (json.loads(line) for line in work.stdout or () if line.startswith("{"))
    if work.returncode:
        raise SystemExit(f"{Path(command[1]).name} ended with {work.returncode}, expected 0; see what it says above")


def line(case: Case) -> str:
    """One case, for the terminal."""
    where = f"{case['model']}, {case['mode']} on {case['ranks']} along {case['along']}"
    if "refused" in case:
        return f"refused {where}: {case['refused']}"
    how = f"{where}, {case['granularity']}, {case['layout']}"
    shares = ", ".join(f"{what} {share(case[what]):.2f}" for what in HELD)
    sent = f"{case['collectives']} collectives, {case['bytes']} bytes"
    return f"{'WRONG ' if case['wrong'] else 'ok    '} {how}: {shares} of the bound; {sent}{_told(case)}"


def share(one: dict[str, float]) -> float:
    """Of its bound, an error."""
    return one["error"] / one["bound"]


def _told(case: Case) -> str:
    return (
        f"; {', '.join(case['wrong'])}: {case.get('found')}, expected {case.get('expected')}" if case["wrong"] else ""
    )


def summary(found: list[Case]) -> dict[str, Any]:
    """Of all cases: how many hold, the largest share of a bound, and why others are refused."""
    ran = [case for case in found if "refused" not in case]
    shares = [share(case[what]) for case in ran for what in HELD]
    return {
        "cases": len(ran),
        "hold": sum(not case["wrong"] for case in ran),
        "models": len({case["model"] for case in ran}),
        "largest_share_of_a_bound": round(max(shares, default=0.0), 3),
        "of_each_model": dict(Counter(case["model"] for case in ran)),
        "refused": {f"{case['model']} along {case['along']}": case["refused"] for case in found if "refused" in case},
    }


def file(record: dict[str, Any], found: list[Case], begin: float, allow_dirty: bool) -> Path:
    """The record of all cases so far."""
    told = {**summary(found), "took_seconds": round(time.monotonic() - begin), "what": found}
    return write_record("parallel-parity", {**record, **told}, allow_dirty=allow_dirty)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="of the tests (default: all)")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4), default=[2, 4])
    parser.add_argument("--granularity", nargs="+", choices=GRANULARITIES, default=list(GRANULARITIES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--in-turn", action="store_true", help="not every granularity and layout, but one after another"
    )
    parser.add_argument("--dry-run", action="store_true", help="file no record")
    dirty_option(parser)
    given = parser.parse_args()
    results = None if given.dry_run else ROOT / "tools" / "results"
    record, begin, found = circumstances(results, given.allow_dirty), time.monotonic(), []
    asked = {"models": given.model, "ranks": given.ranks, "granularities": given.granularity, "layouts": given.layout}
    asked["in_turn"] = given.in_turn
    for case in cases(asked):
        if results and found and found[-1]["model"] != case["model"]:
            file(record, found, begin, given.allow_dirty)
        found.append(case)
        print(f"{len(found):4} {line(case)}", flush=True)
    told = summary(found)
    print(
        f"{told['hold']} of {told['cases']} hold, the largest error {told['largest_share_of_a_bound']:.2f} of its bound"
    )
    if results:
        print("filed", file(record, found, begin, given.allow_dirty).name)
    return int(told["hold"] < told["cases"])


if __name__ == "__main__":
    sys.exit(main())
