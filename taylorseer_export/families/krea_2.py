"""Krea 2: one row of blocks over words and picture, all modulated by one vector and a table each, guidance by a second
call.

Its pipeline passes the places of words, all zero, before those of the picture; here they are the picture's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.families.encoders import ANSWER, DESCRIBE, asked, layers, one_place
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, packed
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, still

_SHIFT = 1.15  # of the sigmas of the distilled model, whatever the size


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    words = ("batch", "text_tokens", config["num_text_layers"], config["text_hidden_dim"])
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", words, "constant"),
        Input("position_ids", ("image_tokens", 3), "constant", "float32", fill="grid"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
    )


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    places, words = inputs["position_ids"], inputs["encoder_hidden_states"].shape[1]
    every = torch.cat([places.new_zeros(words, places.shape[1]), places])
    mask = inputs["encoder_attention_mask"].bool()
    return call(model, {**inputs, "position_ids": every, "encoder_attention_mask": mask})


_TOKENS = Tokens(
    "tokens",
    "tokenizer",
    512,
    size="text_tokens",
    mask="mask",
    template=asked(DESCRIBE) + "{}",
    suffix=ANSWER,
    dropped=34,
)


def _encode(chosen: tuple[int, ...], encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of some layers of Qwen3-VL, one beside the other. Padding, before the end of the template, takes no
    place."""
    import torch

    model, mask, start = encoders["text_encoder"].language_model, given["mask"], given["tokens_dropped"]
    places = (mask.cumsum(1) - 1).clamp(min=0).expand(3, 1, -1)
    with one_place(model):
        states = layers(model, given["tokens"], attention_mask=mask, position_ids=places)
    words = torch.stack([states[layer] for layer in chosen], 2)
    return {"encoder_hidden_states": words[:, start:], "encoder_attention_mask": mask[:, start:]}


_WHOLE = Whole(
    decode=still,
    encoders=("text_encoder",),
    tokens=(_TOKENS,),
    encode=partial(_encode, (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)),
    negative="",
)


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config.get("text_encoder_select_layers")
    whole = _WHOLE if layers is None else replace(_WHOLE, encode=partial(_encode, tuple(layers)))
    return {**(_DISTILLED if config.get("is_distilled") else {}), "whole": whole}


_PIPELINE = Pipeline(guidance_offset=1.0, arguments="places-of-all")
_DISTILLED = {
    "guidance": "none",
    "guidance_scale": 0.0,
    "pipeline": replace(_PIPELINE, shift=_SHIFT),
    "defaults": Defaults(steps=8, interval=4, warmup=3, order=1),
}

KREA_2 = Family(
    name="krea-2",
    title="Krea 2 and its distilled form",
    model_class="Krea2Transformer2DModel",
    reference="krea/Krea-2-Raw",
    sites=(r"transformer_blocks\.\d+\.(attn|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("final_layer", "hidden_states"),
    inputs=_inputs,
    dimensions=lambda config: {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 512)},
    latent_sizes=packed,
    defaults=Defaults(steps=28, interval=4, warmup=3, order=1),
    scheduler_config={"use_dynamic_shifting": True, "max_image_seq_len": 6400},
    guidance="branches",
    guidance_scale=4.5,
    timestep_divisor=1000.0,
    pipeline=_PIPELINE,
    lora_loader="Krea2LoraLoaderMixin",
    forward=_forward,
    whole=_WHOLE,
    by_config=_by_config,
    variants={"turbo": _DISTILLED},
)
