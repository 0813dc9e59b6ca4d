"""Strong typing: every cast between float types stands in the graph.

Torch lets an operator read two float types and casts one in silence, as FLUX's rotary tables do with float32 positions
and float64 frequencies. Strongly typed engines refuse such operators, or choose another type than torch does.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import fx

aten = torch.ops.aten


def explicit_casts(graph: fx.Graph) -> None:
    """Give operators that mix float types inputs of one type: that of what they return.

    Where that is no float, as in a comparison, it is the type torch promotes to.
    """
    for node in list(graph.nodes):
        kinds = float_types(node)
        if len(kinds) < 2:
            continue
        value = node.meta["val"]
        float_result = isinstance(value, torch.Tensor) and value.is_floating_point()
        wanted = value.dtype if float_result else reduce(torch.promote_types, sorted(kinds, key=str))
        for source in node.all_input_nodes:
            given = source.meta.get("val")
            if isinstance(given, torch.Tensor) and given.is_floating_point() and given.dtype != wanted:
                with graph.inserting_before(node):
                    cast = graph.call_function(aten.to.dtype, (source, wanted))
                cast.meta = {**source.meta, "val": aten.to.dtype(given, wanted)}
                node.replace_input_with(source, cast)


def float_types(node: fx.Node) -> set[torch.dtype]:
    """The float types among the tensors that an operator computes with."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return set()
    # Markers, and a product of float8 with scales: values and scales of a quantised weight.
    if node.target.namespace in ("taylorseer", "onnx_symbolic") or node.target is aten._scaled_mm.default:
        return set()
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
