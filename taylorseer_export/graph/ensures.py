"""What a split promises, counted from the graphs that it made.

A forecast step costs next to nothing because nothing of the blocks is left in its graph but gates and additions. A
declaration whose `sites` miss an attention or an MLP breaks that promise without changing a number: every forecast
still agrees with the reference, and is slow. So the promise is held where all graphs come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from taylorseer_export.bundle.shapes import names
from taylorseer_export.errors import ExportError
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.narrow import upstream
from taylorseer_export.graph.sizes import is_size
from taylorseer_export.graph.taps import STACK_INPUT, STACK_OUTPUT
from taylorseer_export.graph.trace import Trace, is_tap, module_paths

aten = torch.ops.aten
_ATTENTIONS = ("scaled_dot_product_attention", "softmax", "_softmax", "topk", "sort")
_PRODUCTS = (
    "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum",
    "conv1d", "conv2d", "conv3d", "convolution",
)  # fmt: skip
_NAMED = 4  # modules that a message names, the others are counted


def ensure(trace: Trace, graphs: Collection[Cut], live: Collection[fx.Node]) -> None:
    """Hold what `split` promises, at every granularity.

    1. Every graph is well formed (`graph.lint`), holds no tap, and no operator in it mixes float types.
    2. Every tap is consumed: no site is computed in the forecast graph.
    3. There is no attention in the forecast graph.
    4. Nor is there a product, of tensors or with a weight, that belongs to the blocks: what `stack.output` is computed
       from and `stack.input` is not. What stands before the blocks (the embedders of the latent) and behind them (the
       final norm and the head) is live on every step, and so is what the timestep moves, not the latent, and fits in
       no table: a row for each frame, or of a batch of one size.
    5. Nor is there a row of the text, or of anything else whose number no latent has.

    Args:
        trace: What the graphs were derived from.
        graphs: All of them.
        live: The nodes of the trace that the forecast graph computes.

    Raises:
        ExportError: The family's `sites` are not complete; it names the modules that are left over.
    """
    for cut in graphs:
        cut.module.graph.lint()
        wrong = [str(node.args[1]) for node in cut.module.graph.nodes if is_tap(node)] + _mixed_types(cut)
        if wrong:
            raise ExportError(
                f"graph `{cut.name}` holds {wrong[0]}, expected no tap and one float type for each operator; report "
                "it, and export with --precision fp32 until it is mended"
            )
    taps = trace.taps()
    blocks = upstream([taps[STACK_OUTPUT]]) - upstream([taps[STACK_INPUT]])
    latent = {size for spec in trace.inputs if spec.role == "latent" for entry in spec.shape for size in names(entry)}
    sites = {taps[name]: name for name in trace.sites if name in taps}

    of_step = _of_step(trace)

    def left(node: fx.Node) -> bool:
        product = node in blocks - of_step and _operator(node) in _PRODUCTS
        foreign = _sizes(trace, node) - latent - {"batch"}
        return node in sites or product or _operator(node) in _ATTENTIONS or bool(foreign)

    found = [sites[node] if node in sites else _module(node, trace.sites) for node in _first(live, left)]
    found = list(dict.fromkeys(found))
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ExportError(
            f"the forecast graph is left with {', '.join(f'`{name}`' for name in found[:_NAMED])}{more}, expected no "
            "attention, no MLP and no text of the blocks in it; add their modules to the family's `sites`, see "
            "families/README.md"
        )


def _of_step(trace: Trace) -> set[fx.Node]:
    """The nodes that the timestep moves and the latent does not."""
    roles = {spec.name: spec.role for spec in trace.inputs}
    behind: dict[str, set[fx.Node]] = {"step": set(), "latent": set()}
    for node in trace.module.graph.nodes:
        for role, found in behind.items():
            own = node.op == "placeholder" and roles.get(str(node.target)) == role
            if own or (not is_size(node) and any(source in found for source in node.all_input_nodes)):
                found.add(node)
    return behind["step"] - behind["latent"]


def _first(live: Collection[fx.Node], wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The wanted nodes with no other between them and the output, in graph order: what lies behind follows from them.

    An attention that was left reads the text, and that the blocks before; the attention is what a declaration lacks.
    """
    found = set()
    stack = [node for node in live if not any(user in live for user in node.users)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if wanted(node):
            found.add(node)
            continue
        more = {source for source in node.all_input_nodes if source in live} - seen
        seen |= more
        stack += more
    return sorted(found)


def _mixed_types(cut: Cut) -> list[str]:
    """The operators of a graph that read two float types. A node that was added returns what its first input is."""
    contract = iter(cut.inputs)
    types: dict[fx.Node, torch.dtype | None] = {}
    mixed = []
    for node in cut.module.graph.nodes:
        read = [types[source] for source in node.all_input_nodes]
        kinds = sorted({str(t).removeprefix("torch.") for t in read if t is not None and t.is_floating_point})
        if isinstance(node.target, torch._ops.OpOverload) and len(kinds) > 1:
            mixed.append(f"`{node.target}` of {' and '.join(kinds)} at `{node.name}`")
        if node.op == "placeholder":
            types[node] = getattr(torch, next(contract).dtype)
        elif node.op == "get_attr":
            types[node] = attrgetter(str(node.target))(cut.module).dtype
        elif node.target is aten.to.dtype:
            types[node] = node.args[1]
        elif "val" in node.meta:
            types[node] = getattr(node.meta["val"], "dtype", None)
        elif _operator(node) in ("", "sym_size"):
            types[node] = None
        else:
            types[node] = read[0]
    return mixed


def _operator(node: fx.Node) -> str:
    """Name of a node's operator without its overload; empty where it is none of torch."""
    return node.target.__name__.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def _sizes(trace: Trace, node: fx.Node) -> set[str]:
    """Dimensions that the sizes of a node's tensor are computed from."""
    value = node.meta.get("val")
    shape: Collection[Any] = value.shape if isinstance(value, torch.Tensor) else ()
    symbols = {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    return {trace.names.get(symbol, str(symbol)) for symbol in symbols}


def _module(node: fx.Node, sites: Collection[str]) -> str:
    """Path of the outermost module around a node that holds no site: the one that a declaration would name."""
    paths = [path for path in module_paths(node) if path]
    around = [path for path in paths if not any(f"{site}.".startswith(f"{path}.") for site in sites)]
    return next(iter(around or paths[::-1]), node.name)
