"""Low-rank inputs: every linear layer of a traced graph takes the LoRA of the request beside its own weight.

    y = W x + b    becomes    y = W x + b + up (down x)          down [R, in], up [out, R]

All of them are rows of one tensor `lora` `[rows, R]`: of each layer first `down` transposed, `in` rows, then `up`,
`out` rows, in the order of the graph. Every matrix has R columns, so a layer reads its own by a slice of rows, and a
graph has one more input whatever the number of layers; a request that changes its LoRA is one copy. Zeros add nothing.

In a graph `lora` counts as a weight: nothing that follows from it alone is worth handing from one graph to another, so
each graph takes it whole, all graphs of a slot from one buffer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taylorseer_export.bundle.low_rank import LORA, Layer
from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Input
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.trace import Trace

aten = torch.ops.aten
_SHOWN = 5
MOST_RANK = 1024


def low_rank(trace: Trace, rank: int, pattern: str | None = None) -> tuple[Trace, tuple[Layer, ...]]:
    """Give linear layers of a trace low-rank inputs, in place of its graph.

    Requires a graph before it is narrowed, whose linear layers read their weights by the checkpoint's names. Ensures
    that with zeros it computes what it did, and with the matrices of a LoRA what the model does with it.

    Args:
        trace: The tapped graph.
        rank: R, the highest rank of a request's LoRA, dimensionless.
        pattern: Regular expression that is found in the names of the modules that are given them; all if left out.

    Returns:
        The trace with its further input, and the layers in the order of their rows.

    Raises:
        ConfigError: There is no such layer.
    """
    graph = trace.module.graph
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        name = _weight_of(node)
        if name is not None and (pattern is None or re.search(pattern, name.removesuffix(".weight"))):
            found.setdefault(name.removesuffix(".weight"), []).append(node)
    if not found:
        known = sorted({name.removesuffix(".weight") for node in graph.nodes if (name := _weight_of(node))})
        raise ConfigError(
            f"--lora-targets is {pattern}, which is in the name of no linear layer of the graphs, expected a part of "
            f"one ({_some(known)}); correct it, or leave it out"
        )
    layers = tuple(
        Layer(module=module, inputs=shape[1], outputs=shape[0])
        for module, nodes in found.items()
        for shape in [tuple(map(int, nodes[0].args[1].meta["val"].shape))]  # type: ignore[union-attr]
    )
    rows = sum(layer.inputs + layer.outputs for layer in layers)
    first = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    with graph.inserting_after(first):
        lora = graph.placeholder(LORA)
    with first.meta["val"].fake_mode:
        lora.meta["val"] = torch.empty((rows, rank), dtype=trace.precision)
    start = 0
    for layer in layers:
        for node in found[layer.module]:
            _add(graph, node, lora, layer, start)
        start += layer.inputs + layer.outputs
    return replace(trace, inputs=(*trace.inputs, Input(LORA, (rows, rank), "lora"))), layers


def check_rank(rank: int | None, pattern: str | None) -> None:
    """Refuse what is no rank, or no pattern.

    Raises:
        ConfigError: One of them is out of range, or there are targets without a rank.
    """
    if rank is None:
        if pattern is not None:
            raise ConfigError(f"--lora-targets is {pattern} without --lora-rank, expected it too; add it")
        return
    if not 1 <= rank <= MOST_RANK:
        raise ConfigError(f"--lora-rank is {rank}, expected 1 to {MOST_RANK} (dimensionless); change it")
    try:
        re.compile(pattern or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"--lora-targets is {pattern}, which is no regular expression ({error}), expected one; correct it"
        ) from error


def _add(graph: fx.Graph, node: fx.Node, lora: fx.Node, layer: Layer, start: int) -> None:
    """Add the product with the rows of a layer to what its node returns."""
    source, middle, end = node.args[0], start + layer.inputs, start + layer.inputs + layer.outputs
    kind = node.meta["val"].dtype
    with graph.inserting_after(node):
        after = graph.call_function(aten.add.Tensor, ())  # its place; what it reads comes before
    node.replace_all_uses_with(after)

    def make(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, args, like=node)

    with graph.inserting_before(after):
        down, up = (make(aten.slice.Tensor, lora, 0, *bounds) for bounds in ((start, middle), (middle, end)))
        if lora.meta["val"].dtype != kind:
            down, up = make(aten.to.dtype, down, kind), make(aten.to.dtype, up, kind)
        inner = make(aten.linear.default, source, make(aten.transpose.int, down, 0, 1))
        total = make(aten.add.Tensor, node, make(aten.linear.default, inner, up))
    after.replace_all_uses_with(total)
    graph.erase_node(after)


def _weight_of(node: fx.Node) -> str | None:
    """Name of the weight that a linear layer reads; None for any other node, and for a weight that is computed."""
    weight = node.args[1] if node.target is aten.linear.default else None
    named = isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight")
    return str(weight.target) if named and weight.meta["val"].ndim == 2 else None  # type: ignore[union-attr]


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
