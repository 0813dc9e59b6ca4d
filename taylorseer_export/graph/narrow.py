"""Narrowing: store only the rows that reach the output.

FLUX's single blocks run on `cat(text, image)`, and only the image rows of the last block leave the network. Each
block ends with `slice(residual + gate * tap)`. A slice of a sum is the sum of the slices, and a slice of a
concatenation that takes just one part is that part, so the slice moves back until it stands on the tap:

    slice(cat(t, i) + g * tap)   becomes   i + g * slice(tap)

Afterwards the rows a forecast must provide are what the slices on its tap say, and the text rows of the same tap
have no path to the output of the forecast graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from taylorseer_export.graph.trace import Trace, eliminate_dead, is_tap

aten = torch.ops.aten
_TO_THE_END = 2**63 - 1
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.to.dtype, aten.clamp.default, aten.clip.default)


def narrow(trace: Trace) -> None:
    """Move every row slice that stands behind a tap back onto that tap, in place."""
    graph = trace.module.graph
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and _step(node) == 1 and _reaches_tap(node.args[0], _window(node)[0]):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_push(graph, node.args[0], *_window(node)))
    eliminate_dead(graph)


def _push(graph: fx.Graph, source: fx.Node, dim: int, start: Any, end: Any) -> fx.Node:
    """The rows `start:end` along `dim` of `source`, computed from as few rows as possible."""
    if source.target in _ELEMENTWISE:
        args = [_push_operand(graph, a, source, dim, start, end) for a in source.args]
        return call(graph, source.target, args, source.kwargs, like=source)
    if source.target is aten.cat.default and _cat_dim(source) == dim:
        part = _covered_part(source, start, end)
        if part is not None:
            return part
    return call(graph, aten.slice.Tensor, [source, dim, start, end], like=source)


def _push_operand(graph: fx.Graph, operand: Any, result: fx.Node, dim: int, start: Any, end: Any) -> Any:
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return operand
    shape, full = operand.meta["val"].shape, result.meta["val"].shape
    own = dim - (len(full) - len(shape))  # broadcasting aligns shapes at their last dimension
    if own < 0 or _equal(shape[own], 1):
        return operand
    return _push(graph, operand, own, start, end)


def _reaches_tap(source: Any, dim: Any) -> bool:
    """Whether a slice of `source` along `dim` can move back as far as a tap."""
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    if is_tap(source):
        return False  # already there
    return _leads_to_tap(source, dim)


def _leads_to_tap(source: Any, dim: int) -> bool:
    if is_tap(source):
        return True
    if not isinstance(source, fx.Node):
        return False
    if source.target in _ELEMENTWISE:
        return any(_leads_to_tap(a, dim) for a in source.args)
    if source.target is aten.cat.default and _cat_dim(source) == dim:
        return any(_leads_to_tap(a, dim) for a in source.args[0])  # type: ignore[union-attr]
    return False


def _covered_part(cat: fx.Node, start: Any, end: Any) -> fx.Node | None:
    """The one operand of `cat` that `start:end` takes exactly, if there is one."""
    begin: Any = 0
    parts: Sequence[fx.Node] = cat.args[0]  # type: ignore[assignment]
    dim = _cat_dim(cat)
    for position, part in enumerate(parts):
        stop = begin + part.meta["val"].shape[dim]
        last = position == len(parts) - 1
        if _equal(_value(start), begin) and (_equal(_value(end), stop) or (last and _value(end) == _TO_THE_END)):
            return part
        begin = stop
    return None


def call(
    graph: fx.Graph,
    target: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """Add a call node whose fake value is known, so that later passes can ask for its shape."""
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    values, options = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values, **options)
    if like is not None:
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
    return node


def _window(node: fx.Node) -> tuple[int, Any, Any]:
    """(dim, start, end) of a slice call, with its defaults filled in."""
    source, dim, start, end = (*node.args, *[None] * 4)[:4]
    dim = (dim or 0) % source.meta["val"].ndim  # type: ignore[union-attr]
    return dim, 0 if start is None else start, _TO_THE_END if end is None else end


def _step(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else 1


def _cat_dim(node: fx.Node) -> int:
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    return int(dim % node.meta["val"].ndim)


def _value(bound: Any) -> Any:
    return bound.meta["val"] if isinstance(bound, fx.Node) else bound


def _equal(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every admissible shape (not only for the traced one)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))
