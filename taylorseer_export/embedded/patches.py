"""Pictures for text encoders that see them beside a prompt: brought to their size and cut into patches."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, sqrt

import numpy as np

from taylorseer_export.bundle.manifest import Patches
from taylorseer_export.embedded.picture import resized, seen_by_encoder
from taylorseer_export.runtime.parts import Cut

_STEP = 32  # pixels, that sides of a picture of an area are rounded to


def sides_of_area(area: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture brought to an area in its own shape, as `calculate_dimensions` in diffusers.

    Args:
        area: Pixels.
        height, width: Of the picture, in pixels.
    """
    ratio = width / height
    wide = sqrt(area * ratio)
    return round(wide / ratio / _STEP) * _STEP, round(wide / _STEP) * _STEP


def sides_of_shape(side: int, step: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a video from a picture, as HunyuanVideo 1.5's pipeline chooses it.

    Of all in whole steps that have as many as a square does, and no side more than four times the other, the one whose
    shape is nearest; of those that are longer than the picture none.

    Args:
        side: Of the square, in pixels.
        step: Pixels.
        height, width: Of the picture, in pixels.
    """
    count = round((side / step) ** 2)
    sizes = []
    high, wide = count, 1
    while high > 0:
        if max(high, wide) <= 4 * min(high, wide):
            sizes.append((high, wide))
        if high * (wide + 1) <= count:
            wide += 1
        else:
            high -= 1
    shape = height / width
    far = [round(high / wide, 5) - shape for high, wide in sizes]
    near = [k for k, more in enumerate(far) if (more <= 0 if shape >= 1 else more >= 0)]
    high, wide = sizes[min(near, key=lambda k: abs(far[k]))]
    return step * high, step * wide


def sides_in_tokens(patches: Patches, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of a picture brought to whole tokens, within the pixels that encoders are shown."""
    side = patches.side * patches.merged
    sides = [round(extent / side) for extent in (height, width)]
    if side**2 * sides[0] * sides[1] > patches.most:
        factor = sqrt(height * width / patches.most)
        sides = [max(1, floor(extent / factor / side)) for extent in (height, width)]
    elif side**2 * sides[0] * sides[1] < patches.least:
        factor = sqrt(patches.least / (height * width))
        sides = [ceil(extent * factor / side) for extent in (height, width)]
    return side * sides[0], side * sides[1]


def cut(patches: Patches, pictures: Sequence[np.ndarray]) -> Cut:
    """Pictures `[height, width, 3]` uint8 as the encoders see them.

    Shapes: T tokens, M patches along each side of one, S pixels of a patch, F frames.
    """
    rows, places, counts = [], [], []
    window = 0  # how many there were
    for number, picture in enumerate(pictures):
        shown = resized(picture, *sides_of_area(patches.area, *picture.shape[:2]))
        shown = seen_by_encoder(shown, sides_in_tokens(patches, *shown.shape[:2]), None, patches.filter)
        merged, side = patches.merged, patches.side
        high, wide = (extent // (merged * side) for extent in shown.shape[:2])
        values = (shown.astype(np.float32) / 255).reshape(high, merged, side, wide, merged, side, 3)
        values = values.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # [T, T, M, M, 3, 1, S, S]
        values = np.repeat(values, patches.frames, 5)
        rows.append(values.reshape(high * wide * merged**2, -1))
        top, left = np.divmod(np.arange(high * wide), wide)  # of each token
        across = ceil(wide / patches.window)
        of_window = window + top // patches.window * across + left // patches.window
        window += ceil(high / patches.window) * across
        down, right = np.divmod(np.arange(merged**2), merged)  # of each patch in it
        row, column = merged * top[:, None] + down, merged * left[:, None] + right
        every = np.broadcast_arrays(number, of_window[:, None], row, column)
        places.append(np.stack([value.ravel() for value in every], 1))
        counts.append(high * wide)
    found = {patches.input: np.concatenate(rows), patches.places: np.concatenate(places).astype(np.int64)}
    return Cut(found, tuple(counts))
