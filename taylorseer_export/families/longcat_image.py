"""LongCat-Image: FLUX's blocks without pooled text and guidance as an input, guidance by a second call.

Words in quotes are spelled. Its pipeline has its text encoder write the prompt anew first, unless
`enable_prompt_rewrite` is false, as it is here. Places of words run along the diagonal, and those of the picture begin
where the longest prompt ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.families.encoders import ANSWER, asked, layers
from taylorseer_export.families.family import Defaults, Input, Pipeline, no_counterpart
from taylorseer_export.families.flux import FLUX
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture

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


_BEFORE = asked(
    "As an image captioning expert, generate a descriptive text prompt based on an image content, suitable for input "
    "to a text-to-image model."
)
_TOKENS = Tokens(
    "tokens",
    "tokenizer",
    _WORDS,
    mask="mask",
    template=_BEFORE + "{}",
    suffix=ANSWER,
    spelled=True,
    special=False,
    dropped=_BEFORE,
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of the prompt and of its padding."""
    states = layers(encoders["text_encoder"], given["tokens"], attention_mask=given["mask"])
    start = given["tokens_dropped"]
    return {"encoder_hidden_states": states[-1][:, start : start + _WORDS]}


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
    whole=Whole(decode=picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode, negative=""),
    lora_loader="",
    variants={},
)
