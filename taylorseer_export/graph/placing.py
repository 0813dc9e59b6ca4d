"""Places among all ranks' rows: what a graph makes of the places of rows, or of how many there are, on one rank.

    arange(R)             ->  arange(R) + rank R
    arange(R + T)         ->  those and the T places behind all ranks' rows, or before them, as such rows are joined
    table[a : a + R]      ->  table[a + rank R : a + rank R + R]
    x < R                 ->  x < N R: whatever is computed with a number of rows, but for an extent

Shapes: N ranks, R rows of the latent on one rank, T other rows, B batch.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.parallel import RANK
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.rowwise import Rows, computes, operator_of, written
from taylorseer_export.graph.sizes import is_size
from taylorseer_export.graph.trace import Trace, eliminate_dead

aten = torch.ops.aten
# A comparison of places with a count -> what it makes of places that come before all that are counted.
_FIRST: dict[Any, Any] = {aten.lt.Tensor: aten.new_ones.default, aten.ge.Tensor: aten.new_zeros.default}


class Placing:
    """Changes to one graph.

    Args:
        trace: Its trace.
        ranks: N.
        rows: Of the latent.
        outermost: Whether a rank's share of them follows on itself where all sizes of the latent are in one dimension.

    Attributes:
        placed: Nodes that tell rows by their place, among all ranks' rows.
    """

    def __init__(self, trace: Trace, ranks: int, rows: Rows, outermost: bool) -> None:
        self.graph, self.ranks, self.rows = trace.module.graph, ranks, rows
        self.placed: set[fx.Node] = set()
        self._outermost = outermost
        self._lines: dict[fx.Node, Any] = {}  # places of rows -> the size that the model counts up to
        self._rank: fx.Node | None = None
        latent = next(spec.name for spec in trace.inputs if spec.role == "latent")
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        (shown,) = (n for n in placeholders if n.target == latent)
        self._last, self._fakes = placeholders[-1], shown.meta["val"].fake_mode

    def place_rows(self) -> None:
        """Let what is made of the places of rows, or of their number, be made of those of all ranks."""
        for node in list(self.graph.nodes):
            if node.target in _FIRST:
                self._see_all(node)
        eliminate_dead(self.graph)
        for node in list(self.graph.nodes):
            if operator_of(node) == "arange" and node.users and node.args[:-1] in ((), (0,)):
                self._place_line(node)
            elif node.target is aten.slice.Tensor and len(node.args) == 4:
                self._place_entries(node)
            elif computes(node) and any(self._counts_any(size) for size in node.args):
                with self.graph.inserting_before(node):
                    node.args = tuple(self._of_all(arg) if self._counts_any(arg) else arg for arg in node.args)
                self.placed.add(node)

    def _see_all(self, node: fx.Node) -> None:
        """`arange(R + T) < R + count`, by which R rows are all seen, as `cat(ones(R), arange(T) < count)`.

        `>=` alike. A mask is counted, which is 0 or 1 everywhere.
        """
        line, moves = _below(node.args[0])
        total, others = _below(node.args[1])
        if operator_of(line) != "arange" or total.target is not aten.add.Tensor or line.args[:-1] not in ((), (0,)):
            return
        given: Any = (*total.args, line.args[-1])
        count, own, size = given
        if not self._counts_any(own) or not isinstance(size, fx.Node) or not self._homogeneous(own):
            return
        if operator_of(count) != "sum" or not str(count.args[0].target).endswith("_mask"):  # and so not below 0
            return
        if self.rows.dims(count) or (self.rows.dims(node) != [node.meta["val"].ndim - 1]):
            return
        with self.graph.inserting_before(node), self._fakes:
            rest = self._call(operator.sub, size, own)
            if self.rows.holds(rest.meta["val"]):
                return
            places = _moved(self, self._call(aten.arange.default, rest, device=torch.device("cpu")), moves)
            seen = self._call(node.target, places, _moved(self, count, others))
            shape = [self._extent_of(seen, dim) for dim in range(seen.meta["val"].ndim - 1)]
            first = self._call(_FIRST[node.target], seen, [*shape, own], dtype=torch.bool)
            made = self._call(aten.cat.default, [first, seen], -1)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _place_line(self, node: fx.Node) -> None:
        """`arange(R)`, or `arange(R + T)`, as places among all rows."""
        size: Any = node.args[-1]
        if not self._counts_any(size) or not (self._counts_rows(size) or self._outermost):
            return
        kind, later = node.meta["val"].dtype, node.next
        placed: fx.Node | None
        with self.graph.inserting_before(later):
            if self._homogeneous(size):
                first = self._first(size)
                first = first if kind == torch.int64 else self._call(aten.to.dtype, first, kind)
                placed = self._call(aten.add.Tensor, node, first)
                node.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not placed)
                self.placed.add(node)
            else:
                placed = self._placed_together(node, size, kind)
                if placed is None:
                    return
                node.replace_all_uses_with(placed)
                self.graph.erase_node(node)
        self._lines[placed] = size

    def _placed_together(self, node: fx.Node, size: fx.Node, kind: torch.dtype) -> fx.Node | None:
        """Places of rows of the latent and others, joined as the only joined rows of so many are."""
        order = self.rows.joined_as(size.meta["val"])
        expression = sympy.expand(written(size.meta["val"]))
        others, _ = expression.as_independent(self.rows.symbol, as_Add=True)
        own = _sized(size, sympy.expand(expression - others))
        if order not in ([True, False], [False, True]) or own is None or kind != torch.int64:
            return None
        rest = self._call(operator.sub, size, own)
        with self._fakes:
            mine = self._call(aten.arange.default, own, device=torch.device("cpu"))
            theirs = self._call(aten.arange.default, rest, device=torch.device("cpu"))
        first = self._first(own)
        if order[0]:
            theirs = self._call(aten.add.Tensor, theirs, self._times(own, self.ranks))
        else:
            first = self._call(aten.add.Tensor, first, rest)
        placed = self._call(aten.add.Tensor, mine, first)
        self.placed |= {mine, theirs, first, placed}
        return self._call(aten.cat.default, [placed, theirs] if order[0] else [theirs, placed])

    def whole(self, node: Any, made: dict[fx.Node, Any]) -> Any:
        """What is made of places and numbers of rows alone, of all ranks' rows.

        Raises:
            ExportError: It is made of rows.
        """
        if not isinstance(node, fx.Node):
            return node
        if node in made:
            return made[node]
        if is_size(node):
            found = self._of_all(node)
        elif node in self._lines:
            with self._fakes:
                size = self._of_all(self._lines[node])
                found = self._call(aten.arange.default, size, device=torch.device("cpu"))
            self.placed.add(found)
        elif not self.rows.dims(node):
            found = node
        elif node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            self.rows.refuse(node, "masks rows of the latent")
        else:
            known = computes(node)  # with numbers of all rows, by now
            args = fx.map_arg(node.args, lambda one: one if known and is_size(one) else self.whole(one, made))
            kept = {name: fx.map_arg(value, lambda one: self.whole(one, made)) for name, value in node.kwargs.items()}
            found = self._call(node.target, *args, **kept)
            self.placed.add(found)
        made[node] = found
        return found

    def _place_entries(self, node: fx.Node) -> None:
        """`table[start : start + R]` as the entries of this rank."""
        given: Any = node.args
        source, dim, start, end = given
        dim %= source.meta["val"].ndim
        if self.rows.holds(source.meta["val"].shape[dim]) or not isinstance(end, fx.Node):
            return
        with self.graph.inserting_before(node):
            count = self._call(operator.sub, end, start) if start else end
            if not self._counts_rows(count):
                return
            places = self._places(count, self._of_all(start or 0))
            made = call(self.graph, aten.index_select.default, [source, dim, places], like=node)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        self.placed.add(made)

    def _counts_any(self, size: Any) -> bool:
        """Whether it is the node of a size that is computed from the rows of one rank."""
        return isinstance(size, fx.Node) and self.rows.holds(size.meta["val"])

    def _counts_rows(self, size: Any) -> bool:
        value = size.meta["val"] if isinstance(size, fx.Node) else size
        return isinstance(value, torch.SymInt) and written(value) == self.rows.symbol

    def _homogeneous(self, size: fx.Node) -> bool:
        """Whether N times the rows make it N times as large."""
        expression, symbol = sympy.expand(written(size.meta["val"])), self.rows.symbol
        return bool(sympy.expand(expression.subs(symbol, 2 * symbol) - 2 * expression) == 0)

    def _of_all(self, size: Any) -> Any:
        """A size that is computed from the rows of one rank, computed from those of all.

        Raises:
            ExportError: It is the extent of rows of the latent and others.
        """
        if not isinstance(size, fx.Node) or not self.rows.holds(size.meta["val"]):
            return size
        if size.target is aten.sym_size.int:
            if not self._homogeneous(size):
                self.rows.refuse(size, "computes with the number of rows of the latent and others")
            return self._times(size, self.ranks)
        args = [self._of_all(arg) for arg in size.args]
        return self._call(size.target, *args)

    def _places(self, count: Any, start: Any = 0) -> fx.Node:
        """`[count]` int64: start + rank * count and those that follow."""
        first = self._first(count)
        with self._fakes:
            line = self._call(aten.arange.default, count, dtype=torch.int64, device=torch.device("cpu"))
        places = self._call(aten.add.Tensor, line, first)
        if not isinstance(start, int) or start:
            places = self._call(aten.add.Tensor, places, start)
        self.placed |= {line, places}
        return places

    def _first(self, count: Any) -> fx.Node:
        """`[1]` int64: the place of the first of this rank's rows, or heads, among those of all ranks."""
        place = self._call(aten.mul.Tensor, self._rank_input(), count)
        self.placed.add(place)
        return place

    def _rank_input(self) -> fx.Node:
        if self._rank is None:
            with self.graph.inserting_after(self._last), self._fakes:
                self._rank = self.graph.placeholder(RANK)
                self._rank.meta["val"] = torch.zeros(1, dtype=torch.int64)
        return self._rank

    def _extent_of(self, x: fx.Node, dim: int) -> Any:
        """An extent as an argument: the number, or a node of it."""
        size = x.meta["val"].shape[dim]
        return self._call(aten.sym_size.int, x, dim) if isinstance(size, torch.SymInt) else size

    def _times(self, size: Any, times: int) -> Any:
        return self._call(operator.mul, size, times) if isinstance(size, fx.Node) else size * times

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self.graph, target, args, kwargs)


def _below(node: Any) -> tuple[fx.Node, list[fx.Node]]:
    """What a tensor is before dimensions of one entry were added, and how they were."""
    moves = []
    while operator_of(node) in ("unsqueeze", "to"):
        moves.append(node)
        node = node.args[0]
    return node, moves[::-1]


def _moved(placing: Placing, node: fx.Node, moves: list[fx.Node]) -> fx.Node:
    for move in moves:
        node = placing._call(move.target, node, *move.args[1:], **move.kwargs)
    return node


def _sized(size: Any, expression: sympy.Expr) -> fx.Node | None:
    """The size of that expression, among those that a size is computed from."""
    if not isinstance(size, fx.Node):
        return None
    if sympy.expand(written(size.meta["val"]) - expression) == 0:
        return size
    if size.target is aten.sym_size.int:
        return None
    return next((found for arg in size.args if (found := _sized(arg, expression)) is not None), None)
