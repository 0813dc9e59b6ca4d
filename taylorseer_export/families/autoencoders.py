"""What the VAEs of several families have in common, in a form that exports."""

from __future__ import annotations

from typing import Any

from taylorseer_export.families.whole import unit


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


def of_tokens(vae: Any) -> tuple[Any, Any]:
    """Mean and deviation of each channel of a token of FLUX.2's VAE, which is 2 x 2 latent pixels: `[4 C]` each."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


def picture_of_tokens(vae: Any, latents: Any) -> Any:
    """Its latents `[1, C, H, W]` -> `[1, 3, height, width]`. Every other row and column of pixels has one deviation."""
    import torch

    rows, columns = (torch.arange(extent) % 2 for extent in latents.shape[2:])
    mean, deviation = (of.view(1, -1, 2, 2)[:, :, rows][:, :, :, columns] for of in of_tokens(vae))
    return unit(vae.decode(latents * deviation + mean, return_dict=False)[0])
