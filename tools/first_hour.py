"""The first hour on a GPU: what the tests marked `gpu` and the goals say, proved in order on a bare machine.

    python tools/first_hour.py --carry build/first-hour/wheels     here, with a network: fetch what the machine lacks
    python tools/first_hour.py --wheels build/first-hour/wheels    there, without one: everything, from a plain checkout
    python tools/first_hour.py --list                              the stages
    python tools/first_hour.py --stage flux --budget 500           some of them, and a time for all together
    python tools/first_hour.py --device cpu --tiny                 a trial: the same code on tiny models, without a GPU
    python tools/first_hour.py --file first-hour.json              file what came back in tools/results

The machine has one GPU, torch 2.11 and Python 3.12, and no network. Each stage runs in a process of its own that is
ended when its time is up, so a crash costs that stage alone; what it found by then is kept. After each stage two files
are written anew in `--out`: `first-hour.json`, the record of all stages so far, and `first-hour.zip`, their logs and,
of those that failed, what is needed to mend them away from the GPU. Then comes the table of goals: met, missed with
its number, not run with its reason. Exits with 1 where a stage failed or a goal is missed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

from hour import carry, mending, process
from hour.goals import MISSED, NOT_RUN, Goal, not_run, table
from hour.report import Report, read
from hour.stages import NAMES, STAGES, Stage, listing, stage_of
from record import RESULTS, ROOT, circumstances, dirty_option, write_record

BUILD = ROOT / "build" / "first-hour"
NAME = "first-hour"
LEAST = 15  # seconds under which no stage begins
LIBRARIES = ("torch", "triton", "diffusers", "cache-dit", "transformers", "numpy", "pydantic", "onnxruntime",
             "onnxruntime-gpu", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx", "torch_tensorrt",
             "pytest")  # fmt: skip
FAILED = ("failed", "crashed", "timed out", "missed")


def one(stage: Stage, args: argparse.Namespace, seconds: float, site: Path | None) -> dict[str, Any]:
    """Run one stage, and what is to be said of it."""
    record: dict[str, Any] = {"stage": stage.name, "proves": stage.proves, "status": "not run", "why": "",
                              "seconds": 0.0, "budget_s": seconds, "goals": [], "found": {}}  # fmt: skip
    why = stage.why_not(site) or ("no time left in --budget" if seconds < LEAST else "")
    if why:
        return record | {"why": why, "goals": [not_run(f"{stage.name}: every goal", why)]}
    folder = BUILD / "work" / stage.name
    for stale in ("kept", "report.json", "log.txt"):
        path = folder / stale
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--here",
        stage.name,
        "--seconds",
        str(seconds),
        *passed_on(args),
    ]
    ended = process.run(command, seconds, folder / "log.txt", environment(folder, site))
    said = read(folder / "report.json")
    record |= {"seconds": round(ended.seconds, 1), "found": said.get("found", {}), "goals": said.get("goals", [])}
    if "not_run" in said:
        return record | {"why": said["not_run"], "goals": [not_run(f"{stage.name}: every goal", said["not_run"])]}
    missed = [goal["goal"] for goal in record["goals"] if goal["verdict"] == MISSED]
    record["status"], why = verdict(ended, said, record["goals"])
    record["why"] = "; ".join(filter(None, (why, said.get("error", ""))))
    if record["status"] in FAILED:
        if not record["goals"]:
            record["goals"] = [not_run(f"{stage.name}: every goal", record["why"])]
        record["log_tail"] = process.tail(folder / "log.txt")
        told = [record["why"]]
        if record["status"] != "missed":  # whose log says how well it went
            told.append("\n".join(process.tail(folder / "log.txt", 400, 60_000)))
        record["mend"] = {"needs": mending.needs(told, missed, capability_of(args))}
    return record


def verdict(ended: process.Ended, said: dict[str, Any], goals: list[Goal]) -> tuple[str, str]:
    """(status of a stage, why): one that proved nothing has not passed."""
    if ended.how != "done":
        return ended.how, ended.why
    if "found" not in said:
        return "failed", "it ended without a word, expected what it found"
    verdicts = {goal["verdict"] for goal in goals}
    if MISSED in verdicts:
        return "missed", ""
    return ("not run", "none of its goals could be") if verdicts == {NOT_RUN} else ("passed", "")


def capability_of(args: argparse.Namespace) -> str:
    """Compute capability of the GPU as the driver says it; that of an H200 in a trial."""
    if args.device == "cpu":
        return "9.0"
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[0] if lines else "9.0"


def passed_on(args: argparse.Namespace) -> list[str]:
    """The options that a stage's own process is given again."""
    words = ["--device", args.device, "--interval", str(args.interval), "--warmup", str(args.warmup)]
    words += ["--order", *map(str, args.order)]
    for name in ("steps", "repeats", "loops"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    if args.granularity:
        words += ["--granularity", *args.granularity]
    return words + [option for option, given in (("--tiny", args.tiny), ("--no-compile", not args.compiles),
                                                 ("--no-parity", not args.parity)) if given]  # fmt: skip


def environment(folder: Path, site: Path | None) -> dict[str, str]:
    """Of a stage: the checkout and what was carried on the path, compiled code kept for a second run, no network."""
    paths = [str(site)] if site else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "TRITON_CACHE_DIR": str(folder / "compiled" / "triton"),
    }


def here(args: argparse.Namespace) -> int:
    """Run one stage in this process; what it raises is put down beside what it found."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    stage = stage_of(args.here)
    path = BUILD / "work" / stage.name / "report.json"
    report = Report(path, args.seconds - LEAST / 3)  # the rest is for its last words
    try:
        if args.device == "cuda" and (why := too_small(stage)):
            report.not_run(why)
            return 0
        stage.call(args, report)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        report.failed(f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}")
        return 1
    return 0


def too_small(stage: Stage) -> str:
    """Why the GPU cannot hold a stage; empty where it can."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU" if stage.name != "facts" else ""
    free = torch.cuda.mem_get_info()[0]
    if free >= stage.gpu_bytes:
        return ""
    return (
        f"{free / 2**30:.0f} GiB of the GPU are free, expected {stage.gpu_bytes / 2**30:.0f}; end what else runs on it"
    )


def hour(args: argparse.Namespace) -> int:
    """Every stage that was chosen, one after the other; the record is on disk after each."""
    began = time.monotonic()
    site = None
    if args.wheels:
        site = BUILD / "site"
        carry.install(args.wheels, site)
    where = circumstances() | carry.origin(args.wheels) | {"trial": args.trial, "device": args.device}
    where["versions"] = versions(site)
    args.out.mkdir(parents=True, exist_ok=True)
    archive = args.out / f"{NAME}.zip"
    archive.unlink(missing_ok=True)
    stages: list[dict[str, Any]] = []
    for stage in STAGES:
        if stage.name not in args.stage:
            continue
        left = args.budget - (time.monotonic() - began)
        print(f"{stage.name}: {stage.proves} ...", file=sys.stderr, flush=True)
        record = one(stage, args, min(stage.seconds * args.patience, left), site)
        folder = BUILD / "work" / stage.name
        own = [folder / "log.txt", folder / "report.json", folder / "kept"]
        failed = record["status"] in FAILED
        if record["status"] != "not run":
            files = mending.pack(
                archive, stage.name, own if failed else own[:1], folder / "compiled" if failed else None
            )
            if failed:
                record["mend"]["files"] = {"archive": archive.name, "count": len(files), "first": files[:12]}
        stages.append(record)
        put(args.out / f"{NAME}.json", where | {"seconds": time.monotonic() - began, "stages": stages})
        print(table([record]), flush=True)
    print(f"\n{table(stages)}\n\n{args.out / NAME}.json, {archive.name}")
    return 1 if any(record["status"] in FAILED for record in stages) else 0


def versions(site: Path | None) -> dict[str, str]:
    """Versions of what the stages lean on, installed or carried."""
    path = [*([str(site)] if site else []), *sys.path]
    return {name: found.version for name in LIBRARIES for found in islice(distributions(name=name, path=path), 1)}


def put(path: Path, content: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    half = path.with_suffix(".half")
    half.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(half, path)


def filed(paths: list[Path], folder: Path, allow_dirty: bool) -> Path:
    """File what came back as one record: of a stage that ran several times the last one that ran at all.

    Raises:
        SystemExit: The records are of several commits or devices, or of a tree with uncommitted changes.
    """
    records = sorted((json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda r: r["date"])
    of = {(record["commit"], record["device"], record["trial"]) for record in records}
    if len(of) != 1:
        raise SystemExit(f"the records are of {len(of)} commits or devices, expected one; file them one by one")
    stages: dict[str, Any] = {}
    for record in records:
        for stage in record["stages"]:
            if stage["stage"] not in stages or stage["status"] != "not run":
                stages[stage["stage"]] = stage
    whole = records[-1] | {"stages": [impersonal(stages[name]) for name in NAMES if name in stages]}
    return write_record(NAME if not whole["trial"] else f"{NAME}-trial", whole, folder, allow_dirty)


def impersonal(content: Any) -> Any:
    """What is filed of a stage: files by their names, since the folders of the machine say nothing to a reader."""
    if isinstance(content, dict):
        return {key: impersonal(value) for key, value in content.items() if key != "platform"}
    if isinstance(content, list):
        return [impersonal(value) for value in content]
    return re.sub(r"(?<![\w.:/])(?:/[\w.+-]+)+/", "", content) if isinstance(content, str) else content


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    parser.add_argument("--carry", type=Path, metavar="FOLDER", help="fetch the wheels that the machine lacks and end")
    parser.add_argument("--file", type=Path, nargs="+", metavar="RECORD", help="file records in tools/results and end")
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="install what --carry fetched, for the stages alone"
    )
    parser.add_argument("--stage", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="(default: all)")
    parser.add_argument("--budget", type=float, default=3000, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--patience", type=float, default=1.0, metavar="TIMES", help="a stage's own time, so often")
    parser.add_argument("--out", type=Path, default=BUILD, metavar="FOLDER", help="(default: build/first-hour)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    dirty_option(parser)
    bench = parser.add_argument_group("the benches")
    bench.add_argument(
        "--no-compile", dest="compiles", action="store_false", help="leave torch.compile out, for a trial"
    )
    bench.add_argument("--no-parity", dest="parity", action="store_false", help="leave out the float32 comparison")
    bench.add_argument("--granularity", nargs="+", help="(default: the model's)")
    bench.add_argument("--order", type=int, nargs="+", default=[1], help="the first meets the rivals")
    bench.add_argument("--steps", type=int, help="of a loop (default: the model's)")
    bench.add_argument("--interval", type=int, default=6)
    bench.add_argument("--warmup", type=int, default=3)
    bench.add_argument("--repeats", type=int, help="calls per timing of a full step")
    bench.add_argument("--loops", type=int, help="pairs of whole loops")
    parser.add_argument("--here", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3000, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    if args.list:
        print(listing())
        return 0
    if args.carry:
        return carry.carry(args.carry)
    if args.file:
        print(filed(args.file, RESULTS, args.allow_dirty))
        return 0
    if args.device == "cpu" and not args.tiny:
        parser.error("--device is cpu without --tiny, expected a GPU for the full-size models; add --tiny")
    args.trial = "" if args.device == "cuda" and not args.tiny and args.compiles else "a trial, not the real thing"
    return here(args) if args.here else hour(args)


if __name__ == "__main__":
    sys.exit(main())
