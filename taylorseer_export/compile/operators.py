"""Graphs in operators that the ONNX exporter has a form of.

By itself it traces a graph twice more to take the other operators apart, which is half of an export. Here they are
taken apart while the graph is traced anyway, and an exported program that has none of them left is not traced again.
Collectives become calls at the same time, see `collectives.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taylorseer_export.compile.collectives import call_of
from taylorseer_export.graph.cut import Cut

aten = torch.ops.aten

# Operators that are another by another name.
_NAMES = {
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}


def taken_apart(cut: Cut) -> Cut:
    """A graph with calls in the place of operators that are made of others, which `torch.export` looks into."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(cut.module.graph, {}))
    for node in graph.nodes:
        node.target = _apart(node.target)
    return replace(cut, module=fx.GraphModule(cut.module, graph))


def traced_once(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, which takes its operators apart only if there is one to be taken apart."""
    trace_again = program.run_decompositions

    def run_decompositions(table: Mapping[Any, Any] | None = None, **how: Any) -> torch.export.ExportedProgram:
        left = any(_is_composed(node.target) or node.target in (table or {}) for node in program.graph.nodes)
        return trace_again(table, **how) if left or table is None else program

    program.run_decompositions = run_decompositions
    return program


def _apart(target: Any) -> Any:
    """What to call in the place of an operator."""
    if call := _FORMULAS.get(target) or call_of(target):
        return call
    if target is not aten.meshgrid.indexing and (not _is_composed(target) or target._schema.is_mutable):
        return _NAMES.get(target, target)

    def apart(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # by which `torch.export` keeps the operator whole
            return target.decompose(*args, **kwargs)

    return apart


def _is_composed(target: Any) -> bool:
    """Whether an operator writes into what it reads, or shares memory with it and is made of others."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    shares = any(argument.alias_info is not None for argument in schema.arguments)
    composed = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return schema.is_mutable or (shares and composed)


def _outer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x_i y_j."""
    return x.unsqueeze(1) * y


def _rms_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions, in float32."""
    wide = _cast(x, torch.float32)
    last = list(range(-len(shape), 0))
    mean = torch.mean(torch.pow(wide, 2), dim=last, keepdim=True)
    wide = wide * torch.rsqrt(mean + (torch.finfo(torch.float32).eps if eps is None else eps))
    if weight is not None:
        wide = wide * _cast(weight, torch.float32)
    return _cast(wide, x.dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made: torch.Tensor = x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)
    return made


def _resized(x: torch.Tensor, size: list[int] | None, factors: list[float] | None) -> torch.Tensor:
    """Pixels as often as the factors say, by the nearest; the operator itself where they are no whole numbers."""
    if factors is None or any(factor != int(factor) for factor in factors):
        made: torch.Tensor = aten._upsample_nearest_exact2d.vec(x, size, factors)
        return made
    for dim, factor in zip((2, 3), factors, strict=True):
        places = (torch.arange(x.shape[dim] * int(factor), dtype=torch.float32, device=x.device) + 0.5) / factor
        x = x.index_select(dim, _cast(places, torch.int64))
    return x


_FORMULAS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.outer.default: _outer,
    aten.rms_norm.default: _rms_norm,
    aten._upsample_nearest_exact2d.vec: _resized,
}
