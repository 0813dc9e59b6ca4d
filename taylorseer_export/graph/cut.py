"""Cuts: how a derived graph is put together from the nodes of a trace."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import linear, names
from taylorseer_export.errors import ExportError
from taylorseer_export.graph.binding import Time
from taylorseer_export.graph.sizes import is_size, simplified
from taylorseer_export.graph.trace import Trace, eliminate_dead, is_tap

aten = torch.ops.aten
SUM = torch.float32  # sums and differences of snapshots; weights rounded to bfloat16 would not add up to 1


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


@dataclass
class Builder:
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
        if node.op == "placeholder":  # one that counts as a weight: all others are here before what reads them
            return self.placeholder(_lora(node))
        return self.graph.node_copy(node, lambda n: self.copies[n])

    def size(self, value: Any) -> Any:
        """A size of the trace, expressed through this graph's own inputs."""
        expression = simplified(value.node.expr) if isinstance(value, torch.SymInt) else sympy.Integer(value)
        return self.size_of(expression)

    def size_of(self, expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression not in self.sized:
            if expression.is_Symbol:
                self.sized[expression] = self._size_of_symbol(self.trace.names[expression])
            else:
                factors = [expression.base] * int(expression.exp) if expression.is_Pow else expression.args
                values = [self.size_of(a) for a in factors]
                self.sized[expression] = self._arithmetic(expression, values)
        return self.sized[expression]

    def _size_of_symbol(self, name: str) -> fx.Node:
        for wanted in (str.isidentifier, lambda entry: names(entry) == {name}):  # a name alone, else a multiple of it
            for tensor in self.inputs:
                for k, entry in enumerate(tensor.shape):
                    if isinstance(entry, str) and name in names(entry) and wanted(entry):
                        return self._solved(self.placeholders[tensor.name], k, entry)
        raise ExportError(
            f"size `{name}` is needed by graph `{self.name}` but none of its inputs has it, expected one; "
            "declare an input with that dimension in the family"
        )

    def _solved(self, tensor: fx.Node, dim: int, entry: str) -> fx.Node:
        """The size behind an entry `factor*size + offset` of a tensor's shape."""
        _, factor, offset = linear(entry)
        extent = self.graph.call_function(aten.sym_size.int, (tensor, dim))
        if offset:
            extent = self.graph.call_function(operator.sub, (extent, offset))
        return extent if factor == 1 else self.graph.call_function(operator.floordiv, (extent, factor))

    def _arithmetic(self, expression: sympy.Expr, values: list[Any]) -> fx.Node:
        fold = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod}
        fold["Pow"] = operator.mul  # of equal factors
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
        eliminate_dead(self.graph)  # before there is a module, whose code is written from what is left
        module = fx.GraphModule(self.trace.module, self.graph)
        return Cut(self.name, module, tuple(self.inputs), tuple(t for t, _ in outputs))


class StepBuilder:
    """Copies step-time nodes into the prepare graph with S * B rows where the trace has B.

    `clocks` are the step inputs of the trace, `[B]`, and what stands for them in that graph, `[S]`.
    """

    def __init__(self, times: dict[fx.Node, Time], request: Builder, clocks: dict[fx.Node, fx.Node]) -> None:
        self.times, self.request, self.graph = times, request, request.graph
        self.steps = self.graph.call_function(aten.sym_size.int, (next(iter(clocks.values())), 0))
        symbol = next((s for s, name in request.trace.names.items() if name == "batch"), None)
        self.batch = request.trace.example_sizes["batch"] if symbol is None else request.size_of(symbol)
        self.copies: dict[fx.Node, Any] = {node: self._rows(clock) for node, clock in clocks.items()}
        self.rows = self._make(operator.mul, (self.steps, self.batch))
        self.sizes = {} if symbol is None else {symbol: self.rows}  # of a batch of one size, the timestep alone

    def _make(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(target, args)

    def _rows(self, clock: fx.Node) -> fx.Node:
        """Numbers of steps `[S]`, once for each sample: `[S * B]`."""
        column = self._make(aten.unsqueeze.default, (clock, 1))
        return self._make(
            aten.flatten.using_ints, (self._make(aten.expand.default, (column, [self.steps, self.batch])),)
        )

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


def _lora(node: fx.Node) -> Tensor:
    """Contract of the low-rank weights of a request."""
    kind: Any = str(dtype_of(node)).removeprefix("torch.")
    return Tensor(name=str(node.target), dtype=kind, shape=tuple(map(int, node.meta["val"].shape)), role="lora")


def identifier(name: str) -> str:
    """A tensor name as a Python identifier, for placeholders."""
    return name.replace(".", "__")


def weighted_sum(
    builder: Builder, weights: fx.Node, buffer: fx.Node, stored: torch.dtype, wanted: torch.dtype, like: fx.Node
) -> fx.Node:
    """sum_i weights[i] * buffer[i], as the product [1, M] @ [M, elements], in the shape of `like`.

    The product reads every snapshot once and writes once, and its sums are formed in float32 by every engine.

    Args:
        weights: `[1, M]` float32.
        buffer: `[M, ...]` of dtype `stored`.
        wanted: dtype of the sum.
    """
    make = builder.graph.call_function
    entries = cast(builder, make(aten.flatten.using_ints, (buffer, 1)), stored, SUM)
    product = cast(builder, make(aten.matmul.default, (weights, entries)), SUM, wanted)
    return make(aten.reshape.default, (product, [builder.size(s) for s in like.meta["val"].shape]))


def cast(builder: Builder, value: fx.Node, seen: torch.dtype, wanted: torch.dtype) -> fx.Node:
    """The value in another dtype, where it is of one."""
    return value if seen == wanted else builder.graph.call_function(aten.to.dtype, (value, wanted))


def dtype_of(node: fx.Node) -> torch.dtype:
    """dtype of a node of the trace: a model in half precision may keep its hidden state, or part of it, in float32."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def wider(one: fx.Node, other: fx.Node) -> torch.dtype:
    """The type in which two nodes of the trace are added: that of both, or the one that torch promotes to."""
    return torch.promote_types(dtype_of(one), dtype_of(other))


def difference(builder: Builder, one: fx.Node, other: fx.Node) -> tuple[fx.Node, torch.dtype]:
    """`one - other` of two nodes of the trace, and its dtype."""
    wide = wider(one, other)
    values = tuple(cast(builder, builder.copy(node), dtype_of(node), wide) for node in (one, other))
    return builder.graph.call_function(aten.sub.Tensor, values), wide
