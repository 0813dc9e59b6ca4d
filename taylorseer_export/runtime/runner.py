"""The runner interface: a loaded engine, and buffers bound to it once.

A runner owns the graphs of one bundle on one device. Buffers are allocated by name-free shape and dtype, bound to a
graph's inputs and outputs once, and the bound call is replayed: no step allocates or copies state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.errors import StepError

Call = Callable[[], None]


class Buffer(Protocol):
    """A tensor at a fixed address on the runner's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def address(self) -> int:
        """First byte on the device."""
        ...

    @property
    def nbytes(self) -> int: ...

    def entry(self, index: int) -> Buffer:
        """The part at `index` of the first dimension: the same memory, one dimension less."""
        ...

    def write(self, values: np.ndarray) -> None:
        """Copy values from the host, broadcasting as numpy does; `host_dtype` says of which type."""
        ...

    def copy(self, source: Buffer) -> None:
        """Copy a buffer of the same runner, shape and dtype; on a GPU in the order of the calls."""
        ...

    def clear(self) -> None:
        """Set every element to zero."""
        ...

    def read(self) -> np.ndarray:
        """A copy on the host, of the type that `host_dtype` says."""
        ...


class Runner(Protocol):
    """The engines of a bundle, loaded."""

    @property
    def graphs(self) -> Mapping[str, Graph]: ...

    @property
    def device(self) -> Device:
        """Where engines and buffers are; a GPU has its number."""
        ...

    @property
    def fallbacks(self) -> int:
        """Calls that could have been a CUDA graph's and ran without one, because that was asked for."""
        ...

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A new buffer of zeros."""
        ...

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """A call of `graph` that reads and writes these buffers each time it is made.

        Raises:
            StepError: A tensor of the contract has no buffer, or an input and an output share memory.
        """
        ...

    def close(self) -> None:
        """Release the engines."""
        ...


def host_dtype(dtype: str) -> np.dtype:
    """The numpy type of a tensor on the host: bfloat16, which numpy lacks, is float32 there."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


def to_bits(values: np.ndarray) -> np.ndarray:
    """The upper half of float32 values, rounded to the nearest, ties to even: bfloat16 as uint16."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = wide + (0x7FFF + ((wide >> 16) & 1)).astype(np.uint32)
    bits = np.where(np.isnan(values), (wide >> 16) | 0x40, rounded >> 16)
    return bits.astype(np.uint16).reshape(np.shape(values))


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> the same values as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_binding(
    graph: Graph, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], aliases: Mapping[str, str] | None = None
) -> None:
    """Refuse a binding that is incomplete, or where an output overlaps an input.

    ONNX Runtime and TensorRT both write outputs while inputs are still being read: one address for both gives
    wrong numbers without an error.

    Args:
        graph: The contract.
        inputs, outputs: Name -> buffer.
        aliases: Output -> the input whose memory it must be, where the engine itself demands that.

    Raises:
        StepError: Names the tensors.
    """
    aliases = aliases or {}
    for tensors, buffers in ((graph.inputs, inputs), (graph.outputs, outputs)):
        missing = [t.name for t in tensors if t.name not in buffers]
        if missing:
            raise StepError(
                f"tensor `{missing[0]}` of {graph.file} has no buffer, expected one for each of "
                f"{len(tensors)} tensors; bind every name of the contract"
            )
    for output, source in aliases.items():
        if outputs[output].address != inputs[source].address:
            raise StepError(
                f"output `{output}` of {graph.file} has its own memory, expected that of input `{source}`, which the "
                "engine updates in place; bind one buffer to both"
            )
    # Sweep over the address ranges: after sorting, only neighbours can overlap.
    ranges = [(b.address, b.address + b.nbytes, name, "input") for name, b in inputs.items() if b.nbytes]
    ranges += [
        (b.address, b.address + b.nbytes, name, "output")
        for name, b in outputs.items()
        if b.nbytes and name not in aliases
    ]
    reach = 0
    owner = ("", "")
    for begin, end, name, kind in sorted(ranges):
        if begin < reach and "output" in (kind, owner[1]):
            raise StepError(
                f"{kind} `{name}` of {graph.file} overlaps {owner[1]} `{owner[0]}` in memory, expected separate "
                "buffers; allocate one buffer for each"
            )
        if end > reach:
            reach, owner = end, (name, kind)
