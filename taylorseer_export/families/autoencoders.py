"""What the VAEs of several families have in common, in a form that exports."""

from __future__ import annotations

from typing import Any


def all_seen(*sizes: Any, **options: Any) -> None:
    """`prepare_causal_attention_mask` of one frame, where every pixel sees every other: none. diffusers makes one of
    zeros, by a number of pixels that is known when it runs."""


def past_seen(frames: Any, pixels: Any, dtype: Any, device: Any, batch_size: Any = None) -> Any:
    """The same of several, `[1, F P, F P]`: 0 where a pixel sees its own frame and those before, else minus infinity.

    diffusers repeats each frame by a number that is known when it runs, for which ONNX has no sound form, or makes the
    mask row by row.
    """
    import torch

    frame = torch.arange(frames, device=device).unsqueeze(1).expand(frames, pixels).flatten()
    return torch.where(frame.unsqueeze(0) <= frame.unsqueeze(1), 0.0, -float("inf")).to(dtype).unsqueeze(0)
