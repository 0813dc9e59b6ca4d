"""Wan 2.1 VACE: Wan whose blocks are given hints, which blocks of their own make of a video, a mask and pictures.

A hint is a site: what stands before it has no other way to the hidden state, so that a forecast step runs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Input, no_counterpart, no_entries
from taylorseer_export.families.wan import WAN


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


WAN_VACE = replace(
    WAN,
    name="wan-vace",
    title="Wan 2.1 VACE",
    model_class="WanVACETransformer3DModel",
    reference="Wan-AI/Wan2.1-VACE-14B-diffusers",
    sites=(*WAN.sites, r"vace_blocks\.\d+\.proj_out"),
    inputs=_inputs,
    comfy=no_counterpart,
    whole=None,
    by_config=no_entries,
    variants={},
)
