"""FLUX.2 (dev, klein base, klein): FLUX's blocks, all of a kind with one modulation, and pictures to go by.

KV is a klein whose pictures see themselves alone, as they are without noise, whatever the step and the words are: their
keys and values are made once for a request. Its family is `flux2-kv`.

dev takes guidance as an input. klein does not: its base is guided by a second call, what was distilled of it by none.
Every FLUX.2 also takes pictures, as tokens behind those of the noise; with them a checkpoint is of family `flux2-edit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.autoencoders import of_tokens, picture_of_tokens
from taylorseer_export.families.encoders import layers, told
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, no_entries, packed, replaced, unhooked
from taylorseer_export.families.flux import FLUX, rows_behind
from taylorseer_export.families.whole import Fitted, Modules, Tensors, Tokens, Whole, in_tokens

_PLACES = 4  # of a token: picture, row, column, and the number of a word
_PICTURE = 10  # what the first picture to go by has for the first of them; the second has 20, and so on


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if len(config["axes_dims_rope"]) != _PLACES or config["patch_size"] != 1:
        raise ConfigError(
            f"config entries `axes_dims_rope` and `patch_size` are {list(config['axes_dims_rope'])} and "
            f"{config['patch_size']}, expected {_PLACES} numbers and 1 as of FLUX.2; check --model and the family"
        )
    guidance = (Input("guidance", ("batch",), "constant", fill="guidance"),) if config["guidance_embeds"] else ()
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        *guidance,
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("img_ids", ("batch", "image_tokens", _PLACES), "constant", "int64", fill="grid"),
        Input("txt_ids", ("batch", "text_tokens", _PLACES), "constant", "int64", fill="line"),
    )


def _edit_inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return (
        *_inputs(config),
        Input("image_latents", ("batch", "condition_tokens", config["in_channels"]), "constant"),
        Input("image_ids", ("batch", "condition_tokens", _PLACES), "constant", "int64", fill="grid", first=_PICTURE),
    )


def _kv_inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if config["guidance_embeds"]:
        raise ConfigError(
            "config entry `guidance_embeds` is true, expected false as of FLUX.2 klein KV, the one that was trained "
            "with pictures that see themselves alone; use family flux2-edit"
        )
    return _edit_inputs(config)


def _with_keys_of_pictures(model: Any, inputs: dict[str, Any]) -> Any:
    """The pipeline's two kinds of call, that which extracts keys and values and that which is given them.

    Rows of pictures attend to themselves alone, so the first needs no rows of the latent and none of the text: here it
    has none, and depends on the pictures alone.
    """
    owner = getattr(model, "__self__", model)
    rest = dict(inputs)
    pictures, places = rest.pop("image_latents"), rest.pop("image_ids")
    alone = {
        "hidden_states": pictures,
        "img_ids": places,
        "encoder_hidden_states": rest["encoder_hidden_states"][:, :0],
        "txt_ids": rest["txt_ids"][:, :0],
        "timestep": pictures.new_zeros(pictures.shape[0]),
        "num_ref_tokens": pictures.shape[1],
        "return_dict": False,
    }
    with ExitStack() as stack:
        for module in owner.modules():
            if hasattr(module, "processor"):  # the pipeline sets those that keep keys and values
                stack.enter_context(replaced(module, processor=type(module)._available_processors[-1]()))
        with unhooked(owner):
            _, kept = model(**alone, kv_cache_mode="extract")
        return model(**rest, kv_cache=kept, kv_cache_mode="cached", return_dict=False)[0]


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 512)}


def _edit_dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {**_dimensions(config), "condition_tokens": (4, 32768)}


def _by_config(klein: Whole, config: Mapping[str, Any]) -> dict[str, Any]:
    return {} if config.get("guidance_embeds", True) else {"guidance": "branches", "whole": klein}


_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def _encode(chosen: tuple[int, ...], encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of some layers side by side, those of padding too: the transformer sees all of them."""
    import torch

    states = layers(encoders["text_encoder"], given["tokens"], attention_mask=given["mask"])
    return {"encoder_hidden_states": torch.cat([states[layer] for layer in chosen], -1)}


def _see(vae: Any, picture: Any) -> dict[str, Any]:
    mean, deviation = of_tokens(vae)
    made = in_tokens(vae.encode(2 * picture - 1).latent_dist.mode())
    return {"image_latents": (made - mean) / deviation}


_TOKENS = Tokens("tokens", "tokenizer", 512, size="text_tokens", mask="mask")
_MISTRAL = replace(_TOKENS, chat=told(_SYSTEM, in_parts=True), removed=("[IMG]",))
_QWEN = replace(_TOKENS, chat=told(add_generation_prompt=True, enable_thinking=False))
_DEV = Whole(
    decode=picture_of_tokens,
    encoders=("text_encoder",),
    tokens=(_MISTRAL,),
    encode=partial(_encode, (10, 20, 30)),
)
_KLEIN = replace(_DEV, tokens=(_QWEN,), encode=partial(_encode, (9, 18, 27)), negative="")
# As many as `condition_tokens` holds of the largest.
_FITTED = Fitted(area=1024 * 1024, shortest=64, ratio=8, pictures=8)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2 dev, klein base and klein",
    model_class="Flux2Transformer2DModel",
    reference="black-forest-labs/FLUX.2-dev",
    sites=(r"transformer_blocks\.\d+\.(attn|ff)", r"single_transformer_blocks\.\d+\.attn"),
    stack_input=FLUX.stack_input,
    stack_output=FLUX.stack_output,
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=packed,
    defaults=FLUX.defaults,
    scheduler=FLUX.scheduler,
    scheduler_config=FLUX.scheduler_config,
    guidance="embedded",
    guidance_scale=4.0,
    timestep_divisor=1000.0,
    pipeline=Pipeline(noise="tokens", shift="tokens-and-steps", ignored_inputs=("guidance",)),
    whole=_DEV,
    lora_loader="Flux2LoraLoaderMixin",
    by_config=partial(_by_config, _KLEIN),
    # Of klein, only the base is not distilled.
    distilled="klein",
    variants={
        "base": {},
        "klein": {"guidance": "none", "guidance_scale": 1.0, "defaults": Defaults(4, interval=6, warmup=3, order=1)},
    },
)

FLUX2_EDIT = replace(
    FLUX2,
    name="flux2-edit",
    title="FLUX.2 with pictures to go by",
    inputs=_edit_inputs,
    dimensions=_edit_dimensions,
    typical={"text_tokens": 512, "condition_tokens": 4096},
    forward=rows_behind,
    pipeline=replace(FLUX2.pipeline, arguments="rows-behind", cast_inputs=("img_ids",)),
    whole=replace(_DEV, see=_see, fitted=_FITTED),
    by_config=partial(_by_config, replace(_KLEIN, see=_see, fitted=_FITTED)),
)

FLUX2_KV = replace(
    FLUX2_EDIT,
    name="flux2-kv",
    title="FLUX.2 klein KV, with pictures to go by",
    reference="black-forest-labs/FLUX.2-klein-9b-kv",
    inputs=_kv_inputs,
    forward=_with_keys_of_pictures,
    pipeline=replace(FLUX2_EDIT.pipeline, arguments="rows-ahead"),
    pipelines=("Flux2KleinKVPipeline",),
    guidance="none",
    guidance_scale=1.0,
    defaults=Defaults(4, interval=6, warmup=3, order=1),
    whole=replace(_KLEIN, negative=None, see=_see, fitted=_FITTED),
    by_config=no_entries,
    distilled="",
    variants={},
)
