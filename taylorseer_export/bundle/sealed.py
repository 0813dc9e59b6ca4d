"""Sealed files: JSON in one canonical form that carries the hash of its own fields.

The form is fixed (sorted keys, two spaces, ASCII, a final newline), so a sealed file has exactly one correct text and
any other byte is noticed. The hash makes a slip of an editor or a disk visible; it is no signature and proves nothing
about who wrote the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taylorseer_export.errors import BundleError

LARGEST = 16 << 20  # bytes of a sealed file; the largest published model's manifest takes a hundredth of it

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a sealed file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sealed(Part):
    """A whole file. `digest` is the SHA-256 of the canonical JSON of all the other fields.

    Each kind of file has a version of its own: the default of its `schema_version`.

    Attributes:
        KIND: What the file is, for errors.
        REMEDY: What to do about a damaged one.
    """

    KIND: ClassVar[str]
    REMEDY: ClassVar[str]

    schema_version: int = Field(default=1, ge=1, description="Version of this schema; rises when it changes.")
    digest: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the canonical JSON of all other fields, hexadecimal.",
    )

    def seal(self) -> Self:
        """The same with the `digest` that its other fields have."""
        return self.model_copy(update={"digest": self._computed_digest()})

    def to_json(self) -> bytes:
        """The canonical bytes, sealed: what the file must contain."""
        return _canonical(self.seal().model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, path: object) -> Self:
        """Read a file, refusing all but the exact bytes that `to_json` wrote.

        Args:
            data: The content of the file.
            path: Where it came from, for the errors.

        Returns:
            What it holds, sealed.

        Raises:
            BundleError: The bytes are not JSON, of another schema version, have a missing, unknown
                or contradictory field, a path that leaves the folder, a digest that does not
                belong to them, or differ from the canonical form in any byte.
        """
        try:
            raw = json.loads(data.decode("ascii"), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not readable as JSON ({error}), expected {cls.KIND}; {cls.REMEDY}") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        current = cls.model_fields["schema_version"].default
        if type(version) is int and version > current:
            raise BundleError(
                f"{path} is of schema version {version}, expected at most {current}: it was "
                "written by a newer taylorseer-export; upgrade taylorseer-export"
            )
        if type(version) is int and version < current and _is_sealed(raw):
            raise BundleError(
                f"{path} is of schema version {version}, expected {current}: it was written by an older "
                f"taylorseer-export; {cls.rebuild(raw)}"
            )
        try:
            found = cls.model_validate(raw)
        except ValidationError as error:
            raise BundleError(f"{path} {_first_problem(error, cls.KIND)}; {cls.REMEDY}") from error
        if found.digest != (computed := found._computed_digest()):
            raise BundleError(
                f"{path} digest is {found.digest or 'empty'}, expected {computed}: it was "
                f"changed after it was written; {cls.REMEDY}"
            )
        if data != found.to_json():
            raise BundleError(
                f"{path} is {len(data)} bytes in another layout, expected the canonical form "
                f"(sorted keys, two spaces, no extra whitespace); {cls.REMEDY}"
            )
        return found

    @classmethod
    def rebuild(cls, raw: Mapping[str, Any]) -> str:
        """How to get a file of an older version, whose fields are `raw`, in the current one."""
        return cls.REMEDY

    def _computed_digest(self) -> str:
        body = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(_canonical(body)).hexdigest()


def content(path: Path, expected: str) -> bytes:
    """The bytes of a sealed file, a regular one of at most `LARGEST`: what else may lie there is not read.

    Args:
        path: The file, links followed.
        expected: What it is, and the remedy, for the errors.

    Raises:
        BundleError: It is missing, unreadable, no regular file, or too large.
    """
    try:
        # A pipe is opened without waiting for a writer, and then seen to be one.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BundleError(f"{path} is no regular file, expected {expected}")
            data = stream.read(LARGEST + 1)
    except OSError as error:
        raise BundleError(f"{path} is not readable ({error.strerror}), expected {expected}") from error
    if len(data) > LARGEST:
        raise BundleError(f"{path} is more than {LARGEST} bytes, expected {expected}")
    return data


def _is_sealed(raw: Mapping[str, Any]) -> bool:
    """Whether the digest of a file of any version belongs to its other fields."""
    body = {key: value for key, value in raw.items() if key != "digest"}
    try:
        return bool(raw.get("digest") == hashlib.sha256(_canonical(body)).hexdigest())
    except (ValueError, RecursionError):
        return False


def _canonical(value: object) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _first_problem(error: ValidationError, kind: str) -> str:
    problem = error.errors(include_url=False)[0]
    said = _shown(problem["msg"].removeprefix("Value error, "), 600)
    if not problem["loc"] and isinstance(problem["input"], dict):
        return f"is {kind} that contradicts itself, expected one that agrees: {said}"
    where = ".".join(map(str, problem["loc"])) or kind.split()[-1]
    return f"field `{_shown(where, 200)}` is {_shown(repr(problem['input']), 60)}, expected otherwise: {said}"


def _shown(text: str, most: int) -> str:
    """Text of a file as it may stand in a sentence: of one line, and not too long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"
