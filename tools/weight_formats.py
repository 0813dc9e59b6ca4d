"""What a model's weights take in each format, and the shortest that its steps can be on some GPUs, for its card.

    floor of a step = max(bytes / bandwidth, Σ arithmetic / rate)

Bytes are those of a graph's weights, inputs and outputs, each once. Arithmetic is that of its linear layers and
attentions; layers whose weights are quantised run at the rate of the format, all else at that of bfloat16. Rates are
dense, with sums in float32, of the vendor's data sheets; nothing reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from taylorseer_export.bundle.memory import size
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.compile.export import Draft, Options, Traced, draft
from taylorseer_export.graph.cut import Cut

aten = torch.ops.aten
FORMATS = ("bf16", "fp8", "nvfp4")


@dataclass(frozen=True)
class Gpu:
    """Bytes per second, and operations per second in each format that it multiplies in."""

    bandwidth: float
    rates: Mapping[str, float]


GPUS = {
    "H200": Gpu(4.8e12, {"bf16": 989e12, "fp8": 1979e12}),
    "L40S": Gpu(0.864e12, {"bf16": 362e12, "fp8": 733e12}),
    "RTX 5090": Gpu(1.792e12, {"bf16": 209.5e12, "fp8": 419e12, "nvfp4": 1676e12}),
}


def lines(traced: Traced, options: Options) -> list[str]:
    """The section of a card."""
    plain = draft(traced, options)
    made = {form: plain if form == "bf16" else draft(traced, replace(options, weights=form)) for form in FORMATS}
    names = traced.trace.names
    layers = {part.weight for part in made["fp8"].quantised.values()}
    total, within = flops(plain, plain.split.full, names), flops(plain, plain.split.full, names, layers)
    found = [
        "## Weights in fewer bits",
        "",
        f"`--weights` quantises {len(layers)} linear layers, {within / total:.0%} of the {total / 1e12:.1f} TFLOP of a "
        "full step; `prepare` and `forecast` keep bfloat16. Beside each GPU, the shortest that a full and a forecast "
        "step can be: bytes over bandwidth or arithmetic over rate, whichever is longer, by the data sheets. Computed, "
        "not measured.",
        "",
        "| " + " | ".join(("weights", "prepare", "full", "forecast", "a full step moves", *GPUS)) + " |",
        "| " + " | ".join(["---"] * (5 + len(GPUS))) + " |",
    ]
    for form, one in made.items():
        cells = [form, *(size(one.weights_bytes(cut)) for cut in one.split.graphs), size(_moved(one, one.split.full))]
        found.append("| " + " | ".join((*cells, *_floors(one, form, total, within))) + " |")
    return found


def flops(made: Draft, cut: Cut, names: dict[Any, str], layers: Collection[str] | None = None) -> int:
    """Of the linear layers and attentions of a graph, at the sizes that its card is quoted at.

    Args:
        made: Its draft, in the model's precision.
        cut: The graph.
        names: Of the symbols of the trace.
        layers: Weights, of whose layers alone it is.
    """
    symbols = {symbol: made.typical[name] for symbol, name in names.items()}

    def extents(node: fx.Node) -> list[int]:
        shape = node.meta["val"].shape
        return [int(s.node.expr.xreplace(symbols)) if isinstance(s, torch.SymInt) else int(s) for s in shape]

    total = 0
    for node in cut.module.graph.nodes:
        if node.target is aten.linear.default:
            name = str(node.args[1].target)
            if layers is None or name in layers:
                total += 2 * math.prod(extents(node)) * cut.module.get_parameter(name).shape[1]
        elif node.target is aten.scaled_dot_product_attention.default and layers is None:
            query, key = (extents(source) for source in node.args[:2])
            total += 4 * math.prod(query) * key[-2]
    return total


def _floors(made: Draft, form: str, total: int, within: int) -> Iterator[str]:
    """Of each GPU, in milliseconds: of a full step and of a forecast step."""
    full, forecast = (_moved(made, cut) for cut in (made.split.full, made.split.forecast))
    for name, gpu in GPUS.items():
        if form not in gpu.rates:
            yield f"{name} has no {form}"
            continue
        computed = within / gpu.rates[form] + (total - within) / gpu.rates["bf16"]
        yield f"{1e3 * max(full / gpu.bandwidth, computed):.1f} ms, {1e3 * forecast / gpu.bandwidth:.2f} ms"


def _moved(made: Draft, cut: Cut) -> int:
    """Bytes of weights, inputs and outputs."""
    tensors = (*cut.inputs, *cut.outputs)
    held = sum(math.prod(resolve(t.shape, made.typical)) * getattr(torch, t.dtype).itemsize for t in tensors)
    return held + made.weights_bytes(cut)
