"""Records: what a measurement depended on, and the JSON files under tools/results that keep both.

A record under tools/results names the commit that made it, so a tree with other changes is refused before the work
starts; `--allow-dirty` files it all the same, and the record says so. What lies under tools/results is no change: one
tool after another may file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
LIBRARIES = ("torch", "diffusers", "onnxruntime", "onnx", "onnxscript", "numpy", "safetensors", "cache-dit")


def commit_of(root: Path = ROOT) -> tuple[str, bool]:
    """(commit that is checked out, whether anything but filed results differs from it)."""
    git = ["git", "-C", str(root)]
    commit = _output([*git, "rev-parse", "HEAD"])
    return commit, bool(_output([*git, "status", "--porcelain", "--", ".", ":!tools/results"]))


def circumstances(folder: Path | None = None, allow_dirty: bool = False) -> dict[str, Any]:
    """Machine, versions, commit and command line.

    Args:
        folder: Where the record is to be written; None where it is only shown.
        allow_dirty: Whether uncommitted changes are no reason to refuse.

    Raises:
        SystemExit: The record is to be filed, and the tree has uncommitted changes.
    """
    commit, changed = commit_of()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), platform.processor())
    tool = Path(sys.argv[0]).name
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        # Folders of the machine it ran on say nothing to a reader.
        "command": " ".join(["python", f"tools/{tool}", *[Path(a).name if a[0] == "/" else a for a in sys.argv[1:]]]),
    }
    if folder is not None:
        refuse_dirty(found, folder, allow_dirty)
    return found


def refuse_dirty(record: Mapping[str, Any], folder: Path, allow_dirty: bool) -> None:
    """Refuse to file what no commit can make again; a record that lies elsewhere is marked, no more.

    Raises:
        SystemExit: As said.
    """
    if folder.resolve() == RESULTS and record["uncommitted_changes"] and not allow_dirty:
        raise SystemExit(
            f"the tree is {record['commit'][:12]} with uncommitted changes, expected a commit alone for a record in "
            "tools/results; commit or stash them, or pass --allow-dirty, which the record will say"
        )


def record_options(parser: argparse.ArgumentParser) -> None:
    """`--out` and `--allow-dirty` of a tool that writes a record."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default: tools/results)")
    dirty_option(parser)


def dirty_option(parser: argparse.ArgumentParser) -> None:
    """`--allow-dirty` alone, of a tool that files a record where it is asked to."""
    parser.add_argument("--allow-dirty", action="store_true", help="file a record of a tree with uncommitted changes")


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


def write_record(name: str, record: Mapping[str, Any], folder: Path = RESULTS, allow_dirty: bool = False) -> Path:
    """Write `<date>-<name>.json` into `folder`; a record of the same day is replaced.

    Raises:
        SystemExit: It is to be filed, and its tree had uncommitted changes.
    """
    refuse_dirty(record, folder, allow_dirty)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date'][:10]}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
