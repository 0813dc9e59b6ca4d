"""LongCat-Image: FLUX's blocks without pooled text and guidance as an input, guidance by a second call.

Places of words run along the diagonal, and those of the picture begin where the longest prompt ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.families.family import Defaults, Input, Pipeline, no_counterpart
from taylorseer_export.families.flux import FLUX

_WORDS = 512  # of a prompt, filled up


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        # A 1 in column 0 tells the picture from the words.
        Input("img_ids", ("image_tokens", 3), "constant", "float32", fill="grid", first=1, corner=_WORDS),
        Input("txt_ids", ("text_tokens", 3), "constant", "float32", fill="diagonal"),
    )


LONGCAT_IMAGE = replace(
    FLUX,
    comfy=no_counterpart,
    name="longcat-image",
    title="LongCat-Image",
    model_class="LongCatImageTransformer2DModel",
    reference="meituan-longcat/LongCat-Image",
    inputs=_inputs,
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    guidance="branches",
    guidance_scale=4.5,
    pipeline=Pipeline(guidance_cuts_norm=True, ignored_inputs=("guidance",)),
    pipelines=("LongCatImagePipeline",),
    whole=None,
    lora_loader="",
    variants={},
)
