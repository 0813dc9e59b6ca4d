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
from pathlib import Path
from typing import Annotated, ClassVar, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taylorseer_export.errors import BundleError

LARGEST = 16 << 20  # bytes of a sealed file; the largest published model's manifest takes a hundredth of it
SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a sealed file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sealed(Part):
    """A whole file. `digest` is the SHA-256 of the canonical JSON of all the other fields.

    Attributes:
        KIND: What the file is, for errors.
        REMEDY: What to do about a damaged one.
    """

    KIND: ClassVar[str]
    REMEDY: ClassVar[str]

    schema_version: int = Field(
        default=SCHEMA_VERSION, ge=1, description="Version of this schema; rises when it changes."
    )
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
        if type(version) is int and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} is of schema version {version}, expected at most {SCHEMA_VERSION}: it was "
                "written by a newer taylorseer-export; upgrade taylorseer-export"
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


def _canonical(value: object) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _first_problem(error: ValidationError, kind: str) -> str:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"] and isinstance(problem["input"], dict):
        said = problem["msg"].removeprefix("Value error, ")
        return f"is {kind} that contradicts itself, expected one that agrees: {said}"
    where = ".".join(map(str, problem["loc"])) or kind.split()[-1]
    seen = repr(problem["input"])
    if len(seen) > 60:
        seen = f"{seen[:60]}…"
    return f"field `{where}` is {seen}, expected otherwise: {problem['msg']}"
