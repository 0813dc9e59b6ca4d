"""What is needed to mend a failure where there is no GPU: a sentence, and the small files that it speaks of."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

# Of one stage in the archive, before packing: its own words first, then generated sources, the newest first.
MOST_BYTES = 6_000_000
ONE_FILE = 1_500_000
GENERATED = (".py", ".cpp", ".cu", ".ptx", ".txt", ".log", ".best_config", ".json")

# (what the log or the error says, what is needed). The first that fits is taken.
NEEDS = (
    (
        r"out of memory|OutOfMemoryError|\bSIGKILL\b",
        "the bytes that the stage asked for, in its log; `taylorseer-export FAMILY --dry-run --memory-budget` plans "
        "the same model without a GPU",
    ),
    (
        r"does not compile|(?:Inductor|Compilation|PTXAS|CppCompile)Error|ptxas (?:fatal|error)|BackendCompilerFailed",
        "the generated kernels and wrappers of the stage, in the archive; `python tools/compile_for_gpu.py --gpu "
        "{capability} --model NAME --link`, in the environment of `make gpu-compiler`, compiles the same graphs for "
        "this GPU",
    ),
    (
        r"cannot be captured|is capturing|StreamCapture",
        "the name of the call that may not be captured, in the log; say it in `tests/cuda_double.py`, whose promises "
        "are those of the library, and the same tests fail without a GPU",
    ),
    (
        r"over_bound|error over its bound|AssertionError: .*expected at most|Mismatch|not close",
        "the prediction of the first step beyond its bound, in the archive; inputs and weights are made from seed 0 by "
        "tools/tiny_models.py and tools/hour/subjects.py on any machine, and the eager reference runs on a CPU",
    ),
    (
        r"illegal memory access|misaligned address|device-side assert|SIGSEGV|SIGABRT|SIGBUS",
        "the stack at the crash, at the end of the log, and the generated sources, in the archive; no later stage was "
        "touched by it",
    ),
    (
        r"timed out|TimeoutError|stopped after",
        "the stacks at the end of the log, which say where it stood; a second run on the same machine finds its "
        "compiled code again",
    ),
    (
        r"No module named|ModuleNotFoundError|ImportError|cannot import name",
        "the name of the package in the log; add it to `CARRIED` in tools/hour/carry.py, and carry again",
    ),
)
OTHERWISE = "the log and the versions, which the archive and the record hold"


def needs(said: Iterable[str], missed: Iterable[str], capability: str) -> str:
    """The sentence for a stage that failed, or that missed goals alone.

    Args:
        said: The error, then the log: what the one says goes before what stands somewhere in the other.
        missed: The goals.
        capability: Of the GPU.
    """
    missed = list(missed)
    for text in (*said, *missed):
        for pattern, need in NEEDS:
            if re.search(pattern, text, re.IGNORECASE):
                return need.format(capability=capability)
    if missed:
        return (
            "the times and bytes in the record, to be put beside the launches, spills and bytes that `python "
            f"tools/compile_for_gpu.py --gpu {capability}` counts for the same graphs"
        )
    return OTHERWISE


def pack(archive: Path, stage: str, own: Iterable[Path], generated: Path | None) -> list[str]:
    """Add a stage's files to the archive, in the order given, as far as they are small; the names that went in."""
    left, names = MOST_BYTES, []
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as packed:
        there = set(packed.namelist())
        for path, name in [*_own(own), *_sources(generated)]:
            name = f"{stage}/{name}"
            content = path.read_bytes()[-ONE_FILE:]
            if name in there or len(content) > left:
                continue
            packed.writestr(name, content)
            left -= len(content)
            there.add(name)
            names.append(name)
    return names


def _own(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """What a stage wrote for this: a file, or all files of a folder."""
    for path in paths:
        if path.is_dir():
            yield from ((file, f"{path.name}/{file.name}") for file in sorted(path.iterdir()) if file.is_file())
        elif path.is_file():
            yield path, path.name


def _sources(folder: Path | None) -> Iterator[tuple[Path, str]]:
    """Generated sources, the newest first: what failed was made last."""
    if folder is None or not folder.is_dir():
        return
    files = [p for p in folder.rglob("*") if p.suffix in GENERATED and p.is_file() and p.stat().st_size <= ONE_FILE]
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True):
        yield path, f"generated/{path.relative_to(folder).as_posix()}"
