"""Attention masks as small as attention takes them: what is there twice is left out, and so is what leaves nothing out.

    mask[b, 1, 1, k] repeated for every query, or every head      becomes   mask[b, 1, 1, k]
    mask[b, k] and mask[b, q], of which both must count                     mask[b, k]
    ones, or zeros where they are added to the scores                       none

In the second, rows change that see nothing at all: the softmax of nothing, which torch makes 0 and other engines no
number. Here they see what the others do. A mask of 480p video has 10^9 entries if it has a row for every query.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

from taylorseer_export.families.family import replaced
from taylorseer_export.graph.merge import merge_equal
from taylorseer_export.graph.rewrite import call
from taylorseer_export.graph.sizes import equal

aten = torch.ops.aten
_AS_IT_IS = (aten.view.default, aten.reshape.default, aten.clone.default, aten.contiguous.default)
_BOTH = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_POINTWISE = (
    *_BOTH, aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, aten.add.Tensor, aten.sub.Tensor,
    aten.rsub.Scalar, aten.to.dtype, aten.logical_not.default, aten.bitwise_not.default, aten.eq.Scalar,
    aten.ne.Scalar, aten.gt.Scalar,
)  # fmt: skip
_FILLED = {
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
}
_MOVES = (
    *_AS_IT_IS, aten.expand.default, aten.repeat.default, aten.unsqueeze.default, aten.flatten.using_ints,
    aten.transpose.int, aten.slice.Tensor, aten.to.dtype,
)  # fmt: skip
_ARITHMETIC: Mapping[Any, Callable[[Any, Any], Any]] = {
    aten.rsub.Scalar: lambda a, b: b - a, aten.sub.Tensor: operator.sub, aten.mul.Tensor: operator.mul,
    aten.add.Tensor: operator.add, aten.eq.Scalar: operator.eq, aten.ne.Scalar: operator.ne,
    aten.gt.Scalar: operator.gt, aten.__and__.Tensor: operator.and_, aten.logical_and.default: operator.and_,
}  # fmt: skip


def small_masks(graph: fx.Graph) -> None:
    """Give every attention the smallest mask that says the same, in place of the graph."""
    attentions = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default and _mask(n)]
    merge_equal(graph, _cone(graph, attentions))
    made: dict[fx.Node, fx.Node] = {}
    for node in attentions:
        mask = _of_keys(_small(graph, _mask(node), made))
        nothing = 1 if mask.meta["val"].dtype == torch.bool else 0
        _set_mask(node, None if _constant(mask) == nothing else mask)
    merge_equal(graph, _cone(graph, [node for node in attentions if _mask(node)]))


@contextmanager
def expanded_masks(model: nn.Module) -> Iterator[None]:
    """diffusers' `Attention` with masks [B, 1, T, T] expanded to H heads, [B, H, T, T], and [B, 1, T] to [B H, 1, T].

    The original repeats them with `repeat_interleave(output_size=)`, for which torch 2.11 asks for a number: that would
    fix the batch of the trace.
    """

    def prepared(attention: Any) -> Callable[..., Any]:
        original, heads = attention.prepare_attention_mask, attention.heads

        def prepare(mask: Any, length: Any, batch: Any, out_dim: int = 3) -> Any:
            if mask is not None and mask.ndim == 4 and mask.shape[1] == 1:
                return mask.expand(-1, heads, -1, -1)
            if mask is not None and mask.ndim == out_dim == 3 and (mask.shape[0], mask.shape[2]) == (batch, length):
                return mask.unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 1)
            return original(mask, length, batch, out_dim)

        return prepare

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "prepare_attention_mask") and hasattr(module, "heads"):
                stack.enter_context(replaced(module, prepare_attention_mask=prepared(module)))
        yield


def _mask(attention: fx.Node) -> Any:
    return attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")


def _set_mask(attention: fx.Node, mask: fx.Node | None) -> None:
    if len(attention.args) > 3:
        attention.update_arg(3, mask)
    else:
        attention.update_kwarg("attn_mask", mask)


def _cone(graph: fx.Graph, attentions: list[fx.Node]) -> list[fx.Node]:
    """What the masks are computed from, in the order of the graph; sizes are, and not what has them."""
    found: set[fx.Node] = set()
    stack = [_mask(node) for node in attentions]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not isinstance(node.meta.get("val"), torch.SymInt):
                stack += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _small(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node that broadcasts to this one, of as many sizes 1 as are found."""
    if node not in made:
        source: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is not None and _only_repeats(node, source):
            made[node] = _small(graph, source, made)
        elif node.target in (*_POINTWISE, aten.transpose.int, aten.unsqueeze.default):
            made[node] = _redone(graph, node, made)
        else:
            made[node] = node
    return made[node]


def _redone(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node on smaller inputs, if there are any: of as many sizes as before, so that they broadcast alike."""
    args = fx.map_arg(node.args, lambda n: _small(graph, n, made) if isinstance(_value(n), torch.Tensor) else n)
    if args == node.args:
        return node
    with graph.inserting_before(node.next):
        return call(graph, node.target, args, node.kwargs, like=node)


def _only_repeats(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is its source, repeated where that has size 1."""
    if not isinstance(_value(source), torch.Tensor) or _value(source).ndim != _value(node).ndim:
        return False
    pairs = list(zip(_value(source).shape, _value(node).shape, strict=True))
    if node.target in _AS_IT_IS:
        return all(equal(old, new) for old, new in pairs)
    if node.target in (aten.expand.default, aten.expand_as.default, aten.repeat.default):
        return all(equal(old, new) or equal(old, 1) for old, new in pairs)
    return False


def _of_keys(mask: fx.Node) -> fx.Node:
    """The mask of the keys alone, of one that asks the same of the queries."""
    if mask.target in _BOTH and len(mask.all_input_nodes) == 2:
        for keys, queries in (mask.all_input_nodes, mask.all_input_nodes[::-1]):
            if equal(_value(keys).shape[-2], 1) and _turned(keys, queries) and _value(keys).dtype == torch.bool:
                return keys
    return mask


def _turned(keys: fx.Node, queries: fx.Node) -> bool:
    """Whether two nodes hold the same numbers, one as a row and one as a column."""
    *many, row, column = _value(keys).shape
    shape = _value(queries).shape
    swapped = len(shape) == len(many) + 2 and all(map(equal, shape, (*many, column, row)))
    if not swapped:
        return False
    if queries.target is aten.transpose.int and queries.args[0] is keys:
        return True
    one = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
    return keys.target in one and queries.target in one and keys.args[0] is queries.args[0]


def _constant(node: Any) -> Any:
    """The one number that a tensor holds everywhere, whatever its sizes are; None if it may hold others."""
    if isinstance(node, int | float):
        return node
    if not isinstance(node, fx.Node):
        return None
    if node.target in _FILLED:
        return _FILLED[node.target]
    if node.target is aten.full.default:
        return _constant(node.args[1])
    if node.target in _MOVES:
        return _constant(node.args[0])
    if node.target is aten.cat.default:
        values = {_constant(part) for part in node.args[0]}  # type: ignore[union-attr]
        return values.pop() if len(values) == 1 else None
    if node.target in _ARITHMETIC and len(node.args) == 2:
        values = [_constant(value) for value in node.args]  # type: ignore[assignment]
        return None if None in values else _ARITHMETIC[node.target](*values)
    return None


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")
