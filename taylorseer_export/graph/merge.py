"""Merging: what a graph computes twice from the same values is computed once.

Models that modulate all their blocks alike, as FLUX.2 does, cut the one modulation into shifts, scales and gates anew
in every block. An engine would see that they are equal; what is packed into tables and kept in buffers is settled
before, so here they become one node: equal operators of equal arguments, and with them all that follows from these.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from taylorseer_export.graph.rewrite import mutates
from taylorseer_export.graph.sizes import is_size


def merge_equal(graph: fx.Graph, nodes: Sequence[fx.Node] | None = None) -> None:
    """Let every node read the first of the nodes that are equal to what it reads, and drop the others, in place.

    Results stay equal bit by bit. What draws random numbers, or writes, is left alone.

    Args:
        graph: Of a trace.
        nodes: Those among which equal ones are sought, in the order of the graph; all if left out.
    """
    first: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes if nodes is None else nodes):
        if not _is_pure(node):
            continue
        kept = first.setdefault((node.op, node.target, _key(node.args), _key(node.kwargs)), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    """Whether the node's value follows from its arguments, and nothing else does from it."""
    if node.op == "get_attr":
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return not mutates(node) and torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.op == "call_function" and getattr(operator, getattr(node.target, "__name__", ""), None) is node.target


def _key(value: Any) -> Hashable:
    """Equal for equal arguments alone: 1, 1.0 and True are not. Sizes are known by what they are computed to."""
    if isinstance(value, fx.Node):
        size = value.meta.get("val")
        return size.node.expr if is_size(value) and isinstance(size, torch.SymInt) else value
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(entry)) for name, entry in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return (type(value).__name__, repr(value))
