"""Graphs as eager torch modules with their real weights: the reference that engines are compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from taylorseer_export.build.export import Draft


def eager_modules(plan: Draft) -> dict[str, fx.GraphModule]:
    """Graph name -> module whose parameters hold the checkpoint's weights; needs memory for all of them."""
    weights = {}
    for name, (dtype, _) in plan.stored.items():
        value = plan.buffers[name] if name in plan.buffers else plan.checkpoint.tensor(name)
        weights[name] = value.to(dtype)
    modules = {}
    for cut in plan.split.graphs:
        module = fx.GraphModule(_holder({n: weights[n] for n in cut.parameters()}), copy.copy(cut.module.graph))
        modules[cut.name] = module.eval()
    return modules


def _holder(tensors: dict[str, torch.Tensor]) -> nn.Module:
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
