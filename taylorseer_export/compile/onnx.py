"""Graphs as ONNX: the portable form, and what ONNX Runtime and TensorRT build from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.compile.draft import BaseDraft
from taylorseer_export.compile.engines import Progress
from taylorseer_export.compile.program import exported_program, quiet_libraries, size_of
from taylorseer_export.compile.weights import WEIGHTS, Stored
from taylorseer_export.errors import BuildError, first_line
from taylorseer_export.graph.cut import Cut

OPSET = 20
_SMALL = 1e-8  # what the simplifier takes for 0
_INSIDE = 1 << 13  # bytes


def write_graphs(draft: BaseDraft, folder: Path, progress: Progress) -> dict[str, Path]:
    """Write the weights of a draft, then each of its graphs as ONNX that points into them.

    Returns:
        Graph name -> its file.

    Raises:
        BuildError: An operator has no ONNX form.
    """
    cuts = draft.graphs
    places = draft.write_weights(folder, progress)
    files = {cut.name: folder / f"{cut.name}.onnx" for cut in cuts}
    for k, cut in enumerate(cuts):
        progress("graphs", k, len(cuts))
        write_onnx(draft, cut, places, files[cut.name])
    progress("graphs", len(cuts), len(cuts))
    return files


def write_onnx(draft: BaseDraft, cut: Cut, weights: Mapping[str, Stored], path: Path) -> None:
    """Write one graph as ONNX whose initializers point into the bundle's weights file.

    Raises:
        BuildError: An operator has no ONNX form.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    sizes = draft.graph_sizes
    program = exported_program(cut, sizes, draft.ranges())
    try:
        with torch.no_grad(), quiet_libraries():
            exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except Exception as error:
        raise BuildError(
            f"graph `{cut.name}` has no ONNX form, expected operators of opset {OPSET}; "
            f"torch.onnx says: {first_line(error)}"
        ) from error
    assert exported is not None
    model = exported.model
    graph = model.graph
    # Small whole numbers stay in the graph, where ONNX Runtime looks for shapes.
    outside = {
        name
        for name in weights.keys() & graph.initializers.keys()
        if name not in draft.buffers or weights[name].dtype.is_floating_point or weights[name].length > _INSIDE
    }
    # While the graph is simplified its weights have no value: nothing computed from them can be baked in.
    for name in outside:
        graph.initializers[name].const_value = None
    _keep_small_terms(graph)
    with quiet_libraries():
        optimizer.optimize(model, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1 << 16)
        _without_sequences(graph)
        graph.sort()  # simplifiers before onnxscript 0.7 leave nodes before what they read
    for name in outside & graph.initializers.keys():
        place = weights[name]
        graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, ir.DataType.from_numpy(_numpy_dtype(place.dtype))
            if place.dtype != torch.bfloat16 else ir.DataType.BFLOAT16,
            shape=ir.Shape(place.shape), name=name, base_dir=path.parent,
        )  # fmt: skip
    for values, contract in ((graph.inputs, cut.inputs), (graph.outputs, cut.outputs)):
        for value, tensor in zip(values, contract, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape([size_of(s, sizes) for s in tensor.shape])
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


def _keep_small_terms(graph: Any) -> None:
    """Give numbers close to 0 that are added an axis: without one the simplifier takes them for 0 and leaves them out.

    They are what keeps a division by a sum that may be 0 finite.
    """
    import onnx_ir as ir

    for node in list(graph):
        out = node.outputs[0].shape
        for place, value in enumerate(node.inputs if node.op_type in ("Add", "Sub") else ()):
            known = None if value is None else ir.convenience.get_const_tensor(value)
            if known is None or known.size != 1 or not out:
                continue
            number = known.numpy().reshape(1)
            if 0 < abs(float(number[0])) < _SMALL:
                name = f"{node.outputs[0].name}_term_{place}"
                term = ir.Value(
                    name=name, type=value.type, shape=ir.Shape([1]), const_value=ir.tensor(number, name=name)
                )
                graph.register_initializer(term)
                node.replace_input_with(place, term)


def _without_sequences(graph: Any) -> None:
    """Take the parts of an unbound tensor by index: where the simplifier lost its shape, a sequence of them is left,
    which TensorRT does not know."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "SplitToSequence" or node.attributes["keepdims"].as_int():
            continue
        for use in list(node.outputs[0].uses()):
            part = use.node
            gather = ir.node("Gather", [node.inputs[0], part.inputs[1]], {"axis": node.attributes["axis"].as_int()})
            gather.outputs[0].shape, gather.outputs[0].type = part.outputs[0].shape, part.outputs[0].type
            graph.insert_before(part, gather)
            ir.convenience.replace_all_uses_with(part.outputs[0], gather.outputs[0])
            graph.remove(part, safe=True)
        graph.remove(node, safe=True)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
