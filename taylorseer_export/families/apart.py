"""Pictures of one size, or square ones, as ranks share them out: rows and columns are sizes by themselves.

Alone such a model has one size for both sides, or none that is open. Ranks take the rows of a picture apart, and what a
rank has is no square: it is told both sides, which are fixed at export as those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.families.family import Input, fixed, replaced

Config = Mapping[str, Any]
_SIDES = ("rows", "columns")


def apart(
    inputs: Callable[[Config], tuple[Input, ...]],
    dimensions: Callable[[Config], dict[str, tuple[int, int]]],
    extents: Callable[[Config], tuple[int, int]],
    side: Callable[[Config, int, int], int],
    **more: Any,
) -> dict[str, Any]:
    """`shared` of a family whose pictures are square.

    Args:
        inputs, dimensions: As it is declared alone.
        extents: `config -> (smallest, largest)` side in tokens.
        side: `(config, height, width) -> side` in tokens of a latent in pixels; raises `ConfigError` for another one.
        more: What else is different.
    """

    def of_sides(config: Config) -> tuple[Input, ...]:
        latent, *others = inputs(config)
        patch = config["patch_size"]
        return replace(latent, shape=(*latent.shape[:2], *(f"{patch}*{name}" for name in _SIDES))), *others

    def ranges(config: Config) -> dict[str, tuple[int, int]]:
        own = {name: span for name, span in dimensions(config).items() if name != "side"}
        return {**own, **dict.fromkeys(_SIDES, extents(config))}

    def sizes(config: Config, height: int, width: int) -> dict[str, int]:
        return dict.fromkeys(_SIDES, side(config, height, width))

    return {"inputs": of_sides, "dimensions": ranges, "latent_sizes": sizes, **more}


def of_table(config: Config) -> tuple[int, int]:
    """`extents` of a model that adds a table of places: up to its side."""
    return 1, config["sample_size"] // config["patch_size"]


def side_of_table(config: Config, height: int, width: int) -> int:
    """`side` of such a model: that of the table alone."""
    fixed(config, height, width)
    return int(config["sample_size"] // config["patch_size"])


def in_table(embed: Any, latent: Any) -> Any:
    """`PatchEmbed` of diffusers where its table is as large as the whole picture: the part that is as large as this."""
    tokens = embed.proj(latent)
    _, width, *sides = tokens.shape
    table = embed.pos_embed.view(embed.height, embed.width, width)[: sides[0]][:, : sides[1]]
    return tokens.flatten(2).transpose(1, 2) + table.flatten(0, 1).to(tokens.dtype)


@contextmanager
def part_of_table(model: Any) -> Iterator[None]:
    """`patched` of a model that adds the table of its `pos_embed`."""
    with replaced(model.pos_embed, forward=partial(in_table, model.pos_embed)):
        yield
