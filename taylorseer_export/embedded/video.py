"""Videos as files, written and read: GIF and WebP by Pillow, MP4 by PyAV.

Shapes: F frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.errors import ConfigError, first_line

MP4 = ".mp4"
_ANIMATED = {".gif": 10, ".webp": 1}  # suffix -> milliseconds that its clock counts in
_CODEC = "libx264"
# One video in several hundred gets another file each time with it: it reads memory that nothing has written.
_SAME_FILE = {"x264-params": "mbtree=0"}


def check_video(path: Path, frames: int, option: str = "--out") -> None:
    """Refuse a file that holds no video.

    Args:
        path: The file.
        frames: How many it is to hold; one frame is a picture as well.
        option: How the file was named, for the error.

    Raises:
        ConfigError: Its extension says a format of single pictures, and there are several.
    """
    if frames > 1 and path.suffix.lower() not in (*_ANIMATED, MP4):
        raise ConfigError(
            f"{option} is {path} for a video of {frames} frames, expected .gif, .webp or .mp4, or NAME.safetensors for "
            "latents; change the extension"
        )


def check_mp4() -> None:
    """Refuse where what writes MP4 is missing.

    Raises:
        ConfigError: PyAV is not installed.
    """
    if find_spec("av") is None:
        raise ConfigError("av is not installed, expected it for videos; pip install 'taylorseer-export[video]'")


def read_video(path: Path, option: str) -> np.ndarray:
    """The video in a file, or that of the pictures in a folder by their names, `[F, height, width, 3]` uint8.

    Numbers in names count as such: 2 comes before 10. GIF, WebP and PNG are read by Pillow, anything else by PyAV;
    transparent pixels are on white.

    Args:
        path: The file or folder.
        option: How it was named, for the error.

    Raises:
        ConfigError: There is none, it holds no frame that can be read, or frames of several sizes.
    """
    from PIL import Image, ImageSequence

    try:
        path.stat()  # what is not there is said so, whatever would read it
        if not path.is_dir() and path.suffix.lower() not in (*_ANIMATED, ".png"):
            frames = _read_by_av(path, option)
        else:
            shown = [one for one in path.iterdir() if not one.name.startswith(".")] if path.is_dir() else [path]
            files = sorted(shown, key=_in_order)
            frames = []
            for file in files:
                with Image.open(file) as image:
                    frames += [opaque(np.asarray(one.convert("RGBA"))) for one in ImageSequence.Iterator(image)]
    except ConfigError:  # which is a ValueError, and says what is missing here
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{option} is {path}, expected a video, or a folder of its frames as pictures ({first_line(error)}); check "
            "the file"
        ) from error
    if len(sizes := {frame.shape[:2] for frame in frames}) != 1:
        seen = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)) or "no frame"
        raise ConfigError(f"{option} is {path} with {seen}, expected frames of one size; mend it")
    return np.stack(frames)


def _in_order(file: Path) -> tuple[list[str | int], str]:
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", file.name))], file.name


def _read_by_av(path: Path, option: str) -> list[np.ndarray]:
    if find_spec("av") is None:
        raise ConfigError(
            f"{option} is {path}, which PyAV reads, and av is not installed; pip install 'taylorseer-export[video]', "
            "or give .gif, .webp or a folder of frames"
        )
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("there is sound alone")
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:  # of which some are of no other class
        raise ValueError(first_line(error)) from error


def write_video(path: Path, frames: np.ndarray, rate: int) -> None:
    """Write a video whole or not at all, in the format that the extension says.

    The same frames give the same file. A GIF has 256 colours a frame and a clock of 10 ms. Where a frame equals the one
    before, Pillow writes that the one before stays longer.

    Args:
        path: A file that `check_video` lets pass.
        frames: `[F, height, width, 3]` uint8.
        rate: Frames per second.

    Raises:
        ConfigError: An MP4 of an odd height or width, which its colours do not divide into.
    """
    suffix = path.suffix.lower()
    if suffix == MP4:
        _write_mp4(path, frames, rate)
        return
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    with replacing(path) as partial:
        if not others:
            first.save(partial, format=Image.registered_extensions()[suffix])
            return
        durations = _durations(len(frames), rate, _ANIMATED[suffix])
        # Of these only WebP has a quality.
        first.save(partial, save_all=True, append_images=others, duration=durations, loop=0, quality=90)


def _durations(count: int, rate: int, unit: int) -> list[int]:
    """Milliseconds of each frame, in whole units: what rounding takes from one frame the next ones get back."""
    ends = [unit * round(1000 * k / (rate * unit)) for k in range(count + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _write_mp4(path: Path, frames: Sequence[np.ndarray] | np.ndarray, rate: int) -> None:
    import av

    height, width = frames[0].shape[:2]
    if height % 2 or width % 2:
        raise ConfigError(f"{path} is {height}x{width}, expected even sides for MP4; write .webp")
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream: Any = container.add_stream(_CODEC, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = _SAME_FILE
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())  # what the encoder still holds back
