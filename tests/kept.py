"""Folders that take long to write, kept from run to run for as long as nothing that they are made from changes.

An entry lies under a key: a hash of the sources that an export reads, of what is installed, of the machine and of where
it lies, since bundles name their checkpoints by path. A changed byte gives another key, so nothing here is ever stale.
Each entry has a list of its files and their hashes beside it: one that is damaged or half written is written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# Parts of the package that no export runs: `tests/test_architecture.py` refuses the making side an import of them.
RUN_SIDE = frozenset(
    {"runtime", "embedded", "report", "serve", "comfy", "commands", "cli.py", "__init__.py", "__main__.py"}
)
# What makes and exports the models of the tests.
MAKERS = (
    "tests/kept.py",
    "tests/tiny_bundles.py",
    "tests/tiny_pipelines.py",
    "tools/tiny_models.py",
    "tools/randomised.py",
)

MOST = 3  # keys that are kept: a branch, the main branch, and the one before


def sources(root: Path = ROOT) -> Iterator[Path]:
    """Every file that the bytes of a kept folder may depend on."""
    package = root / "taylorseer_export"
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        if path.is_file() and inside.parts[0] not in RUN_SIDE and path.suffix not in (".pyc", ".md"):
            yield path
    yield from (root / name for name in MAKERS)


def surroundings() -> list[str]:
    """What else decides what an export writes: every installed version, and the machine that code is compiled for."""
    installed = sorted(f"{entry.name}=={entry.version}" for entry in distributions())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [*installed, sys.version, platform.machine(), torch.backends.cpu.get_cpu_capability(), gpu]


def key_of(root: Path, files: Iterable[Path], facts: Iterable[str]) -> str:
    """Hash of names and bytes of `files` under `root`, of where `root` lies, and of `facts`."""
    total = hashlib.sha256(str(root).encode())
    for fact in facts:
        total.update(b"\0" + fact.encode())
    for path in files:
        name = path.relative_to(root).as_posix()
        total.update(f"\0{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()[:20]


def hashes_of(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file in a folder; a file that is also linked to from elsewhere has none."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): "linked"
        if path.stat().st_nlink > 1
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


class Kept:
    """(name, write) -> what `write(folder)` returned, a path in a folder of that name under one key.

    The first process that asks writes it; others wait, and later runs find it. While one of these lives, its key is in
    use and is not swept away.
    """

    def __init__(self, root: Path, key: str):
        self.folder = root / key
        self.made: dict[str, Path] = {}
        mark = self.folder / "in use"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark = mark.open("a")
            fcntl.flock(self._mark, fcntl.LOCK_SH)
            # Between opening and locking another run may have swept it away.
            if mark.exists() and mark.stat().st_ino == os.fstat(self._mark.fileno()).st_ino:
                break
            self._mark.close()
        os.utime(mark)

    def __call__(self, name: str, write: Callable[[Path], Path]) -> Path:
        folder, record = self.folder / name, self.folder / f"{name}.json"
        with FileLock(self.folder / f"{name}.lock"):
            if not self.is_whole(name):
                record.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                made = write(folder).relative_to(folder).as_posix()
                record.write_text(json.dumps({"made": made, "files": hashes_of(folder)}))
            self.made[name] = folder / json.loads(record.read_text())["made"]
        return self.made[name]

    def is_whole(self, name: str) -> bool:
        """Whether an entry was written to its end and has not changed since, by the hash of every file."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return False
        return record["files"] == hashes_of(self.folder / name)

    def changed(self) -> list[str]:
        """Names of the entries handed out here that someone has changed since."""
        return [name for name in self.made if not self.is_whole(name)]

    def close(self) -> None:
        """No longer in use."""
        self._mark.close()


def sweep(root: Path, most: int = MOST) -> None:
    """Remove all keys but the `most` used last, and none that a run uses now."""
    marks = sorted(root.glob("*/in use"), key=lambda path: path.stat().st_mtime, reverse=True)
    for mark in marks[most:]:
        try:
            with mark.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(mark.parent)
        except OSError:  # in use, or swept by another run
            continue
