"""Products in few bits for torch: a quantised linear layer whose factors are multiplied as they are stored.

    linear(round(x, scale), dequantise(values, weight_scale), bias)
        becomes   multiply(codes(x, scale), values) * (scale * weight_scale) + bias

where `multiply` is `_scaled_mm` over float8, its sums in float32, or `_int_mm` over int8, its sums exact. The rule:

    fp8     on a GPU from compute capability 8.9, both sides of the weight multiples of 16, as cuBLAS wants
    int8    on a CPU with VNNI

Any other product is one of widened numbers, which differ from these in the order of a float32 sum alone. On the CPU
`_scaled_mm` widens too, and took twice as long as a product of what was widened before; without VNNI int8 kernels
may saturate between two products; `_int_mm` on a GPU refuses less than 17 rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.quantise import codes, dequantise_operator, round_operator

aten = torch.ops.aten


def multiplies(form: str, device: str, rows: int, columns: int) -> bool:
    """Whether a product of this format is one of few bits here, for a weight `[rows, columns]`: the rule above."""
    if device == "cuda":
        fits = rows % 16 == columns % 16 == 0
        return form == "fp8" and fits and torch.cuda.get_device_capability() >= (8, 9)
    return form == "int8" and torch.cpu._is_vnni_supported()


def in_few_bits(cut: Cut, device: str) -> Cut:
    """A graph with such products in the place of linear layers over markers; the graph itself where there are none."""
    layers = [node for node in cut.module.graph.nodes if _is_product(node, device)]
    if not layers:
        return cut
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    graph.output(graph.graph_copy(cut.module.graph, copies))
    rounded: dict[fx.Node, fx.Node] = {}
    for layer in (copies[node] for node in layers):
        inner, weight, *bias = layer.args
        values, scale, _ = weight.args
        if inner not in rounded:
            with graph.inserting_before(inner):
                rounded[inner] = graph.call_function(codes, inner.args)
        with graph.inserting_before(layer):
            args = (rounded[inner], values, scale, bias[0] if bias else None, inner.args[2])
            layer.replace_all_uses_with(graph.call_function(product, args))
    for node in reversed(list(graph.nodes)):
        if node.target in (aten.linear.default, round_operator(), dequantise_operator()) and not node.users:
            graph.erase_node(node)
    return replace(cut, module=fx.GraphModule(cut.module, graph))


def product(x: Tensor, values: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`[..., rows]` of the dtype of `weight_scale`, formed in float32.

    Args:
        x: `[..., columns]`, what `codes` made; float8 or int8, as `values`.
        values: `[rows, columns]`.
        weight_scale: `[rows]`.
        bias: `[rows]` or None.
        scale: What a value of x counts.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.int8:
        sums = torch._int_mm(flat, values.t()).float()
    else:
        one = torch.ones((), device=x.device)
        sums = torch._scaled_mm(flat, values.t(), one, one, out_dtype=torch.float32)
    made = sums * (weight_scale.float() * scale)
    made = made if bias is None else made + bias.float()
    return made.to(weight_scale.dtype).reshape(*x.shape[:-1], -1)


def _is_product(node: fx.Node, device: str) -> bool:
    if node.target is not aten.linear.default:
        return False
    inner, weight = node.args[:2]
    marked = isinstance(inner, fx.Node) and isinstance(weight, fx.Node)
    if not marked or (inner.target, weight.target) != (round_operator(), dequantise_operator()):  # type: ignore[union-attr]
        return False
    return multiplies(inner.args[1], device, *weight.meta["val"].shape)  # type: ignore[union-attr, arg-type]
