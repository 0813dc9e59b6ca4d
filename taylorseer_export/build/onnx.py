"""Graphs as ONNX: the portable form, and what ONNX Runtime and TensorRT build from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.build.engines import Progress
from taylorseer_export.build.export import Draft
from taylorseer_export.build.weights import WEIGHTS, Stored
from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import evaluate, names, resolve
from taylorseer_export.errors import BuildError
from taylorseer_export.graph.cut import Cut

OPSET = 20
# Sizes at which a graph is exported again: distinct, and never 0 or 1, which export would specialise.
_EXAMPLE = {"steps": 3, "batch": 2}
_EXAMPLE_STEP = 5


def exported_program(cut: Cut, sizes: Mapping[str, int | None]) -> torch.export.ExportedProgram:
    """The cut graph as an `ExportedProgram`.

    Args:
        cut: The graph.
        sizes: Dimension name -> its one size, or None where it stays symbolic.
    """
    example = _example_sizes(sizes)
    # Never written or read, so the Taylor buffers, gigabytes of a full-size model, cost address space and no memory.
    inputs = [torch.empty(resolve(t.shape, example), dtype=getattr(torch, t.dtype)) for t in cut.inputs]
    dynamic = tuple(_dynamic(t, sizes) for t in cut.inputs)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(cut.module, tuple(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise BuildError(
            f"graph `{cut.name}` does not re-export, expected a static graph; "
            f"torch.export says: {str(error).strip().splitlines()[0]}"
        ) from error


def write_graphs(draft: Draft, folder: Path, progress: Progress) -> dict[str, Path]:
    """Write the weights of a draft, then each of its graphs as ONNX that points into them.

    Returns:
        Graph name -> its file.

    Raises:
        BuildError: An operator has no ONNX form.
    """
    cuts = draft.split.graphs
    places = draft.write_weights(folder, progress)
    files = {cut.name: folder / f"{cut.name}.onnx" for cut in cuts}
    for k, cut in enumerate(cuts):
        progress("graphs", k, len(cuts))
        write_onnx(cut, {**draft.sizes, "steps": None}, places, files[cut.name])
    progress("graphs", len(cuts), len(cuts))
    return files


def write_onnx(cut: Cut, sizes: Mapping[str, int | None], weights: Mapping[str, Stored], path: Path) -> None:
    """Write one graph as ONNX whose initializers point into the bundle's weights file.

    Raises:
        BuildError: An operator has no ONNX form.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    program = exported_program(cut, sizes)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except Exception as error:
        raise BuildError(
            f"graph `{cut.name}` has no ONNX form, expected operators of opset {OPSET}; "
            f"torch.onnx says: {str(error).strip().splitlines()[0]}"
        ) from error
    assert exported is not None
    model = exported.model
    graph = model.graph
    # While the graph is simplified its weights have no value: nothing computed from them can be baked in.
    for name in weights.keys() & graph.initializers.keys():
        graph.initializers[name].const_value = None
    with _quiet():
        optimizer.optimize(model, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1 << 16)
    for name in weights.keys() & graph.initializers.keys():
        place = weights[name]
        graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, ir.DataType.from_numpy(_numpy_dtype(place.dtype))
            if place.dtype != torch.bfloat16 else ir.DataType.BFLOAT16,
            shape=ir.Shape(place.shape), name=name, base_dir=path.parent,
        )  # fmt: skip
    for values, contract in ((graph.inputs, cut.inputs), (graph.outputs, cut.outputs)):
        for value, tensor in zip(values, contract, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape([_size(s, sizes) for s in tensor.shape])
    # The exporter notes where in the Python source a node came from: paths of this machine, of no use to a reader.
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.name = cut.name
    model.producer_name, model.producer_version = "taylorseer-export", None
    ir.save(model, path)


def _size(entry: int | str, sizes: Mapping[str, int | None]) -> int | str:
    fixed = {name: size for name, size in sizes.items() if size is not None}
    return evaluate(entry, fixed) if names(entry) <= fixed.keys() else entry


def _example_sizes(sizes: Mapping[str, int | None]) -> dict[str, int]:
    free = [name for name in ("steps", *sizes) if sizes.get(name) is None and name not in _EXAMPLE]
    spread = {name: 2 * _EXAMPLE_STEP + _EXAMPLE_STEP * k for k, name in enumerate(free, 1)}
    return {**_EXAMPLE, **spread, **{n: s for n, s in sizes.items() if s is not None}}


def _dynamic(tensor: Tensor, sizes: Mapping[str, int | None]) -> dict[int, Any]:
    """Which dimensions stay symbolic: a plain name must, an expression over names follows."""
    dims: dict[int, Any] = {}
    for k, entry in enumerate(tensor.shape):
        if isinstance(_size(entry, sizes), str):
            dims[k] = torch.export.Dim.DYNAMIC if str(entry).isidentifier() else torch.export.Dim.AUTO
    return dims


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about itself; its errors come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript", "torch._subclasses")]
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
