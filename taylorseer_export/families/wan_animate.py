"""Wan 2.2 Animate: Wan whose tokens are joined by those of a pose, and whose blocks look at a face frame by frame.

Neither depends on the step: what becomes of the videos of pose and face is computed once for a loop, and a loop makes
one segment of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from taylorseer_export.families.wan import WAN, encoded, seen
from taylorseer_export.families.whole import Driven, Modules, Shown, Tensors

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


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """One latent frame: what there is of it, a mask before its latents, and the latents of the pose.

    Both go through the encoder side by side. Before the first one stands the character, under a mask of ones.
    """
    import torch

    vae = modules["vae"]
    side, pictures = vae.config.scale_factor_spatial, given["scene"][:, :3]
    latents, used = encoded(vae, 2 * torch.cat([pictures, given["pose"]]) - 1, caches)
    kept = given["scene"][:, 3:].unflatten(4, (-1, side))[..., 0].unflatten(3, (-1, side))[:, :, :, :, 0]
    if caches is None:
        kept = kept.repeat(1, 1, vae.config.scale_factor_temporal, 1, 1)  # the first frame is a whole latent frame
    mask = kept.transpose(1, 2)
    made = {"condition": torch.cat([mask, latents[:1]], 1), "pose_hidden_states": latents[1:]}
    if caches is not None:
        return made, used
    character, _ = encoded(vae, (2 * given["picture"] - 1).unsqueeze(2), None)
    whole = torch.cat([mask.clamp(1, 1), character], 1)
    made["condition"] = torch.cat([whole, made["condition"]], 2)
    return {**made, "encoder_hidden_states_image": seen(modules, given)}, used


assert WAN.whole is not None
_WHOLE = replace(
    WAN.whole,
    tokens=tuple(replace(one, size="") for one in WAN.whole.tokens),  # the transformer tells text and picture by it
    animate=_animate,
    driven=Driven("pose", "scene", "face_pixel_values", ahead=1),
    seers=("image_encoder",),
    shown=Shown("pixels", "image_processor"),
    frame_rate=30,
)

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
    whole=_WHOLE,
    by_config=no_entries,
    variants={},
    forward=_at_once,
    derived=_directions,
    patched=_with_directions,
)
