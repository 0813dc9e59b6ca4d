"""Writes: what models write in place as plain functional operators.

A rotary embedding fills an empty tensor element by element, an attention mask has one column set, and the rows of a
picture are turned in place. Each becomes a new tensor, so no graph of ours has a side effect:

    out[..., 0::2] = a;  out[..., 1::2] = b      becomes   flatten(stack(a, b))
    mask[..., k] = value                         becomes   cat(mask[..., :k], value, mask[..., k + 1:])
    query[:, a:b] = value                        becomes   cat(query[:, :a], value, query[:, b:])
    ids[..., k] = value                          becomes   the same of one column
    ids[i, a:b, k] = value                       becomes   the same of a part, put into what it is a part of, and so on
    rows[mask] *= factor                         becomes   where(mask, rows * factor, rows)

Whole tensors are changed too, as in `scores += bias`, which becomes `scores + bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from taylorseer_export.errors import ExportError
from taylorseer_export.graph.rewrite import TO_THE_END, call, mutates
from taylorseer_export.graph.sizes import is_size

aten = torch.ops.aten
_OUT_OF_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.index_put_.default: aten.index_put.default,
    aten.cumsum_.default: aten.cumsum.default,
    aten.scatter_add_.default: aten.scatter_add.default,
}


def functional(graph: fx.Graph) -> None:
    """Replace the writes above by new tensors, in place of the graph.

    Raises:
        ExportError: An operator changes a tensor in another way.
    """
    _choose_rows(graph)
    out_of_place(graph)
    done: list[fx.Node] = []
    for node in list(graph.nodes):
        if node in done:
            continue
        if node.target is aten.detach_.default:
            _drop_detach(graph, node)
        elif node.target is aten.fill_.Tensor and _is_column(node):
            done += _set_column(graph, node)
        elif node.target in (aten.fill_.Tensor, aten.fill_.Scalar):
            done += _set_part(graph, node)
        elif node.target is aten.copy_.default:
            done += _set_rows(graph, node) or _set_part(graph, node) or _interleave(graph, node)
    for node in graph.nodes:
        if mutates(node):
            _refuse(node)


def out_of_place(graph: fx.Graph) -> None:
    """Write `x += y` as `x + y`, in place of the graph, where x is a new tensor that nothing else has read, and so on.

    Other writes are left.
    """
    for node in list(graph.nodes):
        if node.target is aten.detach_.default:
            _drop_detach(graph, node)
        elif node.target in _OUT_OF_PLACE and not _shared(base := _args(node)[0], [], node):
            with graph.inserting_before(node):
                result = call(graph, _OUT_OF_PLACE[node.target], node.args, node.kwargs, like=node)
                if result.meta["val"].dtype != base.meta["val"].dtype:
                    result = call(graph, aten.to.dtype, [result, base.meta["val"].dtype], like=node)
            _finish(graph, base, result, [node])


def _drop_detach(graph: fx.Graph, node: fx.Node) -> None:
    """A tensor that is detached in place is what it was: nothing here is differentiated."""
    node.replace_all_uses_with(_args(node)[0])
    graph.erase_node(node)


def _set_column(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    """`base.select(dim, k).fill_(value)`: a tensor whose column k is the value."""
    view, value = _args(write)
    if view.target is not aten.select.int:
        _refuse(write)
    base, dim, column = _args(view)
    _check_unshared(base, [view], write)
    with graph.inserting_before(write):
        before = call(graph, aten.slice.Tensor, [base, dim, 0, column], like=write)
        old = call(graph, aten.slice.Tensor, [base, dim, column, column + 1], like=write)
        new = call(graph, aten.expand_as.default, [value, old], like=write)
        after = call(graph, aten.slice.Tensor, [base, dim, column + 1, TO_THE_END], like=write)
        parts = [before, new, after] if column else [new, after]
        result = call(graph, aten.cat.default, [parts, dim], like=write)
    return _finish(graph, base, result, [write])


def _set_rows(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    """`base[..., start:end].copy_(value)` over rows that follow on each other; nothing where it is another write.

    What was read of the base before keeps its old value, and what is read after has the new one, so no other tensor
    that shares its memory may be read after.
    """
    view, value = _args(write)[:2]
    while view.target is aten.slice.Tensor and _whole(view):
        view = _args(view)[0]
    one = view.target is aten.select.int and isinstance(view.args[2], int) and view.args[2] >= 0
    if not one and (view.target is not aten.slice.Tensor or (len(view.args) > 4 and view.args[4] != 1)):
        return []
    if one:
        base, dim, start = _args(view)
        end = start + 1 if start + 1 != base.meta["val"].shape[dim] else TO_THE_END
    else:
        base, dim, start, end = (*_args(view), *(0, 0, TO_THE_END)[len(view.args) - 1 :])[:4]
    while base.target is aten.slice.Tensor and _whole(base):
        base = _args(base)[0]
    for alias in _aliases(base, write) - {base}:
        late = [user for user in alias.users if write < user or user is write]
        if [user for user in late if user is not write and not _is_view(user)]:
            return []
    with graph.inserting_before(write):
        rows = view.meta["val"]
        if value.meta["val"].dtype != rows.dtype:
            value = call(graph, aten.to.dtype, [value, rows.dtype], like=write)
        if value.meta["val"].ndim < rows.ndim or any(
            a != b for a, b in zip(value.meta["val"].shape, rows.shape, strict=True)
        ):
            value = call(graph, aten.expand_as.default, [value, view], like=write)
        if one:
            value = call(graph, aten.unsqueeze.default, [value, dim], like=write)
        parts = [] if start == 0 else [call(graph, aten.slice.Tensor, [base, dim, 0, start], like=write)]
        parts.append(value)
        if end != TO_THE_END and end is not None:
            parts.append(call(graph, aten.slice.Tensor, [base, dim, end, TO_THE_END], like=write))
        result = call(graph, aten.cat.default, [parts, dim], like=write) if len(parts) > 1 else value
    return _finish(graph, base, result, [write])


def _is_column(write: fx.Node) -> bool:
    view = _args(write)[0]
    return view.target is aten.select.int and not _shared(_args(view)[0], [view], write)


def _set_part(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    """A write into a part of a part of a tensor, by numbers and ranges; nothing where it is another write.

    Each part is put into the one that it was taken of, up to the whole tensor. What was read of that before keeps its
    old value, so no part that was taken before may be read after.
    """
    view, value = _args(write)[:2]
    chain, base = [], view
    while base.target in (aten.select.int, aten.slice.Tensor):
        if base.target is aten.slice.Tensor and len(base.args) > 4 and base.args[4] != 1:
            return []
        chain.append(base)
        base = _args(base)[0]
    for alias in _aliases(base, write) - {base}:
        if any((write < user) and not _is_view(user) for user in alias.users):
            return []
    if not chain:
        return []
    with graph.inserting_before(write):
        part = view.meta["val"]
        if isinstance(value, fx.Node):
            if value.meta["val"].dtype != part.dtype:
                value = call(graph, aten.to.dtype, [value, part.dtype], like=write)
            value = call(graph, aten.expand_as.default, [value, view], like=write)
        else:
            value = call(graph, aten.full_like.default, [view, value], like=write)
        for taken in chain:
            value = _put(graph, taken, value, write)
    return _finish(graph, base, value, [write])


def _put(graph: fx.Graph, taken: fx.Node, value: fx.Node, write: fx.Node) -> fx.Node:
    """What a part was taken of, with the value in the part's place."""
    if taken.target is aten.select.int:
        whole, dim, start = _args(taken)
        start = start if start >= 0 else start + whole.meta["val"].shape[dim]
        value = call(graph, aten.unsqueeze.default, [value, dim], like=write)
        end = start + 1 if start + 1 != whole.meta["val"].shape[dim] else TO_THE_END
    else:
        if _whole(taken):
            return value
        whole, dim, start, end = (*_args(taken), *(0, 0, TO_THE_END)[len(taken.args) - 1 :])[:4]
        end = TO_THE_END if end is None else end
    parts = [] if start in (0, None) else [call(graph, aten.slice.Tensor, [whole, dim, 0, start], like=write)]
    parts.append(value)
    if end != TO_THE_END:
        parts.append(call(graph, aten.slice.Tensor, [whole, dim, end, TO_THE_END], like=write))
    return call(graph, aten.cat.default, [parts, dim], like=write) if len(parts) > 1 else value


def _choose_rows(graph: fx.Graph) -> None:
    """`rows[mask] = f(rows[mask])`, where f knows no other row, as a choice between f(rows) and rows."""
    for node in list(graph.nodes):
        if node.target is not aten.index_put_.default or len(_args(node)) > 3 or len(_args(node)[1]) != 1:
            continue
        base, (mask,), value = _args(node)
        steps = []
        while value.target in _OUT_OF_PLACE and not isinstance(value.args[1], fx.Node):
            steps.append(value)
            value = _args(value)[0]
        if mask.meta["val"].dtype != torch.bool or value.target is not aten.index.Tensor:
            continue
        if value.args != (base, [mask]):
            continue
        with graph.inserting_before(node):
            changed = base
            for step in reversed(steps):
                changed = call(graph, _OUT_OF_PLACE[step.target], [changed, *_args(step)[1:]], like=node)
            for _ in range(base.meta["val"].ndim - mask.meta["val"].ndim):
                mask = call(graph, aten.unsqueeze.default, [mask, -1], like=node)
            chosen = call(graph, aten.where.self, [mask, changed, base], like=node)
        _finish(graph, base, chosen, [node])
        for step in steps:
            graph.erase_node(step)


def _whole(view: fx.Node) -> bool:
    """Whether a slice takes all of what it slices."""
    _, _, start, end, step = (*view.args, *(0, 0, TO_THE_END, 1)[len(view.args) - 1 :])[:5]
    return bool(start in (0, None) and end == TO_THE_END and step == 1)


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or mutates(node):
        return False
    return any(result.alias_info for result in node.target._schema.returns)


def _aliases(node: fx.Node, write: fx.Node) -> set[fx.Node]:
    """All tensors that surely or possibly share the memory of one, but for what is taken of it after the write."""
    root = node
    while _is_view(root):
        root = root.all_input_nodes[0]
    found, stack = {root}, [root]
    while stack:
        taken = stack.pop()
        for user in taken.users:
            if _is_view(user) and user not in found and not (taken is node and write < user):
                found.add(user)
                stack.append(user)
    return found


def _interleave(graph: fx.Graph, write: fx.Node) -> list[fx.Node]:
    """The first of n writes `base[..., k::n].copy_(value)`, k = 0 to n - 1, which leave nothing of the base."""
    view, _ = _args(write)
    if view.target is not aten.slice.Tensor or len(view.args) < 5:
        _refuse(write)
    base, dim, *_, count = _args(view)
    views = [user for user in base.users if user.target is aten.slice.Tensor and len(user.args) == 5]
    writes = [next(iter(v.users)) for v in views]
    windows = [v.args for v in views]
    if windows != [(base, dim, k, TO_THE_END, count) for k in range(count)] or dim != base.meta["val"].ndim - 1:
        _refuse(write)
    if any(w.target is not aten.copy_.default or w.args[0] is not v for w, v in zip(writes, views, strict=True)):
        _refuse(write)
    _check_unshared(base, views, writes[-1])
    with graph.inserting_before(writes[-1]):
        stacked = call(graph, aten.stack.default, [[w.args[1] for w in writes], -1], like=write)
        result = call(graph, aten.flatten.using_ints, [stacked, -2], like=write)
        if result.meta["val"].dtype != base.meta["val"].dtype:
            result = call(graph, aten.to.dtype, [result, base.meta["val"].dtype], like=write)
    return _finish(graph, base, result, writes)


def _check_unshared(base: fx.Node, views: Sequence[fx.Node], write: fx.Node) -> None:
    if _shared(base, views, write):
        _refuse(write)


def _shared(base: fx.Node, views: Sequence[fx.Node], write: fx.Node) -> bool:
    """Whether a write may be seen through another tensor: the base does not own its memory, or was read before."""
    aliases = isinstance(base.target, torch._ops.OpOverload) and any(r.alias_info for r in base.target._schema.returns)
    early = [user for user in base.users if user not in views and user < write and not is_size(user)]
    return base.op != "call_function" or aliases or bool(early) or any(len(v.users) != 1 for v in views)


def _finish(graph: fx.Graph, base: fx.Node, result: fx.Node, writes: list[fx.Node]) -> list[fx.Node]:
    """Let all that reads the base after the last write read the result, and drop the writes, which are returned."""
    base.replace_all_uses_with(result, delete_user_cb=lambda user: writes[-1] < user)
    for write in writes:
        write.replace_all_uses_with(result)
        graph.erase_node(write)
    return writes


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _refuse(node: fx.Node) -> NoReturn:
    raise ExportError(
        f"operator `{node.target}` at `{node.name}` is in place, expected a functional graph; "
        "run the model's part out of place before exporting it"
    )
