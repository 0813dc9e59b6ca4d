"""FramePack: HunyuanVideo's blocks over a window of frames, with frames made before as conditioning tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

from taylorseer_export.families.autoencoders import all_seen
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, instead, replaced, uncut, video_patches
from taylorseer_export.families.hunyuan_video import HUNYUAN_VIDEO
from taylorseer_export.families.whole import Modules, Sections, Shown, Tensors, spread

# Frames of the past as the pipeline passes them: (argument, frames, the first of them in time); the new ones follow.
_PAST = (("latents_clean", 2, 18), ("latents_history_2x", 2, 16), ("latents_history_4x", 16, 0))
_NEW = 20  # the first new frame
_PATCH = 8  # side of the coarsest patch of the past, in latent pixels; other sides would have to be padded
_IMAGE = 729  # tokens of the image encoder


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    channels, picture = config["in_channels"], (f"{_PATCH}*rows", f"{_PATCH}*columns")
    inputs = [
        Input("hidden_states", ("batch", channels, "frames", *picture), "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["text_embed_dim"]), "constant"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", "float32", fill="ones"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
        Input("image_embeds", ("batch", _IMAGE, config["image_proj_dim"]), "constant"),
        Input("indices_latents", ("frames",), "constant", "int64", fill="frames", first=_NEW),
        Input("guidance", ("batch",), "constant", fill="guidance"),
    ]
    for name, frames, first in _PAST:
        inputs.append(Input(name, ("batch", channels, frames, *picture), "constant"))
        inputs.append(Input(f"indices_{name}", (frames,), "constant", "int64", fill="frames", first=first))
    return tuple(inputs)


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 8), "frames": (1, 64), "rows": (2, 32), "columns": (2, 32), "text_tokens": (2, 1024)}


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    return video_patches({"patch_size": _PATCH}, frames, height, width)


def _forward(model: Any, hidden_states: Any, timestep: Any, guidance: Any, return_dict: bool, **given: Any) -> Any:
    """The model's own forward, but for the text: padding is masked out for every batch.

    The original crops it by a value of the mask where the batch is 1, and fills the mask in a loop over the batch
    where it is not. Rows that no one attends to and that do not leave the network change nothing.
    """
    import torch

    patch, patch_t = model.config.patch_size, model.config.patch_size_t
    _, _, frames, height, width = hidden_states.shape
    rows, columns = height // patch, width // patch
    names = ("latents", *(name for name, _, _ in _PAST))
    past = model.clean_x_embedder(*(given[name] for name in names[1:]))
    rotary = [model.rope(given[f"indices_{name}"], height, width, hidden_states.device) for name in names]
    target = model.x_embedder(hidden_states)
    tokens, rotary = model._pack_history_states(target, *past, *rotary, rows, columns)
    temb, _ = model.time_text_embed(timestep, given["pooled_projections"], guidance)
    mask = given["encoder_attention_mask"]
    image = model.image_projection(given["image_embeds"])
    text = torch.cat([image, model.context_embedder(given["encoder_hidden_states"], timestep, mask)], 1)
    words = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, dtype=torch.int)[:, None]
    seen = torch.cat([words.new_ones(words.shape[0], of.shape[1]) for of in (tokens, image)] + [words], 1)[
        :, None, None
    ]
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        tokens, text = block(tokens, text, temb, seen, rotary)
    tokens = model.proj_out(model.norm_out(tokens[:, -target.shape[1] :], temb))
    return (uncut(tokens, (frames // patch_t, rows, columns), (patch_t, patch, patch)),)


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """The latents of the picture as its VAE leaves them open, and what the image encoder makes of it."""
    vae = modules["vae"]
    with replaced(sys.modules[type(vae).__module__], prepare_causal_attention_mask=all_seen):
        mean, deviation = spread(vae, given["picture"].unsqueeze(2))
    states = modules["image_encoder"](given["pixels"]).last_hidden_state
    return {"image_embeds": states, "mean": mean, "deviation": deviation}, []


assert HUNYUAN_VIDEO.whole is not None
_PAST_AND_PLACES = tuple((name, f"indices_{name}") for name, _, _ in _PAST)
_WHOLE = replace(
    HUNYUAN_VIDEO.whole,
    animate=_animate,
    sections=Sections("backward", new="indices_latents", past=_PAST_AND_PLACES, usual=4),
    seers=("image_encoder",),
    shown=Shown("pixels", "feature_extractor", sized=True),
    frame_rate=30,
)
_FORWARD = Sections("forward", new="indices_latents", past=_PAST_AND_PLACES, usual=4)

FRAMEPACK = Family(
    name="framepack",
    title="FramePack (HunyuanVideo, next frames from those before), sides that are multiples of 64 pixels",
    model_class="HunyuanVideoFramepackTransformer3DModel",
    reference="lllyasviel/FramePackI2V_HY",
    sites=HUNYUAN_VIDEO.sites,
    stack_input=HUNYUAN_VIDEO.stack_input,
    stack_output=HUNYUAN_VIDEO.stack_output,
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=25, interval=5, warmup=1, order=0),
    scheduler_config={"shift": 7.0},
    guidance="embedded",
    guidance_scale=9.0,
    latent_size=(9, 80, 80),
    pipeline=Pipeline(
        guidance_factor=1000.0,
        largest_shift=log(7.0),
        cast_inputs=tuple(name for name, _, _ in _PAST),
    ),
    patched=instead(_forward),
    whole=_WHOLE,
    lora_loader="HunyuanVideoLoraLoaderMixin",
    # Its weights are of the other direction, which no config says: diffusers' sampling type `vanilla`.
    variants={"f1": {"whole": replace(_WHOLE, sections=_FORWARD)}},
)
