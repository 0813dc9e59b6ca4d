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


def sides_of(count: int) -> tuple[int, int]:
    """(rows, columns) of a picture of `count` tokens, as square as the count allows."""
    width = max(w for w in range(1, int(count**0.5) + 1) if count % w == 0)
    return count // width, width
