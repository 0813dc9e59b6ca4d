"""Stages that run other code: tests, engine by engine, and one model's contest."""

from __future__ import annotations

import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import ROOT

from hour.goals import Goal, at_most, not_run
from hour.report import Report

# Kind of engine -> (what `-k` chooses, the modules it needs). A kind whose library is missing starts no process.
KINDS = {
    "inductor": ("inductor", ()),
    "onnxruntime": ("onnxruntime", ("onnxruntime",)),
    "tensorrt-rtx": ("tensorrt-rtx", ("tensorrt_rtx",)),
    "tensorrt": ("tensorrt and not tensorrt-rtx and not torch-tensorrt", ("tensorrt",)),
    "torch-tensorrt": ("torch-tensorrt", ("torch_tensorrt",)),
}
ON_GPU = ("tests/test_runtime.py", "tests/test_inductor.py", "tests/test_onnxruntime_gpu.py")
# A trial runs the same contract on the CPU's engines: numbers against the oracle and the untouched model.
ON_CPU = {"inductor": "inductor", "onnxruntime": "onnx"}
TRIED = "(all_full or parity_with)"
DOUBLES = "capture or stream or fallback or gpu or closing"


def engines(args: Any, report: Report) -> None:
    """Every kind of engine in a process of its own: one that crashes costs the others nothing.

    Raises:
        RuntimeError: A test failed, or a process of tests died.
    """
    found: dict[str, Any] = {}
    goals: list[Goal] = []
    lost = []
    for kind, (chosen, modules) in KINDS.items():
        goal = f"{kind}: tests that failed"
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            goals.append(not_run(goal, f"{', '.join(missing)} is not installed"))
        elif args.device == "cpu" and kind not in ON_CPU:
            goals.append(not_run(goal, "a trial has no GPU to build for"))
        else:
            if args.device == "cpu":
                words = ["-m", "not gpu", "-k", f"{ON_CPU[kind]} and {TRIED}", "tests/test_runtime.py"]
            else:
                words = ["-m", "gpu", "-k", chosen, *ON_GPU]
            found[kind] = counted = tests(report, f"engines-{kind}", words)
            goals.append(judged(goal, counted))
            if counted["died"] or counted["failed"]:
                lost.append(f"{kind}: {counted['died'] or ', '.join(counted['failed'][:5])}")
        report.write(found, goals)
        print(kind, goals[-1], flush=True)
    if lost:
        raise RuntimeError("; ".join(lost))


def captures(args: Any, report: Report) -> None:
    """What has been seen with doubles alone; a trial runs the doubles, the GPU the real thing.

    Raises:
        RuntimeError: A test failed, or a process of tests died.
    """
    where = "gpu" if args.device == "cuda" else "not gpu"
    words = ["-m", where, "tests/test_captures.py"]
    _one(report, "captures", "streams and captures: tests that failed", words)


def triton(args: Any, report: Report) -> None:
    """The tests of a real server.

    Raises:
        RuntimeError: A test failed, or a process of tests died.
    """
    _one(report, "triton", "Triton: tests that failed", ["tests/test_triton.py"])


def contest(args: Any, report: Report) -> None:
    """The contest of the model that the stage is named for."""
    from hour.contest import run

    run(args.here, args, report)


def _one(report: Report, name: str, goal: str, words: list[str]) -> None:
    counted = tests(report, name, words)
    report.write({name: counted}, [judged(goal, counted)])
    if counted["died"] or counted["failed"]:
        raise RuntimeError(counted["died"] or ", ".join(counted["failed"][:5]))


def tests(report: Report, name: str, words: list[str]) -> dict[str, Any]:
    """Run pytest, and count what its report says; a process that died has no report, and says by what."""
    report.kept.mkdir(parents=True, exist_ok=True)
    junit = report.kept / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-o", "addopts=", "-p", "no:xdist",
               f"--junitxml={junit}", *words]  # fmt: skip
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    died = f"pytest ended by {signal.Signals(-code).name}" if code < 0 else ""
    if not died and code not in (0, 1, 5):  # 5: no test was chosen
        died = f"pytest ended with {code}, expected 0 or 1"
    return {**counts(junit), "died": died}


def counts(junit: Path) -> dict[str, Any]:
    """Tests passed, failed and skipped, with the names and the reasons."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}}
    if not junit.is_file():
        return found
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(str(case.get("name")))
        elif (skip := case.find("skipped")) is not None:
            why = str(skip.get("message"))
            found["skipped"][why] = found["skipped"].get(why, 0) + 1
        else:
            found["passed"] += 1
    return found


def judged(goal: str, counted: dict[str, Any]) -> Goal:
    """Whether tests ran and none failed; where all were skipped, why."""
    if counted["died"]:
        return not_run(goal, counted["died"])
    if not counted["passed"] and not counted["failed"]:
        return not_run(goal, "; ".join(counted["skipped"]) or "no test was chosen")
    return at_most(f"{goal}, {counted['passed']} passed", 0, len(counted["failed"]))
