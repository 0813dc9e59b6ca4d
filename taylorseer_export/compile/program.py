"""Cut graphs as `ExportedProgram`s: what every builder starts from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import compute, evaluate, is_linear, linear, names, resolve
from taylorseer_export.errors import BuildError, first_line
from taylorseer_export.graph.casts import float_types
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.sizes import example_sizes

# Sizes at which a graph is exported again, where the ranges hold them: distinct.
_EXAMPLE = {"steps": 3, "batch": 2}
_EXAMPLE_STEP = 5


def exported_program(
    cut: Cut,
    sizes: Mapping[str, int | None],
    ranges: Mapping[str, tuple[int, int]],
    module: fx.GraphModule | None = None,
    device: str = "cpu",
) -> torch.export.ExportedProgram:
    """The cut graph as an `ExportedProgram`.

    Args:
        cut: The graph.
        sizes: Dimension name -> its one size, or None where it stays symbolic.
        ranges: Dimension name -> (smallest, largest) size; the graph is exported at sizes within.
        module: What to export in its place: a form of it that takes its outputs as further inputs.
        device: Where the inputs are.

    Raises:
        BuildError: It does not export, or an operator mixes float types.
    """
    tensors = cut.inputs if module is None else (*cut.inputs, *cut.outputs)
    dynamic = tuple(_dynamic(t, sizes) for t in tensors)
    inputs = example_inputs(tensors, sizes, ranges, device)
    try:
        with torch.no_grad(), quiet_libraries():
            source = _related_sizes(module or cut.module, tensors, sizes)
            program = torch.export.export(source, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise BuildError(
            f"graph `{cut.name}` does not re-export, expected a static graph; torch.export says: {first_line(error)}"
        ) from error
    mixed = mixed_types(program)
    if mixed:
        raise BuildError(
            f"operator {mixed[0]} of graph `{cut.name}` mixes float types, expected one for each operator; report "
            "it, and export with --precision fp32 until it is mended"
        )
    return program


def _related_sizes(
    module: fx.GraphModule, contract: tuple[Tensor, ...], sizes: Mapping[str, int | None]
) -> fx.GraphModule:
    """The module with every extent of its inputs compared with the sizes it is computed from before anything else.

    Every input brings symbols of its own. Found equal only on the way, they leave shapes behind that mix both: no
    engine can read them, and torch reasons about them for most of an export.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    places = [
        (entry, node, k)
        for node, tensor in zip(inputs, contract, strict=True)
        for k, entry in enumerate(tensor.shape)
        if isinstance(size_of(entry, sizes), str)
    ]
    places.sort(key=lambda place: (not str(place[0]).isidentifier(), not is_linear(place[0])))  # names alone come first
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    seen: dict[int | str, Any] = {}
    with graph.inserting_before(inputs[-1].next):
        for entry, *place in places:
            extent: Any = fx.Proxy(graph.call_function(torch.ops.aten.sym_size.int, tuple(place)), tracer)
            if entry in seen or names(entry) <= known.keys():
                expected = seen[entry] if entry in seen else compute(entry, known)
                graph.call_function(torch._check, ((extent == expected).node,))
            elif is_linear(entry):
                name, factor, offset = linear(entry)
                known[name] = extent if (factor, offset) == (1, 0) else (extent - offset) // factor
            seen.setdefault(entry, extent)
    return fx.GraphModule(module, graph)


def example_inputs(
    tensors: tuple[Tensor, ...],
    sizes: Mapping[str, int | None],
    ranges: Mapping[str, tuple[int, int]],
    device: str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """Tensors of the contract at the sizes a graph is exported with.

    Never written or read, so the Taylor buffers, gigabytes of a full-size model, cost address space and no memory on
    the CPU.
    """
    example = _example_sizes(sizes, ranges)
    return tuple(torch.empty(resolve(t.shape, example), dtype=getattr(torch, t.dtype), device=device) for t in tensors)


def mixed_types(program: torch.export.ExportedProgram) -> list[str]:
    """Operators that read tensors of two float types: torch casts one in silence, strongly typed engines refuse."""
    mixed = {node: float_types(node) for node in program.graph.nodes}
    return [
        f"`{node.target}` at `{node.name}` ({' and '.join(sorted(str(t).removeprefix('torch.') for t in types))})"
        for node, types in mixed.items()
        if len(types) > 1
    ]


def size_of(entry: int | str, sizes: Mapping[str, int | None]) -> int | str:
    """An entry of a shape as a number where the fixed sizes tell it, else as it is."""
    fixed = {name: size for name, size in sizes.items() if size is not None}
    return evaluate(entry, fixed) if names(entry) <= fixed.keys() else entry


def _example_sizes(sizes: Mapping[str, int | None], ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    free = [name for name in ("steps", *sizes) if sizes.get(name) is None and name not in _EXAMPLE]
    spread = {name: 2 * _EXAMPLE_STEP + _EXAMPLE_STEP * k for k, name in enumerate(free, 1)}
    fixed = {name: size for name, size in sizes.items() if size is not None}
    wanted = {**_EXAMPLE, **spread, **fixed}
    allowed = {name: ranges.get(name, (1, size)) for name, size in wanted.items()}
    return {**example_sizes(allowed, wanted), **fixed}


def _dynamic(tensor: Tensor, sizes: Mapping[str, int | None]) -> dict[int, Any]:
    """Which dimensions stay symbolic: a plain name must, an expression over names follows."""
    dims: dict[int, Any] = {}
    for k, entry in enumerate(tensor.shape):
        if isinstance(size_of(entry, sizes), str):
            dims[k] = torch.export.Dim.DYNAMIC if str(entry).isidentifier() else torch.export.Dim.AUTO
    return dims


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what torch and the exporters note about themselves; their errors come as exceptions."""
    noisy = ("torch.onnx", "torch._subclasses", "torch._inductor", "torch.export", "onnx_ir", "onnxscript")
    loggers = [logging.getLogger(name) for name in noisy]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
