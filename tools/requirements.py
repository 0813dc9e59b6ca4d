"""Writes tools/deploy/requirements.txt: what the container installs, every package by version and hash.

    python tools/requirements.py

The versions are those of tools/constraints.txt and, for what only the container has, those that pip chooses. pip
resolves them for the container (Linux x86_64, Python 3.12); from an index that serves metadata no wheel is fetched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tools/deploy/requirements.txt"
ONNXRUNTIME = "onnxruntime-gpu==1.31.1"  # the index has no newer one for GPUs; that of the CPU is ahead
CONSTRAINTS = ROOT / "tools/constraints.txt"
BUILD = ("setuptools", "wheel")  # our own package is built in the container, without fetching anything
PYTHON = "3.12"
# pip takes the platforms as they are named: a newer glibc's are not those of the older ones as well.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
HEADER = """\
# Written by tools/requirements.py; do not edit. For Linux x86_64 and Python 3.12, as in the image.
"""


def wanted() -> list[str]:
    """What the container asks for itself: the base, two extras, ONNX Runtime for GPUs, and what builds our package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["whole"], *extras["sample"], ONNXRUNTIME, *BUILD]


def text_of(report: dict[str, object]) -> str:
    """The requirements file that says what pip's installation report says."""
    lines = []
    for entry in report["install"]:  # type: ignore[attr-defined]
        name, version = entry["metadata"]["name"].lower().replace("_", "-"), entry["metadata"]["version"]
        lines.append(f"{name}=={version} --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}")
    return HEADER + "\n".join(sorted(lines)) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--target", folder,
             "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms,
             "--constraint", str(CONSTRAINTS), "--report", str(report), *wanted()],
            check=True,
        )  # fmt: skip
        OUT.write_text(text_of(json.loads(report.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
