"""Rows alike: what is equal for all tokens, or for two kinds of them, is computed once for each kind and spread last.

    linear(expand(row))                      becomes   expand(linear(row))
    x * (1 + expand(row))                              x * (1 + row)
    linear(where(mask, one, other))                    where(mask, linear(one), linear(other))
    chunk(table + where(mask, one, other))             chunk(table) + where(mask, chunk(one), chunk(other))

Models of a picture as the first frame, and FLUX.3, take a timestep for each token and modulate token by token. A row of
the batch fits in a table of steps; a row of each token fits in none, and would be computed anew in every step. Each
token gets the numbers that it had: an operator is moved only where it treats every token alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.sizes import equal, is_size, is_whole, simplified
from taylorseer_export.graph.taps import tap_operator

aten = torch.ops.aten
# Operators that take parts of a tensor, and where they name the dimension.
_PARTS: dict[Any, int] = {
    aten.chunk.default: 2, aten.unbind.int: 1, aten.select.int: 1, aten.slice.Tensor: 1, aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}  # fmt: skip
_SHAPES: dict[Any, int | None] = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten.unflatten.int: 2,
    aten.flatten.using_ints: None,
}
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_CASTS = (aten.to.dtype, aten.clone.default)


@dataclass(frozen=True)
class _Alike:
    """What a tensor holds at every token.

    Attributes:
        rows: It for all tokens, or for those of the mask and for the others; shaped as the tensor, without the tokens.
        dim: The dimension of tokens; that of the batch and of tokens in one where the tensor is so.
        count: How many tokens there are.
        mask: `[..., tokens]` bool; None where all are alike.
        table: Weights that are added to each.
    """

    rows: tuple[fx.Node, ...]
    dim: int
    count: sympy.Expr
    mask: fx.Node | None = None
    table: fx.Node | None = None


def rows_alike(graph: fx.Graph) -> None:
    """Compute what is equal for tokens once for all of them, in place; dead nodes are left.

    Requires operators without side effects. Ensures that every value is what it was, but for the order in which a
    product of fewer rows sums.
    """
    _Pass(graph).run()


class _Pass:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.found: dict[fx.Node, _Alike] = {}
        self.spread: dict[fx.Node, fx.Node] = {}
        self.weights: set[fx.Node] = set()  # what is computed of weights alone

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "get_attr" or (node.op == "call_function" and self.weights.issuperset(node.all_input_nodes)):
                self.weights.add(node)
            if node.op != "call_function" or is_size(node):
                continue
            with self.graph.inserting_before(node):
                alike = self._of(node)
                if alike is not None:
                    self.found[node] = alike
                elif node.target is not tap_operator():
                    self._read_spread(node)

    def _of(self, node: fx.Node) -> _Alike | None:
        """What the value of an operator is alike in, with its rows made."""
        read = [self.found[n] for n in node.all_input_nodes if n in self.found]
        if not read:
            return _begun(self.graph, node)
        first, args = read[0], node.args
        if any(one.count != first.count for one in read):
            return None
        if node.kwargs and node.target not in _CASTS and not _pointwise(node):
            return None
        if node.target in _PARTS or node.target is operator.getitem or node.target is aten.squeeze.dim:
            return self._part(node, first) if len(read) == 1 else None
        if any(one.table for one in read):
            return None
        dim: int | None = first.dim
        if node.target in _SHAPES:
            dim, args = _reshaped(node, first)
        elif node.target is aten.unsqueeze.default:
            at: Any = args[1]
            dim = first.dim + (at % node.meta["val"].ndim <= first.dim)
        elif node.target is aten.linear.default or node.target in _NORMS:
            own = len(args[1]) if node.target in _NORMS else 1  # type: ignore[arg-type]
            alone = node.all_input_nodes[0] in self.found and len(read) == 1
            dim = first.dim if alone and first.dim < node.meta["val"].ndim - own else None
        elif node.target is aten.cat.default:
            at = args[1] if len(args) > 1 else 0
            same = all(part in self.found and self.found[part].dim == first.dim for part in args[0])  # type: ignore
            dim = first.dim if same and at % node.meta["val"].ndim != first.dim else None
        elif _pointwise(node):
            if (added := self._with_table(node)) is not None:
                return added
            dim = self._common_dim(node)
        elif node.target not in _CASTS:
            return None
        if dim is None:
            return None
        masks = {one.mask for one in read if one.mask is not None}
        return self._made(node, args, dim, read, masks.pop() if masks else None) if len(masks) < 2 else None

    def _made(self, node: fx.Node, args: Any, dim: int, read: Sequence[_Alike], mask: fx.Node | None) -> _Alike:
        """The operator on the rows in the place of what is alike."""
        kinds = 1 if mask is None else 2
        rows = []
        for kind in range(kinds):

            def row(n: fx.Node, kind: int = kind) -> fx.Node:
                return self.found[n].rows[min(kind, len(self.found[n].rows) - 1)] if n in self.found else n

            rows.append(call(self.graph, node.target, fx.map_arg(args, row), fx.map_arg(node.kwargs, row), like=node))
        return _Alike(tuple(rows), dim, read[0].count, mask)

    def _part(self, node: fx.Node, alike: _Alike) -> _Alike | None:
        """A part of all dimensions but that of tokens; of what weights are added to, the same part of both."""
        source, dim, rows, args = node.all_input_nodes[0], alike.dim, alike.rows, node.args
        values, inner = source.meta["val"], rows[0].meta["val"]
        if node.target is operator.getitem:
            one_for_all = not isinstance(inner, tuple | list)
        else:
            at = (*node.args, *[0] * 3)[_PARTS.get(node.target, 1)] % values.ndim
            # A mask says which tokens of each sample are of a kind: of some of the samples it would say so of others.
            if at == dim or len(node.all_input_nodes) > 1 or (at < dim and alike.mask is not None):
                return None
            if alike.table is not None and not equal(alike.table.meta["val"].shape[at], values.shape[at]):
                return None
            # A table may have several where all share a row: then every part is of that.
            one_for_all = alike.table is not None and not equal(inner.shape[at], values.shape[at])
            if one_for_all and node.target is aten.select.int:
                one_for_all, args = False, (source, at, 0)
            elif one_for_all and (node.target is not aten.chunk.default or args[1] != values.shape[at]):
                return None
            dim -= at < dim and node.target in (aten.unbind.int, aten.select.int, aten.squeeze.dim)
        if node.target is aten.squeeze.dim and at > 0:  # as a move, of those that the splitter leaves in the loop
            rows = tuple(call(self.graph, aten.flatten.using_ints, [row, at - 1, at], like=node) for row in rows)
        elif not one_for_all:
            rows = self._made(node, args, dim, [alike], alike.mask).rows
        table = alike.table
        if table is not None:
            table = call(self.graph, node.target, [table, *node.args[1:]], node.kwargs, like=node)
        return replace(alike, rows=rows, dim=dim, table=table)

    def _with_table(self, node: fx.Node) -> _Alike | None:
        """Weights added to rows of two kinds stay apart: blocks have tables of their own and share the rows."""
        if node.target is not aten.add.Tensor or node.kwargs:
            return None
        own, shared = sorted(node.args, key=lambda n: n in self.found)
        alike = self.found[shared]  # type: ignore[index]
        if alike.mask is None or own not in self.weights or _rank(own) > _rank(shared):
            return None
        whole = node.meta["val"].shape
        for _ in range(_rank(shared) - _rank(own)):
            own = call(self.graph, aten.unsqueeze.default, [own, 0], like=node)
        sizes = zip(own.meta["val"].shape, shared.meta["val"].shape, whole, strict=True)  # type: ignore[union-attr]
        fits = all(equal(size, 1) or equal(size, full) for *both, full in sizes for size in both)
        return replace(alike, table=own) if fits and equal(own.meta["val"].shape[alike.dim], 1) else None  # type: ignore

    def _common_dim(self, node: fx.Node) -> int | None:
        """The dimension of tokens of what operands make together; None if one has its own numbers for each token."""
        rank = _rank(node)
        dims = {alike.dim + rank - _rank(n) for n in node.all_input_nodes if (alike := self.found.get(n))}
        dim = dims.pop()
        for operand in node.all_input_nodes:
            own = dim - (rank - _rank(operand))
            if operand not in self.found and own >= 0 and not equal(operand.meta["val"].shape[own], 1):
                return None
        return None if dims else dim

    def _read_spread(self, node: fx.Node) -> None:
        """Let an operator that has numbers of each token read rows where they broadcast, or rows that are spread."""
        for source in [n for n in node.all_input_nodes if n in self.found]:
            alike = self.found[source]
            if source not in self.spread and (made := self._spread(source, alike)) is not None:
                self.spread[source] = made
            if alike.mask is None and not (_pointwise(node) and self._broadcasts(node, source, alike)):
                continue
            if source in self.spread:
                node.replace_input_with(source, self.spread[source])

    def _broadcasts(self, node: fx.Node, source: fx.Node, alike: _Alike) -> bool:
        """Whether another operand brings the tokens."""
        behind = _rank(source) - alike.dim
        return any(
            n not in self.found and _rank(n) >= behind and _size(n.meta["val"].shape[-behind]) == alike.count
            for n in node.all_input_nodes
        )

    def _spread(self, source: fx.Node, alike: _Alike) -> fx.Node | None:
        """The rows, spread over tokens where they are of two kinds; None where they are already, where batch and tokens
        are one dimension, or where the mask is of other samples."""
        own: dict[Any, Any] = {aten.where.self: source.args[1:], aten.expand.default: source.args[:1]}
        if alike.rows == own.get(source.target) or isinstance(source.meta["val"], tuple | list):
            return None
        if not equal(alike.rows[0].meta["val"].shape[alike.dim], 1):
            return None
        made, mask = alike.rows[0], alike.mask
        if mask is not None:
            sizes = zip(mask.meta["val"].shape[:-1], made.meta["val"].shape, strict=False)
            if _rank(mask) != alike.dim + 1 or any(not equal(one, 1) and not equal(one, own) for one, own in sizes):
                return None
            for _ in range(_rank(source) - _rank(mask)):
                mask = call(self.graph, aten.unsqueeze.default, [mask, -1], like=source)
            made = call(self.graph, aten.where.self, [mask, *alike.rows], like=source)
        if alike.table is not None:
            made = call(self.graph, aten.add.Tensor, [alike.table, made], like=source)
        return made


def _begun(graph: fx.Graph, node: fx.Node) -> _Alike | None:
    """What is alike where it begins: one row that is expanded over tokens, or two that a mask chooses from."""
    value = node.meta["val"]
    if node.target is aten.expand.default:
        (source, *_), mask = node.args, None
        rows: tuple[Any, ...] = (source,)
    elif node.target is aten.where.self:
        mask, *rows_of_two = node.args
        rows = tuple(rows_of_two)
    else:
        return None
    if any(_rank(row) != value.ndim or row.meta["val"].dtype != value.dtype for row in rows):
        return None
    wider = [k for k, size in enumerate(value.shape) if any(not equal(row.meta["val"].shape[k], size) for row in rows)]
    if len(wider) != 1 or wider[0] == 0 or any(not equal(row.meta["val"].shape[wider[0]], 1) for row in rows):
        return None
    (dim,) = wider
    if isinstance(mask, fx.Node):
        behind = mask.meta["val"].shape[dim - value.ndim + 1 :] if dim + 1 < value.ndim else ()
        if _rank(mask) != value.ndim or any(not equal(size, 1) for size in behind):
            return None
        for _ in behind:
            mask = call(graph, aten.select.int, [mask, -1, 0], like=node)
    return _Alike(rows, dim, _size(value.shape[dim]), mask)  # type: ignore[arg-type]


def _reshaped(node: fx.Node, alike: _Alike) -> tuple[int | None, Any]:
    """(dimension of tokens in another shape, arguments that bring rows into it); None where tokens are torn apart."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    inner = _size(math.prod(before[alike.dim + 1 :]))
    for dim, size in enumerate(after):
        others = sympy.cancel(_size(size) / alike.count)
        if _size(math.prod(after[dim + 1 :])) != inner or not is_whole(others):
            continue
        place = _SHAPES[node.target]
        sizes = [] if place is None else list(node.args[place])  # type: ignore[arg-type]
        at = dim - (int(node.args[1]) % len(before) if node.target is aten.unflatten.int else 0)  # type: ignore
        if not 0 <= at < len(sizes):
            return dim, node.args
        if others == 1:
            sizes[at] = 1
        return (dim, (*node.args[:place], sizes)) if others == 1 or sizes[at] == -1 else (None, node.args)
    return None, node.args


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _rank(node: Any) -> int:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _size(size: Any) -> sympy.Expr:
    return sympy.expand(simplified(size.node.expr)) if isinstance(size, torch.SymInt) else sympy.Integer(size)
