"""Wan 2.1 VACE: Wan whose blocks are given hints, which blocks of their own make of a video, a mask and pictures.

A hint is a site: what stands before it has no other way to the hidden state, so that a forecast step runs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Input, no_counterpart
from taylorseer_export.families.wan import WAN, encoded
from taylorseer_export.families.whole import Controlled, Modules, Tensors


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if config["image_dim"] is not None:
        raise ConfigError(
            f"config entry `image_dim` is {config['image_dim']}, expected none, as of the published VACE models, whose "
            "pipeline shows pictures to no image encoder; pass one of them"
        )
    latent, *others = WAN.inputs(config)
    control = ("batch", config["vace_in_channels"], *latent.shape[2:])
    return (
        latent,
        *others,
        Input("control_hidden_states", control, "constant"),
        Input("control_hidden_states_scale", (len(config["vace_layers"]),), "constant", fill="ones"),
    )


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """One latent frame of the control: latents of what stays, latents of what is made anew, and what of it is.

    Both go through the encoder side by side, grey where they have nothing; every pixel of the mask is a channel.
    """
    import torch

    vae, anew = modules["vae"], given["mask"]
    video = 2 * (given["picture"].unsqueeze(2) if caches is None else given["video"]) - 1
    latents, used = encoded(vae, torch.cat([video * (1 - anew), video * anew]), caches)
    side = vae.config.scale_factor_spatial
    squares = given["shown"].unflatten(4, (-1, side)).unflatten(3, (-1, side))  # [1, 1, 1, H, side, W, side]
    told = squares.squeeze(1).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    return {"control_hidden_states": torch.cat([latents[:1], latents[1:], told], 1)}, used


assert WAN.whole is not None


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("boundary_ratio") is not None:
        return {"whole": None}  # two transformers, of which a bundle holds one
    controlled = Controlled(
        "video", "mask", "shown", "control_hidden_states", config.get("out_channels", 16), pictures=8
    )
    return {"whole": replace(_WHOLE, controlled=controlled)}


_WHOLE = replace(WAN.whole, animate=_animate)

WAN_VACE = replace(
    WAN,
    name="wan-vace",
    title="Wan 2.1 VACE",
    model_class="WanVACETransformer3DModel",
    reference="Wan-AI/Wan2.1-VACE-14B-diffusers",
    sites=(*WAN.sites, r"vace_blocks\.\d+\.proj_out"),
    inputs=_inputs,
    comfy=no_counterpart,
    whole=_WHOLE,
    by_config=_by_config,
    variants={},
)
