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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.graph.rewrite import TO_THE_END, call
from taylorseer_export.graph.sizes import equal, is_size
from taylorseer_export.graph.taps import is_mark
from taylorseer_export.graph.trace import Trace, eliminate_dead, is_tap

aten = torch.ops.aten
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.to.dtype, aten.clamp.default, aten.clip.default)
_ROWWISE = (aten.linear.default, aten.layer_norm.default)  # over the last dimension alone


def narrow(trace: Trace) -> None:
    """Move every row slice that stands behind a tap back onto that tap, in place."""
    graph = trace.module.graph
    taps = [n for n in graph.nodes if is_tap(n) and not _is_mark(n)]
    inside = upstream(taps)
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and _step(node) == 1:
            with graph.inserting_before(node):
                move = _Move(graph, *_counted_from_the_front(graph, node), last=node not in inside)
                if move.reaches_tap(node.args[0]) or move.is_part(node.args[0]):
                    node.replace_all_uses_with(move.of(node.args[0]))
    eliminate_dead(graph)
    for tap, slices in readers(trace, taps).items():
        _join(graph, tap, slices)
    eliminate_dead(graph)


def readers(trace: Trace, taps: Collection[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Tap -> through what the output reads it, with no other of `taps` between: slices of the tap, or the tap."""
    found: dict[fx.Node, set[fx.Node]] = {}
    seen, stack = set(), list(trace.predictions.values())
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        tap = node.args[0] if node.target is aten.slice.Tensor else node
        if tap in taps:
            found.setdefault(tap, set()).add(node)  # type: ignore[arg-type]
        else:
            stack += [source for source in node.all_input_nodes if not is_size(source)]
    return found


def upstream(targets: Iterable[fx.Node]) -> set[fx.Node]:
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
            if _is_mark(source):
                source.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]  # one tap per name
            return moved
        if source.target is aten.cat.default and _cat_dim(source) == self.dim:
            parts = self._parts(source)
            if parts:
                return parts[0] if len(parts) == 1 else call(self.graph, source.target, [parts, self.dim], like=source)
        if (inside := self._under_unsqueeze(source)) is not None:
            first = inside.of(source.args[0])  # type: ignore[arg-type]
            return call(self.graph, source.target, [first, *source.args[1:]], source.kwargs, like=source)
        inner = _rows_of_rows(self.graph, source, self.dim, self.start, self.end)
        return inner or call(self.graph, aten.slice.Tensor, [source, self.dim, self.start, self.end], like=source)

    def _parts(self, cat: fx.Node) -> list[fx.Node]:
        """The operands of `cat` that hold the rows, cut to them; empty if that depends on the sizes of a request."""
        graph, begin = self.graph, 0
        found: list[fx.Node] = []
        parts: Any = cat.args[0]
        for part in parts:
            extent = part.meta["val"].shape[self.dim]
            stop = _sum(graph, begin, _size_node(graph, part, self.dim))
            after = _value(self.end) != TO_THE_END and _at_most(_value(self.end), _value(begin))
            if not after and not _at_most(_value(stop), _value(self.start)):
                inner = _inner_window(graph, self.start, self.end, begin, stop)
                if inner is None:
                    return []
                whole = inner[0] == 0 and inner[1] in (TO_THE_END, extent)
                found.append(part if whole else replace(self, start=inner[0], end=inner[1]).of(part))
            begin = stop
        return found

    def is_part(self, source: Any) -> bool:
        """Whether the rows are parts of a concatenation, of which the others are not needed: text beside the latent."""
        if not isinstance(source, fx.Node):
            return False
        if source.target in _ELEMENTWISE:
            return any(self.is_part(a) for a in source.args)
        return source.target is aten.cat.default and _cat_dim(source) == self.dim and bool(self._parts(source))

    def _under_unsqueeze(self, source: fx.Node) -> _Move | None:
        """The same rows before a dimension of one was put in front of them: places of tokens, for every sample."""
        if source.target is not aten.unsqueeze.default or source.args[1] != 0 or self.dim == 0:
            return None
        inside = replace(self, dim=self.dim - 1)
        return inside if inside.is_part(source.args[0]) else None

    def _operand(self, operand: Any, result: fx.Node) -> Any:
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            return operand
        shape, full = operand.meta["val"].shape, result.meta["val"].shape
        own = self.dim - (len(full) - len(shape))  # broadcasting aligns shapes at their last dimension
        if own < 0 or equal(shape[own], 1):
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
            return _is_mark(source) or self._leads_to_tap(source.args[0])
        if source.target is aten.cat.default and _cat_dim(source) == self.dim:
            return any(self._leads_to_tap(a) for a in source.args[0])  # type: ignore[union-attr]
        return is_tap(source.args[0] if source.target is aten.slice.Tensor else source)

    def _passes(self, source: fx.Node) -> bool:
        """Whether rows of `source` are the same operator on rows of its first argument."""
        if not self.last:
            return False
        if source.target in _ROWWISE:
            return self.dim < source.meta["val"].ndim - 1
        return _is_mark(source)


def _is_mark(node: fx.Node) -> bool:
    """Whether the node is a tap that marks a place and is no site."""
    return is_tap(node) and is_mark(str(node.args[1]))


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
    return _arithmetic(graph, operator.add, left, right)


def _difference(graph: fx.Graph, left: Any, right: Any) -> Any:
    return _arithmetic(graph, operator.sub, left, right)


def _arithmetic(graph: fx.Graph, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    value = function(_value(left), _value(right))
    if isinstance(left, int) and isinstance(right, int):
        return value
    node = graph.call_function(function, (left, right))
    node.meta["val"] = value
    return node


def _inner_window(graph: fx.Graph, start: Any, end: Any, begin: Any, stop: Any) -> tuple[Any, Any] | None:
    """The rows `start:end` within the rows `begin:stop`, counted from `begin`; None if that depends on sizes."""
    if _at_most(_value(start), _value(begin)):
        first = 0
    elif _at_most(_value(begin), _value(start)):
        first = _difference(graph, start, begin)
    else:
        return None
    if _value(end) == TO_THE_END or _at_most(_value(stop), _value(end)):
        return first, TO_THE_END
    if _at_most(_value(end), _value(stop)):
        return first, _difference(graph, end, begin)
    return None


def _join(graph: fx.Graph, tap: fx.Node, slices: set[fx.Node]) -> None:
    """Let two slices that follow on each other read one slice of the tap: then that is what a forecast provides.

    HunyuanVideo with a replaced first frame gates the rows of that frame and the others apart.
    """
    if len(slices) != 2 or tap in slices or any(_step(node) != 1 for node in slices):
        return
    for one, other in permutations(slices):
        (dim, start, middle), (other_dim, begin, end) = _window(one), _window(other)
        if dim == other_dim and start == 0 and equal(_value(middle), _value(begin)) and isinstance(end, fx.Node):
            first = min(one, other)
            # The two may stand far apart: take the size where it was known before both.
            known = [n for n in graph.nodes if n < first and isinstance(n.meta.get("val"), torch.SymInt)]
            same = [n for n in known if equal(_value(n), _value(end))]
            if same:
                with graph.inserting_before(first):
                    rows = call(graph, aten.slice.Tensor, [tap, dim, 0, same[0]], like=tap)
                for node in (one, other):
                    node.update_arg(0, rows)
                return


def _counted_from_the_front(graph: fx.Graph, node: fx.Node) -> tuple[int, Any, Any]:
    """The window of a slice with bounds below 0, which count from the end, made such that count from the front."""
    dim, *bounds = _window(node)
    source: Any = node.args[0]
    start, end = (
        _sum(graph, _size_node(graph, source, dim), bound) if _at_most(_value(bound), -1) else bound for bound in bounds
    )
    return dim, start, end


def _size_node(graph: fx.Graph, tensor: fx.Node, dim: int) -> Any:
    """A size of a tensor: the number, or the node of it."""
    size = tensor.meta["val"].shape[dim]
    return call(graph, aten.sym_size.int, [tensor, dim]) if isinstance(size, torch.SymInt) else size


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


def _at_most(left: Any, right: Any) -> bool:
    """Whether one size is at most another for every admissible shape."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(left <= right):
        return True
    difference = right - left
    if not isinstance(difference, torch.SymInt):
        return bool(difference >= 0)
    # Torch bounds no product of sizes. With every size 1 or more, r*c <= f*r*c follows from f*r*c - r*c, written in
    # f - 1, r - 1 and c - 1, having no term below 0.
    expression = difference.node.expr
    symbols = expression.free_symbols
    if not expression.is_polynomial(*symbols):
        return False
    moved = sympy.expand(expression.xreplace({s: s + 1 for s in symbols}))
    return all(factor >= 0 for factor in moved.as_coefficients_dict().values())
