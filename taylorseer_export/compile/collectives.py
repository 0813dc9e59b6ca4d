"""Collectives as ONNX. It has none of its own; the parsers of TensorRT 10.16, 11 and RTX read a node `DistCollective`.

    all_gather    [R, ...] of each rank -> [N R, ...] of all, in their order
    all_to_all    [N, ...]: entry r goes to rank r, and entry r came from there

Both are along the first dimension alone, which is the form that `graph/shard.py` gives them. No node says which rank
runs it, so one plan serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_OURS = "taylorseer"  # domain of the node until the graph is simplified: the simplifier asks ONNX for what ONNX has
_NODE = "DistCollective"


def gathered(x: Tensor, ranks: int, group: str) -> Tensor:
    """All ranks' entries of the first dimension."""
    return _collective("all_gather", x, ranks, (ranks * x.shape[0], *x.shape[1:]))


def exchanged(x: Tensor, given: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """One entry of the first dimension for each rank, from each rank."""
    return _collective("all_to_all", x, len(sent), x.shape)


def arrived(x: Tensor) -> Tensor:
    """What was waited for: an engine's own stream keeps the order."""
    return x


_CALLS: dict[str, Callable[..., Tensor]] = {
    "all_gather_into_tensor": gathered,
    "all_to_all_single": exchanged,
    "wait_tensor": arrived,
}


def call_of(target: Any) -> Callable[..., Tensor] | None:
    """What to call in the place of a collective, which `torch.export` looks into; None in that of anything else."""
    namespace, _, name = str(target).partition(".")
    return _CALLS.get(name.split(".")[0]) if namespace == "_c10d_functional" else None


def with_nodes(model: Any) -> None:
    """Put the nodes that TensorRT's parsers read, which are of ONNX's own domain, in the place of ours."""
    found = [node for node in model.graph if (node.domain, node.op_type) == (_OURS, _NODE)]
    for node in found:
        node.domain, node.version = "", None
    if found and not any(node.domain == _OURS for node in model.graph):
        model.opset_imports.pop(_OURS, None)


def _collective(kind: str, x: Tensor, ranks: int, shape: Sequence[Any]) -> Tensor:
    """Without groups all ranks take part; nothing is reduced, and no rank is the root."""
    how: dict[str, Any] = {
        "collective_operation": kind,
        "reduce_op": "none",
        "root": -1,
        "group_size": 0,
        "nb_rank": ranks,
    }
    made: Tensor = torch.onnx.ops.symbolic(f"{_OURS}::{_NODE}", (x,), how, dtype=x.dtype, shape=shape, version=1)
    return made
