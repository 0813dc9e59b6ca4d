"""The run side alone: what serving the images API needs installed, how large that is, and how soon it answers.

    python tools/run_side.py --file

A fresh environment gets the package with the extras of `EXTRAS`, from pip's index, in the versions of
tools/constraints.txt. What makes bundles must not come along. The embedded FLUX, exported here and now, is served from
it by `taylorseer-export serve`; the picture that comes over HTTP must be the one that this full environment draws, bit
for bit. Then the server is started again and again: a cold start is the time from the start of the process to the
first 200 of /health, with the bundle's hashes checked, engines loaded and both kinds of steps warm; a first answer is
that of the first request after it. The first start of all reads its files from the disk, or from memory where pip has
just written them; nothing is done to have it one way or the other.

The environment's Python is a link to the one that runs this file and is not counted. `--linked` needs no network: it
links to the packages of this environment rather than install them.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from record import RESULTS, ROOT, circumstances, dirty_option, write_record

from taylorseer_export import cli
from taylorseer_export.embedded.requests import pictures, prompt_request
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import sample

EXTRAS = ("onnxruntime", "whole", "serve")
ABSENT = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript")
BODY = {"prompt": "a red circle left of a blue square", "seed": 7}
PACKAGE = "taylorseer_export"
_SECONDS = 120  # until a server that does not start is given up
_SHOWN = 5  # packages that the summary names


def copied_sources(folder: Path) -> Path:
    """The package as it stands, apart: pip would build it within the checkout, on what an earlier build left there."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def site_of(environment: Path) -> Path:
    """Where packages lie."""
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def installed(environment: Path, sources: Path) -> None:
    """A fresh environment that pip has filled."""
    venv.create(environment)
    python = str(environment / "bin/python")
    asked = f"{sources}[{','.join(EXTRAS)}]"
    constraints = str(ROOT / "tools/constraints.txt")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-c", constraints, asked]
    subprocess.run(pip, check=True)


def linked(environment: Path, sources: Path) -> None:
    """A fresh environment that links to what this one has of it."""
    venv.create(environment)
    site = site_of(environment)
    for name in closure(sources):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    shutil.copytree(sources / PACKAGE, site / PACKAGE)


def closure(sources: Path) -> set[str]:
    """Names of all packages that the package needs with `EXTRAS`, and that those need."""
    project = tomllib.loads((sources / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    waiting, seen = [Requirement(line) for line in lines], set()
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name in seen:
            continue
        seen.add(name)
        for line in distribution(name).requires or ():
            other = Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)):
                waiting.append(other)
    return seen


def check_absent(environment: Path) -> None:
    """Refuse an environment that has what makes bundles.

    Raises:
        SystemExit: It has.
    """
    code = f"from importlib.util import find_spec\nprint(*[name for name in {ABSENT} if find_spec(name)])"
    found = _output(environment, code)
    if found:
        raise SystemExit(f"the run side has {found}, expected none of {', '.join(ABSENT)}; see who asks for it")


def packages_of(environment: Path) -> dict[str, str]:
    """Name -> version."""
    code = (
        "import json\nfrom importlib.metadata import distributions\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in distributions()}))"
    )
    return dict(sorted(json.loads(_output(environment, code)).items()))


def sizes_of(environment: Path) -> dict[str, float]:
    """Top-level entry of the environment's packages -> MB (1e6 bytes) of its files, the largest first."""
    made = {entry.name: sum(_bytes_under(entry)) / 1e6 for entry in site_of(environment).iterdir()}
    return dict(sorted(made.items(), key=lambda item: -item[1]))


def _bytes_under(path: Path) -> Iterator[int]:
    if path.is_file():
        yield path.stat().st_size
    for folder, _, files in os.walk(path):
        yield from (os.stat(Path(folder, file)).st_size for file in files)


def _output(environment: Path, code: str) -> str:
    command = [environment / "bin/python", "-I", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=environment).stdout.strip()


def served(environment: Path, bundle: Path, more: int = 1) -> tuple[dict[str, float], list[str]]:
    """Start a server, draw, and stop it.

    Args:
        environment: That runs it.
        bundle: What it serves.
        more: Pictures after the first one.

    Returns:
        Seconds to the first /health 200 and of the first and the later answers, and resident MB at the end; then the
        pictures, as base64 of PNG files.

    Raises:
        SystemExit: It does not start, or does not draw.
    """
    command = [environment / "bin/python", "-I", "-m", PACKAGE, "serve", bundle, "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TAYLORSEER"))}
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=environment, env=kept, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"at (http://\S+)", line)
            if not found:
                process.wait(_SECONDS)
                errors.seek(0)
                raise SystemExit(f"the server does not start: {errors.read().strip() or line}")
            _until_well(found[1], began + _SECONDS)
            times = {"cold_start_s": time.perf_counter() - began}
            answers, files = [], []
            for _ in range(1 + more):
                sent = time.perf_counter()
                files.append(_drawn(found[1]))
                answers.append(time.perf_counter() - sent)
            times |= {"first_answer_s": answers[0]}
            times |= {"later_answer_s": statistics.median(answers[1:])} if more else {}
            return times | {"resident_mb": _resident(process.pid)}, files
        finally:
            process.terminate()
            process.wait(_SECONDS)


def _until_well(url: str, end: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_SECONDS) as answer:
                if answer.status == 200:
                    return
        except urllib.error.URLError as error:
            if time.perf_counter() > end:
                raise SystemExit(f"the server is not well after {_SECONDS} s: {error}") from error
        time.sleep(0.005)


def _drawn(url: str) -> str:
    """The base64 of the PNG file of `BODY`."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(BODY).encode(), headers)
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return str(json.load(answer)["data"][0]["b64_json"])


def _resident(process: int) -> float:
    """MB that a process holds in memory; 0 where the system does not say."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def drawn_here(bundle: Path) -> np.ndarray:
    """The picture of `BODY` as this environment draws it, `[height, width, 3]` uint8."""
    with load(bundle, threads=1) as denoiser:
        request = prompt_request(denoiser, [str(BODY["prompt"])], [int(BODY["seed"])])
        made: np.ndarray = pictures(denoiser, request, sample(denoiser, request, denoiser.forecasts()))[0]
    return made


def check_same(files: list[str], expected: np.ndarray) -> None:
    """Refuse pictures of a server that are not the one expected.

    Raises:
        SystemExit: A pixel differs.
    """
    from PIL import Image

    for file in files:
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))
        if seen.shape != expected.shape or (seen != expected).any():
            raise SystemExit("the run side draws another picture, expected the full environment's; compare versions")


def exported(folder: Path) -> Path:
    """The bundle of the embedded FLUX, as the command line exports it."""
    if code := cli.main(["flux", "--out", str(folder)]):
        raise SystemExit(code)
    return folder / "flux-tiny"


def measured(scratch: Path, bundle: Path, starts: int, links: bool = False) -> dict[str, Any]:
    """What the record says besides the circumstances.

    Args:
        scratch: A folder for the environment.
        bundle: Of the embedded FLUX.
        starts: Of the server, after the first one.
        links: Whether packages are linked to and not installed.
    """
    (scratch / "sources").mkdir()
    sources = copied_sources(scratch / "sources")
    environment = scratch / "environment"
    began = time.perf_counter()
    (linked if links else installed)(environment, sources)
    took = time.perf_counter() - began
    check_absent(environment)
    sizes = sizes_of(environment)
    first, files = served(environment, bundle)
    again = []
    for _ in range(starts):
        times, more = served(environment, bundle)
        again.append(times)
        files += more
    check_same(files, drawn_here(bundle))
    summary = {
        name: {f"p{q}": float(np.percentile([times[name] for times in again], q)) for q in (50, 90)} for name in first
    }
    return {
        "extras": EXTRAS,
        "linked": links,
        "absent": ABSENT,
        "packages": packages_of(environment),
        "install_s": took,
        "size_mb": sum(sizes.values()),
        "sizes_mb": sizes,
        "bundle_mb": sum(_bytes_under(bundle)) / 1e6,
        "pictures": len(files),
        "equal_bits": True,
        "first": first,
        "again": again,
        "summary": summary,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10, help="of the server, after the first (default: %(default)s)")
    parser.add_argument("--linked", action="store_true", help="link to the packages of this environment; not filed")
    parser.add_argument("--file", action="store_true", help="write the record into tools/results")
    dirty_option(parser)
    given = parser.parse_args()
    if given.linked and given.file:
        parser.error("--linked is given beside --file, expected one of them: what is filed is what pip installs")
    where = circumstances(RESULTS if given.file else None, given.allow_dirty)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        record = where | measured(folder, exported(folder / "engines"), given.starts, given.linked)
    largest = ", ".join(f"{name} {size:.1f}" for name, size in list(record["sizes_mb"].items())[:_SHOWN])
    print(f"{record['size_mb']:.0f} MB in {len(record['packages'])} packages: {largest}")
    for name, numbers in record["summary"].items():
        print(f"{name:16}{record['first'][name]:9.3f} at first, then {numbers['p50']:.3f} (p90 {numbers['p90']:.3f})")
    if given.file:
        print(f"filed {write_record('run-side', record, allow_dirty=given.allow_dirty)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
