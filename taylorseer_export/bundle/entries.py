"""What entries of a manifest may hold: names, numbers, paths and shapes, checked one by one."""

import json
from pathlib import PureWindowsPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from taylorseer_export.bundle import shapes
from taylorseer_export.bundle.schedulers import SCHEDULERS

BUNDLE_NAME = "[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"  # regular expression; a name is part of a folder's


def _plain_json(value: Any) -> Any:
    """The value as JSON reads it back: tuples become lists, keys become text."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"is not plain JSON ({error})") from error


def _inside(path: str) -> str:
    """The path itself, if it is relative, posix and stays in the folder."""
    foreign = "\\" in path or PureWindowsPath(path).anchor or not path.isprintable()
    if foreign or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("path escapes the folder")
    return path


def _shape_entry(entry: int | str) -> int | str:
    shapes.names(entry)
    if isinstance(entry, int):
        shapes.evaluate(entry, {})
    return entry


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has characters that cannot be shown")
    return text


def _scheduler(name: str) -> str:
    if name not in SCHEDULERS:
        raise ValueError("is no scheduler of diffusers that this version knows")
    return name


Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
FamilyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
BundleName = Annotated[str, Field(pattern=f"^{BUNDLE_NAME}$")]
Template = Annotated[str, Field(min_length=2, max_length=4000)]
SizeName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Whole = Annotated[int, Field(ge=-(1 << 31), le=(1 << 31) - 1)]
Size = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
Config = Annotated[dict[str, Any], BeforeValidator(_plain_json)]
RelativePath = Annotated[str, Field(max_length=500), AfterValidator(_inside)]
Shape = tuple[Annotated[int | str, AfterValidator(_shape_entry)], ...]
SchedulerName = Annotated[str, AfterValidator(_scheduler)]
