"""Quantised weights: values of few bits, the scales that they are multiplied by, and what the product is.

    format   values                     scale                          weight
    fp8      e4m3fn or e5m2 [N, ...]    float32 [] or [N]              values * scale
    int8     int8 [N, K]                float32 [] or [N]              values * scale
    mxfp8    e4m3fn [N, K]              e8m0fnu [N, K / 32]            values * scale of the block
    nvfp4    uint8 [N, K / 2]           e4m3fn [N, K / 16], second []  values * (scale of the block * second)

Every product is taken in float32 and rounded once more where another dtype is asked for. The layout is the plain one,
whatever that of the file: rows of blocks in order, and the first of two 4-bit values in the low half of its byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

FORMATS = ("fp8", "int8", "mxfp8", "nvfp4")
BLOCK = {"mxfp8": 32, "nvfp4": 16}  # values that share a scale, along a row
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits; the fourth is the sign


@dataclass(frozen=True)
class Quantised:
    """One weight in a quantised format, as the table above has it.

    Attributes:
        format: Of FORMATS.
        values: What is multiplied.
        scale: What by: one for the tensor, one for each row, or one for each block of a row.
        second: float32 [], what the block scales of nvfp4 are multiplied by; None otherwise.
        input_scale: float32 [], of activations, where the file has one that was calibrated; the weight is without it.
        rotation: Columns of a group that a Hadamard matrix was multiplied with before int8 took them (ConvRot); 0 for
            none.
    """

    format: str
    values: torch.Tensor
    scale: torch.Tensor
    second: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    rotation: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *rows, columns = self.values.shape
        return (*rows, 2 * columns if self.format == "nvfp4" else columns)

    def rows_of_scale(self) -> torch.Tensor:
        """The scale with a row for each of the weight, in a dtype that cuts and joins work on."""
        if self.format in BLOCK:
            return self.scale.view(torch.uint8)
        return self.scale.expand(self.shape[0]) if self.scale.ndim == 0 else self.scale

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight."""
        if self.format == "nvfp4":
            assert self.second is not None
            found = _pairs()[self.values.int()].reshape(self.shape)
            scale = self.scale.float() * self.second
        else:
            found, scale = self.values.float(), self.scale.float()
        if self.format in BLOCK:
            blocks = found.unflatten(1, (-1, BLOCK[self.format]))
            blocks *= scale[..., None]
        else:
            found *= scale.reshape(-1, *[1] * (found.ndim - 1)) if scale.ndim else scale
        if self.rotation:
            found = (found.unflatten(1, (-1, self.rotation)) @ hadamard(self.rotation)).flatten(1)
        return found.to(dtype)


def joined(parts: Mapping[str, Quantised], convert: Callable[..., torch.Tensor]) -> Quantised | None:
    """What rows of some weights make; None where they differ in more than values and in scales of their rows.

    Args:
        parts: Name -> weight, of those it is made of.
        convert: Cuts and joins along the first axis what a function gives by these names.
    """
    first, *others = parts.values()
    alike = all(
        (one.format, one.values.dtype, one.values.shape[1:])
        == (first.format, first.values.dtype, first.values.shape[1:])
        and _same(one.second, first.second)
        and _same(one.input_scale, first.input_scale)
        for one in others
    )
    if not alike:
        return None
    values = convert(lambda name: parts[name].values.view(torch.uint8)).view(first.values.dtype)
    if first.scale.ndim == 0 and not others:
        return replace(first, values=values)
    scale = convert(lambda name: parts[name].rows_of_scale())
    return replace(first, values=values, scale=scale.view(first.scale.dtype))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and bool(one == other))


def _pairs() -> torch.Tensor:
    """Byte -> the two numbers of nvfp4 in it, [256, 2]."""
    numbers = torch.tensor([*E2M1, *(-value for value in E2M1)])
    byte = torch.arange(256)
    return torch.stack([numbers[byte % 16], numbers[byte // 16]], dim=1)


def hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix of ConvRot, symmetric and orthogonal: its own inverse; `size` is a power of 4."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    found = four
    while len(found) < size:
        found = torch.kron(found, four)
    return found / size**0.5


def plain_order(tiled: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """Block scales out of the tiles that tensor cores read (cuBLAS, "1D block scaling factors layout").

    A tile has 128 rows and 4 blocks; the scale of row r and block b of it lies at byte 16 (r % 32) + 4 (r // 32) + b.
    Rows and blocks are padded to whole tiles, which lie in rows of tiles.

    Args:
        tiled: [rows padded to 128, blocks padded to 4], or the same numbers in another shape.
        rows: Of the weight.
        blocks: Of each row.

    Returns:
        [rows, blocks].
    """
    tiles = tiled.reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)[:rows, :blocks].contiguous()
