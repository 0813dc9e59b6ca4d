"""Sequence parallel: the traced graph of a model as each of N ranks runs it, on its share of the latent's rows.

    trace ▸ [shard] ▸ split

Rows of the latent are sliced on the host, and with them all else that has one entry for each: the size that counts them
counts those of one rank from here on, so state, tables and snapshots shrink to 1/N and nothing below knows of it.
Whatever treats each row alone runs as it is (`rowwise.py` holds that). An attention looks at all rows, and becomes

    gather      2 collectives: all ranks' keys, and all ranks' values; queries stay.
    ulysses     4: every rank gives away rows of queries, keys and values and gets all rows of its share of the heads;
                what it attended to goes back the same way.

Sums over rows, and convolutions that see rows beside their own, are in `mixing.py`. Rows that are not the latent's, as
those of a text or of another latent, are on every rank, which computes them alike: their keys are joined once. The
graphs do not say which rank runs them: where they need it they read the input `rank` `[1]`, so one bundle serves all. A
forecast step has no attention, and so nothing to send.

Shapes: N ranks, B batch, H heads, h = H / N, R rows of the latent on one rank, T other rows, D head.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from operator import attrgetter
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.parallel import GROUP, RANK, Mode
from taylorseer_export.bundle.shapes import is_multiple, names, resolve
from taylorseer_export.errors import ExportError
from taylorseer_export.families.family import Input
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.mixing import Mixing
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.rowwise import Rows, Segment, attentions
from taylorseer_export.graph.trace import Trace, eliminate_dead

aten = torch.ops.aten
Parts = list[fx.Node]


def shard(trace: Trace, mode: Mode, ranks: int, dimension: str, family: str) -> Trace:
    """The trace of what one rank runs; the graph is changed in place.

    Ensures: every rank's rows of the prediction are the untouched model's, but for the order in which an attention sums
    over its keys.

    Args:
        trace: Of the whole model.
        mode: What attentions become.
        ranks: N, at least 2.
        dimension: The size that counts the rows that are shared out; it counts those of one rank afterwards.
        family: What refusals call the model.

    Raises:
        ExportError: Something but attention mixes rows; the heads do not divide by N.
    """
    (symbol,) = (s for s, name in trace.names.items() if name == dimension)
    for spec in trace.inputs:
        if any(dimension in names(entry) and not is_multiple(entry) for entry in spec.shape):
            raise ExportError(
                f"input `{spec.name}` of family {family} is {list(spec.shape)}, expected `{dimension}` alone in a "
                "dimension, to be cut along it; leave --parallel out"
            )
    latent = next(spec for spec in trace.inputs if spec.role == "latent")
    counted = [name for entry in latent.shape for name in sorted(names(entry) & set(trace.names.values()) - {"batch"})]
    outermost, inner = counted[0] == dimension, counted[counted.index(dimension) + 1 :]
    inside = prod((s for s, name in trace.names.items() if name in inner), start=sympy.Integer(1))
    rows = Rows(trace.module.graph, symbol, dimension, family, None if outermost else symbol * inside)
    pass_ = _Pass(trace, mode, ranks, rows, outermost)
    pass_.place_rows()
    pass_.mix()
    rows.check(pass_.placed)
    for node in attentions(trace.module.graph):
        pass_.share(node)
    eliminate_dead(trace.module.graph)
    trace.module.graph.lint()
    used = any(n.op == "placeholder" and n.target == RANK for n in trace.module.graph.nodes)
    inputs = (*trace.inputs, Input(RANK, (1,), "constant", "int64", (0, ranks - 1))) if used else trace.inputs
    return replace(trace, inputs=inputs)


class _Pass(Mixing):
    """The changes to one graph."""

    def __init__(self, trace: Trace, mode: Mode, ranks: int, rows: Rows, outermost: bool) -> None:
        super().__init__(trace, ranks, rows, outermost)
        self.mode = mode
        self._wholes: dict[fx.Node, Any] = {}  # what was made of all ranks' places

    # Attention -----------------------------------------------------------------------------------------------------

    def share(self, node: fx.Node) -> None:
        """One attention over all ranks' rows, where its keys are rows of the latent."""
        given: Any = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
        query, key, value, mask, _, causal, *_ = given
        mask = node.kwargs.get("attn_mask", mask)
        length = key.meta["val"].shape[-2]
        if not self.rows.holds(length):
            return
        if node.kwargs.get("is_causal", causal):
            self.rows.refuse(node, "is causal")
        segments = self.rows.segments(key, length)
        with self.graph.inserting_before(node):
            if self.mode == "gather":
                whole = [self._gathered(x, segments) for x in (key, value)]
                made = self._attention(node, [query, *whole], self._seeing(mask, node, (-1,)))
            else:
                given = [self._heads(x, node) for x in (query, key, value)]
                found = self._attention(node, given, self._seeing(mask, node, (-1, -2)))
                made = self._returned(found, self.rows.segments(query, query.meta["val"].shape[-2]))
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _attention(self, node: fx.Node, given: Sequence[Any], mask: Any) -> fx.Node:
        kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        rest = (mask, *node.args[4:]) if len(node.args) > 4 else ()
        if mask is not None and not rest:
            kwargs["attn_mask"] = mask
        return call(self.graph, node.target, [*given, *rest], kwargs, like=node)

    def _gathered(self, x: fx.Node, segments: Sequence[Segment]) -> fx.Node:
        """`[B, H, R, D]` of this rank beside `[B, H, T, D]` of all -> the same with the `N R` rows of all ranks."""
        parts = []
        for part, segment in zip(self._cut(x, segments), segments, strict=True):
            if segment.local:
                rows = self._packed(part, [2, 0, 1, 3])
                told = [rows, self.ranks, GROUP]
                all_rows = self._waited(torch.ops._c10d_functional.all_gather_into_tensor.default, told)
                part = self._call(aten.permute.default, all_rows, [1, 2, 0, 3])
            parts.append(part)
        return self._joined(parts, 2)

    def _heads(self, x: fx.Node, node: fx.Node) -> fx.Node:
        """`[B, H, R, D]` of this rank beside `[B, H, T, D]` of all -> `[B, h, N R, D]` beside `[B, h, T, D]`."""
        heads = x.meta["val"].shape[1]
        if heads % self.ranks:
            self.rows.refuse(node, f"has {heads} heads, which {self.ranks} ranks do not share evenly,")
        own = heads // self.ranks
        segments = self.rows.segments(x, x.meta["val"].shape[2])
        parts = []
        for part, segment in zip(self._cut(x, segments), segments, strict=True):
            if segment.local:
                by_rank = self._call(aten.unflatten.int, part, 1, [self.ranks, own])
                mine = self._exchanged(self._packed(by_rank, [1, 3, 0, 2, 4]))  # [N, R, B, h, D]
                all_rows = self._call(aten.flatten.using_ints, mine, 0, 1)
                parts.append(self._call(aten.permute.default, all_rows, [1, 2, 0, 3]))
            else:
                parts.append(self._call(aten.index_select.default, part, 1, self._places(own)))
        return self._joined(parts, 2)

    def _returned(self, x: fx.Node, segments: Sequence[Segment]) -> fx.Node:
        """`[B, h, N R, D]` beside `[B, h, T, D]` -> `[B, H, R, D]` of this rank beside `[B, H, T, D]`.

        One exchange brings both: to each rank go its own rows, and the other rows that all have, of these heads.
        """
        wide = [self._extent(segment, self.ranks if segment.local else 1) for segment in segments]
        parts = []
        for part, segment in zip(self._split(x, wide), segments, strict=True):
            if segment.local:
                by_rank = self._call(aten.unflatten.int, part, 2, [self.ranks, self._extent(segment)])
                parts.append(self._call(aten.permute.default, by_rank, [2, 3, 0, 1, 4]))  # [N, R, B, h, D]
            else:
                alone = self._call(aten.unsqueeze.default, self._call(aten.permute.default, part, [2, 0, 1, 3]), 0)
                parts.append(self._call(aten.expand.default, alone, [self.ranks, -1, -1, -1, -1]))
        sent = self._call(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]
        mine = self._exchanged(self._packed(sent))
        by_heads = self._call(aten.permute.default, mine, [2, 0, 3, 1, 4])  # [B, N, h, R + T, D]
        return self._call(aten.flatten.using_ints, by_heads, 1, 2)

    def _exchanged(self, x: fx.Node) -> fx.Node:
        """`[N, ...]`: entry r goes to rank r, and entry r came from there."""
        told = [x, [1] * self.ranks, [1] * self.ranks, GROUP]
        return self._waited(torch.ops._c10d_functional.all_to_all_single.default, told)

    def _seeing(self, mask: Any, node: fx.Node, dims: Sequence[int]) -> Any:
        """A mask over this rank's rows -> over all ranks', along some dimensions: those of the latent are seen alike.

        Raises:
            ExportError: It tells rows of the latent apart.
        """
        if mask is None:
            return None
        shape = mask.meta["val"].shape
        if self._told_by_places(mask):
            return self._seeing_places(mask, shape)
        if self.mode == "ulysses" and len(shape) > 2 and shape[-3] != 1:
            self.rows.refuse(node, "masks each head by itself")
        for dim in dims:
            if not self.rows.holds(mask.meta["val"].shape[dim]):
                continue
            segments = self.rows.segments(mask, shape[dim])
            if not all(segment.constant for segment in segments if segment.local):
                self.rows.refuse(node, "masks rows of the latent")
            cut = self._cut(mask, segments, dim)
            parts = [p for part, s in zip(cut, segments, strict=True) for p in [part] * (self.ranks if s.local else 1)]
            mask = self._joined(parts, dim)
        return mask

    def _told_by_places(self, mask: fx.Node) -> bool:
        """Whether a mask is made of the places of rows."""
        seen, left = set(), [mask]
        while left:
            node = left.pop()
            if node in self._lines:
                return True
            if node not in seen and self.rows.dims(node):
                seen.add(node)
                left += node.all_input_nodes
        return False

    def _seeing_places(self, mask: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """A mask that is made of the places of rows, made of all ranks' places: so many cost less than to be sent."""
        if self.mode == "gather" and len(shape) > 1 and self.rows.holds(shape[-2]):
            self.rows.refuse(mask, "masks rows of the latent")
        found: fx.Node = self.whole(mask, self._wholes)
        return found

    # Nodes ---------------------------------------------------------------------------------------------------------

    def _cut(self, x: fx.Node, segments: Sequence[Segment], dim: int = 2) -> Parts:
        return self._split(x, [self._extent(segment) for segment in segments], dim)

    def _split(self, x: fx.Node, sizes: Sequence[Any], dim: int = 2) -> Parts:
        if len(sizes) == 1:
            return [x]
        pieces = self._call(aten.split_with_sizes.default, x, list(sizes), dim)
        return [self._call(operator.getitem, pieces, k) for k in range(len(sizes))]

    def _joined(self, parts: Parts, dim: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts, dim)

    def _extent(self, segment: Segment, times: int = 1) -> Any:
        extent = self._extent_of(segment.source, segment.dim)
        return extent if times == 1 else self._times(extent, times)


def counted(graphs: Mapping[str, fx.Graph]) -> dict[str, int]:
    """Graph -> how many collectives it makes."""
    return {
        name: sum(str(n.target).startswith("_c10d_functional.") and "wait" not in str(n.target) for n in graph.nodes)
        for name, graph in graphs.items()
    }


def sent(cut: Cut, sizes: Mapping[str, int], ranks: int) -> int:
    """Bytes that one rank sends the others in a call of a graph, counted from what its collectives are given.

        gather: (N - 1) times what it is given        exchange: (N - 1) / N of it

    Args:
        cut: The graph.
        sizes: Of one rank.
        ranks: N.
    """
    given: list[tuple[str, int]] = []

    class _Counter(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("_c10d_functional.") and "wait" not in str(target):
                given.append((str(target), args[0].numel() * args[0].element_size()))
            return super().call_function(target, args, kwargs)

    weight = next(n for n in cut.module.graph.nodes if n.op == "get_attr")
    with attrgetter(str(weight.target))(cut.module).fake_mode, torch.no_grad():
        inputs = [torch.empty(resolve(t.shape, sizes), dtype=getattr(torch, t.dtype)) for t in cut.inputs]
        _Counter(cut.module).run(*inputs)
    return sum(size * (ranks - 1) // (ranks if "all_to_all" in target else 1) for target, size in given)
