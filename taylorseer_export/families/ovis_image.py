"""Ovis-Image: FLUX's blocks with gated MLPs, without pooled text, guidance by a second call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.families.encoders import told
from taylorseer_export.families.family import Defaults, Input, Pipeline, no_counterpart
from taylorseer_export.families.flux import FLUX
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("img_ids", ("image_tokens", 3), "constant", "float32", fill="grid"),
        Input("txt_ids", ("text_tokens", 3), "constant", "float32", fill="diagonal"),
    )


_ASKED = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: "
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The last states, those of padding zero: the transformer sees all of them."""
    mask = given["mask"]
    states = encoders["text_encoder"](given["tokens"], attention_mask=mask, use_cache=False).last_hidden_state
    return {"encoder_hidden_states": (states * mask[..., None])[:, given["tokens_dropped"] :]}


_TOKENS = Tokens(
    "tokens",
    "tokenizer",
    256,
    size="text_tokens",
    mask="mask",
    chat=told(before=_ASKED, add_generation_prompt=True, enable_thinking=False),
    special=False,
    dropped=28,
)

OVIS_IMAGE = replace(
    FLUX,
    comfy=no_counterpart,
    name="ovis-image",
    title="Ovis-Image",
    model_class="OvisImageTransformer2DModel",
    reference="AIDC-AI/Ovis-Image-7B",
    inputs=_inputs,
    dimensions=lambda config: {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 256)},
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    guidance="branches",
    guidance_scale=5.0,
    pipeline=Pipeline(),
    whole=Whole(decode=picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode, negative=""),
    lora_loader="",
    typical={"text_tokens": 256},
    variants={},
)
