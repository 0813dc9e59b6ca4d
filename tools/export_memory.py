"""Export memory: how much of a large checkpoint is ever resident while it is exported.

    python tools/export_memory.py                          a FLUX of 4 B parameters in bf16; needs 26 GB of disk
    python tools/export_memory.py --parameters 12e9 --dtype fp8 --precision fp16      with scales; needs 37 GB of disk

Makes a random checkpoint, exports it in a process of its own, samples that process's resident memory until it ends, and
deletes both. Resident memory has two parts. Anonymous pages are what the process allocated; file pages are what it
mapped, such as the shards and the libraries themselves, and the kernel may drop them whenever it likes. The limit is on
their sum.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import ROOT, circumstances, record_options, write_record
from tqdm import tqdm

from taylorseer_export.checkpoint.files import headers, tensor_names
from taylorseer_export.checkpoint.packed import is_part

LIMIT = 6e9  # bytes resident; the fp32 weights of the default model are 16e9
PERIOD = 0.02  # seconds between two samples
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}  # of a parameter
GRAPHS = ("prepare", "full", "forecast")  # in the order they are written
_FIELDS = {"VmHWM": "peak", "VmRSS": "total", "RssAnon": "anonymous", "RssFile": "file"}


def resident(pid: int) -> dict[str, int]:
    """Resident memory of a process now, in bytes; empty once it has ended. `peak` is the kernel's own high mark."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return {_FIELDS[k]: int(values[k].split()[0]) * 1024 for k in _FIELDS if k in values}


def stage_of(out: Path) -> str:
    """What the export is at, seen from the files it has written."""
    partial = next(iter(out.glob(".*partial*")), None)
    if partial is None:
        return "finish" if out.exists() else "trace and split"
    if not _complete(partial / "weights.safetensors"):
        return "weights"
    return next((f"graph {name}" for name in GRAPHS if not (partial / f"{name}.onnx").exists()), "hash")


def _complete(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    if not path.is_file() or path.stat().st_size < 8:
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    if len(text) < length:
        return False
    ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
    return path.stat().st_size >= 8 + length + max(ends, default=0)


def measure(command: list[str], out: Path, weights: int) -> dict[str, object]:
    """Run `command` and watch its memory.

    Args:
        command: The export.
        out: Its `--out`, where stages are read off and the bar's bytes are counted.
        weights: Bytes that it will write, for the bar.

    Returns:
        Peak bytes (total, anonymous, file), the stage of each, peak by stage, seconds, exit code.
    """
    began = time.perf_counter()
    log = tempfile.TemporaryFile()
    child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    peaks = dict.fromkeys(("peak", "total", "anonymous", "file"), 0)
    at = dict.fromkeys(peaks, "")
    stages: dict[str, dict[str, float]] = {}
    stage, next_look, last = "trace and split", 0.0, 0.0
    with tqdm(total=weights, desc="export", unit="B", unit_scale=True) as bar:
        while child.poll() is None:
            now = time.perf_counter() - began
            if now >= next_look:
                stage, next_look = stage_of(out), now + 0.25
                written = sum(p.stat().st_size for p in out.glob(".*partial*/weights.safetensors"))
                bar.update(max(min(written, weights), bar.n) - bar.n)
                bar.set_postfix_str(f"{stage}, {peaks['total'] / 1e9:.2f} GB resident at most")
            seen = resident(child.pid)
            row = stages.setdefault(stage, {"seconds": 0.0, "total": 0, "anonymous": 0, "file": 0})
            row["seconds"] += now - last
            last = now
            for name, value in seen.items():
                if value > peaks[name]:
                    peaks[name], at[name] = value, stage
                if name in row:
                    row[name] = max(row[name], value)
            time.sleep(PERIOD)
    log.seek(0)
    text = log.read().decode(errors="replace")
    log.close()
    for row in stages.values():
        row["seconds"] = round(row["seconds"], 1)
    return {
        "peak_rss_bytes": max(peaks["peak"], peaks["total"]),
        "peak_anonymous_bytes": peaks["anonymous"],
        "peak_file_bytes": peaks["file"],
        "peak_stage": {"total": at["total"], "anonymous": at["anonymous"], "file": at["file"]},
        "stages": stages,
        "seconds": round(time.perf_counter() - began, 1),
        "exit_code": child.returncode,
        "output_tail": text[-2000:] if child.returncode else "",
    }


def parameters_of(folder: Path) -> int:
    """Of a checkpoint, by the headers of its files."""
    files = {name: path for path in sorted(folder.glob("*.safetensors")) for name in tensor_names(path)}
    return sum(math.prod(one.shape) for name, one in headers(files).items() if not is_part(name))


def run(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    checkpoint, out = folder / "random-flux", folder / "engines"
    python = [sys.executable]
    make = ["tools/make_asset.py", "random-checkpoint", "flux"]
    make += ["--parameters", str(args.parameters), "--dtype", args.dtype]
    make += ["--heads", str(args.heads), "--shards", str(args.shards), "--out", str(checkpoint)]
    if args.double:
        make += ["--double", str(args.double), "--single", str(args.single)]
    subprocess.run([*python, *make], cwd=ROOT, check=True)  # its own process: the sampled one inherits no memory
    read = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    parameters = parameters_of(checkpoint)
    export = ["-m", "taylorseer_export.cli", "flux", "--model", str(checkpoint), "--order", str(args.order)]
    export += ["--precision", args.precision, *(["--device", "cuda"] if args.precision == "fp16" else [])]
    export += ["--state", args.state, "--latent-size", args.latent_size, "--batch", "1", "--out", str(out)]
    found = measure([*python, *export], out, BYTES[args.precision] * parameters)
    written = sum(path.stat().st_size for path in out.rglob("weights.safetensors"))
    shutil.rmtree(out, ignore_errors=True)
    return {
        "parameters": parameters,
        "dtype": args.dtype,
        "precision": args.precision,
        "checkpoint_bytes": read,
        "weights_file_bytes": written,
        "order": args.order,
        "granularity": args.state,
        "latent_size": args.latent_size,
        "limit_bytes": int(args.limit),
        **found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=4e9, help="dimensionless (default: %(default).0e)")
    parser.add_argument("--double", type=int, help="double blocks (default: from --parameters)")
    parser.add_argument("--single", type=int, help="single blocks (default: from --parameters)")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--shards", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--order", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--state", choices=("module", "residual", "last"), default="module")
    parser.add_argument("--latent-size", default="128x128", help="HxW in latent pixels (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="resident bytes (default: %(default).0e)")
    parser.add_argument("--work", type=Path, help="folder with room for both (default: the system's temporary folder)")
    record_options(parser)
    args = parser.parse_args()
    where = circumstances(args.out, args.allow_dirty)
    needed = (BYTES[args.dtype] + BYTES[args.precision]) * args.parameters + 1e9 if not args.double else 0
    with tempfile.TemporaryDirectory(dir=args.work, prefix="export-memory-") as folder:
        if shutil.disk_usage(folder).free < needed:
            parser.error(
                f"{folder} has {shutil.disk_usage(folder).free / 1e9:.0f} GB free, expected {needed / 1e9:.0f}"
            )
        record = where | run(args, Path(folder))
    if args.work:
        record["command"] = record["command"].replace(str(args.work), "DIR")
    path = write_record("export-memory", record, args.out, args.allow_dirty)
    fits = record["exit_code"] == 0 and record["peak_rss_bytes"] < record["limit_bytes"]
    print(
        f"{record['parameters'] / 1e9:.2f} B parameters, {record['weights_file_bytes'] / 1e9:.1f} GB of weights "
        f"written in {record['seconds']:.0f} s\nresident at most {record['peak_rss_bytes'] / 1e9:.2f} GB (anonymous "
        f"{record['peak_anonymous_bytes'] / 1e9:.2f}, file {record['peak_file_bytes'] / 1e9:.2f}; the peaks need not "
        f"coincide), limit {record['limit_bytes'] / 1e9:.1f} GB: {'passed' if fits else 'FAILED'}"
    )
    for stage, row in record["stages"].items():
        print(f"  {stage:<16}{row['seconds']:>7.1f} s  total {row['total'] / 1e9:5.2f}  anonymous "
              f"{row['anonymous'] / 1e9:5.2f}  file {row['file'] / 1e9:5.2f} GB")  # fmt: skip
    if record["exit_code"]:
        print(record["output_tail"])
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0 if fits else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
