"""What looks at other rows than its own and is no attention: sums over rows, and neighbours.

    a product over rows      the shares of all ranks, added up: linear attention, whose `k^T v` is one matrix a head
    a convolution            the rows at both ends of a rank's share, each to the rank next to it

Each is one collective of little: a matrix, or two rows of a picture. What comes of a sum has the same bits on every
rank, since all add the shares in one order.

Shapes: N ranks, B batch, R rows of the latent on one rank, p rows that a convolution sees beyond each end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.parallel import GROUP
from taylorseer_export.graph.placing import Placing
from taylorseer_export.graph.rewrite import TO_THE_END
from taylorseer_export.graph.rowwise import argument, operator_of, written

aten = torch.ops.aten


class Mixing(Placing):
    """Changes to one graph; arguments are those of `Placing`."""

    def mix(self) -> None:
        """Let what adds up rows add up those of all ranks, and what sees its neighbours see those of other ranks."""
        for node in list(self.graph.nodes):
            name = operator_of(node)
            if name == "matmul" and self._adds_rows(node):
                self._add_up(node)
            elif name == "conv2d" and (dim := self._sees_beyond(node)) is not None:
                self._bring_neighbours(node, dim)

    # Sums ------------------------------------------------------------------------------------------------------------

    def _adds_rows(self, node: fx.Node) -> bool:
        """Whether a product adds up rows of the latent, and those alone."""
        left, right = (x for x in node.args if isinstance(x, fx.Node))
        inner = left.meta["val"].ndim - 1, max(right.meta["val"].ndim - 2, 0)
        sides = list(zip((left, right), inner, strict=True))
        if not all(dim in self.rows.dims(x) for x, dim in sides) or self.rows.dims(node):
            return False
        length = left.meta["val"].shape[-1]
        return all(segment.local for x, _ in sides for segment in self.rows.segments(x, length))

    def _add_up(self, node: fx.Node) -> None:
        with self.graph.inserting_before(node.next):
            packed = self._packed(node)
            total = self._call(aten.sum.dim_IntList, self._of_every_rank(packed), [0])
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not packed)
        self.placed.add(node)

    # Neighbours ------------------------------------------------------------------------------------------------------

    def _sees_beyond(self, node: fx.Node) -> int | None:
        """The dimension of rows along which a convolution sees as many beyond its own place on either side; None where
        it is no such convolution."""
        source: Any = node.args[0]
        dims = [dim for dim in self.rows.dims(source) if dim >= 2]
        if len(dims) != 1 or self._beyond(node, dims[0]) == 0:
            return None
        extent, reach = source.meta["val"].shape[dims[0]], self._beyond(node, dims[0])
        along = sympy.cancel(written(extent) / self.rows.symbol).is_number
        kernel = node.args[1].meta["val"].shape[dims[0]]  # type: ignore[union-attr]
        plain = all(self._spread(node, name, 1)[dims[0] - 2] == 1 for name in ("stride", "dilation"))
        return dims[0] if along and plain and kernel == 2 * reach + 1 else None

    def _beyond(self, node: fx.Node, dim: int) -> int:
        return self._spread(node, "padding", 0)[dim - 2]

    def _spread(self, node: fx.Node, name: str, default: int) -> list[int]:
        """An argument of a convolution for rows and for columns; words are for no reach here."""
        given: Any = argument(node, name, default)
        if isinstance(given, str):
            return [0, 0]
        both = [given] if isinstance(given, int) else list(given)
        return both * 2 if len(both) == 1 else both

    def _bring_neighbours(self, node: fx.Node, dim: int) -> None:
        """The convolution over `[p rows of the rank before, R, p of the rank behind]`; zeros at the ends of all."""
        source: Any = node.args[0]
        reach = self._beyond(node, dim)
        with self.graph.inserting_before(node):
            ends = [self._call(aten.slice.Tensor, source, dim, *span) for span in ((0, reach), (-reach, TO_THE_END))]
            self.placed.update(ends)
            every = self._of_every_rank(self._packed(self._call(aten.cat.default, ends, dim)))
            none = self._call(aten.zeros_like.default, self._call(aten.slice.Tensor, every, 0, 0, 1))
            around = self._call(aten.cat.default, [none, every, none], 0)  # entry r is of the rank before rank r
            rank = self._rank_input()
            behind = self._call(aten.add.Tensor, rank, 2)
            found = []
            for place, span in ((rank, (reach, TO_THE_END)), (behind, (0, reach))):
                one = self._call(aten.squeeze.dim, self._call(aten.index_select.default, around, 0, place), 0)
                found.append(self._call(aten.slice.Tensor, one, dim, *span))
            whole = self._call(aten.cat.default, [found[0], source, found[1]], dim)
            padding = self._spread(node, "padding", 0)
            padding[dim - 2] = 0
            bias, groups = argument(node, "bias", None), argument(node, "groups", 1)
            told = [bias, self._spread(node, "stride", 1), padding, self._spread(node, "dilation", 1), groups]
            made = self._call(aten.conv2d.default, whole, node.args[1], *told)
        self.placed.update({whole, made})
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    # Collectives -----------------------------------------------------------------------------------------------------

    def _of_every_rank(self, x: fx.Node) -> fx.Node:
        """`[N, B, ...]` of all ranks' `[B, ...]`, packed."""
        told = [x, self.ranks, GROUP]
        every = self._waited(torch.ops._c10d_functional.all_gather_into_tensor.default, told)
        return self._call(aten.unflatten.int, every, 0, [self.ranks, self._extent_of(x, 0)])

    def _waited(self, collective: Any, args: Sequence[Any]) -> fx.Node:
        return self._call(torch.ops._c10d_functional.wait_tensor.default, self._call(collective, *args))

    def _packed(self, x: fx.Node, order: Sequence[int] | None = None) -> fx.Node:
        """In this order of dimensions, and so in memory, as collectives need it."""
        moved = x if order is None else self._call(aten.permute.default, x, list(order))
        return self._call(aten.clone.default, moved, memory_format=torch.contiguous_format)
