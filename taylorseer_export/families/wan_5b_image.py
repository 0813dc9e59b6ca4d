"""Wan 2.2 TI2V-5B from a picture: its latents are the first frame, whose tokens have timestep 0.

The model modulates token by token; here two rows serve them, that of timestep 0 and that of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Input, Pipeline, call, no_counterpart, no_entries
from taylorseer_export.families.wan import WAN, encoded
from taylorseer_export.families.whole import Modules, Tensors

_CHANNELS = 48  # of the one Wan that is told the timestep of each token


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    seen = (config["in_channels"], config["out_channels"])
    if seen != (_CHANNELS, _CHANNELS):
        raise ConfigError(
            f"config entries `in_channels` and `out_channels` are {seen[0]} and {seen[1]}, expected {_CHANNELS} both: "
            "of all Wan, TI2V-5B alone takes a picture as its first frame; export the others as family wan"
        )
    return WAN.inputs(config)


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    made = WAN.dimensions(config)
    return {**made, "frames": (2, made["frames"][1])}


def _from_picture(model: Any, inputs: dict[str, Any]) -> Any:
    """As WanImageToVideoPipeline: a timestep for each token, 0 in the first frame."""
    import torch

    latents, time = inputs["hidden_states"], inputs["timestep"]
    frames, first = latents.shape[2], (latents.shape[3] // 2) * (latents.shape[4] // 2)  # tokens of a frame
    # Made of the latent, so that what is spread over tokens counts as of a step and is never kept for all of them; by
    # the places of frames, which are others on each rank.
    later = latents.new_zeros(frames, first) + (torch.arange(frames) > 0).to(latents.dtype)[:, None]
    later = later.reshape(1, frames * first) > 0
    still = inputs["encoder_hidden_states"].new_zeros(time.shape, dtype=time.dtype)  # a constant, looked at once
    return call(model, {**inputs, "timestep": torch.where(later, time[:, None], still[:, None])})


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """The latents of the picture, as the one frame that they replace."""
    latents, _ = encoded(modules["vae"], (2 * given["picture"] - 1).unsqueeze(2), None)
    return {"condition": latents}, []


assert WAN.whole is not None

WAN_5B_IMAGE = replace(
    WAN,
    name="wan-5b-image",
    title="Wan 2.2 TI2V-5B with a picture as its first frame",
    reference="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    inputs=_inputs,
    dimensions=_dimensions,
    scheduler_config={**WAN.scheduler_config, "flow_shift": 5.0},
    latent_scale=16,
    latent_size=(31, 44, 80),
    pipeline=Pipeline(flow_steps="count", arguments="first-frame"),
    comfy=no_counterpart,
    whole=replace(WAN.whole, animate=_animate, frame_rate=24),
    by_config=no_entries,
    variants={},
    forward=_from_picture,
)
