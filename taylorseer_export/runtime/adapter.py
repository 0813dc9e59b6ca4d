"""LoRA of a request: the low-rank weights that the graphs of a bundle take as an input, one request unlike the next.

    y = W x + b + s (alpha / rank) B (A x)        with s the strength that the request gives

A bundle has such inputs when it was exported with `--lora-rank R`. The matrices of a file are laid into the rows of
that one input, the factors in B, and zeros where its rank is below R. Several files lie side by side, so that their
ranks add up. Nothing of the engines changes, so it works with every kind of them.

Files and names are those of `lora.py`. A slot keeps what it was given last: a request with the same copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from taylorseer_export.bundle.low_rank import LowRank
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.lora import file_and_scale, pairs_of, some

_LARGEST = {"float16": 65504.0}


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank weights of a request, as a bundle takes them. Equal to another of the same matrices and strength.

    Attributes:
        given: What was asked for: `FILE` or `FILE:STRENGTH`, several are added up.
        matrices: `[rows, R]` float32, laid out as `LowRank` says; nothing writes to them.
        ups: `[rows, 1]` bool, where they are rows of B.
        layers: How many layers they change.
        unread: Modules that they would change and that no graph reads.
        strength: What B is multiplied by besides, dimensionless.
    """

    given: tuple[str, ...]
    matrices: np.ndarray = field(repr=False)
    ups: np.ndarray = field(repr=False)
    layers: int
    unread: tuple[str, ...] = ()
    strength: float = 1.0

    def at(self, strength: float) -> Adapter:
        """The same at so many times its strength; shares its memory.

        Raises:
            ConfigError: The strength is no finite number.
        """
        if not math.isfinite(strength):
            raise ConfigError(f"lora strength is {strength}, expected a finite number; write it like 0.8")
        return replace(self, strength=self.strength * strength)

    def values(self) -> np.ndarray:
        """What the input holds, `[rows, R]` float32."""
        if self.strength == 1:
            return self.matrices
        return self.matrices * np.where(self.ups, np.float32(self.strength), np.float32(1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.matrices is other.matrices and self.strength == other.strength

    def __hash__(self) -> int:
        return hash((id(self.matrices), self.strength))

    def __str__(self) -> str:
        """What ranks compare: of the numbers a checksum, since files of one name may differ."""
        return f"{', '.join(self.given)} of strength {self.strength} (numbers {crc32(self.matrices.tobytes())})"


def adapter(given: Sequence[str | Path], low_rank: LowRank | None, dtype: str) -> Adapter:
    """The low-rank weights that files hold.

    Args:
        given: `FILE` or `FILE:STRENGTH`, dimensionless; several are added up.
        low_rank: The inputs of the bundle.
        dtype: Of them.

    Raises:
        ConfigError: The bundle has no such inputs; a file is missing, damaged, holds something else than low-rank pairs
            of this model under its own names, changes a layer without inputs, or is of too high a rank.
    """
    if low_rank is None:
        raise ConfigError(
            "lora is given for a bundle without low-rank inputs, expected one that takes it with each request; export "
            "again with --lora-rank R, or load the bundle with lora=FILE"
        )
    rows, rank = low_rank.shape
    matrices, ups = np.zeros((rows, rank), np.float32), np.zeros((rows, 1), np.bool_)
    places = {layer.module: (layer, place) for layer, place in low_rank.places()}
    for _, place in places.values():
        ups[place.middle : place.end] = True
    shapes = {f"{module}.weight": (layer.outputs, layer.inputs) for module, (layer, _) in places.items()}
    used: dict[str, int] = {}
    unread: dict[str, None] = {}
    for one in given:
        path, scale = file_and_scale(str(one))
        pairs, absent = pairs_of(path, shapes, lambda module: f"{module}.weight" not in shapes, low_rank.unread)
        _check_layers(path, [name for name in absent if name not in low_rank.unread], low_rank)
        unread |= dict.fromkeys(absent)
        _check_rank(path, {name: used.get(name, 0) + len(pair.down) for name, pair in pairs.items()}, used, rank)
        for name, pair in pairs.items():
            _, place = places[name.removesuffix(".weight")]
            columns = slice(used.get(name, 0), used.get(name, 0) + len(pair.down))
            matrices[place.start : place.middle, columns] = pair.down.T
            matrices[place.middle : place.end, columns] = pair.up * np.float32(scale * pair.factor)
            used[name] = columns.stop
    most = float(np.abs(matrices).max(initial=0.0))
    if not most <= _LARGEST.get(dtype, np.finfo(np.float32).max):
        raise ConfigError(
            f"lora {', '.join(map(str, given))} has numbers up to {most:.3g}, beyond the range of {dtype}, expected "
            "smaller ones; lower its strength, or export again with --precision bf16"
        )
    return Adapter(tuple(map(str, given)), matrices, ups, len(used), tuple(unread))


def _check_layers(path: Path, strange: Sequence[str], low_rank: LowRank) -> None:
    if strange:
        chosen = f", those that --lora-targets {low_rank.pattern} chose at export" if low_rank.pattern else ""
        raise ConfigError(
            f"lora {path} changes {len(strange)} layers that have no low-rank inputs "
            f"({some([f'`{module}`' for module in strange])}), expected layers of this bundle that have them{chosen}; "
            f"export again {'with other targets' if low_rank.pattern else f'with --lora {path}'}, or use another"
        )


def _check_rank(path: Path, ranks: Mapping[str, int], used: Mapping[str, int], most: int) -> None:
    name = max(ranks, key=ranks.__getitem__, default="")
    if ranks and ranks[name] > most:
        seen = f"rank {ranks[name]}" if not used.get(name) else f"rank {ranks[name]} with those before it"
        raise ConfigError(
            f"lora {path} has {seen} at `{name.removesuffix('.weight')}`, expected at most {most} (dimensionless), "
            f"which the bundle was exported for; export again with --lora-rank {ranks[name]}"
        )
