"""`--weights keep`: a checkpoint that is quantised already goes into the graphs with its own values and scales."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch

from taylorseer_export.errors import ConfigError
from taylorseer_export.graph.formats import FORMATS

if TYPE_CHECKING:
    from taylorseer_export.checkpoint.checkpoint import Checkpoint
    from taylorseer_export.checkpoint.quantised import Quantised
    from taylorseer_export.graph.quantise import Part


class Own(NamedTuple):
    """What a checkpoint says of a weight that it has quantised: the format, and the scale of what its layer reads."""

    format: str
    input_scale: float | None


def formats_of(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Own]:
    """Weight -> what is said of it, of those that the checkpoint has quantised; each is read once, and none is held.

    Raises:
        ConfigError: There are no weights, or none is, or they are in several formats, or in one that no graph holds.
    """
    if checkpoint.weightless:
        raise ConfigError(
            f"--weights is keep, and {checkpoint.reference} is a config without weights, expected a checkpoint that is "
            "quantised; pass it as --model, or use --weights fp8"
        )
    found = {name: _own(own) for name in names if (own := checkpoint.quantised(name)) is not None}
    kinds = sorted({own.format for own in found.values()})
    if len(kinds) != 1 or kinds[0] not in FORMATS:
        raise ConfigError(
            f"--weights is keep, and the blocks of {checkpoint.reference} are in {' and '.join(kinds) or 'no format'}, "
            f"expected one of {', '.join(FORMATS)}; use --weights fp8, which quantises them anew, or leave it out"
        )
    return found


def _own(own: Quantised) -> Own:
    scale = None if own.input_scale is None else float(own.input_scale)
    return Own("fp8 e5m2" if own.values.dtype == torch.float8_e5m2 else own.format, scale)


def kept(checkpoint: Checkpoint, part: Part) -> torch.Tensor:
    """A tensor of a weight as the graphs hold it: a scale for each row, those but of blocks in the model's precision.

    Raises:
        ConfigError: A scale has no digits in that precision.
    """
    own = checkpoint.quantised(part.weight)
    assert own is not None, "bug in taylorseer-export: a weight that was quantised is not"
    if part.index == 0:
        return own.values
    if part.index == 1 and own.second is not None:
        return own.scale
    scale = own.scale.expand(len(own.values)) if own.second is None else own.second
    limits = torch.finfo(part.precision)
    sizes = scale.abs()[scale != 0]
    if sizes.numel() and not (float(sizes.min()) >= limits.smallest_normal and float(sizes.max()) <= limits.max):
        raise ConfigError(
            f"a scale of `{part.weight}` is {float(sizes.min()):.1e}, expected {limits.smallest_normal:.1e} to "
            f"{limits.max:.1e} for --weights keep in this precision; use --precision bf16"
        )
    return scale.to(part.precision).contiguous()
