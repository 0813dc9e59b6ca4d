"""Picture files: written in the formats of the API, and looked at before anything of them is decoded."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import numpy as np

from taylorseer_export.embedded.picture import opaque
from taylorseer_export.errors import ConfigError
from taylorseer_export.serve.api.problems import Refusal

FORMATS = ("png", "jpeg", "webp")
MOST_PIXELS = 1 << 26  # of a picture that is sent: 8192 x 8192


class Output(NamedTuple):
    """How pictures are written.

    Attributes:
        format: Of `FORMATS`.
        quality: 0 to 100, of the two that lose something.
    """

    format: str = "png"
    quality: int = 100


def encoded(picture: np.ndarray, output: Output) -> str:
    """A picture `[H, W, 3]` uint8, or `[H, W, 4]` with transparency, as the base64 of a file; a JPEG's is on white."""
    stream = io.BytesIO()
    picture = opaque(picture) if output.format == "jpeg" and picture.shape[-1] == 4 else picture
    more = {} if output.format == "png" else {"quality": output.quality}
    _pillow().fromarray(picture).save(stream, format=output.format.upper(), **more)
    return base64.b64encode(stream.getvalue()).decode()


def decoded(data: bytes, field: str) -> np.ndarray:
    """The picture of a file: `[H, W, 4]` uint8, alpha last.

    Its format and its size are read from the head of the file, before room for it is made.

    Raises:
        Refusal: It is no picture of `FORMATS`, too large, or damaged.
    """
    expected = f"expected a picture as {', '.join(FORMATS)}; send one of those"
    try:
        with _pillow().open(io.BytesIO(data), formats=[name.upper() for name in FORMATS]) as held:
            if held.width * held.height > MOST_PIXELS:
                raise Refusal(
                    f"{field} is {held.width}x{held.height}, expected at most {MOST_PIXELS} pixels; send a smaller one",
                    400,
                    field,
                )
            return np.asarray(held.convert("RGBA"))
    except Refusal:
        raise
    except Exception as error:  # whatever a damaged file makes of its reader
        raise Refusal(f"{field} is not readable ({type(error).__name__}), {expected}", 400, field) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "pillow is not installed, expected it to write pictures; pip install 'taylorseer-export[serve]'"
        ) from error
    return Image
