"""How a bundle is shared out over ranks: what its manifest says, and what both sides must call alike."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from taylorseer_export.bundle.entries import SizeName
from taylorseer_export.bundle.sealed import Part

Mode = Literal["gather", "ulysses"]
GROUP = "taylorseer"  # the process group that collectives of the graphs are over, by the name that they hold
RANK = "rank"  # the input that tells a graph which rank runs it, where it needs it


class Parallel(Part):
    """The latent's rows are shared out over ranks, each of which runs the graphs on its own."""

    mode: Mode = Field(
        description="What attentions became. gather: all keys and values on every rank. ulysses: all rows of a share "
        "of the heads on every rank."
    )
    degree: int = Field(ge=2, le=64, description="How many ranks.")
    dimension: SizeName = Field(
        description="The size that counts the rows; in shapes and in `dimensions` it counts those of one rank."
    )


def ranges_of_one(parallel: Parallel | None, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """(smallest, largest) of every size on one rank, from those of the whole: only what divides is taken."""
    if parallel is None:
        return dict(ranges)
    low, high = ranges[parallel.dimension]
    return {**ranges, parallel.dimension: (-(-low // parallel.degree), high // parallel.degree)}
