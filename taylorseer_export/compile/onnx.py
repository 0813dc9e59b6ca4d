"""Graphs as ONNX: the portable form, and what ONNX Runtime and TensorRT build from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taylorseer_export.compile.collectives import with_nodes
from taylorseer_export.compile.draft import BaseDraft
from taylorseer_export.compile.engines import Progress
from taylorseer_export.compile.exporter import done_once
from taylorseer_export.compile.operators import taken_apart, traced_once
from taylorseer_export.compile.program import exported_program, quiet_libraries, size_of
from taylorseer_export.compile.weights import WEIGHTS, Stored
from taylorseer_export.errors import BuildError, first_line
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.formats import BLOCK
from taylorseer_export.graph.quantise import lowered

OPSET = 20
# With float8 that a quantisation makes, and with values of four bits in blocks.
_QUANTISED_OPSET, _BLOCKS_OPSET, _BLOCKS_IR = 21, 23, 11
_SMALL = 1e-8  # what the simplifier takes for 0
_INSIDE = 1 << 13  # bytes
_IN_BLOCKS = {"axis": -1, "block_size": BLOCK}
_PLUGIN = "trt"  # domain of TensorRT's own operators
_OURS = "taylorseer"  # domain of nodes that are none of ONNX until the graph is simplified


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
    apart = taken_apart(lowered(cut, _dequantise, _round))
    program = exported_program(apart, sizes, draft.ranges())
    try:
        with torch.no_grad(), quiet_libraries(), done_once():
            exported = torch.onnx.export(
                traced_once(program), dynamo=True, optimize=False, opset_version=OPSET, verbose=False
            )
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
    with quiet_libraries(), done_once():
        optimizer.optimize(model, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1 << 16)
        _without_sequences(graph)
        graph.sort()  # simplifiers before onnxscript 0.7 leave nodes before what they read
    for name in outside & graph.initializers.keys():
        place = weights[name]
        graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS, place.offset, place.length, _data_type(place.dtype),
            shape=ir.Shape(place.shape), name=name, base_dir=path.parent,
        )  # fmt: skip
    with_nodes(model)
    _with_quantisation(model)
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
        if node.op_type != "SplitToSequence" or node.attributes.get_int("keepdims", 1):
            continue
        for use in list(node.outputs[0].uses()):
            part = use.node
            gather = ir.node("Gather", [node.inputs[0], part.inputs[1]], {"axis": node.attributes["axis"].as_int()})
            gather.outputs[0].shape, gather.outputs[0].type = part.outputs[0].shape, part.outputs[0].type
            graph.insert_before(part, gather)
            ir.convenience.replace_all_uses_with(part.outputs[0], gather.outputs[0])
            graph.remove(part, safe=True)
        graph.remove(node, safe=True)


def _dequantise(values: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
    """The marker as a node of our own, which `_with_quantisation` replaces: the exporter has no such operator."""
    given = (values, scale) if whole is None else (values, scale, whole)
    shape = (values.shape[0], values.shape[1] * (1 if whole is None else 2))
    made: torch.Tensor = torch.onnx.ops.symbolic(
        f"{_OURS}::Dequantise", given, dtype=given[-1].dtype, shape=shape, version=1
    )
    return made


def _round(x: torch.Tensor, form: str, scale: float) -> torch.Tensor:
    made: torch.Tensor = torch.onnx.ops.symbolic(
        f"{_OURS}::Round", (x,), {"form": form, "scale": scale}, dtype=x.dtype, shape=x.shape, version=1
    )
    return made


def _with_quantisation(model: Any) -> None:
    """Put the operators of ONNX in the place of our own nodes, and raise the opset to theirs where there are any."""
    import onnx_ir as ir

    graph, found = model.graph, [node for node in model.graph if node.domain == _OURS]
    opset = _QUANTISED_OPSET
    # ONNX Runtime, where it is told to let no sum of two products saturate, changes zero points that it has to find.
    rounded_to_int8 = any(n.op_type == "Round" and n.attributes["form"].as_string() == "int8" for n in found)
    for node in found:
        kind, old = node.outputs[0].dtype, node.outputs[0]
        if node.op_type == "Round":
            form, scale = node.attributes["form"].as_string(), node.attributes["scale"].as_float()
            four, step = form == "nvfp4", _number(graph, f"round.{scale!r}", scale, kind)
            made = _four_bits(node.inputs[0], step, kind) if four else _eight_bits(node.inputs[0], step, form)
        else:
            values, *scales = node.inputs
            four = len(scales) == 2
            made = [ir.node("DequantizeLinear", scales)] if four else []
            inputs = [_as_pairs(values), made[0].outputs[0]] if four else [values, *scales]
            if rounded_to_int8:
                inputs.append(_zeros(graph, values))
            made.append(ir.node("DequantizeLinear", inputs, _IN_BLOCKS if four else {"axis": 0}))
            made[0].outputs[0].dtype = kind
        opset = _BLOCKS_OPSET if four else opset
        for k, one in enumerate(made):
            one.name = f"{node.name}.{k}"
            graph.insert_before(node, one)
            for n, value in enumerate(one.outputs):
                value.name = f"{old.name}.{k}.{n}"
        last = made[-1].outputs[0]
        last.dtype, last.shape = kind, old.shape
        ir.convenience.replace_all_uses_with(old, last)
        graph.remove(node, safe=True)
    if found:
        model.opset_imports[""] = opset
        model.opset_imports.pop(_OURS, None)
        if opset == _BLOCKS_OPSET:
            model.ir_version = max(model.ir_version, _BLOCKS_IR)
            model.opset_imports[_PLUGIN] = 1


def _eight_bits(x: Any, step: Any, form: str) -> list[Any]:
    """x rounded to e4m3 or int8 in units of `step`."""
    import onnx_ir as ir

    to = ir.DataType.INT8 if form == "int8" else ir.DataType.FLOAT8E4M3FN
    there = ir.node("QuantizeLinear", [x, step], {"output_dtype": int(to)})
    there.outputs[0].dtype = to
    return [there, ir.node("DequantizeLinear", [there.outputs[0], step])]


def _four_bits(x: Any, step: Any, kind: Any) -> list[Any]:
    """x rounded to e2m1 in blocks, by the operator that TensorRT's parsers have for it: ONNX has none."""
    import onnx_ir as ir

    how = {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    there = ir.node("TRT_FP4DynamicQuantize", [x, step], how, domain=_PLUGIN, num_outputs=2)
    there.outputs[0].dtype, there.outputs[1].dtype = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
    scales = ir.node("DequantizeLinear", [there.outputs[1], step])
    scales.outputs[0].dtype = kind
    return [there, scales, ir.node("DequantizeLinear", [there.outputs[0], scales.outputs[0]], _IN_BLOCKS)]


def _number(graph: Any, name: str, number: float, kind: Any) -> Any:
    """The initializer of one number, made once for a graph."""
    import onnx_ir as ir

    if name not in graph.initializers:
        value = ir.tensor(np.array(number, kind.numpy()), name=name)
        graph.register_initializer(ir.val(name, kind, ir.Shape(()), const_value=value))
    return graph.initializers[name]


def _zeros(graph: Any, values: Any) -> Any:
    """The initializer of the zero points of int8 weights; of its own for each, since the change is made in place."""
    import onnx_ir as ir

    name, shape = f"{values.name}_zeros", ir.Shape(values.shape[:1])
    value = ir.tensor(np.zeros(values.shape[0], np.int8), name=name)
    graph.register_initializer(ir.val(name, ir.DataType.INT8, shape, const_value=value))
    return graph.initializers[name]


def _as_pairs(packed: Any) -> Any:
    """The initializer of bytes with two values each as one of four-bit values, over the same bytes of the file."""
    import onnx_ir as ir

    old, kind = packed.const_value, ir.DataType.FLOAT4E2M1
    shape = ir.Shape((old.shape[0], 2 * old.shape[1]))
    packed.const_value = ir.ExternalTensor(
        old.location, old.offset, old.length, kind, shape=shape, name=packed.name, base_dir=old.base_dir
    )
    packed.dtype, packed.shape = kind, shape
    return packed


def _data_type(dtype: torch.dtype) -> Any:
    """What ONNX calls a dtype; numpy lacks some."""
    import onnx_ir as ir

    others = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN}
    return others.get(dtype) or ir.DataType.from_numpy(torch.empty(0, dtype=dtype).numpy().dtype)
