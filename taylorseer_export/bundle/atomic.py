"""Files and folders written whole or not at all, and what a killed process left of them.

What is under way lies in a folder `.NAME.partial-TOKEN` beside its place, on the same disk. Whoever writes it holds a
lock on that folder, which the system takes away when the process ends, however it ends: a folder that can be locked
has no owner. Where a disk knows no locks nothing is swept.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from taylorseer_export.errors import ConfigError

_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[0-9a-f]{12}")


def check_open(folder: Path, what: str, fix: str) -> None:
    """Refuse a folder in which this process may make nothing, before the work whose result goes there.

    Raises:
        ConfigError: Says what was to be written there, and `fix`.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"folder {folder} is not writable, expected it for {what}; {fix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write one file whole or not at all.

    1. Yields a path in a folder beside `path` to write to; the folder that holds `path` must exist.
    2. When the block ends, the file is flushed to disk and takes the place of `path` by renaming.
    3. When anything is raised instead, Ctrl-C included, it is deleted and `path` is as before.

    Raises:
        ConfigError: Something else than a regular file is there.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is no regular file, expected one or nothing there; choose another name")
    sweep(path.parent)
    with aside(path) as folder:
        written = folder / path.name
        yield written
        flush(written)
        written.replace(path)


@contextmanager
def aside(path: Path, kind: str = "partial") -> Iterator[Path]:
    """An empty folder beside `path` that is locked, and deleted at the end where it still has its name."""
    while True:
        folder = path.with_name(f".{path.name}.{kind}-{secrets.token_hex(6)}")
        folder.mkdir()
        try:
            handle = _locked(folder)
        except OSError:  # no locks on this disk, so nobody sweeps
            handle = None
            break
        if handle is not None:
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(parent: Path) -> None:
    """Delete what killed processes left in a folder. A bundle that was moved aside for one that never came is put back.

    What a live process writes is left alone, and so is what cannot be deleted.
    """
    try:
        left = [(path, found) for path in parent.iterdir() if (found := _ASIDE.fullmatch(path.name))]
    except OSError:
        return
    for path, found in left:
        try:
            handle = _locked(path)
        except OSError:
            continue
        if handle is None:
            continue
        try:
            if found["kind"] == "replaced" and not os.path.lexists(parent / found["name"]):
                with suppress(FileNotFoundError):
                    (path / found["name"]).rename(parent / found["name"])
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def flush(path: Path) -> None:
    """Have a file or folder, and all in it, on the disk before going on."""
    for parent, _, names in os.walk(path, topdown=False):
        for name in names:
            flush_one(Path(parent, name))
        flush_one(Path(parent))
    if not path.is_dir():
        flush_one(path)


def flush_one(path: Path) -> None:
    """The same for a file, or for a folder's list of names alone."""
    if os.name == "nt":  # has no fsync for folders and read-only handles
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock of a folder; None where another one holds it or the folder is gone.

    Raises:
        OSError: Folders cannot be locked here.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have renamed it, or another sweeper deleted it, before the lock was taken.
        if os.path.samestat(os.fstat(handle), os.stat(folder, follow_symlinks=False)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None
