"""Records: what a measurement depended on, and the JSON files under tools/results that keep both."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
LIBRARIES = ("torch", "diffusers", "onnxruntime", "onnx", "onnxscript", "numpy", "safetensors")


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and command line."""
    git = ["git", "-C", str(ROOT)]
    commit, changed = (_output([*git, *words]) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), platform.processor())
    tool = Path(sys.argv[0]).name
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        # Folders of the machine it ran on say nothing to a reader.
        "command": " ".join(["python", f"tools/{tool}", *[Path(a).name if a[0] == "/" else a for a in sys.argv[1:]]]),
    }


def _output(command: list[str]) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def write_record(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<date>-<name>.json` into `folder`; a record of the same day is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date'][:10]}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
