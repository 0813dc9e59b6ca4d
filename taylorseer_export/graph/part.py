"""Graphs of the parts of a pipeline besides the transformer: traced whole, with nothing tapped and nothing cut."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx, nn

from taylorseer_export.bundle.manifest import Role, Tensor
from taylorseer_export.bundle.shapes import linear, names, resolve
from taylorseer_export.errors import ExportError, first_line
from taylorseer_export.graph.casts import explicit_casts
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.guards import settled
from taylorseer_export.graph.rewrite import inlined, mutates, plain, unseeing_rows
from taylorseer_export.graph.sizes import example_sizes, shape_entry_from_expression, simplified
from taylorseer_export.graph.trace import dimension, drop_noise, eliminate_dead, fold_constants
from taylorseer_export.graph.writes import out_of_place

aten = torch.ops.aten

# Sizes at which a part is traced, where its ranges hold them: distinct.
_EXAMPLE_SIZES = (10, 14, 22)

Function = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class _Called(nn.Module):
    """Modules under their names in the pipeline, and one function of them as their `forward`."""

    def __init__(self, modules: Mapping[str, nn.Module], function: Function, inputs: Sequence[str]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

        def forward(**given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(function(given).values())

        # What torch.export binds by.
        named = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in inputs]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward


def trace_part(
    name: str,
    modules: Mapping[str, nn.Module],
    function: Function,
    inputs: Sequence[Tensor],
    ranges: Mapping[str, tuple[int, int]],
    role: Callable[[str], Role],
) -> tuple[Cut, dict[str, torch.Tensor]]:
    """Trace a function of some modules.

    Args:
        name: Of the graph.
        modules: Name in the pipeline -> module in eval mode; its tensors are named `module.tensor` in the graph.
        function: Inputs by name -> outputs by name.
        inputs: The contract of its inputs.
        ranges: Dimension -> (smallest, largest) size; the graph keeps those that differ.
        role: Of an output, by its name.

    Returns:
        The graph with its contract, and what the modules compute from nothing, under new names.

    Raises:
        ExportError: `torch.export` refuses them, or two pictures would be needed to know a size.
    """
    open_sizes = {name: span for name, span in ranges.items() if span[0] < span[1]}
    sizes = example_sizes(ranges, dict(zip(ranges, _EXAMPLE_SIZES, strict=False)))
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in open_sizes.items()}
    example = {t.name: torch.zeros(resolve(t.shape, sizes), dtype=getattr(torch, t.dtype)) for t in inputs}
    dynamic = {
        t.name: {k: dimension(str(s), dims) for k, s in enumerate(t.shape) if names(s) & dims.keys()} for t in inputs
    }
    made: list[str] = []

    def called(given: Mapping[str, Any]) -> Mapping[str, Any]:
        outputs = function(given)
        made[:] = outputs  # export would undo what is noted on the module
        return outputs

    model = _Called(modules, called, list(example)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytree deprecations inside torch.export, not ours to mend
        try:
            program = settled(partial(torch.export.export, model, (), example, dynamic_shapes=dynamic, strict=False))
            module = program.module()
            assert isinstance(module, fx.GraphModule)
            inlined(module)
            drop_noise(module.graph)
            out_of_place(module.graph)
            if any(map(mutates, module.graph.nodes)):  # torch writes any anew, which takes as long as the trace
                module = program.run_decompositions({}).module()
                drop_noise(module.graph)
        except Exception as error:
            raise ExportError(
                f"part `{name}` ({', '.join(modules)}) is not traceable, expected a static graph; torch.export says: "
                f"{first_line(error)}"
            ) from error
    assert isinstance(module, fx.GraphModule)
    _in_any_layout(module.graph)
    plain(module.graph)
    unseeing_rows(module.graph)
    eliminate_dead(module.graph)
    explicit_casts(module.graph)
    weights = {key for key, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    constants = fold_constants(module, weights, f"{name}_constant")
    symbols = _symbols(module, inputs)
    (results,) = module.graph.output_node().args
    outputs = tuple(
        Tensor(name=key, dtype=_dtype(node), shape=_shape(node, symbols), role=role(key))
        for key, node in zip(made, results, strict=True)  # type: ignore[arg-type]
    )
    return Cut(name, module, tuple(inputs), outputs), constants


def _in_any_layout(graph: fx.Graph) -> None:
    """Views of what is transposed as reshapes: they held for the layout that attention's kernel gave at the sizes of
    the trace, and at others torch may take another kernel."""
    transposed = (aten.transpose.int, aten.permute.default)
    for node in graph.nodes:
        if node.target is aten.view.default and any(source.target in transposed for source in node.all_input_nodes[:1]):
            node.target = aten.reshape.default


def _symbols(module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbol of the trace -> the dimension that it is."""
    placeholders = {node.target: node for node in module.graph.nodes if node.op == "placeholder"}
    return {
        symbol: sympy.Symbol(linear(entry)[0], integer=True, positive=True)
        for tensor in inputs
        for size, entry in zip(placeholders[tensor.name].meta["val"].shape, tensor.shape, strict=True)
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }


def _shape(node: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[int | str, ...]:
    sizes = [
        size.node.expr.subs(symbols) if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape
    ]
    return tuple(int(s) if isinstance(s, int | sympy.Integer) else _entry(s) for s in sizes)


def _entry(size: sympy.Expr) -> int | str:
    made = simplified(size)
    return int(made) if made.is_Integer else shape_entry_from_expression(made)


def _dtype(node: Any) -> Any:
    return str(node.meta["val"].dtype).removeprefix("torch.")
