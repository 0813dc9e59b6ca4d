"""How one traced graph is cut: what each part reads of the others, by which name and shape, and the graphs made of it.

A graph is the nodes of its binding time behind its outputs; what they read of earlier times is what `prepare` has to
return, as request values or packed into the rows of tables. Nothing here knows a model: the cut points are taps, the
binding times a dependency analysis, and whatever no output needs is never copied.

    noise_pred ◂─ head ◂─ + ◂───────── + ◂── embedder ◂─ latent
                          │ gate       │ gate
                         cut          cut
                          ▴            ▴
                         MLP ◂─ … ─ attention ◂─ text

    cut       what a forecast step takes from the Taylor buffers
    late      what a step computes behind its targets: a full step all of it, a forecast step what stops at the cuts
    early     the frontier of late: request and step values that it reads, which `prepare` returns
    table     the early step values of one use, packed into one row

Shapes: B batch, S steps, M = order + 1 entries of a Taylor buffer, W width of a table row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.manifest import Role, Shape, Tensor
from taylorseer_export.bundle.shapes import is_linear, linear
from taylorseer_export.graph.binding import Time, binding_times
from taylorseer_export.graph.cut import SUM, Builder, Cut, StepBuilder, cast, difference, dtype_of, weighted_sum, wider
from taylorseer_export.graph.narrow import readers
from taylorseer_export.graph.sizes import is_size, shape_entry_from_expression, simplified
from taylorseer_export.graph.sums import Sum, Sums
from taylorseer_export.graph.taps import STACK_INPUT, STACK_OUTPUT
from taylorseer_export.graph.trace import Trace, module_paths
from taylorseer_export.method import Granularity, Layout

aten = torch.ops.aten
STEPS = "steps"

# Operators that only move, repeat or cast data: cheaper to redo per step than to keep what they return.
_MOVES = (
    aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.to.dtype,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.flatten.using_ints, aten.unflatten.int,
    aten.permute.default, aten.transpose.int,
)  # fmt: skip


class Splitter:
    """What is cut where, and the graphs `prepare`, `full` and `forecast`.

    Args:
        trace, granularity, layout, order, state_dtype: As of `split`; the trace is narrowed.

    Attributes:
        sites: Name -> shape of one snapshot.
        cuts: Site -> the nodes whose sum is forecast.
        sums: The sites that are sums.
        full_targets: What the full graph is computed for: the predictions and what the Taylor buffers keep.
    """

    def __init__(
        self, trace: Trace, granularity: Granularity, layout: Layout, order: int, state_dtype: torch.dtype
    ) -> None:
        self.trace, self.layout, self.order, self.state_dtype = trace, layout, order, state_dtype
        self.taps = trace.taps()
        self.times = binding_times(trace)
        self.predictions, self.noise_pred = trace.predictions, trace.noise_pred
        self.specs = {spec.name: spec for spec in trace.inputs}
        coarse = {f"{granularity}{stream}": stream for stream in trace.streams}
        ends = {site: self.taps[STACK_OUTPUT + stream] for site, stream in coarse.items()}
        tapped = {name: self.taps[name] for name in trace.sites} if granularity == "module" else ends
        # What a site is counted from.
        begins = {site: self.taps[STACK_INPUT + stream] for site, stream in coarse.items()}
        self.bases = begins if granularity == "residual" else {}
        # Site -> the nodes whose sum is forecast: a tap, or the one slice of it that reaches the output.
        cuts = self._cut_points({tap: name for name, tap in tapped.items()})
        reaching = self.late(list(self.predictions.values()), stop=cuts.values())
        gated = state_dtype != torch.float16
        self.sums = Sums(trace.module.graph, cuts, [*ends.values()], reaching, self.times, self._shape, gated)
        self.times = binding_times(trace)  # of the parts of gates too
        self.cuts: dict[str, tuple[fx.Node, ...]] = {}
        self.cuts |= {name: (node,) for name, node in cuts.items() if name not in self.sums.branches}
        for name, one in self.sums.found.items():
            self.cuts[name] = tuple(node for node, _ in one.members)
        self.sites = {site: self._shape(nodes[0]) for site, nodes in self.cuts.items()}

        # What a forecast step computes its prediction from, and where it stops.
        values = [branch.value for branch in self.sums.branches.values()]
        self.stops = {*(node for nodes in self.cuts.values() for node in nodes), *values}

        # What the full graph returns, and what it is computed from.
        cut = [node for nodes in self.cuts.values() for node in nodes]
        self.full_targets = [*self.predictions.values(), *cut, *self.bases.values()]

    # What is cut ---------------------------------------------------------------------------------------------------

    def _cut_points(self, taps: dict[fx.Node, str]) -> dict[str, fx.Node]:
        """Each tap that the output reads; a tap read only through one slice is cut behind that slice."""
        reached = readers(self.trace, taps)
        return {
            name: next(iter(reached[tap])) if len(reached[tap]) == 1 else tap
            for tap, name in taps.items()
            if tap in reached
        }

    def late(self, targets: list[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
        """The latent-dependent nodes behind `targets`, not going past `stop`."""
        late: set[fx.Node] = set()
        stack, stop = list(targets), set(stop)
        while stack:
            node = stack.pop()
            if node in late or node in stop or (self.times[node] < Time.LATENT and not self._stays(node)):
                continue
            late.add(node)
            stack += [n for n in node.all_input_nodes if not is_size(n)]
        return late

    def _stays(self, node: fx.Node) -> bool:
        """Whether an early value is made in the loop all the same: a move or an outer product, no smaller than what it
        is made of."""
        if self.times[node] == Time.WEIGHT or node.op != "call_function":
            return False
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if node.target not in _MOVES and (node.target is not aten.mul.Tensor or len(sources) < 2):
            return False
        return self._bytes(node) >= sum(self._bytes(n) for n in sources)

    def _bytes(self, node: fx.Node) -> int:
        value = node.meta["val"]
        sizes = [self._example(s) for s in value.shape]
        return math.prod(sizes) * int(value.dtype.itemsize)

    def _example(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        return int(size.node.expr.xreplace({s: self.trace.example_sizes[n] for s, n in self.trace.names.items()}))

    def frontier(self, late: set[fx.Node], also: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """The request and step values that late nodes read, and those of `also`."""
        read = {*also, *(n for node in late for n in node.all_input_nodes)}
        return {n for n in read - late if Time.WEIGHT < self.times[n] < Time.LATENT}

    # Contracts -----------------------------------------------------------------------------------------------------

    def _shape(self, node: fx.Node) -> tuple[int | str, ...]:
        return tuple(self._dimension(s) for s in node.meta["val"].shape)

    def _dimension(self, size: Any) -> int | str:
        if not isinstance(size, torch.SymInt):
            return int(size)
        names = {s: sympy.Symbol(n) for s, n in self.trace.names.items()}
        expression = simplified(size.node.expr).xreplace(names)
        return int(expression) if expression.is_Integer else shape_entry_from_expression(expression)

    def tensor(self, name: str, node: fx.Node, role: Role) -> Tensor:
        return Tensor(name=name, dtype=_dtype_name(node), shape=self._shape(node), role=role)

    def declared(self, node: fx.Node) -> Tensor:
        """Contract of a placeholder of the trace."""
        spec = self.specs[str(node.target)]
        facts = {
            "values": spec.values,
            "fill": spec.fill,
            "first": spec.first,
            "corner": spec.corner,
            "spacing": spec.spacing,
            "within": spec.within,
        }
        # As declared: to the trace a product of sizes is one size, and a size that it was made at no size at all.
        shape = [
            size if isinstance(of, int) else linear(of)[0] if is_linear(of) and linear(of)[1:] == (1, 0) else of
            for of, size in zip(spec.shape, self._shape(node), strict=True)
        ]
        return self.tensor(spec.name, node, spec.role).model_copy(update={**facts, "shape": tuple(shape)})

    # Tables --------------------------------------------------------------------------------------------------------

    def tables(self, early: set[fx.Node], forecast: set[fx.Node], probe: set[fx.Node]) -> dict[str, list[fx.Node]]:
        """Pack the step values: `step.shared` is read by both kinds of step, `step.full` by full steps alone.

        Of these last the probe reads `step.probe`.
        """
        order = {node: k for k, node in enumerate(self.trace.module.graph.nodes)}
        tables: dict[str, list[fx.Node]] = defaultdict(list)
        for node in sorted(early, key=order.__getitem__):
            if self.times[node] is not Time.STEP:
                continue
            name = "step.shared" if node in forecast else "step.probe" if node in probe else "step.full"
            dtype = _dtype_name(node)
            tables[name if dtype == _dtype_name(self.noise_pred) else f"{name}.{dtype}"].append(node)
        return dict(tables)

    def bind_early(self, builder: Builder, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> None:
        """Make every early value of `early` available in `builder`: as an input, or as columns of a table row."""
        for node in self.trace.module.graph.nodes:
            if node in early and node.op == "placeholder" and self.times[node] is not Time.STEP:
                builder.copies[node] = builder.placeholder(self.declared(node))
            elif node in early and self.times[node] is Time.REQUEST:
                builder.copies[node] = builder.placeholder(self.tensor(self._request_name(node), node, "constant"))
        for name, members in tables.items():
            if not early.intersection(members):
                continue
            width = sum(self._width(n) for n in members)
            tensor = Tensor(name=name, dtype=_dtype_name(members[0]), shape=("batch", width), role="step")
            row, begin = builder.placeholder(tensor), 0
            for node in members:
                end = begin + self._width(node)
                tail = [int(s) for s in node.meta["val"].shape[1:]]
                if not tail:  # the timestep itself
                    builder.copies[node], begin = builder.graph.call_function(aten.select.int, (row, 1, begin)), end
                    continue
                columns = builder.graph.call_function(aten.slice.Tensor, (row, 1, begin, end))
                if len(tail) > 1:
                    columns = builder.graph.call_function(aten.unflatten.int, (columns, 1, tail))
                builder.copies[node], begin = columns, end

    def _width(self, node: fx.Node) -> int:
        return math.prod(int(s) for s in node.meta["val"].shape[1:])

    def _request_name(self, node: fx.Node) -> str:
        """A name from the module that computes the value, so that a reader of the contract can place it."""
        path = next(reversed(module_paths(node)), "")
        return f"request.{path}.{node.name}" if path else f"request.{node.name}"

    # Graphs --------------------------------------------------------------------------------------------------------

    def latent_inputs(self, builder: Builder) -> None:
        for node in self.trace.module.graph.nodes:
            if node.op == "placeholder" and self.times[node] is Time.LATENT:
                builder.copies[node] = builder.placeholder(self.declared(node))

    def full(self, builder: Builder, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        """The graph of a full step, from what is already in `builder`."""
        self.latent_inputs(builder)
        self.bind_early(builder, early, tables)
        sums = self._sums(builder)
        outputs, scales = self._predicted(builder), None
        for site, nodes in self.cuts.items():
            value, made_in = (sums[site], SUM) if site in sums else (builder.copy(nodes[0]), dtype_of(nodes[0]))
            if site in self.bases:
                value, made_in = difference(builder, nodes[0], self.bases[site])
            shape = self.sites[site]
            if self.layout == "derivatives":
                if scales is None and self.order > 0:
                    scales = builder.placeholder(
                        Tensor(name="scales", dtype="float32", shape=(self.order,), role="weights")
                    )
                old = builder.placeholder(self._buffer(site, "taylor_in", self._kept(site))) if self.order > 0 else None
                value, made_in = cast(builder, value, made_in, SUM), SUM
                value, shape = self._differences(builder, value, old, scales), self._kept(site)
            value = cast(builder, value, made_in, self.state_dtype)
            outputs.append((self._buffer(site, "taylor_out", shape), value))
        return builder.finish(outputs)

    def _sums(self, builder: Builder) -> dict[str, fx.Node]:
        """Site -> the sum that its buffer holds, to which each member is added as soon as it is there: none is kept."""
        make = builder.graph.call_function
        sums: dict[str, fx.Node] = {}
        parts = [(node, weights, site) for site, one in self.sums.found.items() for node, weights in one.members]
        for node, weights, site in sorted(parts, key=lambda part: part[0]):
            value = cast(builder, builder.copy(node), dtype_of(node), SUM)
            if weights is not None:
                value = make(aten.mul.Tensor, (value, cast(builder, builder.copy(weights), dtype_of(weights), SUM)))
            sums[site] = make(aten.add.Tensor, (sums[site], value)) if site in sums else value
        return sums

    def _differences(self, builder: Builder, new: fx.Node, old: fx.Node | None, scales: fx.Node | None) -> fx.Node:
        """Stack of D'_0 = new and D'_(j+1) = scales[j] (D'_j - D_j), each of the shape of one snapshot, in float32."""
        make = builder.graph.call_function
        differences = [new]
        for j in range(self.order):
            before = cast(builder, make(aten.select.int, (old, 0, j)), self.state_dtype, SUM)
            change = make(aten.sub.Tensor, (differences[-1], before))
            differences.append(make(aten.mul.Tensor, (change, make(aten.select.int, (scales, 0, j)))))
        return make(aten.stack.default, (differences,))

    def forecast(self, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        builder = Builder(self.trace, "forecast")
        self.latent_inputs(builder)
        self.bind_early(builder, early, tables)
        weights = builder.placeholder(Tensor(name="weights", dtype="float32", shape=(self.order + 1,), role="weights"))
        row = builder.graph.call_function(aten.unsqueeze.default, (weights, 0))
        for site, nodes in self.cuts.items():
            buffer = builder.placeholder(self._buffer(site, "taylor_in", self._kept(site)))
            wanted = dtype_of(nodes[0])
            if site in self.sums.found:
                self._add_forecast(builder, self.sums.found[site], row, buffer)
                continue
            if site not in self.bases:
                value = weighted_sum(builder, row, buffer, self.state_dtype, wanted, nodes[0])
            else:
                begin = self.bases[site]
                wide = wider(nodes[0], begin)
                change = weighted_sum(builder, row, buffer, self.state_dtype, wide, nodes[0])
                base = cast(builder, builder.copy(begin), dtype_of(begin), wide)
                value = cast(builder, builder.graph.call_function(aten.add.Tensor, (base, change)), wide, wanted)
            builder.copies[nodes[0]] = value
        for addition, rest in self.sums.dropped().items():
            builder.copies[addition] = builder.copy(rest)
        return builder.finish(self._predicted(builder))

    def _predicted(self, builder: Builder) -> list[tuple[Tensor, fx.Node]]:
        """The prediction of each latent, as an output."""
        return [(self.tensor(name, node, "noise_pred"), builder.copy(node)) for name, node in self.predictions.items()]

    def _add_forecast(self, builder: Builder, one: Sum, row: fx.Node, buffer: fx.Node) -> None:
        """Put the forecast of a sum, times its gate, in the place of what its home adds, or add it to that."""
        wanted, make = dtype_of(one.home.value), builder.graph.call_function
        value = weighted_sum(builder, row, buffer, self.state_dtype, wanted, one.home.value)
        if one.gate is not None:
            value = make(aten.mul.Tensor, (value, cast(builder, builder.copy(one.gate), dtype_of(one.gate), wanted)))
        before = builder.copies.get(one.home.value)
        builder.copies[one.home.value] = value if before is None else make(aten.add.Tensor, (before, value))

    def _kept(self, site: str) -> Shape:
        """All that is kept of a site, the oldest or lowest order first."""
        return (self.order + 1, *self.sites[site])

    def _buffer(self, site: str, role: Role, shape: Shape) -> Tensor:
        return Tensor(name=f"{role}.{site}", dtype=_name(self.state_dtype), shape=shape, role=role, site=site)

    def prepare(self, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        """One graph for the request: constants once, step values for all timesteps in one batch of S * B rows."""
        request = Builder(self.trace, "prepare")
        for node in self.trace.module.graph.nodes:
            if node.op == "placeholder" and self.times[node] is Time.REQUEST:
                request.copies[node] = request.placeholder(self.declared(node))
        clocks = {
            node: request.placeholder(self.declared(node).model_copy(update={"shape": (STEPS,)}))
            for node in self.trace.module.graph.nodes
            if node.op == "placeholder" and self.times[node] is Time.STEP
        }
        outputs = []
        for node in self.trace.module.graph.nodes:
            if node in early and node.op != "placeholder" and self.times[node] is Time.REQUEST:
                outputs.append((self.tensor(self._request_name(node), node, "constant"), request.copy(node)))
        step = StepBuilder(self.times, request, clocks) if tables else None
        for name, members in tables.items():
            assert step is not None
            columns = [
                request.graph.call_function(aten.reshape.default, (step.copy(n), [-1, self._width(n)]))
                if n in clocks
                else request.graph.call_function(aten.flatten.using_ints, (step.copy(n), 1))
                for n in members
            ]
            table = request.graph.call_function(aten.cat.default, (columns, 1))
            table = request.graph.call_function(aten.unflatten.int, (table, 0, [step.steps, step.batch]))
            width = sum(self._width(n) for n in members)
            tensor = Tensor(name=name, dtype=_dtype_name(members[0]), shape=(STEPS, "batch", width), role="step")
            outputs.append((tensor, table))
        return request.finish(outputs)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _dtype_name(node: fx.Node) -> Any:
    return _name(dtype_of(node))
