"""Narrowing: store only the rows that reach the output.

FLUX's single blocks run on `cat(text, image)`, and only the image rows of the last block leave the network. Each
block ends with `slice(residual + gate * tap)`. A slice of a sum is the sum of the slices, and a slice of a
concatenation that takes just one part is that part, so the slice moves back until it stands on the tap:

    slice(cat(t, i) + g * tap)   becomes   i + g * slice(tap)

A slice behind the last block moves further: through the head, whose norm and linear layers treat each row alone, and
down the residual stream of all blocks. So do the rows of FLUX-Kontext that leave the network, without those of its
conditioning image.

Afterwards the rows a forecast must provide are what the slices on its tap say, and the text rows of the same tap
have no path to the output of the forecast graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from taylorseer_export.graph.rewrite import TO_THE_END, call
from taylorseer_export.graph.taps import STACK_INPUT, STACK_OUTPUT
from taylorseer_export.graph.trace import Trace, eliminate_dead, is_tap

aten = torch.ops.aten
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.to.dtype, aten.clamp.default, aten.clip.default)
_ROWWISE = (aten.linear.default, aten.layer_norm.default)  # over the last dimension alone


def narrow(trace: Trace) -> None:
    """Move every row slice that stands behind a tap back onto that tap, in place."""
    graph = trace.module.graph
    inside = _upstream(n for n in graph.nodes if is_tap(n) and not _is_stack_tap(n))
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and _step(node) == 1:
            move = _Move(graph, *_window(node), last=node not in inside)
            if move.reaches_tap(node.args[0]):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(move.of(node.args[0]))
    eliminate_dead(graph)


def _upstream(targets: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that some target is computed from, and the targets."""
    seen: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


@dataclass(frozen=True)
class _Move:
    """The rows `start:end` along `dim`, on their way back to a tap.

    Attributes:
        last: Whether no site is computed from them: they are on their way out, and only these go through the head.
    """

    graph: fx.Graph
    dim: int
    start: Any
    end: Any
    last: bool

    def of(self, source: fx.Node) -> fx.Node:
        """The rows of `source`, computed from as few rows as possible."""
        if source.target in _ELEMENTWISE:
            args = [self._operand(a, source) for a in source.args]
            return call(self.graph, source.target, args, source.kwargs, like=source)
        if self._passes(source):
            first = self.of(source.args[0])  # type: ignore[arg-type]
            moved = call(self.graph, source.target, [first, *source.args[1:]], source.kwargs, like=source)
            if _is_stack_tap(source):
                source.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]  # one tap per name
            return moved
        if source.target is aten.cat.default and _cat_dim(source) == self.dim:
            part = _covered_part(source, self.start, self.end)
            if part is not None:
                return part
        inner = _rows_of_rows(self.graph, source, self.dim, self.start, self.end)
        return inner or call(self.graph, aten.slice.Tensor, [source, self.dim, self.start, self.end], like=source)

    def _operand(self, operand: Any, result: fx.Node) -> Any:
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            return operand
        shape, full = operand.meta["val"].shape, result.meta["val"].shape
        own = self.dim - (len(full) - len(shape))  # broadcasting aligns shapes at their last dimension
        if own < 0 or _equal(shape[own], 1):
            return operand
        return replace(self, dim=own).of(operand)

    def reaches_tap(self, source: Any) -> bool:
        """Whether the rows of `source` can be had from rows of a tap, further back."""
        if not isinstance(source, fx.Node):
            return False
        return (not is_tap(source) or self._passes(source)) and self._leads_to_tap(source)

    def _leads_to_tap(self, source: Any) -> bool:
        if not isinstance(source, fx.Node):
            return False
        if source.target in _ELEMENTWISE:
            return any(self._leads_to_tap(a) for a in source.args)
        if self._passes(source):
            return _is_stack_tap(source) or self._leads_to_tap(source.args[0])
        if source.target is aten.cat.default and _cat_dim(source) == self.dim:
            return any(self._leads_to_tap(a) for a in source.args[0])  # type: ignore[union-attr]
        return is_tap(source)

    def _passes(self, source: fx.Node) -> bool:
        """Whether rows of `source` are the same operator on rows of its first argument."""
        if not self.last:
            return False
        if source.target in _ROWWISE:
            return self.dim < source.meta["val"].ndim - 1
        return _is_stack_tap(source)


def _is_stack_tap(node: fx.Node) -> bool:
    return is_tap(node) and node.args[1] in (STACK_INPUT, STACK_OUTPUT)


def _rows_of_rows(graph: fx.Graph, inner: fx.Node, dim: int, start: Any, end: Any) -> fx.Node | None:
    """`x[a:b][start:end]` as one slice of `x`, where `start:end` surely lies within `a:b`."""
    if inner.target is not aten.slice.Tensor or _step(inner) != 1 or _window(inner)[0] != dim:
        return None
    _, first, last = _window(inner)
    length = inner.meta["val"].shape[dim]
    if not all(_at_most(0, _value(bound)) for bound in (first, start, end)):
        return None
    if _value(end) != TO_THE_END:
        if not _at_most(_value(end), length):
            return None
        last = _sum(graph, first, end)
    return call(graph, aten.slice.Tensor, [inner.args[0], dim, _sum(graph, first, start), last], like=inner)


def _sum(graph: fx.Graph, left: Any, right: Any) -> Any:
    """The sum of two sizes, as a node where one of them is a node."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    node = graph.call_function(operator.add, (left, right))
    node.meta["val"] = _value(left) + _value(right)
    return node


def _covered_part(cat: fx.Node, start: Any, end: Any) -> fx.Node | None:
    """The one operand of `cat` that `start:end` takes exactly, if there is one."""
    begin: Any = 0
    parts: Sequence[fx.Node] = cat.args[0]  # type: ignore[assignment]
    dim = _cat_dim(cat)
    for position, part in enumerate(parts):
        stop = begin + part.meta["val"].shape[dim]
        last = position == len(parts) - 1
        if _equal(_value(start), begin) and (_equal(_value(end), stop) or (last and _value(end) == TO_THE_END)):
            return part
        begin = stop
    return None


def _window(node: fx.Node) -> tuple[int, Any, Any]:
    """(dim, start, end) of a slice call, with its defaults filled in."""
    source, dim, start, end = (*node.args, *[None] * 4)[:4]
    dim = (dim or 0) % source.meta["val"].ndim  # type: ignore[union-attr]
    return dim, 0 if start is None else start, TO_THE_END if end is None else end


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


def _at_most(left: Any, right: Any) -> bool:
    """Whether one size is at most another for every admissible shape."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left <= right))
