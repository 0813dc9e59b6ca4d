"""Quantise: the linear layers of the blocks get weights of fewer bits; a pass on the traced graph, before the split.

    linear(x, weight, bias)   becomes   linear(x, dequantise(weight, weight_scale), bias)

and with activations quantised by token, the largest value of a row of x being a,

    s = a / 448 * 2**8,   linear(round(x / s), dequantise(weight, weight_scale)) * s + bias

where `round` is a quantisation by the constant 2**-8 and back, for nvfp4 to e2m1 in blocks of 16, for int8 to whole
numbers to 127: engines that multiply in few bits ask for a constant, and no sum of products leaves the range of
float16. With static activations that constant is a layer's own, found beforehand (`constant_scale`), and no row is
looked at; what is larger than the largest number of the format saturates:

    linear(round(x, scale), dequantise(weight, weight_scale), bias)

`dequantise` and `round` are markers; every engine has its own operators in their place (`lowered`).

The rule, which names no model: quantised is a linear layer that

1. computes from the latent, or from what is as wide (binding time latent): modulation and what else is known before the
   loop is in `prepare`, in the model's precision;
2. has a weight that lies in a block, the module around a site: embedders, the final norm and the output layer do not;
3. has a weight that nothing else reads, of a shape that the format has;
4. is matched by no pattern of `keep`.

Of these none is left in the forecast graph, which holds no product of the blocks, at any granularity (`ensures.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from taylorseer_export.errors import ConfigError
from taylorseer_export.graph.binding import Time, binding_times
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.formats import dequantised, fits, in_blocks, of_blocks, quantised, stored
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.trace import Trace

aten = torch.ops.aten
STEP = 2.0**-8  # what a value of a rounded activation counts
BLOCK_STEP = STEP / 6  # what a scale of a block of them counts; 6 is the largest of e2m1
_HOLDS = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6 * 448.0}  # the largest rounded activation, in units of its scale


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised weight is stored as.

    Attributes:
        weight: Name of the weight in the checkpoint.
        form: `fp8`, `nvfp4` or `int8`.
        precision: dtype of its scales.
        index: Which of the tensors of `formats.stored`.
        count: Numbers of the weight.
        kept: Whether the checkpoint's own values and scales are taken.
        input_scale: What a value that the layer reads counts when it is rounded, where that is a constant.
    """

    weight: str
    form: str
    precision: torch.dtype
    index: int
    count: int
    kept: bool = False
    input_scale: float | None = None

    def of(self, weight: Tensor) -> Tensor:
        """This part of the weight."""
        return quantised(weight, self.form, self.precision)[self.index]


@dataclass(frozen=True)
class Quantised:
    """A trace whose linear layers are quantised.

    Attributes:
        trace: A trace of its own; the one that it was made from is as it was.
        parts: Name of a stored tensor -> what it is of which weight.
    """

    trace: Trace
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the quantised weights, in the order of the graph."""
        return tuple(dict.fromkeys(part.weight for part in self.parts.values()))


@cache
def dequantise_operator() -> Any:
    """The marker `taylorseer::dequantise(values, scale, whole) -> weight`, defined once per process on first use."""

    @torch.library.custom_op("taylorseer::dequantise", mutates_args=())
    def dequantise(values: Tensor, scale: Tensor, whole: Tensor | None) -> Tensor:
        return dequantised(values, scale, whole)

    @dequantise.register_fake
    def _(values: Tensor, scale: Tensor, whole: Tensor | None) -> Tensor:
        columns = values.shape[1] if whole is None else values.shape[1] * 2
        return values.new_empty((values.shape[0], columns), dtype=(scale if whole is None else whole).dtype)

    return torch.ops.taylorseer.dequantise.default


@cache
def round_operator() -> Any:
    """The marker `taylorseer::round(x, form, scale) -> x`, see `rounded`; defined once per process on first use."""

    @torch.library.custom_op("taylorseer::round", mutates_args=())
    def round(x: Tensor, form: str, scale: float) -> Tensor:
        return rounded(x, form, scale)

    @round.register_fake
    def _(x: Tensor, form: str, scale: float) -> Tensor:
        return torch.empty_like(x)

    return torch.ops.taylorseer.round.default


def rounded(x: Tensor, form: str, scale: float) -> Tensor:
    """x as e4m3 or int8 holds it in units of `scale`; in nvfp4 as blocks whose scales e4m3 holds in them."""
    if form == "nvfp4":
        whole = torch.full((), scale, dtype=x.dtype)
        return of_blocks(*in_blocks(x, whole), whole)
    return (codes(x, form, scale).to(_wide(x)) * scale).to(x.dtype)


def codes(x: Tensor, form: str, scale: float) -> Tensor:
    """What `rounded` multiplies by `scale`, float8 or int8: the nearest to x / scale, or the largest."""
    share = x.to(_wide(x)) / scale
    if form == "int8":
        return share.round().clamp(-128.0, 127.0).to(torch.int8)
    return share.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _wide(x: Tensor) -> torch.dtype:
    """float32, in which engines divide and multiply by scales whatever the precision, or float64 as it is."""
    return torch.promote_types(x.dtype, torch.float32)


def constant_scale(largest: float, form: str, precision: torch.dtype) -> float:
    """What a rounded value counts, so that a layer's input of at most `largest` in size does not saturate.

    Of formats with an exponent the next power of two: dividing by it is exact in every engine, it costs no digit of any
    value, and leaves room for inputs up to twice as large. Of int8 `largest / 127`, rounded up to the precision.
    """
    scale = largest / _HOLDS[form]
    if not 0 < scale < math.inf:
        return scale  # `quantise` refuses it, by the name of the layer
    if form == "int8":
        scale *= 1 + torch.finfo(precision).eps
        return max(float(torch.tensor(scale).to(precision)), torch.finfo(precision).smallest_normal)
    return max(2.0 ** math.ceil(math.log2(scale)), torch.finfo(precision).smallest_normal)


def is_marker(node: fx.Node) -> bool:
    """Whether a node is one of the operators above, which read values and scales of two types."""
    return node.target in (dequantise_operator(), round_operator())


def quantise(
    trace: Trace,
    form: str,
    activations: str = "none",
    keep: Collection[str] = (),
    own: Collection[str] | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> Quantised:
    """A trace with the weights of its linear layers quantised, by the rule above.

    Args:
        trace: It stays as it is.
        form: `fp8`, `nvfp4` or `int8`.
        activations: `none`: as they come. `token`: row by row to the format, with nvfp4 in blocks. `static`: to the
            format by one constant for each layer.
        keep: Patterns of the shell (`*.attn.to_q`) over names of layers that stay in the model's precision.
        own: The weights that the checkpoint has in this format, which alone are taken, as they are; None takes all.
        input_scales: Weight -> that constant, representable in the model's precision.

    Raises:
        ConfigError: A pattern matches no layer that would be quantised, or none is left, or one lacks its constant.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(trace.module.graph, {}))
    module = fx.GraphModule(trace.module, graph)
    copied = replace(trace, module=module)
    found = _layers(copied, form)
    found = {name: nodes for name, nodes in found.items() if own is None or name in own}
    chosen = {name: nodes for name, nodes in found.items() if not any(_matches(name, pattern) for pattern in keep)}
    for pattern in keep:
        if not any(_matches(name, pattern) for name in found):
            raise ConfigError(
                f"--keep-precision is {pattern}, expected a pattern of layers that --weights {form} quantises, like "
                f"{_layer(next(iter(found), '*.to_q'))} or *.to_q; correct it or leave it out"
            )
    if not chosen:
        raise ConfigError(
            f"--weights is {form} with {len(found)} layers that have the format and {len(keep)} patterns of "
            "--keep-precision, expected one layer at least to quantise; leave one of the options out"
        )
    scales = _checked(chosen, input_scales or {}, trace.precision) if activations == "static" else {}
    parts: dict[str, Part] = {}
    for name, layers in chosen.items():
        scale = scales.get(name)
        made = _with_markers(module, name, layers, form, trace.precision, activations, scale)
        parts |= {part: replace(of, kept=own is not None, input_scale=scale) for part, of in made.items()}
    graph.lint()
    module.recompile()
    return Quantised(copied, parts)


def _checked(chosen: Collection[str], scales: Mapping[str, float], precision: torch.dtype) -> Mapping[str, float]:
    """The constants, one for each layer and each a number of the precision that can be divided by."""
    lacking = [name for name in chosen if name not in scales]
    if lacking:
        layer = _layer(lacking[0])
        raise ConfigError(
            f"`{layer}` has no scale for what it reads ({len(lacking)} of {len(chosen)} layers have none), expected "
            "one for --activations static; give sample requests with --inputs or --prompts, or leave it out with "
            f"--keep-precision {layer}"
        )
    limits = torch.finfo(precision)
    for name in chosen:
        if not limits.smallest_normal <= scales[name] <= limits.max:
            layer = _layer(name)
            raise ConfigError(
                f"the scale for what `{layer}` reads is {scales[name]:g}, expected {limits.smallest_normal:.1e} to "
                f"{limits.max:.1e} for --activations static; give other sample requests with --inputs or --prompts, "
                f"or leave it out with --keep-precision {layer}"
            )
    return scales


def _layers(trace: Trace, form: str) -> dict[str, list[fx.Node]]:
    """Weight -> the linear layers that read it, of those that rules 1 to 3 choose."""
    times = binding_times(trace)
    blocks = {f"{home}." for site in trace.sites if (home := site.rpartition(".")[0])}
    found: dict[str, list[fx.Node]] = {}
    for node in trace.module.graph.nodes:
        if node.op != "get_attr" or not any(str(node.target).startswith(block) for block in blocks):
            continue
        readers = [user for user in node.users if _is_linear_over(user, node) and times[user] is Time.LATENT]
        weight = node.meta["val"]
        whole = weight.is_floating_point() and weight.dtype == trace.precision and fits(form, tuple(weight.shape))
        if whole and readers and len(readers) == len(node.users):
            found[str(node.target)] = readers
    return found


def layers_of(trace: Trace) -> tuple[str, ...]:
    """The weights of the linear layers that the rule chooses, in any format."""
    return tuple(_layers(trace, "int8"))


def _is_linear_over(node: fx.Node, weight: fx.Node) -> bool:
    return (
        node.target is aten.linear.default and node.args[1] is weight and weight not in (node.args[0], *node.args[2:])
    )


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _matches(weight: str, pattern: str) -> bool:
    return fnmatchcase(_layer(weight), pattern)


def _with_markers(
    module: fx.GraphModule,
    name: str,
    layers: Sequence[fx.Node],
    form: str,
    precision: torch.dtype,
    activations: str,
    scale: float | None,
) -> dict[str, Part]:
    """Put the markers around one weight; returns the parts that take its place, by name."""
    graph = module.graph
    weight = layers[0].args[1]
    assert isinstance(weight, fx.Node), "bug in taylorseer-export: a linear layer without a weight"
    owner, _, leaf = name.rpartition(".")
    home: Any = module.get_submodule(owner)
    shape, parameter, value = tuple(weight.meta["val"].shape), attrgetter(name)(module), weight.meta["val"]
    delattr(home, leaf)
    parts, nodes = {}, []
    with graph.inserting_before(weight):
        for index, part in enumerate(stored(form, shape, precision)):
            home.register_buffer(leaf + part.suffix, _like(parameter, part.shape, part.dtype))
            node = graph.get_attr(name + part.suffix)
            node.meta["val"] = _like(value, part.shape, part.dtype)
            parts[name + part.suffix] = Part(name, form, precision, index, math.prod(shape))
            nodes.append(node)
        made = call(graph, dequantise_operator(), [*nodes, None][:3], like=layers[0])
    for layer in layers:
        layer.replace_input_with(weight, made)
        if activations == "token":
            _by_token(graph, layer, form)
        elif scale is not None:
            _by_constant(graph, layer, form, scale)
    graph.erase_node(weight)
    return parts


def _by_token(graph: fx.Graph, layer: fx.Node, form: str) -> None:
    """Quantise what a linear layer reads, row by row."""
    x, weight, *bias = layer.args
    kind = layer.meta["val"].dtype
    step = BLOCK_STEP if form == "nvfp4" else STEP
    with graph.inserting_before(layer):
        size = call(graph, aten.abs.default, [x], like=layer)
        largest = call(graph, aten.amax.default, [size, [-1], True], like=layer)
        scale = call(graph, aten.div.Tensor, [largest, _HOLDS[form] * step], like=layer)
        scale = call(
            graph, aten.clamp.default, [scale, torch.finfo(kind).smallest_normal], like=layer
        )  # a row of zeros
        share = call(graph, aten.div.Tensor, [x, scale], like=layer)
        product = _rounded_product(graph, layer, [share, weight], form, step)
        result = call(graph, aten.mul.Tensor, [product, scale], like=layer)
        if bias and bias[0] is not None:
            result = call(graph, aten.add.Tensor, [result, bias[0]], like=layer)
    layer.replace_all_uses_with(result)
    graph.erase_node(layer)


def _by_constant(graph: fx.Graph, layer: fx.Node, form: str, scale: float) -> None:
    """Quantise what a linear layer reads by one constant."""
    with graph.inserting_before(layer):
        result = _rounded_product(graph, layer, layer.args, form, scale)
    layer.replace_all_uses_with(result)
    graph.erase_node(layer)


def _rounded_product(graph: fx.Graph, layer: fx.Node, args: Sequence[Any], form: str, scale: float) -> fx.Node:
    """A linear layer of (x, weight, bias if any) over x as it is rounded, in the place of `layer`."""
    x, *others = args
    flat = form == "nvfp4" and x.meta["val"].ndim > 2
    if flat:  # TensorRT-RTX 1.7 does not follow blocks through the rows of a concatenation of three dimensions
        x = call(graph, aten.flatten.using_ints, [x, 0, -2], like=layer)
    inner = call(graph, round_operator(), [x, form, scale], like=layer)
    product = call(graph, aten.linear.default, [inner, *others], like=layer)
    return call(graph, aten.reshape.default, [product, _sizes(graph, layer)], like=layer) if flat else product


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """The shape of what a node returns: numbers, and nodes where a size is open."""
    shape, x = node.meta["val"].shape, node.args[0]
    return [
        call(graph, aten.sym_size.int, [x, k]) if isinstance(size, torch.SymInt) else size
        for k, size in enumerate(shape)
    ]


def _like(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without numbers, of the fake mode that `value` is of if it is of one."""
    return torch.empty_like(value).new_empty(shape, dtype=dtype)


def lowered(cut: Cut, dequantise: Callable[..., Tensor] = dequantised, round: Callable[..., Tensor] = rounded) -> Cut:
    """A graph with calls in the place of its markers, which `torch.export` looks into; the graph itself without any.

    Args:
        cut: The graph.
        dequantise: (values, scale, whole or None) -> weight.
        round: (x, format, scale) -> x.
    """
    if not any(is_marker(node) for node in cut.module.graph.nodes):
        return cut
    graph = fx.Graph()
    graph.output(graph.graph_copy(cut.module.graph, {}))
    for node in graph.nodes:
        if is_marker(node):
            node.target = dequantise if node.target is dequantise_operator() else round
    return replace(cut, module=fx.GraphModule(cut.module, graph))


def watched(module: fx.GraphModule, weights: Collection[str], see: Callable[[Tensor, str], None]) -> fx.GraphModule:
    """An unquantised graph that calls `see(x, weight)` before each linear layer over one of these weights: what it
    reads, and the name."""
    for node in list(module.graph.nodes):
        weight = node.args[1] if node.target is aten.linear.default else None
        if isinstance(weight, fx.Node) and weight.target in weights:
            with module.graph.inserting_before(node):
                module.graph.call_function(see, (node.args[0], str(weight.target)))
    module.recompile()
    return module
