"""The contract of a graph beside what its engine says of itself: names, dtypes and shapes of every input and output.

Buffers are made by the contract and written by the engine: where the two differ, memory is overwritten. Every runner
compares them before it makes a buffer, and every builder that can before it writes one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from taylorseer_export.bundle.manifest import Dimension, Graph
from taylorseer_export.bundle.shapes import evaluate, names

NOTE = "taylorseer_contract"  # where an AOTInductor package keeps the `signature` of each graph

# Tensor -> (dtype, shape); an extent that is free is -1, or its entry in the contract where the engine keeps names.
Seen = Mapping[str, tuple[str, Sequence[int | str]]]


def unlike(graph: Graph, inputs: Seen, outputs: Seen, dimensions: Mapping[str, Dimension]) -> str | None:
    """How an engine's own tensors differ from the contract, as `<what> is <seen>, expected <what>`; None if they agree.

    Args:
        graph: The contract.
        inputs, outputs: What the engine or network says of itself.
        dimensions: Ranges of the sizes: one of a single size is a number in the engine, any other is free.
    """
    fixed = {name: d.minimum for name, d in dimensions.items() if d.minimum == d.maximum}
    for kind, tensors, seen in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        expected = [t.name for t in tensors]
        if sorted(seen) != sorted(expected):
            strange = sorted(set(seen) ^ set(expected))
            return f"{kind} {', '.join(strange)} are in one of engine and manifest, expected the same names in both"
        for tensor in tensors:
            dtype, found = seen[tensor.name]
            named = any(isinstance(extent, str) for extent in found)
            shape = [evaluate(s, fixed) if names(s) <= fixed.keys() else s if named else -1 for s in tensor.shape]
            # Engines cannot always tell that a computed size has one value only: an output may stay free, and an
            # extent may keep its name.
            agree = len(found) == len(shape) and all(
                f in (s, entry) or (kind == "outputs" and f == -1)
                for f, s, entry in zip(found, shape, tensor.shape, strict=True)
            )
            if dtype != tensor.dtype or not agree:
                return f"`{tensor.name}` is {dtype} {_bracketed(found)}, expected {tensor.dtype} {_bracketed(shape)}"
    return None


def signature(graph: Graph) -> str:
    """The contract of a graph as text, for engines that keep a note and do not know the names of their tensors."""
    tensors = ([[t.name, t.dtype, list(t.shape)] for t in side] for side in (graph.inputs, graph.outputs))
    return json.dumps(list(tensors), separators=(",", ":"))


def _bracketed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
