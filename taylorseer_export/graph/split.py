"""The split: one traced graph becomes `prepare`, `full` and `forecast`.

    prepare    request constants, all timesteps          -> request values, tables of step values [steps, batch, W]
    full       latent, request values, table rows        -> noise_pred, what the Taylor buffers keep
    forecast   latent, table rows, Taylor buffers, weights -> noise_pred

`full` and `forecast` are the latent-dependent nodes behind `noise_pred`, without and with the cut; what they read of
earlier binding times is `prepare`'s output. Nothing here knows a model: the cut points are taps, the binding times a
dependency analysis, and whatever no output needs is never copied.

Shapes: B batch, S steps, M = order + 1 entries of a Taylor buffer, W width of a table row.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.manifest import Role, Tensor
from taylorseer_export.errors import ExportError
from taylorseer_export.graph.binding import Time, binding_times, is_size
from taylorseer_export.graph.narrow import call, narrow
from taylorseer_export.graph.taps import STACK_INPUT, STACK_OUTPUT
from taylorseer_export.graph.trace import Trace, eliminate_dead, is_tap

aten = torch.ops.aten
Granularity = Literal["module", "residual", "last"]
Layout = Literal["snapshots", "derivatives"]
STEPS = "steps"

# Operators that only move, repeat or cast data: cheaper to redo per step than to keep what they return.
_MOVES = (
    aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.to.dtype,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.flatten.using_ints, aten.unflatten.int,
    aten.permute.default, aten.transpose.int,
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """One derived graph with its contract. `module` takes its inputs in the contract's order."""

    name: str
    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def parameters(self) -> tuple[str, ...]:
        """Checkpoint names of the weights this graph reads, in order of first use."""
        return tuple(dict.fromkeys(str(n.target) for n in self.module.graph.nodes if n.op == "get_attr"))

    def operators(self) -> Counter[str]:
        """How often each operator occurs, for cards and for the invariants."""
        return Counter(
            n.target.__name__.split(".")[0]
            for n in self.module.graph.nodes
            if isinstance(n.target, torch._ops.OpOverload)
        )


@dataclass(frozen=True)
class Split:
    """The derived graphs of one model and the sites whose history they keep: name -> shape of one snapshot."""

    prepare: Cut
    full: Cut
    forecast: Cut
    sites: dict[str, tuple[int | str, ...]]

    @property
    def graphs(self) -> tuple[Cut, Cut, Cut]:
        return (self.prepare, self.full, self.forecast)


def split(trace: Trace, granularity: Granularity, layout: Layout, order: int) -> Split:
    """Derive the graphs of `trace`.

    Args:
        trace: The tapped graph; it is narrowed in place and otherwise left alone.
        granularity: What is forecast. `module`: every site. `residual`: what the block stack adds to its input.
            `last`: the hidden state that leaves the stack.
        layout: `snapshots`: the full graph returns what it computed, and a ring keeps the last `order + 1`.
            `derivatives`: it reads the old differences and returns the new ones.
        order: Highest difference kept, dimensionless.

    Raises:
        ExportError: A size inside the graph cannot be computed from the inputs of a derived graph.
    """
    narrow(trace)
    return _Splitter(trace, granularity, layout, order).run()


@dataclass
class _Builder:
    """A graph under construction: copies nodes of the trace on demand, and adds placeholders for the rest."""

    trace: Trace
    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    copies: dict[fx.Node, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    placeholders: dict[str, fx.Node] = field(default_factory=dict)
    sized: dict[sympy.Expr, fx.Node] = field(default_factory=dict)

    def placeholder(self, tensor: Tensor) -> fx.Node:
        """The input called `tensor.name`; placeholders stand before all calls."""
        if tensor.name not in self.placeholders:
            last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), self.graph._root)
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(identifier(tensor.name))
            self.placeholders[tensor.name] = node
            self.inputs.append(tensor)
        return self.placeholders[tensor.name]

    def copy(self, node: fx.Node) -> Any:
        """The node's value in this graph, copying whatever it needs first."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self.copies:
                stack.pop()
                continue
            missing = [] if is_size(current) else [n for n in current.all_input_nodes if n not in self.copies]
            if missing:
                stack += missing
                continue
            self.copies[current] = self._copied(stack.pop())
        return self.copies[node]

    def _copied(self, node: fx.Node) -> Any:
        if is_size(node):
            return self.size(node.meta["val"])
        if is_tap(node):
            return self.copies[node.args[0]]  # type: ignore[index]
        if node.op == "get_attr":
            return self.graph.get_attr(str(node.target))
        return self.graph.node_copy(node, lambda n: self.copies[n])

    def size(self, value: Any) -> Any:
        """A size of the trace, expressed through this graph's own inputs."""
        expression = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
        return self._size_of(expression)

    def _size_of(self, expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression not in self.sized:
            if expression.is_Symbol:
                self.sized[expression] = self._size_of_symbol(self.trace.names[expression])
            else:
                values = [self._size_of(a) for a in expression.args]
                self.sized[expression] = self._arithmetic(expression, values)
        return self.sized[expression]

    def _size_of_symbol(self, name: str) -> fx.Node:
        for tensor in self.inputs:
            if name in tensor.shape:
                return self.graph.call_function(
                    aten.sym_size.int, (self.placeholders[tensor.name], tensor.shape.index(name))
                )
        raise ExportError(
            f"size `{name}` is needed by graph `{self.name}` but none of its inputs has it, expected one; "
            "declare an input with that dimension in the family"
        )

    def _arithmetic(self, expression: sympy.Expr, values: list[Any]) -> fx.Node:
        import operator
        from functools import reduce

        fold = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod}
        function = fold.get(type(expression).__name__)
        if function is None:
            raise ExportError(
                f"size `{expression}` is computed by {type(expression).__name__}, expected + * // or %; "
                "make that size an input dimension of the family"
            )
        return reduce(lambda a, b: self.graph.call_function(function, (a, b)), values)

    def finish(self, outputs: Iterable[tuple[Tensor, fx.Node]]) -> Cut:
        outputs = tuple(outputs)
        self.graph.output(tuple(node for _, node in outputs))
        module = fx.GraphModule(self.trace.module, self.graph)
        eliminate_dead(module.graph)
        module.recompile()
        return Cut(self.name, module, tuple(self.inputs), tuple(t for t, _ in outputs))


class _Splitter:
    def __init__(self, trace: Trace, granularity: Granularity, layout: Layout, order: int) -> None:
        self.trace, self.layout, self.order = trace, layout, order
        self.taps = trace.taps()
        self.times = binding_times(trace)
        self.noise_pred = trace.noise_pred
        self.specs = {spec.name: spec for spec in trace.inputs}
        names = trace.sites if granularity == "module" else (STACK_OUTPUT,)
        # Site -> node whose value is forecast: the tap itself or the one slice of it that reaches the output.
        self.cuts = self._cut_points({self.taps[name]: name for name in names})
        self.base = self.taps[STACK_INPUT] if granularity == "residual" else None
        self.label = granularity
        self.sites = {
            (name if granularity == "module" else granularity): self._shape(node) for name, node in self.cuts.items()
        }

    def run(self) -> Split:
        late_full = self._late([self.noise_pred, *self.cuts.values(), *([self.base] if self.base else [])], stop=())
        late_forecast = self._late([self.noise_pred, *([self.base] if self.base else [])], stop=self.cuts.values())
        early_full, early_forecast = self._frontier(late_full), self._frontier(late_forecast)
        tables = self._tables(early_full, early_forecast)
        full = self._full(early_full, tables)
        forecast = self._forecast(early_forecast, tables)
        return Split(self._prepare(early_full | early_forecast, tables), full, forecast, self.sites)

    # What is cut ---------------------------------------------------------------------------------------------------

    def _cut_points(self, taps: dict[fx.Node, str]) -> dict[str, fx.Node]:
        """Walk back from the output to each tap; a tap seen only through one slice is cut behind that slice."""
        reached: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        seen, stack = set(), [self.noise_pred]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in taps:
                reached[node].add(node)
            elif node.target is aten.slice.Tensor and node.args[0] in taps:
                reached[node.args[0]].add(node)  # type: ignore[index]
            else:
                stack += node.all_input_nodes
        return {
            name: next(iter(reached[tap])) if len(reached[tap]) == 1 else tap
            for tap, name in taps.items()
            if tap in reached
        }

    def _late(self, targets: list[fx.Node], stop: Iterable[fx.Node]) -> set[fx.Node]:
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
        """Whether an early value is made in the loop all the same: a mere move, no smaller than what it moves."""
        if self.times[node] == Time.WEIGHT or node.op != "call_function":
            return False
        if node.target not in _MOVES:
            return False
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        return self._bytes(node) >= sum(self._bytes(n) for n in sources)

    def _bytes(self, node: fx.Node) -> int:
        value = node.meta["val"]
        sizes = [self._example(s) for s in value.shape]
        return math.prod(sizes) * int(value.dtype.itemsize)

    def _example(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        return int(size.node.expr.xreplace({s: self.trace.example_sizes[n] for s, n in self.trace.names.items()}))

    def _frontier(self, late: set[fx.Node]) -> set[fx.Node]:
        """The request and step values that late nodes read."""
        return {
            n
            for node in late
            for n in node.all_input_nodes
            if n not in late and Time.WEIGHT < self.times[n] < Time.LATENT
        }

    # Contracts -----------------------------------------------------------------------------------------------------

    def _shape(self, node: fx.Node) -> tuple[int | str, ...]:
        return tuple(self._dimension(s) for s in node.meta["val"].shape)

    def _dimension(self, size: Any) -> int | str:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr.xreplace({s: sympy.Symbol(n) for s, n in self.trace.names.items()})
        return int(expression) if expression.is_Integer else str(expression)

    def _tensor(self, name: str, node: fx.Node, role: Role) -> Tensor:
        return Tensor(name=name, dtype=_dtype_name(node), shape=self._shape(node), role=role)

    def _declared(self, node: fx.Node) -> Tensor:
        """Contract of a placeholder of the trace."""
        return self._tensor(str(node.target), node, self.specs[str(node.target)].role)

    # Tables --------------------------------------------------------------------------------------------------------

    def _tables(self, full: set[fx.Node], forecast: set[fx.Node]) -> dict[str, list[fx.Node]]:
        """Pack the step values: `step.shared` is read by both kinds of step, `step.full` by full steps alone."""
        order = {node: k for k, node in enumerate(self.trace.module.graph.nodes)}
        tables: dict[str, list[fx.Node]] = defaultdict(list)
        for node in sorted(full | forecast, key=order.__getitem__):
            if self.times[node] is not Time.STEP or node.op == "placeholder":
                continue
            name = "step.shared" if node in forecast else "step.full"
            dtype = _dtype_name(node)
            tables[name if dtype == _dtype_name(self.noise_pred) else f"{name}.{dtype}"].append(node)
        return dict(tables)

    def _bind_early(self, builder: _Builder, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> None:
        """Make every early value of `early` available in `builder`: as an input, or as columns of a table row."""
        for node in self.trace.module.graph.nodes:
            if node in early and node.op == "placeholder":
                builder.copies[node] = builder.placeholder(self._declared(node))
            elif node in early and self.times[node] is Time.REQUEST:
                builder.copies[node] = builder.placeholder(self._tensor(self._request_name(node), node, "constant"))
        for name, members in tables.items():
            if not early.intersection(members):
                continue
            width = sum(self._width(n) for n in members)
            tensor = Tensor(name=name, dtype=_dtype_name(members[0]), shape=("batch", width), role="step")
            row, begin = builder.placeholder(tensor), 0
            for node in members:
                end = begin + self._width(node)
                columns = builder.graph.call_function(aten.slice.Tensor, (row, 1, begin, end))
                tail = [int(s) for s in node.meta["val"].shape[1:]]
                if len(tail) > 1:
                    columns = builder.graph.call_function(aten.unflatten.int, (columns, 1, tail))
                builder.copies[node], begin = columns, end

    def _width(self, node: fx.Node) -> int:
        return math.prod(int(s) for s in node.meta["val"].shape[1:])

    def _request_name(self, node: fx.Node) -> str:
        """A name from the module that computes the value, so that a reader of the contract can place it."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]).removeprefix("L['self'].").strip(".") if stack else ""
        return f"request.{path}.{node.name}" if path else f"request.{node.name}"

    # Graphs --------------------------------------------------------------------------------------------------------

    def _latent_inputs(self, builder: _Builder) -> None:
        for node in self.trace.module.graph.nodes:
            if node.op == "placeholder" and self.times[node] is Time.LATENT:
                builder.copies[node] = builder.placeholder(self._declared(node))

    def _full(self, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        builder = _Builder(self.trace, "full")
        self._latent_inputs(builder)
        self._bind_early(builder, early, tables)
        outputs = [(self._tensor("noise_pred", self.noise_pred, "noise_pred"), builder.copy(self.noise_pred))]
        scales = None
        for site, cut in zip(self.sites, self.cuts.values(), strict=True):
            value = builder.copy(cut)
            if self.base is not None:
                value = builder.graph.call_function(aten.sub.Tensor, (value, builder.copy(self.base)))
            shape = self.sites[site]
            if self.layout == "derivatives":
                if scales is None and self.order > 0:
                    scales = builder.placeholder(
                        Tensor(name="scales", dtype="float32", shape=(self.order,), role="weights")
                    )
                old = builder.placeholder(self._buffer(site, "taylor_in", cut)) if self.order > 0 else None
                value, shape = self._differences(builder, value, old, scales, cut), (self.order + 1, *shape)
            tensor = Tensor(name=f"taylor_out.{site}", dtype=_dtype_name(cut), shape=shape, role="taylor_out")
            outputs.append((tensor, value))
        return builder.finish(outputs)

    def _differences(
        self, builder: _Builder, new: fx.Node, old: fx.Node | None, scales: fx.Node | None, cut: fx.Node
    ) -> fx.Node:
        """Stack of D'_0 = new and D'_(j+1) = scales[j] (D'_j - D_j), each of the shape of one snapshot."""
        make = builder.graph.call_function
        differences = [new]
        for j in range(self.order):
            scale = make(aten.to.dtype, (make(aten.select.int, (scales, 0, j)), cut.meta["val"].dtype))
            change = make(aten.sub.Tensor, (differences[-1], make(aten.select.int, (old, 0, j))))
            differences.append(make(aten.mul.Tensor, (change, scale)))
        return make(aten.stack.default, (differences,))

    def _forecast(self, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        builder = _Builder(self.trace, "forecast")
        self._latent_inputs(builder)
        self._bind_early(builder, early, tables)
        weights = builder.placeholder(Tensor(name="weights", dtype="float32", shape=(self.order + 1,), role="weights"))
        weights = builder.graph.call_function(aten.unsqueeze.default, (weights, 0))
        if (dtype := self.noise_pred.meta["val"].dtype) != torch.float32:
            weights = builder.graph.call_function(aten.to.dtype, (weights, dtype))
        for site, cut in zip(self.sites, self.cuts.values(), strict=True):
            buffer = builder.placeholder(self._buffer(site, "taylor_in", cut))
            value = self._weighted_sum(builder, weights, buffer, cut)
            if self.base is not None:
                value = builder.graph.call_function(aten.add.Tensor, (builder.copy(self.base), value))
            builder.copies[cut] = value
        output = builder.copy(self.noise_pred)
        return builder.finish([(self._tensor("noise_pred", self.noise_pred, "noise_pred"), output)])

    def _weighted_sum(self, builder: _Builder, weights: fx.Node, buffer: fx.Node, cut: fx.Node) -> fx.Node:
        """The forecast of one site: sum_i weights[i] * buffer[i], as the product [1, M] @ [M, elements].

        The product reads every snapshot once and writes once, and its sums are formed in float32 by every engine.
        """
        make = builder.graph.call_function
        product = make(aten.matmul.default, (weights, make(aten.flatten.using_ints, (buffer, 1))))
        return make(aten.reshape.default, (product, [builder.size(s) for s in cut.meta["val"].shape]))

    def _buffer(self, site: str, role: Role, cut: fx.Node) -> Tensor:
        shape = (self.order + 1, *self._shape(cut))
        return Tensor(name=f"{role}.{site}", dtype=_dtype_name(cut), shape=shape, role=role)

    def _prepare(self, early: set[fx.Node], tables: dict[str, list[fx.Node]]) -> Cut:
        """One graph for the request: constants once, step values for all timesteps in one batch of S * B rows."""
        request = _Builder(self.trace, "prepare")
        for node in self.trace.module.graph.nodes:
            if node.op == "placeholder" and self.times[node] is Time.REQUEST:
                request.copies[node] = request.placeholder(self._declared(node))
        (step_node,) = (
            n for n in self.trace.module.graph.nodes if n.op == "placeholder" and self.times[n] is Time.STEP
        )
        timesteps = request.placeholder(
            Tensor(name=str(step_node.target), dtype=_dtype_name(step_node), shape=(STEPS,), role="step")
        )
        outputs = []
        for node in self.trace.module.graph.nodes:
            if node in early and node.op != "placeholder" and self.times[node] is Time.REQUEST:
                outputs.append((self._tensor(self._request_name(node), node, "constant"), request.copy(node)))
        step = _StepBuilder(self.times, request, timesteps, step_node)
        for name, members in tables.items():
            columns = [request.graph.call_function(aten.flatten.using_ints, (step.copy(n), 1)) for n in members]
            table = request.graph.call_function(aten.cat.default, (columns, 1))
            table = request.graph.call_function(aten.unflatten.int, (table, 0, [step.steps, step.batch]))
            width = sum(self._width(n) for n in members)
            tensor = Tensor(name=name, dtype=_dtype_name(members[0]), shape=(STEPS, "batch", width), role="step")
            outputs.append((tensor, table))
        return request.finish(outputs)


class _StepBuilder:
    """Copies step-time nodes into the prepare graph with S * B rows where the trace has B."""

    def __init__(self, times: dict[fx.Node, Time], request: _Builder, timesteps: fx.Node, step_node: fx.Node) -> None:
        self.times, self.request, self.graph = times, request, request.graph
        self.steps = self.graph.call_function(aten.sym_size.int, (timesteps, 0))
        symbol = next(s for s, name in request.trace.names.items() if name == "batch")
        self.batch = request._size_of(symbol)
        rows = self._make(
            aten.expand.default, (self._make(aten.unsqueeze.default, (timesteps, 1)), [self.steps, self.batch])
        )
        self.copies: dict[fx.Node, Any] = {step_node: self._make(aten.flatten.using_ints, (rows,))}
        import operator

        self.rows = self._make(operator.mul, (self.steps, self.batch))
        self.sizes = {symbol: self.rows}

    def _make(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(target, args)

    def copy(self, node: fx.Node) -> Any:
        if node not in self.copies:
            self.copies[node] = self._copied(node)
        return self.copies[node]

    def _copied(self, node: fx.Node) -> Any:
        if is_size(node):
            value = node.meta["val"]
            expression = value.node.expr if isinstance(value, torch.SymInt) else None
            return self.sizes.get(expression) or self.request.size(value)
        if self.times[node] is Time.WEIGHT:
            return self.request.copy(node)
        if self.times[node] is Time.REQUEST:
            return self._repeated(self.request.copy(node), node)
        for source in node.all_input_nodes:
            self.copy(source)
        return self.graph.node_copy(node, lambda n: self.copies[n])

    def _repeated(self, value: fx.Node, node: fx.Node) -> fx.Node:
        """A request value [B, ...] once per step: [S * B, ...]; a value without a batch serves all steps as it is."""
        shape = node.meta["val"].shape
        if not shape or not isinstance(shape[0], torch.SymInt):
            return value
        sizes = [self.steps, *[self.request.size(s) for s in shape]]
        wide = self._make(aten.expand.default, (self._make(aten.unsqueeze.default, (value, 0)), sizes))
        return self._make(aten.flatten.using_ints, (wide, 0, 1))


def identifier(name: str) -> str:
    """A tensor name as a Python identifier, for placeholders."""
    return name.replace(".", "__")


def _dtype_name(node: fx.Node) -> Any:
    return str(node.meta["val"].dtype).removeprefix("torch.")
