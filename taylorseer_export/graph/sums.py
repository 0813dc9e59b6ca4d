"""Sums: what one Taylor buffer can hold of several sites, so that their forecasts are added up before they are made.

On its way to the hidden state a site is multiplied by a gate, or by nothing, and added. Where a forecast step does
nothing but additions behind that, only the sum of all is read, and a forecast is linear in the features:

    one gate          g T(m_1) + g T(m_2)                      =  g T(m_1 + m_2)
    none              T(m_1) + T(m_2)                          =  T(m_1 + m_2)
    one and weights   (e + w_1) T(m_1) + (e + w_2) T(m_2)  =  e T(m_1 + m_2) + T(w_1 m_1 + w_2 m_2)

The first is FLUX.2, whose blocks have one modulation, the second the cross-attentions of Wan, and the third its other
sites: each block adds a table of its own to one modulation. What weights were multiplied into needs no gate, and goes
with what has none.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from taylorseer_export.bundle.manifest import Shape
from taylorseer_export.graph.binding import Time
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.taps import tap_operator

aten = torch.ops.aten
UNGATED = "ungated"  # the site that all branches without a gate share
# Operators that pick a part of a tensor, or cast it, and where they name the dimension.
_PICKS = {
    aten.chunk.default: 2, aten.unbind.int: 1, aten.unsqueeze.default: 1, aten.squeeze.dim: 1, aten.select.int: 1,
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """How a site comes to the hidden state in a forecast step.

    Attributes:
        gate: What it is multiplied by; None without one.
        value: What is added: the product with the gate, or the site itself.
        addition: Where it is added.
        rest: What it is added to.
    """

    gate: fx.Node | None
    value: fx.Node
    addition: fx.Node
    rest: fx.Node


@dataclass(frozen=True)
class Sum:
    """What one Taylor buffer holds.

    Attributes:
        members: Each site's node, and the weights that it is multiplied by before it is added; None for none.
        gate: What the forecast is multiplied by; None without one.
        home: The first branch, in whose place the forecast is added.
    """

    members: tuple[tuple[fx.Node, fx.Node | None], ...]
    gate: fx.Node | None
    home: Branch


class Sums:
    """Which sites share a buffer.

    Args:
        graph: Of the trace. Parts of gates that it has not yet are added to it.
        cuts: Site -> the node that is forecast.
        ends: Behind the last addition to the hidden state of each stream.
        reaching: The nodes of a forecast step.
        times: Of every node.
        shape: `node -> shape` by the family's dimensions.
        gated: Whether gated sites may share one. In float16 they may not: only its gate brings such a sum into range.

    Attributes:
        branches: Site -> its branch, of those that share a buffer.
        found: Name of what they share -> the sum.
    """

    def __init__(
        self,
        graph: fx.Graph,
        cuts: Mapping[str, fx.Node],
        ends: Collection[fx.Node],
        reaching: set[fx.Node],
        times: Mapping[fx.Node, Time],
        shape: Callable[[fx.Node], Shape],
        gated: bool,
    ) -> None:
        self._graph, self._ends, self._reaching, self._times, self._shape = graph, ends, reaching, times, shape
        self._picked: dict[Any, fx.Node] = {}
        branches = {name: branch for name, node in cuts.items() if (branch := self._branch(node))}
        members: dict[Any, list[tuple[str, fx.Node | None]]] = defaultdict(list)
        for name, branch in branches.items():
            if branch.gate is None or gated:
                members[branch.gate, shape(cuts[name])].append((name, None))
        self._take_apart(members)
        self.found: dict[str, Sum] = {}
        for (gate, _), those in sorted(members.items(), key=lambda entry: entry[0][0] is None):
            if len(those) > 1:
                site = UNGATED if gate is None else _common_name(name for name, _ in those)
                site = site if site not in {*cuts, *self.found} else f"{site}.{len(self.found)}"
                home = min((branches[name] for name, _ in those), key=lambda branch: branch.addition)
                self.found[site] = Sum(tuple((cuts[name], weights) for name, weights in those), gate, home)
        inside = {node for one in self.found.values() for node, _ in one.members}
        self.branches = {name: branch for name, branch in branches.items() if cuts[name] in inside}

    @property
    def gates(self) -> tuple[fx.Node, ...]:
        """What the forecasts are multiplied by."""
        return tuple(one.gate for one in self.found.values() if one.gate is not None)

    def dropped(self) -> dict[fx.Node, fx.Node]:
        """The additions of all branches that are no home, in their order -> what they add to."""
        homes = {one.home.addition for one in self.found.values()}
        left = sorted((b for b in self.branches.values() if b.addition not in homes), key=lambda b: b.addition)
        return {branch.addition: branch.rest for branch in left}

    def _take_apart(self, members: dict[Any, list[tuple[str, fx.Node | None]]]) -> None:
        """Let sites whose gates differ in weights alone share, where that makes fewer buffers."""
        apart: dict[Any, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        for (gate, shape), those in members.items():
            if gate is not None and len(those) == 1 and (terms := self._terms(gate)):
                apart[terms[0], shape].append((gate, terms[1]))
        for shape in dict.fromkeys(shape for _, shape in apart):  # in their order, the same in every process
            groups = {shared: gates for (shared, of), gates in apart.items() if of == shape and len(gates) > 1}
            saved = sum(len(gates) - 1 for gates in groups.values())
            if saved <= ((None, shape) not in members):
                continue
            for shared, gates in groups.items():
                for gate, own in gates:
                    ((name, _),) = members.pop((gate, shape))
                    members[shared, shape].append((name, None))
                    members[None, shape].append((name, own))

    def _terms(self, gate: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """What others may share and what is of weights, of a gate that is a part of their sum; None for any other."""
        picks, whole = [], gate
        while _picks(whole):
            picks.append(whole)
            whole = whole.all_input_nodes[0]
        if whole.target is not aten.add.Tensor or whole.kwargs or len(whole.all_input_nodes) != 2:
            return None
        own, shared = sorted(whole.all_input_nodes, key=lambda node: self._times[node])
        if self._times[own] is not Time.WEIGHT or self._times[shared] is Time.WEIGHT:
            return None
        if picks:
            # Weights that broadcast over leading dimensions get those: a part is of the same dimension of both.
            for _ in range(len(self._shape(whole)) - len(self._shape(own))):
                own = self._made(aten.unsqueeze.default, own, (0,), whole)
            if any(self._shape(term)[1:] != self._shape(whole)[1:] for term in (own, shared)):
                return None
        for pick in reversed(picks):
            own, shared = (self._made(pick.target, term, pick.args[1:], pick) for term in (own, shared))
        return shared, own

    def _made(self, target: Any, source: fx.Node, options: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """What an operator makes of a tensor, one node for all who ask."""
        key = (target, source, repr(options), repr(like.kwargs))
        if key not in self._picked:
            with self._graph.inserting_after(source):
                self._picked[key] = call(self._graph, target, [source, *options], like.kwargs, like=like)
        return self._picked[key]

    def _branch(self, cut: fx.Node) -> Branch | None:
        """The branch of a site, if that is all that is read of it and nothing but additions follow."""
        gate, value, reader = None, cut, self._reader(cut)
        while reader is not None and reader.target in (aten.mul.Tensor, aten.to.dtype):
            if reader.target is aten.mul.Tensor:
                factor = _other(reader, value)
                if gate is not None or factor is None or self._shape(reader) != self._shape(value):
                    return None
                gate = factor
            value, reader = reader, self._reader(reader)
        if reader is None or reader.target is not aten.add.Tensor:
            return None
        addition, rest = reader, _other(reader, value)
        if rest is None or self._shape(rest) != self._shape(addition):
            return None
        while reader not in self._ends:
            reader = self._reader(reader)
            if reader is None or reader.target not in (aten.add.Tensor, aten.to.dtype, tap_operator()):
                return None
        return Branch(gate, value, addition, rest)

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The one node of a forecast step that reads another; None if there is none, or a second one."""
        found = [user for user in node.users if user in self._reaching]
        return found[0] if len(found) == 1 else None


def _other(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other tensor of a sum or product; None if there is no other, or more to it."""
    others = [argument for argument in node.args if argument is not value]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) and not node.kwargs else None


def _picks(node: fx.Node) -> bool:
    """Whether a node is the same part, or the same cast, of each sample of its one tensor."""
    if len(node.all_input_nodes) != 1 or node.op != "call_function":
        return False
    if node.target not in _PICKS:
        return node.target in (operator.getitem, aten.to.dtype)
    dim = (*node.args, *[0] * 3)[_PICKS[node.target]]
    return isinstance(dim, int) and dim not in (0, -node.all_input_nodes[0].meta["val"].ndim)


def _common_name(names: Iterable[str]) -> str:
    """Of `blocks.0.attn` and `blocks.1.attn`: `blocks.attn`."""
    return "_".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", "", name) for name in names))
