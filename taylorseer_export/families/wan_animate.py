"""Wan 2.2 Animate: Wan whose tokens are joined by those of a pose, and whose blocks look at a face frame by frame.

Neither depends on the step: what becomes of the videos of pose and face is computed once for a loop, and a loop makes
one segment of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.families.family import (
    Defaults,
    Derived,
    Input,
    Pipeline,
    no_counterpart,
    no_entries,
    replaced,
)
from taylorseer_export.families.wan import WAN

_FACES = 1 << 14  # more than any bundle takes


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    """A segment of n latent frames is of 4 n - 3 frames, and before it stands the latent frame of the character."""
    latent, *others = WAN.inputs(config)
    batch, channels, frames, *sides = latent.shape
    side = config["motion_encoder_size"]
    return (
        replace(latent, shape=(batch, channels, f"{frames}+1", *sides)),
        *others,
        Input("pose_hidden_states", (batch, config["latent_channels"], frames, *sides), "constant"),
        Input("face_pixel_values", (batch, 3, f"4*{frames}-3", side, side), "constant"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    made = WAN.dimensions(config)
    return {**made, "frames": (2, made["frames"][1] - 1)}


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    return WAN.latent_sizes(config, frames - 1, height, width)


def _at_once(model: Any, inputs: dict[str, Any]) -> Any:
    """How many faces are looked at in one batch changes nothing but memory."""
    return model(**inputs, motion_encode_batch_size=_FACES, return_dict=False)[0]


def _directions(config: Mapping[str, Any]) -> dict[str, Derived]:
    """The orthogonal factor of a weight, which the model finds anew in every call and no engine can."""
    import torch

    def make(weight: Any) -> Any:
        return torch.linalg.qr(weight.float() + 1e-8)[0]

    shape = (config["motion_encoder_dim"], config["motion_dim"])
    return {"motion_encoder.directions": Derived("motion_encoder.motion_synthesis_weight", shape, make)}


@contextmanager
def _with_directions(model: Any) -> Iterator[None]:
    with replaced(model.motion_encoder, forward=partial(_motion, model.motion_encoder)):
        yield


def _motion(encoder: Any, faces: Any) -> Any:
    """The encoder's own forward with `_directions`, along each of which a face has moved so far."""
    seen = encoder.conv_in(faces)
    for block in encoder.res_blocks:
        seen = block(seen)
    moved = encoder.conv_out(seen).flatten(1)
    for layer in encoder.motion_network:
        moved = layer(moved)
    return (moved.float() @ encoder.directions.float().T).to(moved.dtype)


WAN_ANIMATE = replace(
    WAN,
    name="wan-animate",
    title="Wan 2.2 Animate",
    model_class="WanAnimateTransformer3DModel",
    reference="Wan-AI/Wan2.2-Animate-14B-Diffusers",
    sites=(*WAN.sites, r"face_adapter\.\d+"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=20, interval=4, warmup=3, order=1),
    guidance_scale=1.0,
    latent_size=(21, 90, 160),
    # Of guidance, what is passed without a face is made anew at every call.
    pipeline=Pipeline(
        flow_steps="count", cast_inputs=("face_pixel_values",), ignored_inputs=("motion_encode_batch_size",)
    ),
    comfy=no_counterpart,
    whole=None,
    by_config=no_entries,
    variants={},
    forward=_at_once,
    derived=_directions,
    patched=_with_directions,
)
