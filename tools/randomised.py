"""Random weights that make a tiny model behave like a trained one; nothing of the package is imported here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

_OF_TIME = (
    "timestep_embedder.linear_1.weight",
    "time_embedder.linear_1.weight",
    "t_embedder.mlp.0.weight",
    "time_embed.linear_1.weight",
    "time_embedding.linear_1.weight",
    "time_embeddings.in_layer.weight",
)


def randomised(build: Callable[[], torch.nn.Module], seed: int) -> Any:
    """What `build` returns, in eval mode, with weights of a trained model's scale, on whatever device it was built.

    Gates are of order one and norm weights are not exactly one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                centre = float(not name.endswith("bias") and bool(parameter.any()))  # some norms add 1 to their weight
                parameter.data = 0.1 * noise + centre
            elif "embedding_table" in name or name.startswith("motion_encoder"):  # which divides by this root itself
                parameter.data = noise
            else:
                parameter.data = noise / math.sqrt(parameter[0].numel())
            if name.endswith(_OF_TIME):
                parameter.data *= low_pass(parameter.shape[1]).to(parameter)
            elif name.endswith("distilled_guidance_layer.in_proj.weight"):  # a quarter of its columns is of the time
                quarter = parameter.shape[1] // 4
                parameter.data[:, :quarter] *= low_pass(quarter).to(parameter)
    return model


def low_pass(channels: int, cutoff: float = 3e-3) -> torch.Tensor:
    """Column factors [channels] that leave angular frequencies below `cutoff` per unit timestep."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    keep = 1 / (1 + (frequency / cutoff) ** 2)
    return (keep / keep.square().mean().sqrt()).repeat(2)
