"""Bundles on disk: written whole or not at all, opened only when every byte is the one written."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from taylorseer_export.bundle.atomic import aside, flush, flush_one, sweep
from taylorseer_export.bundle.manifest import MANIFEST, File, Manifest
from taylorseer_export.errors import BundleError, ConfigError

Progress = Callable[[int], None]

_CHUNK = 1 << 20  # bytes read at a time
_THREADS = 4  # hashing releases the interpreter lock; more than this only queue on the disk
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all had the size and hash in its manifest when it was opened.

    Args:
        folder: Where it lies.
        manifest: What is in it.
    """

    folder: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """Where one file of the bundle lies.

        Args:
            relative: Its name in the manifest, a relative posix path.

        Raises:
            BundleError: The manifest lists no such file, so it was never checked.
        """
        if relative not in self.manifest.files:
            raise BundleError(
                f"file `{relative}` is not listed in {self.folder / MANIFEST}, expected one of "
                f"{', '.join(self.manifest.files)}; {_remedy(self.folder, self.manifest.family)}"
            )
        return self.folder / relative


@contextmanager
def writing(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """Write a bundle whole or not at all.

    1. Yields an empty folder beside `folder`, on the same disk, to write into.
    2. When the block ends, its content is flushed to disk and takes the place of `folder` by
       renaming; a bundle that was there is moved aside first and deleted last.
    3. When anything is raised instead, Ctrl-C included, it is deleted and `folder` is as before.

    What a killed process left in the same place is swept first. A process killed, or a loss of power, between the two
    renames leaves the old bundle aside; whoever writes there next puts it back first.

    Args:
        folder: Where the bundle goes; missing parents are made.
        needed: Size of what will be written, if known, checked before any work. Unit: bytes.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: `folder` is a file, or holds something that is not a bundle.
        BundleError: The disk is full, or has less than `needed` free.
    """
    folder = folder.resolve()
    _refuse_foreign(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with aside(folder) as partial:
            if needed is not None and shutil.disk_usage(partial).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            yield partial
            flush(partial)
            _refuse_foreign(folder)
            _take_place(partial, folder)
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        expected = "room for the bundle" if needed is None else f"{needed} bytes free"
        raise BundleError(
            f"disk holding {error.filename or folder} is full, expected {expected}; free space or choose another --out"
        ) from error


def _take_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; a bundle that is there is moved aside first, and back where that fails."""
    if not folder.exists():
        partial.rename(folder)
    else:
        with aside(folder, "replaced") as place:
            old = place / folder.name
            try:
                folder.rename(old)
                partial.rename(folder)
            finally:
                if old.exists() and not folder.exists():
                    old.rename(folder)
    flush_one(folder.parent)


def hash_files(folder: Path, progress: Progress | None = None) -> dict[str, File]:
    """Hash and size of every file under a folder but its manifest.

    Args:
        folder: The folder, searched to any depth.
        progress: Called with the number of bytes just read, one call at a time, from the threads
            that hash. Unit: bytes.

    Returns:
        Each file by its relative posix path, in the order of the names.

    Raises:
        BundleError: Something is not a regular file, or is a link that leaves the folder.
    """
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    relative = sorted(path.relative_to(folder).as_posix() for path in found)
    return _hashes(folder, [name for name in relative if name != MANIFEST], progress)


def open_bundle(folder: Path, progress: Progress | None = None) -> Bundle:
    """Open a bundle after checking its manifest and every byte of every file.

    All sizes are compared before the first hash, so a cut-off copy is noticed at once. Files that
    the manifest does not list are left alone. What changes after this call is not noticed.

    Args:
        folder: The bundle.
        progress: As in `hash_files`.

    Raises:
        BundleError: The folder, its manifest or a file is missing, unreadable, outside the
            folder, or not what the manifest says. Names the file.
    """
    if not folder.is_dir():
        raise BundleError(f"bundle {folder} is missing, expected a folder; {_remedy(folder, '<family>')}")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder / MANIFEST} is not readable ({error.strerror}), expected the manifest of a "
            f"bundle; {_remedy(folder, '<family>')}"
        ) from error
    manifest = Manifest.from_bytes(data, folder / MANIFEST)
    remedy = _remedy(folder, manifest.family)
    for name, file in manifest.files.items():
        size = _regular(folder, name, remedy).stat().st_size
        if size != file.size:
            raise BundleError(f"{folder / name} is {size} bytes, expected {file.size} bytes; {remedy}")
    for name, seen in _hashes(folder, manifest.files, progress, remedy).items():
        if seen != (expected := manifest.files[name]):
            raise BundleError(f"{folder / name} has SHA-256 {seen.sha256}, expected {expected.sha256}; {remedy}")
    return Bundle(folder, manifest)


def _hashes(
    folder: Path,
    names: Iterable[str],
    progress: Progress | None,
    remedy: str = "replace it by a file and write the bundle again",
) -> dict[str, File]:
    lock = Lock()

    def hashed(name: str) -> File:
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(_regular(folder, name, remedy), remedy):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                with lock:
                    progress(len(chunk))
        return File(sha256=digest.hexdigest(), size=size)

    names = tuple(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(hashed, names), strict=True))


def _chunks(path: Path, remedy: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise BundleError(f"{path} is not readable ({error.strerror}), expected a regular file; {remedy}") from error


def _regular(folder: Path, name: str, remedy: str) -> Path:
    """The path of a file that exists in the folder, links followed."""
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise BundleError(
            f"{folder / name} leads to {path}, expected a file inside the bundle: path escapes the folder; {remedy}"
        )
    if not os.path.isfile(path):
        state = "not a file" if os.path.exists(path) else "missing"
        raise BundleError(f"{folder / name} is {state}, expected a regular file; {remedy}")
    return path


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder; choose another --out")
    if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} is a folder without {MANIFEST}, expected a bundle or an empty folder; "
            "choose another --out, nothing was deleted"
        )


def _remedy(folder: Path, family: str) -> str:
    return f"copy the bundle again, or rebuild it with `taylorseer-export {family} ... --out {folder.parent}`"
