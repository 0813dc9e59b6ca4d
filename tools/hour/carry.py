"""What is carried to a bare machine: wheels for its Python that it lacks, small enough to travel with the checkout.

The machine has torch, Triton and what comes with images for them: numpy, safetensors, onnx, onnxruntime for the CPU,
onnxscript, transformers, accelerate, pytest, hypothesis, filelock. `CARRIED` is what this package imports beside that.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from record import ROOT, commit_of

MOST_BYTES = 64_000_000
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
FOR_THERE = ("--python-version", PYTHON, "--only-binary=:all:", *(f"--platform={p}" for p in PLATFORMS))
# Without their dependencies, so each that the machine lacks is here by name.
CARRIED = (
    "diffusers",
    "cache-dit",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "importlib-metadata",
    "lazy-importer",
)
# What would run more engines, and why it stays behind even where it would fit.
LEFT = {
    "onnxruntime-gpu": "engines: onnxruntime on the GPU",
    "tensorrt-rtx-cu13-libs": "engines: tensorrt-rtx, which builds for no compute capability 9.0 in any case",
    "torch-tensorrt==2.11.0": "engines: tensorrt and torch-tensorrt: TensorRT is gigabytes of NVIDIA's own index",
}
PAPER = "carried.json"
SOURCES = ("taylorseer_export", "tools", "tests")


@dataclass(frozen=True)
class Wheel:
    """A wheel: its name and version, its size in bytes, and its hash where it lies here."""

    name: str
    version: str
    bytes: int
    sha256: str = ""


def pins(root: Path = ROOT) -> dict[str, str]:
    """Name -> version: of the oldest versions, which go with torch 2.11, and for the rest of those in use."""
    found: dict[str, str] = {}
    for name in ("constraints.txt", "constraints-oldest.txt"):
        lines = (root / "tools" / name).read_text(encoding="utf-8").splitlines()
        found |= dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return found


def carry(folder: Path) -> int:
    """Fetch the wheels into `folder`, print what each weighs, and note the commit that they go with.

    Raises:
        SystemExit: A wheel is not to be had, or together they are too heavy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = pins()
    wanted = [f"{name}=={known[name]}" for name in CARRIED]
    with tempfile.TemporaryDirectory() as fresh:
        done = _pip("download", "--no-deps", "--dest", fresh, *FOR_THERE, *wanted)
        if done.returncode:
            raise SystemExit(f"pip answers {done.stderr.strip().splitlines()[-1]}, expected {', '.join(wanted)}; "
                             "correct the pins in tools/constraints-oldest.txt")  # fmt: skip
        wheels = [_wheel(path) for path in sorted(Path(fresh).glob("*.whl"))]
        print(table(wheels, heavy()))
        refuse_heavy(wheels)
        for old in folder.glob("*.whl"):
            old.unlink()
        for path in Path(fresh).glob("*.whl"):
            (folder / path.name).write_bytes(path.read_bytes())
    commit, changed = commit_of()
    paper = {"commit": commit, "uncommitted_changes": changed, "sources": digest(ROOT),
             "wheels": [vars(wheel) for wheel in wheels]}  # fmt: skip
    (folder / PAPER).write_text(json.dumps(paper, indent=1) + "\n", encoding="utf-8")
    return 0


def table(wheels: Iterable[Wheel], left: Iterable[tuple[Wheel, str]]) -> str:
    """Name, version and size of what is carried and of what stays behind, with what that costs."""
    wheels = list(wheels)
    rows = [f"{w.name:24} {w.version:12} {w.bytes / 1e6:8.2f} MB" for w in wheels]
    total = sum(w.bytes for w in wheels)
    rows.append(f"{'together':24} {'':12} {total / 1e6:8.2f} MB of at most {MOST_BYTES / 1e6:.0f}")
    for wheel, costs in left:
        size = f"{wheel.bytes / 1e6:8.2f}" if wheel.bytes else f"{'?':>8}"
        rows.append(f"{wheel.name:24} {wheel.version:12} {size} MB, left behind; not run: {costs}")
    return "\n".join(rows)


def refuse_heavy(wheels: Iterable[Wheel]) -> None:
    """Refuse what would not travel.

    Raises:
        SystemExit: As said.
    """
    wheels = list(wheels)
    total = sum(wheel.bytes for wheel in wheels)
    if total > MOST_BYTES:
        heaviest = max(wheels, key=lambda wheel: wheel.bytes)
        raise SystemExit(
            f"the wheels are {total / 1e6:.1f} MB together, expected at most {MOST_BYTES / 1e6:.0f} MB; take "
            f"{heaviest.name}, {heaviest.bytes / 1e6:.1f} MB, out of `CARRIED`, and say in `LEFT` what it costs"
        )


def heavy() -> list[tuple[Wheel, str]]:
    """What stays behind, by its size as the index says it; nothing of it is fetched."""
    return [(_at_the_index(name), costs) for name, costs in LEFT.items()]


def _at_the_index(wanted: str) -> Wheel:
    """Version and size of a wheel that is not fetched; 0 bytes where the index does not say."""
    name = wanted.split("==")[0]
    with tempfile.TemporaryDirectory() as nowhere:
        asked = (
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--target",
            nowhere,
            *FOR_THERE,
            "--report",
            "-",
            "--quiet",
        )
        done = _pip("install", *asked, wanted)
    try:
        (entry,) = json.loads(done.stdout[done.stdout.index("{") :])["install"]
        url = str(entry["download_info"]["url"])
        with urlopen(Request(url, method="HEAD"), timeout=20) as answer:
            return Wheel(name, str(entry["metadata"]["version"]), int(answer.headers["content-length"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Wheel(name, "", 0)


def install(wheels: Path, site: Path) -> None:
    """Unpack carried wheels into a folder of their own, as a machine without a network does.

    Raises:
        SystemExit: There is no wheel, or pip refuses one.
    """
    paths = sorted(map(str, wheels.glob("*.whl")))
    if not paths:
        raise SystemExit(
            f"{wheels} has no wheel, expected those of --carry; run --carry {wheels} where there is a network"
        )
    done = _pip("install", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *paths)
    if done.returncode:
        raise SystemExit(f"pip answers {done.stderr.strip().splitlines()[-1]}, expected it to unpack {wheels}; "
                         f"run with Python {PYTHON}, which they are for")  # fmt: skip


def origin(wheels: Path | None) -> dict[str, Any]:
    """The commit of this checkout; where it is a copy without git, what was noted when the wheels were fetched.

    A copy that differs from the sources of then is one with uncommitted changes.

    Raises:
        SystemExit: Nothing says what commit this is.
    """
    commit, changed = commit_of()
    if commit:
        return {"commit": commit, "uncommitted_changes": changed}
    paper = wheels / PAPER if wheels is not None else None
    if paper is None or not paper.is_file():
        raise SystemExit(
            f"this checkout has no git and {PAPER} is not beside the wheels, expected one of them to name the commit; "
            "pass --wheels FOLDER as --carry made it"
        )
    noted = json.loads(paper.read_text(encoding="utf-8"))
    changed = bool(noted["uncommitted_changes"]) or noted["sources"] != digest(ROOT)
    return {"commit": noted["commit"], "uncommitted_changes": changed}


def digest(root: Path) -> str:
    """Hash of the names and bytes of all Python sources."""
    total = hashlib.sha256()
    for path in sorted(path for part in SOURCES for path in (root / part).rglob("*.py")):
        total.update(f"\0{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()


def _wheel(path: Path) -> Wheel:
    name, version = path.name.split("-")[:2]
    content = path.read_bytes()
    return Wheel(name.replace("_", "-"), version, len(content), hashlib.sha256(content).hexdigest())


def _pip(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, capture_output=True, text=True)
