"""Complex numbers as pairs of real ones: rotary embeddings that rotate by them become operators that every engine has.

    view_as_complex(x)   becomes   x[..., 0] and x[..., 1]
    polar(r, a)                    r cos(a) and r sin(a); without r where that is ones
    z w                            re z re w - im z im w and re z im w + im z re w
    view_as_real(z)                stack([re z, im z], -1)

Those are the products that torch forms, too. What only moves numbers moves both parts, and a table of the model's code
becomes two. What several blocks do alike to one table is done once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from taylorseer_export.errors import ExportError
from taylorseer_export.graph.merge import merge_equal
from taylorseer_export.graph.rewrite import call

aten = torch.ops.aten
_MOVES = frozenset(
    {
        operator.getitem, aten.alias.default, aten.cat.default, aten.chunk.default, aten.clone.default,
        aten.contiguous.default, aten.detach.default, aten.expand.default, aten.expand_as.default,
        aten.flatten.using_ints, aten.flip.default, aten.gather.default, aten.index.Tensor, aten.index_select.default,
        aten.movedim.int, aten.narrow.default, aten.neg.default, aten.permute.default, aten.repeat.default,
        aten.repeat_interleave.self_int, aten.reshape.default, aten.select.int, aten.slice.Tensor,
        aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default, aten.squeeze.dim, aten.stack.default,
        aten.sum.dim_IntList, aten.transpose.int, aten.unbind.int, aten.unflatten.int, aten.unsqueeze.default,
        aten.view.default, aten.where.self, aten.zeros_like.default,
    }
)  # fmt: skip
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SAME = (aten.resolve_conj.default, aten.resolve_neg.default)
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
Pair = tuple[fx.Node, fx.Node]


def real(module: fx.GraphModule) -> None:
    """Replace every operator on complex numbers by operators on real ones, in place of the graph.

    Raises:
        ExportError: An operator on complex numbers is none of those that have such a form here.
    """
    graph = module.graph
    pairs: dict[fx.Node, Pair] = {}
    before = set(graph.nodes)
    for node in list(graph.nodes):
        reads = any(source in pairs for source in node.all_input_nodes)
        if not reads and not _is_complex(node):
            continue
        with graph.inserting_before(node):
            if _is_complex(node):
                pairs[node] = _pair(module, node, pairs)
            else:
                node.replace_all_uses_with(_value(graph, node, pairs))
    for node in reversed(list(graph.nodes)):
        if node in before and (node in pairs or any(source in pairs for source in node.all_input_nodes)):
            graph.erase_node(node)
    merge_equal(graph, [node for node in graph.nodes if node not in before])


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in values)


def _pair(module: fx.GraphModule, node: fx.Node, pairs: dict[fx.Node, Pair]) -> Pair:
    """Real and imaginary part of a complex node."""
    graph = module.graph
    args: Any = node.args

    def make(target: Any, *values: Any, **options: Any) -> fx.Node:
        return call(graph, target, values, options, like=node)

    if node.op == "get_attr":
        return _table(module, node)
    if node.target is aten.view_as_complex.default:
        numbers = make(aten.unbind.int, args[0], -1)
        return make(operator.getitem, numbers, 0), make(operator.getitem, numbers, 1)
    if node.target is aten.complex.default:
        return args[0], args[1]
    if node.target is aten.polar.default:
        radius, angle = args
        turned = make(aten.cos.default, angle), make(aten.sin.default, angle)
        if radius.target is aten.ones_like.default and radius.args[0] is angle:
            return turned
        return make(aten.mul.Tensor, radius, turned[0]), make(aten.mul.Tensor, radius, turned[1])
    if node.target in _SAME:
        return pairs[args[0]]
    if node.target is aten._conj.default:
        return pairs[args[0]][0], make(aten.neg.default, pairs[args[0]][1])
    if node.target is aten.to.dtype:
        one, other = _parts(graph, args[0], pairs)
        return make(aten.to.dtype, one, _REAL[args[1]]), make(aten.to.dtype, other, _REAL[args[1]])
    if node.target is aten.zeros.default:
        kind = {**node.kwargs, "dtype": _REAL[node.meta["val"].dtype]}
        with node.meta["val"].fake_mode:
            return make(aten.zeros.default, *args, **kind), make(aten.zeros.default, *args, **kind)
    if node.target is aten.mul.Tensor and all(source in pairs for source in args):
        (a, b), (c, d) = (pairs[source] for source in args)
        return (
            make(aten.sub.Tensor, make(aten.mul.Tensor, a, c), make(aten.mul.Tensor, b, d)),
            make(aten.add.Tensor, make(aten.mul.Tensor, a, d), make(aten.mul.Tensor, b, c)),
        )
    both = node.target in _SUMS and all(source in pairs for source in args)
    scaled = node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and args[1] not in pairs)
    if node.target in _MOVES or both or (scaled and not any(isinstance(factor, complex) for factor in args)):

        def of(part: int) -> fx.Node:
            values, options = fx.map_arg((args, node.kwargs), lambda n: pairs[n][part] if n in pairs else n)
            return make(node.target, *values, **options)

        return of(0), of(1)
    raise _unknown(node)


def _parts(graph: fx.Graph, node: Any, pairs: dict[fx.Node, Pair]) -> Pair:
    return pairs[node] if node in pairs else (node, call(graph, aten.zeros_like.default, [node], like=node))


def _value(graph: fx.Graph, node: fx.Node, pairs: dict[fx.Node, Pair]) -> fx.Node:
    """What a node computes that takes complex numbers and returns none."""
    source: Any = node.args[0] if node.args else None
    if node.target is aten.view_as_real.default:
        return call(graph, aten.stack.default, [list(pairs[source]), -1], like=node)
    if node.target in (aten.real.default, aten.imag.default):
        return pairs[source][node.target is aten.imag.default]
    raise _unknown(node)


def _table(module: fx.GraphModule, node: fx.Node) -> Pair:
    """Two buffers in the place of one of complex numbers, which the model's code made."""
    owner, _, leaf = str(node.target).rpartition(".")
    table = getattr(module.get_submodule(owner), leaf)
    made: list[fx.Node] = []
    for name, part in (("real", table.real), ("imaginary", table.imag)):
        buffer = f"{node.name}_{name}"
        module.register_buffer(buffer, part.clone())
        made.append(module.graph.get_attr(buffer))
        made[-1].meta = {**node.meta, "val": getattr(node.meta["val"], "real" if name == "real" else "imag").clone()}
    return made[0], made[1]


def _unknown(node: fx.Node) -> ExportError:
    return ExportError(
        f"operator `{node.target}` at `{node.name}` takes complex numbers, expected a rotation by them, or a move; put "
        "the model's part into real numbers in `patched` of its family"
    )
