"""Inputs that say where tokens are and which count: what they hold follows from the sizes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.runner import host_dtype

ROWS = "image_tokens"  # the dimension that counts the tokens of a packed latent
BEHIND = "condition_tokens"  # that of the pictures behind it
# Tokens along a side of the videos that Kandinsky 5 takes for small: 480 to 854 pixels, 16 a token. What it divides the
# places along the sides of those by, and of all others.
_SMALL, _SCALE, _OTHER_SCALE = (30, 53), 2.0, 3.16


def value_from_fill(
    tensor: Tensor, sizes: Mapping[str, int], sides: tuple[int, int] | None = None
) -> np.ndarray | None:
    """What an input holds by its `fill`; None for one whose values do not follow from the sizes alone.

    Args:
        tensor: Its contract.
        sizes: Of every dimension.
        sides: (rows, columns) of a packed latent in tokens; as square as their number allows if left out.
    """
    shape, kind = resolve(tensor.shape, sizes), host_dtype(tensor.dtype)
    dtype = np.dtype(np.float32) if kind.kind == "f" else kind
    match tensor.fill:
        case "ones":
            return np.ones(shape, dtype)
        case "zeros":
            return np.zeros(shape, dtype)
        case "frames":
            return np.arange(tensor.first, tensor.first + shape[0], dtype=dtype)
        case "scales":
            small = all(_SMALL[0] <= sizes[side] <= _SMALL[1] for side in ("rows", "columns"))
            return np.array([1.0, *2 * [_SCALE if small else _OTHER_SCALE]], dtype)
        case "sides":
            return np.broadcast_to(_pictures(shape[-2], sizes, sides), shape).astype(dtype)
        case "grid":
            rows, columns = sides if sides is not None and tensor.shape[-2] == ROWS else sides_of(shape[-2])
            places = grid(tensor.first, rows, columns, shape[-1], tensor.corner)
            places[:, 1:3] *= tensor.spacing
            return np.broadcast_to(places, shape).astype(dtype)
        case "line" | "diagonal":
            line = np.zeros(shape, dtype)
            line[..., (-1 if tensor.fill == "line" else 1) :] = np.arange(shape[-2])[:, None]
            return line
        case "turns":
            return turns(shape[1:4], shape[4], tensor.within)
    return None


def _pictures(count: int, sizes: Mapping[str, int], sides: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """(1, rows, columns) of the latent, and of the pictures behind it, which share the tokens there are."""
    made = [sides or sides_of(sizes[ROWS])]
    if count > 1:
        each, rest = divmod(sizes[BEHIND], count - 1)
        made += [sides_of(each)] * (count - 2) + [sides_of(each + rest)]
    return [(1, *pair) for pair in made]


def check_pictures(name: str, shapes: np.ndarray, sizes: Mapping[str, int]) -> None:
    """Refuse (frames, rows, columns) of pictures, `[B, P, 3]`, that have more or fewer tokens than a request.

    Raises:
        StepError: They do; a graph would take every token for one of another place.
    """
    rows, behind = sizes[ROWS], sizes.get(BEHIND, 0)
    for pictures in np.asarray(shapes).reshape(-1, np.shape(shapes)[-2], 3).tolist():
        counts = [prod(sides) for sides in pictures]
        if counts[0] != rows or sum(counts[1:]) != behind:
            shown = " and ".join("x".join(map(str, sides)) for sides in pictures)
            beside = f" and {behind} of the pictures behind it" if behind else ""
            raise StepError(
                f"input `{name}` is {shown}, expected {rows} tokens of the latent{beside}; correct the sizes"
            )


def grid(first: int, rows: int, columns: int, width: int = 3, corner: int = 0) -> np.ndarray:
    """(first, row, column, 0, ...) of every token of a picture, `[rows * columns, width]` float32.

    Rows and columns count from `corner`.
    """
    ids = np.zeros((rows * columns, width), np.float32)
    ids[:, 0] = first
    ids[:, 1], ids[:, 2] = corner + np.array(np.divmod(np.arange(rows * columns), columns))
    return ids


def turns(sides: tuple[int, ...], width: int, within: tuple[int, int] | None = None) -> np.ndarray:
    """Cosines and sines of the angles by which places turn queries and keys, `[2, frames, rows, columns, width]`.

    A quarter of the width is of the frame, the rest of row and column by halves. In a part of width w, two neighbours k
    turn by `place / 10000^(2 k / w)`, computed in float32 as diffusers does.

    Args:
        sides: (frames, rows, columns) in tokens.
        width: Of a head.
        within: (rows, columns) that the places are stretched into, the longer side whole and around the middle of the
            other; whole numbers if None.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34; `get_3d_rotary_pos_embed` of diffusers.
    """
    places = [np.arange(side, dtype=np.float32) for side in sides]
    if within is not None:
        places[1:] = [_stretched(*span, side) for span, side in zip(_spans(within, *sides[1:]), sides[1:], strict=True)]
    angles = []
    for axis, (place, part) in enumerate(zip(places, (width // 4, width // 8 * 3, width // 8 * 3), strict=True)):
        powers = np.float32(10000) ** (np.arange(0, part, 2, dtype=np.float32) / np.float32(part))
        turned = np.repeat(np.outer(place, np.float32(1) / powers), 2, axis=1)
        shape = [1, 1, 1, turned.shape[1]]
        shape[axis] = len(place)
        angles.append(np.broadcast_to(turned.reshape(shape), (*sides, turned.shape[1])))
    whole = np.concatenate(angles, -1)
    return np.stack([np.cos(whole), np.sin(whole)])


def _spans(within: tuple[int, int], rows: int, columns: int) -> list[tuple[int, int]]:
    """(begin, end) of rows and of columns of a picture that is as large as fits, in the middle."""
    high, wide = within
    made = (
        (high, round(high / rows * columns)) if rows / columns > high / wide else (round(wide / columns * rows), wide)
    )
    return [(start := round((whole - side) / 2), start + side) for whole, side in zip(within, made, strict=True)]


def _stretched(begin: int, end: int, count: int) -> np.ndarray:
    """`[count]` float32 from `begin` on, evenly, of which `end` would be the next; each half from its own end."""
    last = np.float32(end * (count - 1) / count)
    if count == 1:
        return np.full(1, begin, np.float32)
    gap, place = (last - np.float32(begin)) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    return np.where(place < count // 2, np.float32(begin) + gap * place, last - gap * (np.float32(count - 1) - place))


def sides_of(count: int) -> tuple[int, int]:
    """(rows, columns) of a picture of `count` tokens, as square as the count allows."""
    width = max(w for w in range(1, int(count**0.5) + 1) if count % w == 0)
    return count // width, width
