"""Videos that go by another: what a request makes of its frames, a mask that says what is made anew, and pictures.

Shapes: C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from taylorseer_export.bundle.manifest import Controlled, Manifest
from taylorseer_export.embedded.edits import Given
from taylorseer_export.embedded.picture import grey, resized
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.frames import FrameEncoder

VIDEO, MASK = "video", "mask"
_GREY = np.float32(0.5)


def controlled_of(manifest: Manifest) -> Controlled | None:
    """How the videos of a bundle go by others; None where they do not."""
    return manifest.parts["encode"].controlled if "encode" in manifest.parts else None


def check_control(name: str, videos: Mapping[str, np.ndarray]) -> None:
    """Refuse videos that are none to go by, a mask of nothing, and one of another length.

    Args:
        name: Of the bundle.
        videos: By what they show.

    Raises:
        ConfigError: As it says.
    """
    for other in videos:
        if other not in (VIDEO, MASK):
            raise ConfigError(f"video of a {other} is given for {name}, expected a {VIDEO} and a {MASK}; leave it out")
    if MASK not in videos:
        return
    if VIDEO not in videos:
        raise ConfigError(f"{MASK} is given for {name} without a {VIDEO}, expected the one that it is of; pass both")
    counts = len(videos[MASK]), len(videos[VIDEO])
    if counts[0] != counts[1]:
        raise ConfigError(f"{MASK} has {counts[0]} frames, expected {counts[1]} as the {VIDEO}; cut the longer one")


def control(denoiser: Denoiser, by: Controlled, given: Given | None, size: tuple[int, ...]) -> np.ndarray:
    """`[1, C, F, H, W]`: a latent frame for each picture, the last picture first, and those of the video.

    Args:
        denoiser: The loaded bundle.
        by: How its videos go by others.
        given: The video, its mask and pictures, each if there is one; grey that is made anew if not.
        size: (frames, height, width) of the video that is made, in pixels.

    Raises:
        ConfigError: The video has fewer frames.
    """
    encoder, (frames, height, width) = denoiser.picture_encoder, size
    assert isinstance(encoder, FrameEncoder), "bug in taylorseer-export: a video that goes by another in one call"
    videos = {} if given is None else given.videos
    if VIDEO in videos and (most := len(videos[VIDEO])) < frames:
        raise ConfigError(
            f"size frames is {frames}, expected at most {most}, as the {VIDEO} has that it goes by; change it"
        )
    scale = denoiser.manifest.sampling.time_scale
    count = (frames - 1) // scale + 1

    def frame(number: int) -> np.ndarray:
        if VIDEO not in videos:
            return np.full((3, height, width), _GREY)
        return resized(videos[VIDEO][number], height, width).transpose(2, 0, 1).astype(np.float32) / 255

    def anew(number: int) -> np.ndarray:
        if MASK not in videos:
            return np.ones((1, height, width), np.float32)
        return grey(resized(videos[MASK][number], height, width))[None].astype(np.float32) / 255

    def told(latent: int) -> dict[str, np.ndarray]:
        of = [0] if latent == 0 else range(1 + (latent - 1) * scale, 1 + latent * scale)
        masks = np.stack([anew(number) for number in of], 1)[None]
        # The nearest frame of the mask, as if its frames and latent frames were as long as each other in all.
        nearest = (2 * latent + 1) * frames // (2 * count)
        made = {by.mask: (masks > 0.5).astype(np.float32), by.shown: anew(nearest)[None, :, None]}
        return made if latent == 0 else {**made, by.video: np.stack([frame(number) for number in of], 1)[None]}

    made = encoder({"picture": frame(0)[None]}, count, told)[by.control]
    nothing = np.zeros((1, 1, 1, height, width), np.float32)
    for picture in () if given is None else given.pictures:
        shown = {"picture": on_white(picture, height, width).transpose(2, 0, 1)[None]}
        one = encoder(shown, 1, lambda _: {by.mask: nothing, by.shown: nothing})[by.control].copy()
        one[:, by.latents : 2 * by.latents] = 0
        made = np.concatenate([one, made], 2)
    return made


def on_white(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8 in its own shape on white, as large as fits: `[height, width, 3]` from 0 to 1.

    As diffusers does it for VACE: its sides are brought to multiples of 8 first, and then between the nearest four.
    """
    high, wide = (side - side % 8 for side in picture.shape[:2])
    if not (high and wide):
        raise ConfigError(
            f"picture is {picture.shape[0]}x{picture.shape[1]}, expected sides of at least 8 pixels; scale it"
        )
    values = resized(picture, high, wide).astype(np.float32) / 255
    scale = min(height / high, width / wide)
    sides = int(high * scale), int(wide * scale)
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    made = np.ones((height, width, 3), np.float32)
    for axis, side in enumerate(sides):
        values = _between(values, axis, side)
    made[top : top + sides[0], left : left + sides[1]] = values
    return made


def _between(values: np.ndarray, axis: int, side: int) -> np.ndarray:
    """So many values along an axis, each between its two nearest, as far as its middle is from theirs."""
    count = values.shape[axis]
    place = np.maximum((np.arange(side) + 0.5) * (count / side) - 0.5, 0)
    first = place.astype(int)
    share = (place - first).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(values.ndim)])
    following = np.minimum(first + 1, count - 1)
    return (1 - share) * values.take(first, axis) + share * values.take(following, axis)
