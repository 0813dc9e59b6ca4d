"""One trace of an unmodified diffusers transformer: a flat graph with taps, without weights.

Shapes: every dimension that the family declares is symbolic here; a bundle of one fixed size is specialised later,
when its graphs become engines, so there is one trace per model whatever the sizes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx, nn

from taylorseer_export.bundle.latents import NOISE_PRED, endings
from taylorseer_export.bundle.shapes import linear, names, resolve
from taylorseer_export.errors import ExportError, first_line
from taylorseer_export.families.family import Family, Input, replaced
from taylorseer_export.graph.alike import rows_alike
from taylorseer_export.graph.casts import explicit_casts
from taylorseer_export.graph.guards import settled
from taylorseer_export.graph.masks import expanded_masks, small_masks
from taylorseer_export.graph.merge import merge_equal
from taylorseer_export.graph.real import real
from taylorseer_export.graph.rewrite import alone, inlined, plain, without_empty
from taylorseer_export.graph.sizes import example_sizes
from taylorseer_export.graph.taps import tap_operator, tapped
from taylorseer_export.graph.untraceable import dense_attention, unchanged
from taylorseer_export.graph.writes import functional

aten = torch.ops.aten

# Sizes at which the symbolic trace is taken, where the family's ranges hold them: small and distinct.
_EXAMPLE_SIZES = (2, 24, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Trace:
    """A tapped graph with what is known about its inputs.

    Attributes:
        module: The graph. Parameters are `get_attr` nodes under their checkpoint names; taps are call nodes.
        inputs: The family's declaration of every placeholder.
        sites: Names of the tapped module outputs, in block order.
        names: Symbol of the trace -> dimension name of the family.
        example_sizes: Dimension name -> size used for tracing.
        precision: dtype of the model.
        constants: Tensors that the model computes from nothing, such as frequency tables, under their new names.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    sites: tuple[str, ...]
    names: dict[sympy.Symbol, str]
    example_sizes: dict[str, int]
    precision: torch.dtype
    constants: dict[str, torch.Tensor]

    @property
    def streams(self) -> tuple[str, ...]:
        """What the names of each latent's prediction, marks and coarse sites end on: nothing for the first."""
        return endings(spec.name for spec in self.inputs if spec.role == "latent")

    @property
    def predictions(self) -> dict[str, fx.Node]:
        """Name -> the node whose value the transformer returns, one for each latent, that of the first first."""
        (values,) = self.module.graph.output_node().args
        results = values if isinstance(values, tuple | list) else (values,)
        found = {f"{NOISE_PRED}{end}": result for end, result in zip(self.streams, results, strict=False)}
        assert len(found) == len(self.streams) and all(isinstance(node, fx.Node) for node in found.values()), (
            "bug in taylorseer-export: the traced model returns a constant, or less than it has latents"
        )
        return found

    @property
    def noise_pred(self) -> fx.Node:
        """The node whose value the transformer returns for the first latent."""
        return self.predictions[NOISE_PRED]

    def taps(self) -> dict[str, fx.Node]:
        """Tap name -> its node."""
        return {n.args[1]: n for n in self.module.graph.nodes if is_tap(n)}


def is_tap(node: Any) -> bool:
    """Whether `node` is a tap marker."""
    return isinstance(node, fx.Node) and node.target is tap_operator()


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules around a node, the outermost first; the model itself is the empty one."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(path).removeprefix("L['self'].").strip(".") for path, _ in stack]


def trace(model: nn.Module, family: Family, precision: torch.dtype) -> Trace:
    """Trace `model` once with the family's taps.

    Args:
        model: The diffusers transformer in eval mode; its parameters may be fake tensors, none is read.
        family: Its declaration.
        precision: dtype of the inputs declared as `float`.

    Raises:
        ExportError: `torch.export` refused the model, or the graph changes a tensor in place.
    """
    inputs = family.inputs(model.config)  # type: ignore[arg-type]
    declared = family.dimensions(model.config)  # type: ignore[arg-type]
    sizes = example_sizes(declared, dict(zip(declared, _EXAMPLE_SIZES, strict=False)))
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in declared.items() if low < high}
    example = {i.name: example_tensor(i, sizes, precision) for i in inputs}
    dynamic = {
        i.name: {k: dimension(str(s), dims) for k, s in enumerate(i.shape) if names(s) & dims.keys()} for i in inputs
    }
    with (
        dense_attention(model),
        unchanged(model),
        tapped(model, family) as sites,
        _called(model, family, inputs),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # pytree deprecations inside torch.export, not ours to mend
        try:
            program = settled(partial(torch.export.export, model, (), example, dynamic_shapes=dynamic, strict=False))
        except Exception as error:
            raise ExportError(
                f"{family.model_class} is not traceable with {', '.join(declared)} symbolic, expected a static graph; "
                f"torch.export says: {first_line(error)}"
            ) from error
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    inlined(module)
    drop_noise(module.graph)
    functional(module.graph)
    eliminate_dead(module.graph)
    alone(module.graph)
    real(module)
    plain(module.graph)
    without_empty(module.graph)
    small_masks(module.graph)
    eliminate_dead(module.graph)
    explicit_casts(module.graph)
    rows_alike(module.graph)
    eliminate_dead(module.graph)
    merge_equal(module.graph)
    symbols = _symbols(module.graph, inputs)
    weights = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    reached = {node.args[1] for node in module.graph.nodes if is_tap(node)}  # some modules are there and never called
    called = tuple(site for site in sites if site in reached)
    return Trace(module, inputs, called, symbols, sizes, precision, fold_constants(module, weights))


def _symbols(graph: fx.Graph, inputs: tuple[Input, ...]) -> dict[sympy.Symbol, str]:
    """Symbol of the trace -> dimension name; of sizes that a model compares, the trace has a symbol for one alone."""
    seen = [
        (size.node.expr, str(entry), spec.name)
        for spec in inputs
        for size, entry in zip(_placeholder(graph, spec.name).meta["val"].shape, spec.shape, strict=True)
        if isinstance(size, torch.SymInt)
    ]
    symbols = {symbol: linear(entry)[0] for size, entry, _ in seen for symbol in size.free_symbols}
    for size, entry, name in seen:
        told = size.xreplace({symbol: sympy.Symbol(of) for symbol, of in symbols.items()})
        dimension_name, factor, offset = linear(entry)
        if told != factor * sympy.Symbol(dimension_name) + offset:
            raise ExportError(
                f"shape entry `{entry}` of input `{name}` is {told} to the trace, expected it to be as declared; name "
                "the dimension after another of the sizes that the model compares"
            )
    return symbols


def dimension(entry: str, dims: Mapping[str, Any]) -> Any:
    """A shape entry such as `2*rows` over the `Dim`s of its names."""
    name, factor, offset = linear(entry)
    return dims[name] if (factor, offset) == (1, 0) else factor * dims[name] + offset


@contextmanager
def _called(model: nn.Module, family: Family, inputs: tuple[Input, ...]) -> Iterator[None]:
    """For the length of the block, `model` takes the declared inputs, the way its family calls it."""

    names = [inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY) for spec in inputs]
    with family.patched(model), expanded_masks(model):
        original = model.forward

        def forward(**given: torch.Tensor) -> Any:
            return family.forward(original, given)

        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]  # what torch.export binds by
        with replaced(model, forward=forward):
            yield


def example_tensor(spec: Input, sizes: dict[str, int], precision: torch.dtype) -> torch.Tensor:
    """A zero tensor of the declared shape, for tracing: `[sizes...]`, dtype as declared."""
    dtype = precision if spec.dtype == "float" else getattr(torch, spec.dtype)
    return torch.zeros(resolve(spec.shape, sizes), dtype=dtype)


def eliminate_dead(graph: fx.Graph) -> None:
    """Remove every call without users.

    `Graph.eliminate_dead_code` keeps attention, which torch tags as random, and the checks that export adds; our
    graphs have no side effects (a mutating operator was refused at trace), so whatever is unused can go.
    """
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_module", "get_attr") and not node.users:
            graph.erase_node(node)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)


def drop_noise(graph: fx.Graph) -> None:
    """Drop shape guards, metadata checks, casts that cast nothing, and a squeeze of a size above 1: ONNX knows none."""
    for node in list(graph.nodes):
        if node.op == "call_module" or node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _casts_nothing(node) or _squeezes_nothing(node):
            for user in node.users:
                if user.target is aten.view.default:  # of what may now be laid out otherwise
                    user.target = aten.reshape.default
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def fold_constants(module: fx.GraphModule, weights: set[str], prefix: str = "constant") -> dict[str, torch.Tensor]:
    """Compute now what depends on no input and none of the `weights`, and put it in the graph as a buffer.

    Its name begins with `prefix`: graphs that share a weights file have one each, unless they fold the same.

    An engine would compute the table of timestep frequencies with its own `exp`, and an error of one unit in the last
    place moves the angle of timestep 1000 by 6e-5. Computed here, every engine sees the numbers of the eager model.
    """
    values: dict[fx.Node, torch.Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in weights:  # a number in the model's code, as a tensor
            values[node] = getattr(module.get_submodule(node.target.rpartition(".")[0]), node.target.rpartition(".")[2])
        elif (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and all(n in values for n in node.all_input_nodes)
            and isinstance(node.meta.get("val"), torch.Tensor)
            and not any(isinstance(s, torch.SymInt) for s in node.meta["val"].shape)
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    constants = {}
    for node, value in values.items():
        if any(user not in values for user in node.users):
            name = f"{prefix}_{node.name}"
            module.register_buffer(name, value)
            with module.graph.inserting_before(node):
                buffer = module.graph.get_attr(name)
            buffer.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(buffer)
            constants[name] = value
    eliminate_dead(module.graph)
    return constants


def _squeezes_nothing(node: fx.Node) -> bool:
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return bool(source.meta["val"].ndim == node.meta["val"].ndim)


def _casts_nothing(node: fx.Node) -> bool:
    if node.target not in (
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.contiguous.default,
        aten.dropout.default,
    ):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return bool(source.meta["val"].dtype == node.meta["val"].dtype)
