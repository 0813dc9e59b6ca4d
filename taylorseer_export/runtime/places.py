"""Inputs that say where tokens are and which count: what they hold follows from the sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.runtime.runner import host_dtype

ROWS = "image_tokens"  # the dimension that counts the tokens of a packed latent


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
        case "sides":
            return np.broadcast_to([1, *(sides or sides_of(sizes[ROWS]))], shape).astype(dtype)
        case "grid":
            rows, columns = sides if sides is not None and tensor.shape[-2] == ROWS else sides_of(shape[-2])
            return np.broadcast_to(grid(tensor.first, rows, columns, shape[-1]), shape).astype(dtype)
        case "line":
            line = np.zeros(shape, dtype)
            line[..., -1] = np.arange(shape[-2])
            return line
    return None


def grid(first: int, rows: int, columns: int, width: int = 3) -> np.ndarray:
    """(first, row, column, 0, ...) of every token of a picture, `[rows * columns, width]` float32."""
    ids = np.zeros((rows * columns, width), np.float32)
    ids[:, 0] = first
    ids[:, 1], ids[:, 2] = np.divmod(np.arange(rows * columns), columns)
    return ids


def sides_of(count: int) -> tuple[int, int]:
    """(rows, columns) of a picture of `count` tokens, as square as the count allows."""
    width = max(w for w in range(1, int(count**0.5) + 1) if count % w == 0)
    return count // width, width
