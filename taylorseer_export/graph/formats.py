"""Formats of quantised weights: what a weight becomes, and what an engine computes with in its place.

    fp8     e4m3 values, a scale for each row          w = value * scale[row]
    int8    whole numbers to 127, a scale for each row w = value * scale[row]
    nvfp4   e2m1 values, two to a byte, an e4m3 scale for each 16 of a row, and one scale for all
                                                       w = value * (block scale * scale)

Rows are output channels. Scales but those of blocks are of the model's precision, rounded up, so that the largest value
of a row fits and the engines' product `value * scale` has one type.

Half a step of rounding, per weight, where s is what its value is multiplied by:

    fp8     |w - w'| <= max(2**-4 |w|, 2**-10 s)
    int8    |w - w'| <= s / 2
    nvfp4   |w - w'| <= max(|w| / 5, s / 4, |w| - 6 s)    the last is what a block scale that was rounded down cuts off
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taylorseer_export.checkpoint.quantised import BLOCK as BLOCKS
from taylorseer_export.checkpoint.quantised import E2M1

BLOCK = BLOCKS["nvfp4"]  # weights of a row that share a scale
_LARGEST = {"fp8": 448.0, "int8": 127.0, "nvfp4": E2M1[-1]}
_SMALLEST_BLOCK = 2.0**-9  # the least scale that e4m3 has
_EDGES = tuple((low + high) / 2 for low, high in pairwise(E2M1))
FORMATS = tuple(_LARGEST)


class Stored(NamedTuple):
    """A tensor that a quantised weight is stored as: what follows the weight's name, dtype and shape."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored(form: str, shape: tuple[int, ...], precision: torch.dtype) -> tuple[Stored, ...]:
    """The tensors of a weight `[rows, columns]`, as `quantised` returns them."""
    rows, columns = shape
    if form == "nvfp4":
        return (
            Stored("", torch.uint8, (rows, columns // 2)),
            Stored("_scale", torch.float8_e4m3fn, (rows, columns // BLOCK)),
            Stored("_scale_2", precision, ()),
        )
    values = torch.float8_e4m3fn if form == "fp8" else torch.int8
    return Stored("", values, shape), Stored("_scale", precision, (rows,))


def fits(form: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape has the format: blocks divide its rows."""
    return len(shape) == 2 and (form != "nvfp4" or shape[1] % BLOCK == 0)


def quantised(weight: Tensor, form: str, precision: torch.dtype) -> tuple[Tensor, ...]:
    """A weight `[rows, columns]` as the tensors of `stored`; of any row nothing is larger than the format holds."""
    wide, most = weight.float(), _LARGEST[form]
    if form != "nvfp4":
        scale = _rounded_up(wide.abs().amax(1) / most, precision)
        values = wide / scale.float()[:, None]
        if form == "int8":
            return values.round().clamp(-most, most).to(torch.int8), scale
        return values.clamp(-most, most).to(torch.float8_e4m3fn), scale
    whole = _rounded_up(wide.abs().amax() / (most * _LARGEST["fp8"]), precision)
    codes, scales = in_blocks(wide, whole.float())
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, whole


def in_blocks(x: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of e2m1 `[..., columns]`, uint8, and scales of blocks `[..., columns / 16]` for a scale of all."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    shares = blocks.abs().amax(-1) / _LARGEST["nvfp4"] / whole
    scales = shares.clamp(_SMALLEST_BLOCK, _LARGEST["fp8"]).to(torch.float8_e4m3fn)
    values = (blocks / (scales.to(x.dtype) * whole).unsqueeze(-1)).flatten(-2)
    # To the nearest, of two the even one: an edge itself belongs to the side whose code is even.
    codes = torch.bucketize(values.abs(), torch.tensor(_EDGES, dtype=x.dtype))
    edges = torch.tensor((*_EDGES, torch.inf), dtype=x.dtype)[codes]
    codes += ((codes % 2 == 1) & (values.abs() == edges)).long()
    return (codes | (values < 0).long() << 3).to(torch.uint8), scales


def of_blocks(codes: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """The numbers `[..., columns]` of `in_blocks`, of the dtype of `whole`: `E2M1` by arithmetic, which fuses."""
    size = (codes & 7).to(whole.dtype)
    size = torch.where(size < 4, size * 0.5, torch.where(size < 6, size - 2, size * 2 - 8))
    signed = torch.where(codes > 7, -size, size).unflatten(-1, (-1, BLOCK))
    return (signed * (scales.to(whole.dtype) * whole).unsqueeze(-1)).flatten(-2)


def dequantised(values: Tensor, scale: Tensor, whole: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The weight `[rows, columns]` that an engine computes with, of the scales' precision or another."""
    dtype = dtype or (scale if whole is None else whole).dtype
    if whole is None:
        return values.to(dtype) * scale.to(dtype).unsqueeze(1)
    return of_blocks(torch.stack((values & 15, values >> 4), -1).flatten(1), scale, whole.to(dtype))


def step(parts: tuple[Any, ...]) -> Tensor:
    """What each value is multiplied by, `[rows, columns]` or to be broadcast to it, float64."""
    _, scale, *rest = parts
    if not rest:
        return scale.double().unsqueeze(1)
    return (scale.double() * rest[0].double()).repeat_interleave(BLOCK, 1)


def most_off(weight: Tensor, form: str, parts: tuple[Any, ...]) -> Tensor:
    """The bound above for every number of a weight that was quantised to `parts`; float64."""
    size, s = weight.double().abs(), step(parts)
    if form == "int8":
        return (s / 2).expand_as(size)
    if form == "fp8":
        return torch.maximum(size / 16, s / 1024)
    return torch.maximum(torch.maximum(size / 5, s / 4), size - 6 * s)


def _rounded_up(scale: Tensor, precision: torch.dtype) -> Tensor:
    """The scale in the precision, never below it, and never a number that loses its digits there."""
    limits = torch.finfo(precision)
    return (scale * (1 + limits.eps)).clamp(min=limits.smallest_normal).to(precision)
