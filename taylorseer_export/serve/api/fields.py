"""The fields of a request: read, judged alone, and refused in one sentence where they are not what they should be.

What a field means for a bundle is judged later, by the rules that all doors share. No field is read past: what is not
known is refused, but for those that the OpenAI API itself lets pass (`user`, `safety_identifier`, `moderation`).
"""

from __future__ import annotations

import base64
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from taylorseer_export.method import RequestOptions
from taylorseer_export.serve.api.formats import FORMATS, Output
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.contract import LONGEST_TEXT

HIGHEST_SEED = (1 << 63) - 1
_LARGEST = (1 << 31) - 1
_MOST_PARTIAL = 3
_ALIASES = {"num_inference_steps": "steps"}
_LET_PASS = ("user", "safety_identifier", "moderation")
# Fields of the OpenAI API of which one value is all that there is here.
_FIXED = {"response_format": ("b64_json",), "background": ("auto", "opaque"), "quality": ("auto",)}
_WHY = {
    "response_format": "no picture is stored here",
    "background": "pictures have no transparency",
    "quality": "steps, plan and profile say how good a picture is",
}
_OWN = (
    "prompt model n size output_format output_compression stream partial_images seed negative_prompt guidance_scale"
    " strength timeout progress lora"
).split()
_OPTIONS = tuple(field.name for field in fields(RequestOptions))
NAMES = (*_OWN, *_OPTIONS, *_ALIASES, *_FIXED, *_LET_PASS)
REFERENCE = "input_reference"  # the picture that a video is made from
_OF_VIDEOS = "prompt model size seconds frames seed negative_prompt guidance_scale timeout lora".split()
_DATA = re.compile(r"data:image/[a-z.+-]{1,32};base64")
_LONGEST_VIDEO = 3600.0  # seconds
VIDEO_NAMES = (*_OF_VIDEOS, REFERENCE, *_OPTIONS, *_ALIASES, *_LET_PASS)
# First word of a sentence of the rules that all doors share -> the field that it is about.
PARAMS = {name: name for name in (*NAMES, *VIDEO_NAMES)} | {
    "caption": "prompt",
    "label": "prompt",
    "guidance": "guidance_scale",
}
_TEXTS = ("plan", "dialect", "form", "profile", "guard")


@dataclass(frozen=True)
class Asked:
    """A request for pictures.

    Attributes:
        prompt: What they show.
        model: Who draws; the first of the server if None.
        n: How many.
        size: (height, width) in pixels, of a video (frames, height, width); the model's if None.
        output: How they are written.
        stream: Whether the client is answered before they are done: with previews, or with the job of a video.
        partial_images: How many previews of each.
        progress: Whether a stream, or the job of a video, tells of every step.
        seeds: One for each picture.
        negative_prompt, guidance_scale, strength, lora: As in `Wish`.
        timeout: Seconds from the arrival; the server's if None.
        options: Of the forecasts.
    """

    prompt: str
    model: str | None
    n: int
    size: tuple[int, ...] | None
    output: Output
    stream: bool
    partial_images: int
    progress: bool
    seeds: tuple[int, ...]
    negative_prompt: str | None
    guidance_scale: float | None
    timeout: float | None
    options: RequestOptions
    strength: float | None = None
    lora: str | None = None


@dataclass(frozen=True)
class AskedVideo(Asked):
    """A request for a video.

    Attributes:
        seconds: How long it is to be; the model's length if None.
        frames: The same, as a number of frames.
        reference: The file of the picture that it is to be made from, where that is among the fields.
    """

    seconds: float | None = None
    frames: int | None = None
    reference: bytes | None = None


def asked_of(values: Mapping[str, Any], most_pictures: int, longest: float, form: bool = False) -> Asked:
    """The request that a body holds.

    Args:
        values: Its fields; None is as left out.
        most_pictures: That one request may ask for.
        longest: Seconds that one request may take.
        form: Whether it is a form, where numbers and truth values are text.

    Raises:
        Refusal: A field is unknown, missing, of another type or out of range.
    """
    given = _Fields(values, form)
    given.check_known(NAMES, _FIXED)
    count = given.whole("n", 1, most_pictures, 1)
    seed = given.whole("seed", 0, HIGHEST_SEED - count)
    seed = secrets.randbelow(_LARGEST) if seed is None else seed
    return Asked(
        prompt=given.prompt(),
        model=given.text("model"),
        n=count,
        size=given.size(),
        output=given.output(),
        stream=given.truth("stream"),
        partial_images=given.whole("partial_images", 0, _MOST_PARTIAL, 0),
        progress=given.truth("progress"),
        seeds=tuple(seed + k for k in range(count)),
        negative_prompt=given.text("negative_prompt"),
        guidance_scale=given.number("guidance_scale"),
        timeout=given.number("timeout", 0.0, longest),
        options=given.options(),
        strength=given.number("strength", 0.0, 1.0),
        lora=given.text("lora"),
    )


def video_of(values: Mapping[str, Any], longest: float, form: bool = False) -> AskedVideo:
    """The request for a video that a body holds; arguments and errors are those of `asked_of`."""
    given = _Fields(values, form)
    given.check_known(VIDEO_NAMES, {})
    if given.has("seconds") and given.has("frames"):
        raise Refusal("seconds is given beside frames, expected one of them; leave one out", 400, "seconds")
    seed = given.whole("seed", 0, HIGHEST_SEED)
    return AskedVideo(
        prompt=given.prompt(),
        model=given.text("model"),
        n=1,
        size=given.size(),
        output=Output("webp", 100),
        stream=True,
        partial_images=0,
        progress=True,
        seeds=(secrets.randbelow(_LARGEST) if seed is None else seed,),
        negative_prompt=given.text("negative_prompt"),
        guidance_scale=given.number("guidance_scale"),
        timeout=given.number("timeout", 0.0, longest),
        options=given.options(),
        lora=given.text("lora"),
        seconds=given.number("seconds", 0.0, _LONGEST_VIDEO, text=True),
        frames=given.whole("frames", 1, _LARGEST),
        reference=given.reference(),
    )


class _Fields:
    """The fields of one body."""

    def __init__(self, values: Mapping[str, Any], form: bool) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._form = form

    def has(self, name: str) -> bool:
        """Whether it is given."""
        return name in self._values

    def check_known(self, names: Sequence[str], fixed: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse what is unknown, said twice, or of a value that is not to be had."""
        for name in self._values:
            if name not in names:
                shown = name[:64]
                known = ", ".join(names)
                raise Refusal(f"`{shown}` is given, expected {known}; leave it out", 400, shown, "unknown_parameter")
        for name, other in _ALIASES.items():
            if name in self._values and other in self._values:
                raise Refusal(f"{name} is given beside {other}, expected one of them; leave one out", 400, name)
            if name in self._values:
                self._values[other] = self._values.pop(name)
        for name, possible in fixed.items():
            if self._values.get(name, possible[0]) not in possible:
                raise self._wrong(name, f"{' or '.join(possible)}, since {_WHY[name]}", "leave it out")

    def prompt(self) -> str:
        prompt = self.text("prompt")
        if prompt is None or not prompt.strip():
            raise Refusal(
                f"prompt is {'missing' if prompt is None else 'empty'}, expected what the picture shows; send it",
                400,
                "prompt",
                "missing_required_parameter",
            )
        return prompt

    def size(self) -> tuple[int, int] | None:
        """(height, width) of `WxH`."""
        text = self.text("size")
        if text is None or text == "auto":
            return None
        found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
        if not found:
            raise self._wrong("size", "WxH in pixels, like 1024x768, or auto", "write it so")
        return int(found[2]), int(found[1])

    def output(self) -> Output:
        written = self.text("output_format") or FORMATS[0]
        if written not in FORMATS:
            raise self._wrong("output_format", ", ".join(FORMATS), "choose one of those")
        quality = self.whole("output_compression", 0, 100, 100)
        if written == "png" and quality != 100:
            raise self._wrong("output_compression", "100 for png, which loses nothing", "ask for jpeg or webp")
        return Output(written, quality)

    def reference(self) -> bytes | None:
        """The file in a URL that holds it; nothing is fetched."""
        value = self._values.get(REFERENCE)
        if value is None:
            return None
        url = value.get("image_url") if isinstance(value, Mapping) and len(value) == 1 else None
        kind, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
        try:
            if not _DATA.fullmatch(kind):
                raise ValueError(kind)
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            expected = "a file of a form, or {image_url: data:image/png;base64,...}, since nothing is fetched here"
            raise self._wrong(REFERENCE, expected, "send it so") from error

    def options(self) -> RequestOptions:
        """What it says of its forecasts."""
        made: dict[str, Any] = {}
        for name in _OPTIONS:
            if name in self._values:
                if name in _TEXTS:
                    made[name] = self.text(name)
                elif name == "accumulate":
                    made[name] = self.truth(name)
                elif name == "threshold":
                    made[name] = self.real(name)
                else:
                    made[name] = self.whole(name, -_LARGEST, _LARGEST)
        return RequestOptions(**made)

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, "text", "write it so")
        if len(value) > LONGEST_TEXT:
            raise Refusal(
                f"{name} is {len(value)} characters long, expected at most {LONGEST_TEXT}; shorten it", 400, name
            )
        if not _is_unicode(value):
            raise Refusal(f"{name} has half of a character, expected whole ones; write it as UTF-8", 400, name)
        return value

    def whole(self, name: str, low: int, high: int, otherwise: Any = None) -> Any:
        value = self._values.get(name)
        if value is None:
            return otherwise
        if self._form and isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            span = "" if low == -_LARGEST else f" from {low} to {high}"
            raise self._wrong(name, f"a whole number{span}", "correct it")
        return value

    def real(self, name: str, text: bool = False) -> float | None:
        """A number, be it infinite or none: what is judged later is judged there. `text`: it may be text in JSON."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, bool if self._form or text else bool | str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(name, "a number", "correct it") from None

    def number(self, name: str, above: float = -math.inf, most: float = math.inf, text: bool = False) -> float | None:
        found = self.real(name, text)
        if found is None:
            return None
        if not above < found <= most or math.isinf(found):
            span = "" if most == math.inf else f" above {above:g}, at most {most:g}"
            raise self._wrong(name, f"a finite number{span}", "correct it")
        return found

    def truth(self, name: str) -> bool:
        value = self._values.get(name, False)
        if self._form and isinstance(value, str):
            value = {"true": True, "false": False}.get(value, value)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", "write it so")
        return value

    def _wrong(self, name: str, expected: str, remedy: str) -> Refusal:
        shown = repr(self._values[name])
        shown = shown if len(shown) <= 64 else f"{shown[:64]}…"
        return Refusal(f"{name} is {shown}, expected {expected}; {remedy}", 400, name, "invalid_value")


def _is_unicode(text: str) -> bool:
    """Whether it can be written down: JSON may hold one half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
