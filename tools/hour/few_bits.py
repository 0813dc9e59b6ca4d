"""FLUX.1-dev with fp8 weights beside itself in bfloat16: bytes of the weights, steps, loops, and the error to float32.

torch has the weights widened before each product, so a full step is not expected to be faster: it may cost what that
moves, and the GPU holds half as much. The reference of the error holds what the fp8 weights stand for, as in `verify`.
"""

from __future__ import annotations

from typing import Any

from hour import contest
from hour.ours import ours
from hour.report import Report
from hour.rivals import eager
from hour.subjects import Case

FORM = "fp8"


def run(args: Any, report: Report) -> None:
    """Both, as far as time allows.

    Raises:
        RuntimeError: One of them failed.
    """
    contest.run("flux", args, report, contestants)


def contestants(case: Case, floor: dict[str, float], report: Report) -> dict[str, contest.Contestant]:
    """Label -> what to run: the plain model for its operations, ours in bfloat16, ours with fp8 weights."""
    order, shared = case.args.order[0], {}  # type: ignore[var-annotated]

    def made(weights: str | None) -> dict[str, Any]:
        return ours(case, "residual", order, shared, floor, report.kept, weights)

    label = f"ours residual order {order}"
    return {"eager": lambda: eager(case), label: lambda: made(None), f"{label} {FORM}": lambda: made(FORM)}
