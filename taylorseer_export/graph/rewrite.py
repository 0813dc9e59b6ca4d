"""Rewrites: regions, casts, masks and empty tensors in the few operators that every engine has."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from taylorseer_export.errors import ExportError

aten = torch.ops.aten
TO_THE_END = 2**63 - 1


def inlined(module: fx.GraphModule) -> None:
    """Put the operators of regions without autocast, or without gradients, in the place of the region.

    Nothing here is traced under autocast, and nothing is differentiated: such a region changes no number.

    Raises:
        ExportError: A region turns autocast on.
    """
    graph = module.graph
    while regions := [node for node in graph.nodes if _is_region(node)]:
        for node in regions:
            place = next(k for k, source in enumerate(node.args) if _is_graph(source))
            if "autocast" in str(node.target) and node.args[2]:
                raise ExportError(
                    f"the model turns autocast on at `{node.name}`, expected casts that it makes itself; put the "
                    "model's part into casts in `patched` of its family"
                )
            inner: Any = module.get_submodule(str(_args(node)[place].target))
            for name, value in (*inner.named_buffers(), *inner.named_parameters()):
                if not hasattr(module, name):
                    module.register_buffer(name, value)
            placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
            with graph.inserting_before(node):
                values: Any = graph.graph_copy(
                    inner.graph, dict(zip(placeholders, _args(node)[place + 1 :], strict=True))
                )
            values = values if isinstance(values, tuple | list) else (values,)
            for user in list(node.users):
                user.replace_all_uses_with(values[_args(user)[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and any(map(_is_graph, node.args))


def _is_graph(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target).startswith("submod_")


def plain(graph: fx.Graph) -> None:
    """Casts to the dtype of another tensor as casts, masks filled with a boolean as logical operators, and masks padded
    with one as concatenations."""
    for node in list(graph.nodes):
        if node.target is aten.type_as.default:
            source, dtype = _args(node)[0], node.meta["val"].dtype
            if source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
            else:
                _replace(graph, node, aten.to.dtype, [source, dtype])
        elif node.target is aten.masked_fill.Scalar and node.meta["val"].dtype == torch.bool:
            values, mask, fill = _args(node)
            if fill:
                _replace(graph, node, aten.logical_or.default, [values, mask])
                continue
            with graph.inserting_before(node):
                kept = call(graph, aten.logical_not.default, [mask], like=node)
            _replace(graph, node, aten.logical_and.default, [values, kept])
        elif node.target is aten.pad.default and node.meta["val"].dtype == torch.bool:
            _padded_mask(graph, node)


def alone(graph: fx.Graph) -> None:
    """One tensor padded to the longest of one as itself, with a dimension of size 1 for the one."""
    for node in list(graph.nodes):
        if node.target is aten.pad_sequence.default and len(_args(node)[0]) == 1:
            first = len(node.args) > 1 and node.args[1]
            _replace(graph, node, aten.unsqueeze.default, [_args(node)[0][0], 0 if first else 1])


def _padded_mask(graph: fx.Graph, node: fx.Node) -> None:
    """`pad(mask, (before, behind), value=)` along the last dimension as a concatenation."""
    mask, pads, *rest = _args(node)
    if len(pads) != 2 or rest[:1] not in ([], ["constant"]):
        return
    filled = aten.new_ones.default if len(rest) > 1 and rest[1] else aten.new_zeros.default
    last = mask.meta["val"].ndim - 1
    with graph.inserting_before(node):
        shape = [
            call(graph, aten.sym_size.int, [mask, k]) if isinstance(size, torch.SymInt) else size
            for k, size in enumerate(mask.meta["val"].shape[:last])
        ]
        before, behind = (
            [] if count == 0 else [call(graph, filled, [mask, [*shape, count]], like=node)] for count in pads
        )
    _replace(graph, node, aten.cat.default, [[*before, mask, *behind], last])


def without_empty(graph: fx.Graph) -> None:
    """Tensors without an element left out of concatenations, and no concatenation that is cut where it was joined.

    A family may call its model on some of its rows alone, with none of the others: so nothing of those is left.
    """
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            parts = [part for part in _args(node)[0] if not _is_empty(part.meta["val"])]
            if len(parts) == 1 < len(_args(node)[0]):
                node.replace_all_uses_with(parts[0])
                graph.erase_node(node)
            elif parts:
                node.update_arg(0, parts)
        elif node.target is operator.getitem and (part := _joined(*_args(node))) is not None:
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _joined(pieces: fx.Node, place: int) -> fx.Node | None:
    """The tensor that stands at this place among the pieces of another, if it was there before."""
    if pieces.target is aten.split_with_sizes.default:
        others = [value for k, value in enumerate(pieces.meta["val"]) if k != place]
        return _args(pieces)[0] if all(map(_is_empty, others)) else None
    if pieces.target is not aten.chunk.default:
        return None
    source, count, dim = (*_args(pieces), 0)[:3]
    if source.target is not aten.cat.default:
        return None
    parts, joined_at = (*_args(source), 0)[:2]
    rank = source.meta["val"].ndim
    extents = [part.meta["val"].shape[dim] for part in parts]
    alike = all(isinstance(extent, int) and extent == extents[0] for extent in extents)
    return parts[place] if alike and len(parts) == count and (dim - joined_at) % rank == 0 else None


def _is_empty(value: torch.Tensor) -> bool:
    """Whether it has no element, whatever the sizes of a request are."""
    return any(isinstance(size, int) and size == 0 for size in value.shape)


def unseeing_rows(graph: fx.Graph) -> None:
    """Let attention of a row whose mask shows it nothing be zero, as in torch; engines take the mean of all rows.

    Such are the rows of padding in front of a prompt.
    """
    blind: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = node.kwargs.get("attn_mask") if len(node.args) < 4 else node.args[3]
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
            continue
        if mask not in blind:
            with graph.inserting_before(node):
                sees = call(graph, aten.any.dim, [mask, -1, True], like=node)
                blind[mask] = call(graph, aten.logical_not.default, [sees], like=node)
        with graph.inserting_after(node):
            made = call(graph, aten.masked_fill.Scalar, [node, blind[mask], 0.0], like=node)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)


def call(
    graph: fx.Graph,
    target: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """Add a call node whose fake value is known, so that later passes can ask for its shape."""
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    values, options = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with enable_python_dispatcher():  # torch 2.11 asks numbers of open sizes without
        node.meta["val"] = target(*values, **options)
    if like is not None:
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
    return node


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: Sequence[Any]) -> None:
    with graph.inserting_before(node):
        node.replace_all_uses_with(call(graph, target, args, like=node))
    graph.erase_node(node)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
