"""Bundles on disk: written whole or not at all, opened only when every byte is the one written."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock

from taylorseer_export.bundle.atomic import aside, check_open, flush, flush_one, sweep
from taylorseer_export.bundle.external import external_files
from taylorseer_export.bundle.manifest import MANIFEST, File, Manifest
from taylorseer_export.bundle.sealed import content
from taylorseer_export.errors import BundleError, ConfigError

Progress = Callable[[int], None]

_CHUNK = 1 << 20  # bytes read at a time
_THREADS = 4  # hashing releases the interpreter lock; more than this only queue on the disk
_AGAIN = "replace it by a file and write the bundle again"
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

    def check_listed(self, relative: str) -> None:
        """Refuse an ONNX graph that reads a file which was never checked.

        Args:
            relative: The graph's name in the manifest.

        Raises:
            BundleError: It is no graph, or names a file beside it that the manifest does not list.
        """
        path, remedy = self.path(relative), _remedy(self.folder, self.manifest.family)
        try:
            read = external_files(path.read_bytes())
        except ValueError as error:
            raise BundleError(f"{path} is {error}, expected an ONNX graph; {remedy}") from error
        for name in read:
            if (PurePosixPath(relative).parent / name).as_posix() not in self.manifest.files:
                raise BundleError(
                    f"file `{name}`, which {path} reads, is not listed in {self.folder / MANIFEST}, expected "
                    f"every file that a graph reads to be there with its hash; {remedy}"
                )


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
    check_place(folder)
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
    for name in relative:
        if (place := _leaving(folder, name)) is not None:
            raise BundleError(
                f"{folder / name} leads to {place}, expected a file inside the bundle: path escapes the folder; "
                f"{_AGAIN}"
            )
    return _hashes(folder, [name for name in relative if name != MANIFEST], progress, _AGAIN)


def open_bundle(folder: Path, progress: Progress | None = None) -> Bundle:
    """Open a bundle after checking its manifest and every byte of every file.

    All sizes are compared before the first hash, so a cut-off copy is noticed at once. Files that
    the manifest does not list are left alone. What changes after this call is not noticed. A file may be a link, as
    in the cache of a hub, wherever it leads: its bytes are compared.

    Args:
        folder: The bundle.
        progress: As in `hash_files`.

    Raises:
        BundleError: The folder, its manifest or a file is missing, unreadable, no regular file, or not what the
            manifest says. Names the file.
    """
    if not folder.is_dir():
        raise BundleError(f"bundle {folder} is missing, expected a folder; {_remedy(folder, '<family>')}")
    data = content(folder / MANIFEST, f"the manifest of a bundle; {_remedy(folder, '<family>')}")
    manifest = Manifest.from_bytes(data, folder / MANIFEST)
    remedy = _remedy(folder, manifest.family)
    for name, file in manifest.files.items():
        size = _regular(folder, name, remedy).stat().st_size
        if size != file.size:
            raise BundleError(f"{folder / name} is {size} bytes, expected {file.size} bytes; {remedy}")
    for name, seen in _hashes(folder, manifest.files, progress, remedy).items():
        if seen != (expected := manifest.files[name]):
            place = _leaving(folder, name)  # nothing is told of a file outside but that it is another one
            what = f"has SHA-256 {seen.sha256}" if place is None else f"leads to {place}, whose bytes are others"
            raise BundleError(f"{folder / name} {what}, expected SHA-256 {expected.sha256}; {remedy}")
    return Bundle(folder, manifest)


def _hashes(
    folder: Path,
    names: Iterable[str],
    progress: Progress | None,
    remedy: str,
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
    """The path of a file that exists, links followed: what a file is, its hash decides, not where it lies."""
    path = Path(os.path.realpath(folder / name))
    if not os.path.isfile(path):
        state = "not a file" if os.path.exists(path) else "missing"
        raise BundleError(f"{folder / name} is {state}, expected a regular file; {remedy}")
    return path


def _leaving(folder: Path, name: str) -> Path | None:
    """Where a link leads that leaves the folder; None where it stays."""
    path = Path(os.path.realpath(folder / name))
    return None if path.is_relative_to(os.path.realpath(folder)) else path


def check_place(folder: Path) -> None:
    """Refuse a place where no bundle can be written, before the work of making one.

    Raises:
        ConfigError: `folder` is a file or holds something that is not a bundle, or a folder that would hold it is none
            or is closed.
    """
    try:
        folder = folder.resolve()
        _refuse_foreign(folder)
        holder = next(parent for parent in folder.parents if parent.exists() or parent.is_symlink())
    except (OSError, RuntimeError) as error:  # names too long, links in a circle, folders that may not be looked into
        raise ConfigError(
            f"{folder} is no place for a bundle ({error}), expected a folder; choose another --out"
        ) from error
    if not holder.is_dir():
        raise ConfigError(f"{holder} is no folder, expected one for {folder.name}; choose another --out")
    check_open(holder, folder.name, "choose another --out")


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
