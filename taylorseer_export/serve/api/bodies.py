"""Bodies of requests, read to their end and no further than they may be long."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from taylorseer_export.errors import ServeError
from taylorseer_export.serve.api.answers import Message, Receive
from taylorseer_export.serve.api.problems import Refusal

if TYPE_CHECKING:
    from starlette.requests import Request

MOST_PICTURES = 16  # that one form may bring
_MOST_FIELDS = 64
_LONGEST_FIELD = 1 << 16  # bytes
_IMAGES = ("image", "image[]")
_MASK = "mask"


class Form(NamedTuple):
    """A form as it came.

    Attributes:
        values: Its fields; of a form they are text.
        images: Its picture files.
        mask: A picture file, if there is one.
    """

    values: Mapping[str, Any]
    images: list[bytes]
    mask: bytes | None


async def json_of(request: Request, most: int) -> Mapping[str, Any]:
    """The object that a body of at most `most` bytes holds.

    Raises:
        Refusal: It is longer, of another type, or no JSON object.
        ServeError: The client left.
    """
    _check_type(request, "application/json")
    receive, parts, more = _bounded(request, most), [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    try:
        value = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise Refusal("body is no JSON, expected an object of fields; correct it", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refusal(f"body is {type(value).__name__}, expected a JSON object of fields; write it so")
    return value


async def fields_of(request: Request, most: int, most_of_form: int, picture: str) -> tuple[Form, bool]:
    """The fields of a body, JSON of at most `most` bytes or a form, and whether it is a form.

    Args:
        request: Whose body it is.
        most: Bytes of JSON.
        most_of_form: Bytes of a form.
        picture: Name of the picture file that a form may have.

    Raises:
        Refusal, ServeError: As of `json_of` and `form_of`.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return Form(await json_of(request, most), [], None), False
    return await form_of(request, most_of_form, (picture,)), True


async def form_of(request: Request, most: int, files: Sequence[str] = (*_IMAGES, _MASK)) -> Form:
    """The form that a body of at most `most` bytes holds; its files lie on disk while they come.

    Args:
        request: Whose body it is.
        most: Its bytes.
        files: Names that picture files may have; where `image` is one of them, it is needed.

    Raises:
        Refusal: It is longer, of another type, no form, has a file where there is none to be, or lacks one.
        ServeError: The client left.
    """
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as Parsed

    _check_type(request, "multipart/form-data")
    parsed = Parsed(request.scope, _bounded(request, most))
    values: dict[str, str] = {}
    images: list[bytes] = []
    masks: list[bytes] = []
    try:
        limits = {"max_files": MOST_PICTURES + 1, "max_fields": _MOST_FIELDS, "max_part_size": _LONGEST_FIELD}
        async with parsed.form(**limits) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    if name in values:
                        raise Refusal(f"`{name[:64]}` is given twice, expected it once; leave one out", 400, name[:64])
                    values[name] = value
                elif name in files:
                    (masks if name == _MASK else images).append(await value.read())
                else:
                    wanted = " or ".join(known for known in files if known.isidentifier())
                    raise Refusal(f"`{name[:64]}` is a file, expected {wanted}; leave it out", 400, name[:64])
    except (HTTPException, ValueError) as error:  # the latter of what is no form at all
        why = re.sub(r"\s+", " ", str(getattr(error, "detail", error)))[:200]
        raise Refusal(f"body is no form ({why}), expected multipart/form-data; correct it") from error
    if "image" in files and not images:
        raise Refusal("image is missing, expected a picture file; send it", 400, "image", "missing_required_parameter")
    if len(images) > MOST_PICTURES or len(masks) > 1:
        raise Refusal(
            f"{len(images)} images and {len(masks)} masks are given, expected at most {MOST_PICTURES} and 1; "
            "leave some out",
            400,
            "image",
        )
    return Form(values, images, masks[0] if masks else None)


def _check_type(request: Request, expected: str) -> None:
    """A type that a page of another origin cannot send unasked, for JSON; the one that is read, for both."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        raise Refusal(f"content-type is {given[:64] or 'missing'}, expected {expected}; send it so")


def _bounded(request: Request, most: int) -> Receive:
    """The messages of a request, until they are longer than `most` bytes or the client leaves."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_long(most)
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ServeError("the client left, expected it to send all of its request; send it again", "CANCELLED")
        seen += len(message.get("body", b""))
        if seen > most:
            raise _too_long(most)
        return message

    return receive


def _too_long(most: int) -> Refusal:
    return Refusal(f"body is longer than {most} bytes, expected at most that; send less", 413, code="too_large")
