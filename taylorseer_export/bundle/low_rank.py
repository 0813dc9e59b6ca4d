"""The layers whose low-rank weights a request brings, as the manifest holds them, and where each has its rows.

Shapes: R the highest rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import Field

from taylorseer_export.bundle.entries import Size, Text
from taylorseer_export.bundle.sealed import Part

LORA = "lora"  # the input of the graphs, and its role


class Layer(Part):
    """One linear layer with low-rank inputs."""

    module: Text = Field(min_length=1, max_length=400, description="Dotted name of the module in the transformer.")
    inputs: Size = Field(description="What it takes of a row: columns of its weight.")
    outputs: Size = Field(description="What it makes of a row: rows of its weight.")


class Rows(NamedTuple):
    """Rows of the input: `[start, middle)` are A transposed, `[in, R]`, and `[middle, end)` are B, `[out, R]`."""

    start: int
    middle: int
    end: int


class LowRank(Part):
    """The low-rank inputs of a bundle: of every layer W x + B (A x), all matrices being rows of the input `lora`."""

    rank: Size = Field(description="R, the highest rank of a request's LoRA; lower ones are padded with zeros.")
    pattern: Text | None = Field(default=None, description="Regular expression that chose the layers; null took all.")
    layers: tuple[Layer, ...] = Field(
        min_length=1,
        description="In the order of their rows. Of each first A transposed, then B with its factors in it; both have "
        "`rank` columns.",
    )
    unread: tuple[Text, ...] = Field(
        default=(), description="Modules of the model that no graph reads, so that a LoRA of them changes nothing."
    )

    def places(self) -> Iterator[tuple[Layer, Rows]]:
        """Every layer, and which rows are its own."""
        start = 0
        for layer in self.layers:
            middle = start + layer.inputs
            end = middle + layer.outputs
            yield layer, Rows(start, middle, end)
            start = end

    @property
    def shape(self) -> tuple[int, int]:
        """Of the input: `[rows, R]`."""
        return sum(layer.inputs + layer.outputs for layer in self.layers), self.rank
