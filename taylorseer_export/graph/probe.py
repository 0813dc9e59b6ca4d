"""The probe: the first block as a graph of its own, and the rest of the full graph behind it.

    probe   latent, request values, table rows, kept snapshots, weights -> error, new snapshots, carried values
    rest    carried values, request values, table rows                  -> what the full graph returns

`probe` computes, for every rule that was asked for, a quantity q and how far it is from what was expected of it; `rest`
goes on from where the probe stopped, so a full step that a guard asks for costs a full step and no more.

    q       cg: output of the first block; fbcache: that less the block's input; teacache: input of the first attention
    error   per sample (mean |expected - q|, mean |q|) for cg, (mean |expected - q|, mean |expected|) for the others

Means of the samples of a batch are of equally many elements, so the error of the whole batch is a quotient of sums.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import reduce

import torch
from torch import fx

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import names
from taylorseer_export.graph.binding import Time
from taylorseer_export.graph.cut import SUM, Builder, Cut, cast, difference, dtype_of, weighted_sum
from taylorseer_export.graph.splitter import Splitter
from taylorseer_export.graph.taps import FIRST_INPUT, FIRST_OUTPUT, STACK_INPUT
from taylorseer_export.graph.trace import is_tap
from taylorseer_export.method.guard import Rule

aten = torch.ops.aten


class Prober:
    """Cuts the full graph of a splitter behind its first block.

    Args:
        splitter: What the graphs are cut from.
        rules: Whose quantities the probe computes.

    Attributes:
        inside: The latent-dependent nodes of the probe.
        carried: Those of them that the rest reads.
    """

    def __init__(self, splitter: Splitter, rules: Collection[Rule]) -> None:
        self.splitter, self.rules = splitter, tuple(rules)
        self._marks = {
            "cg": [splitter.taps[FIRST_OUTPUT]],
            "fbcache": [splitter.taps[FIRST_OUTPUT], splitter.taps[STACK_INPUT]],
            "teacache": [splitter.taps[FIRST_INPUT]],
        }
        full = splitter.late(splitter.full_targets, stop=())
        self.inside = splitter.late([node for rule in self.rules for node in self._marks[rule]], stop=())
        for node in splitter.trace.module.graph.nodes:  # a value of several tensors is not carried, its parts are
            if node.target is operator.getitem and node.args[0] in self.inside and node in full:
                self.inside.add(node)
        beyond = full - self.inside
        read = {source for node in beyond for source in node.all_input_nodes} | set(splitter.full_targets)
        self.carried = [
            node
            for node in splitter.trace.module.graph.nodes
            if node in {_source(n) for n in read & self.inside} and splitter.times[node] is Time.LATENT
        ]
        self.early_probe = splitter.frontier(self.inside)
        self.early_rest = splitter.frontier(splitter.late(splitter.full_targets, stop=self.carried))

    def probe(self, tables: dict[str, list[fx.Node]]) -> Cut:
        """The graph that every step of a guarded request begins with."""
        splitter, builder = self.splitter, Builder(self.splitter.trace, "probe")
        splitter.latent_inputs(builder)
        splitter.bind_early(builder, self.early_probe, tables)
        outputs = []
        for rule in self.rules:
            new = self._quantity(builder, rule)
            outputs.append((self._error_tensor(rule), self._error(builder, rule, new)))
            outputs.append((self._snapshot(rule), new))
        returned = {t.name for t, _ in outputs}
        for node in self.carried:
            tensor = self._carried(node)
            if tensor.name not in returned:
                outputs.append((tensor, builder.copy(node)))
        return builder.finish(outputs)

    def rest(self, tables: dict[str, list[fx.Node]]) -> Cut:
        """The full graph, going on from what the probe computed."""
        builder = Builder(self.splitter.trace, "rest")
        self.splitter.latent_inputs(builder)
        for node in self.carried:
            builder.copies[node] = builder.placeholder(self._carried(node))
        self._bring_sizes(builder)
        return self.splitter.full(builder, self.early_rest, tables)

    def _bring_sizes(self, builder: Builder) -> None:
        """Sizes of which only sums and products are carried: the request inputs that have them come along."""
        entries = [entry for tensor in builder.inputs for entry in tensor.shape]
        solved = {name for entry in entries for name in names(entry) if len(names(entry)) == 1}
        for name in sorted({name for entry in entries for name in names(entry)} - solved):
            for node in self.splitter.trace.module.graph.nodes:
                if node.op == "placeholder" and self.splitter.times[node] is Time.REQUEST:
                    tensor = self.splitter.declared(node)
                    if name in tensor.shape:
                        builder.copies[node] = builder.placeholder(tensor)
                        break

    # One quantity ----------------------------------------------------------------------------------------------------

    def _quantity(self, builder: Builder, rule: Rule) -> fx.Node:
        marks = self._marks[rule]
        return builder.copy(marks[0]) if len(marks) == 1 else difference(builder, *marks)[0]

    def _error(self, builder: Builder, rule: Rule, new: fx.Node) -> fx.Node:
        """`[batch, 2]` float32, the two means of every sample."""
        make = builder.graph.call_function
        entries = self._entries(rule)
        weights = builder.placeholder(
            Tensor(name=f"probe_weights.{rule}", dtype="float32", shape=(entries,), role="weights", rule=rule)
        )
        snapshot = self._snapshot(rule)
        kept = builder.placeholder(
            Tensor(
                name=f"probe_in.{rule}",
                dtype=snapshot.dtype,
                shape=(entries, *snapshot.shape),
                role="probe_in",
                rule=rule,
            )
        )
        row = make(aten.unsqueeze.default, (weights, 0))
        dtype = self._dtype(rule)
        expected = weighted_sum(builder, row, kept, dtype, SUM, self._marks[rule][0])
        seen = cast(builder, new, dtype, SUM)
        difference = make(aten.abs.default, (make(aten.sub.Tensor, (expected, seen)),))
        against = make(aten.abs.default, (seen if rule == "cg" else expected,))
        means = [make(aten.mean.dim, (make(aten.flatten.using_ints, (v, 1)), [1])) for v in (difference, against)]
        return make(aten.stack.default, (means, 1))

    def _entries(self, rule: Rule) -> int:
        return self.splitter.order + 1 if rule == "cg" else 1

    # Contracts -------------------------------------------------------------------------------------------------------

    def _snapshot(self, rule: Rule) -> Tensor:
        tensor = self.splitter.tensor(f"probe_out.{rule}", self._marks[rule][0], "probe_out")
        return tensor.model_copy(update={"dtype": str(self._dtype(rule)).removeprefix("torch."), "rule": rule})

    def _dtype(self, rule: Rule) -> torch.dtype:
        """dtype of the quantity of a rule."""
        return reduce(torch.promote_types, map(dtype_of, self._marks[rule]))

    def _error_tensor(self, rule: Rule) -> Tensor:
        return Tensor(name=f"error.{rule}", dtype="float32", shape=("batch", 2), role="error", rule=rule)

    def _carried(self, node: fx.Node) -> Tensor:
        """What the rest reads; the snapshot of a rule is not returned a second time."""
        for rule in self.rules:
            if len(self._marks[rule]) == 1 and _source(self._marks[rule][0]) is node:
                return self._snapshot(rule)
        return self.splitter.tensor(f"carried.{node.name}", node, "carried")


def _source(node: fx.Node) -> fx.Node:
    """What a tap, or a tap on a tap, stands on."""
    while is_tap(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
