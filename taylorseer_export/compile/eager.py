"""Graphs as torch modules with their real weights: what torch compiles, and the reference engines are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from taylorseer_export.compile.draft import BaseDraft
from taylorseer_export.graph.cut import Cut, identifier

aten = torch.ops.aten


def eager_modules(plan: BaseDraft) -> dict[str, fx.GraphModule]:
    """Graph name -> module whose parameters hold the checkpoint's weights; needs memory for all of them."""
    weights = {name: plan.read(name).to(dtype) for name, (dtype, _) in plan.stored.items()}
    return {cut.name: weighted(cut, weights) for cut in plan.graphs}


def weighted(cut: Cut, weights: Mapping[str, torch.Tensor], device: str = "cpu") -> fx.GraphModule:
    """One graph as a module that holds `weights`, its tensors made where they are.

    Args:
        cut: The graph.
        weights: Checkpoint name -> tensor; shared, never copied.
        device: Where they and the inputs are.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(cut.module.graph, {}))
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda a: _moved(a, device))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: _moved(a, device))
    return fx.GraphModule(_holder({n: weights[n] for n in cut.parameters()}), graph).eval()


def writing(module: fx.GraphModule, cut: Cut) -> fx.GraphModule:
    """The module in a form that takes its outputs as further inputs and writes them in place.

    The compilers put the write into the kernel that computes the value, so a bound call allocates nothing it returns.
    """
    graph = fx.Graph()
    values = graph.graph_copy(module.graph, {})
    assert isinstance(values, tuple), "bug in taylorseer-export: a graph without a tuple of outputs"
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    targets = []
    for tensor in cut.outputs:
        with graph.inserting_after(last):
            last = graph.placeholder(f"out__{identifier(tensor.name)}")
        targets.append(last)
    for target, value in zip(targets, values, strict=True):
        graph.call_function(aten.copy_.default, (target, value))
    graph.output(())
    return fx.GraphModule(module, graph).eval()


def pointwise_sums(module: fx.GraphModule) -> fx.GraphModule:
    """The module with every forecast as a sum of scaled snapshots instead of a product of matrices.

    As `[1, M] @ [M, elements]` it would run alone, over a float32 copy of the buffer. As pointwise arithmetic it joins
    the gates, the residual adds and the norms around it in one kernel that reads each snapshot once.
    """
    graph = module.graph
    row = next((n for n in graph.nodes if n.target is aten.unsqueeze.default and n.args[0].target == "weights"), None)
    for product in list(row.users) if row is not None else []:
        assert product.target is aten.matmul.default, "bug in taylorseer-export: weights outside a forecast"
        with graph.inserting_before(product):
            _replace_product(graph, product)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _replace_product(graph: fx.Graph, product: fx.Node) -> None:
    """`reshape(cast(weights @ cast(flatten(buffer))))` becomes `cast(sum(weights * cast(buffer), 0))`."""
    row, entries = product.args
    weights = row.args[0]  # type: ignore[union-attr]
    chain = [entries]
    while chain[-1].target is not aten.flatten.using_ints:  # type: ignore[union-attr]
        chain.append(chain[-1].args[0])  # type: ignore[union-attr]
    buffer = chain[-1].args[0]  # type: ignore[union-attr]
    make = graph.call_function
    wide = buffer if len(chain) == 1 else make(aten.to.dtype, (buffer, torch.float32))
    (after,) = product.users
    cast = after if after.target is aten.to.dtype else None
    (reshaped,) = cast.users if cast is not None else (after,)
    rank = len(reshaped.args[1]) + 1  # type: ignore[arg-type]
    factors = make(aten.reshape.default, (weights, [-1, *[1] * (rank - 1)]))
    value = make(aten.sum.dim_IntList, (make(aten.mul.Tensor, (factors, wide)), [0]))
    if cast is not None:
        value = make(aten.to.dtype, (value, cast.args[1]))
    reshaped.replace_all_uses_with(value)


def _moved(value: Any, device: str) -> Any:
    return torch.device(device) if isinstance(value, torch.device) else value


def _holder(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module tree that has each tensor as a buffer under its dotted name."""
    root = nn.Module()
    for name, tensor in tensors.items():
        owner: Any = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, tensor)
    return root
