"""Qwen-Image 2.1 from text: one row of blocks over words and picture, all modulated by one vector.

Words see only the words before them and are modulated at timestep 0, so their keys and values are the same at every
step. The model keeps them in a cache; here it is traced in two: the words alone, which fill the cache, then the
picture. What the words become is thus known before the first step.

Its VAE makes pictures with transparency, and a latent pixel of it is a token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.encoders import ANSWER, asked, one_place
from taylorseer_export.families.family import (
    Defaults,
    Family,
    Input,
    Pipeline,
    call,
    instead,
    packed,
    replaced,
    unless_traced,
)
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, in_tokens, still

_SLOT = 4  # tokens of the picture that one slot of the words' mask stands for


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if not config.get("causal_condition", True) or config.get("patch_size", 1) != 1:
        raise ConfigError(
            f"config entries `causal_condition` and `patch_size` are {config.get('causal_condition')} and "
            f"{config.get('patch_size')}, expected true and 1 as of Qwen-Image 2.1; check --model and the family"
        )
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["context_in_dim"]), "constant"),
        Input("encoder_hidden_states_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
        Input("img_shapes", ("batch", 1, 3), "constant", "int64", fill="sides"),
    )


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("sample_sigmas"):
        raise ConfigError(
            f"config entry `sample_sigmas` of the pipeline has {len(config['sample_sigmas'])} noise levels, expected "
            "none; no bundle keeps levels of its own as Qwen-Image-2.1-Turbo has them: pass the model it is made from"
        )
    return {}


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    """The model takes sizes as numbers, and returns the rows of the words too."""
    import torch

    count, mask = inputs["hidden_states"].shape[1], inputs["encoder_hidden_states_mask"].bool()
    slots = torch.cat([torch.zeros_like(mask), mask.new_ones(len(mask), count // _SLOT)], 1)
    given = {"encoder_hidden_states_mask": mask, "img_shapes": inputs["img_shapes"].tolist(), "img_mask": slots}
    return call(model, {**inputs, **given})[:, -count:]


def _traced(
    model: Any,
    hidden_states: Any,
    timestep: Any,
    encoder_hidden_states: Any,
    encoder_hidden_states_mask: Any,
    img_shapes: Any,
    return_dict: bool,
) -> Any:
    """The model's own forward as it runs with its cache filled: `hidden_states` [B, N, C] and words [B, T, D]."""
    import torch

    picture, words = model.img_in(hidden_states), model.txt_in(encoder_hidden_states)
    time = model.time_text_embed(timestep.to(picture.dtype), picture)
    start = model.time_text_embed(torch.zeros(1, dtype=picture.dtype), picture)
    length, count = words.shape[1], picture.shape[1]
    word, token = torch.arange(length), torch.arange(count)
    _, height, width = img_shapes[0, 0].unbind()
    row, column = token // width - (height - height // 2), token % width - (width - width // 2)
    of_words = _turns(model.pos_embed, word, word, word)
    of_picture = _turns(model.pos_embed, torch.full_like(token, length), row, column)
    valid = encoder_hidden_states_mask.bool()
    before = (word <= word[:, None]) & valid[:, None, None]
    seen = torch.cat([valid, valid.new_ones(valid.shape[0], count)], 1)[:, None, None]
    cache = sys.modules[type(model).__module__].QwenImage21KVCache(len(model.transformer_blocks))
    still, moved = model.modulation(start), model.modulation(time)
    for k, block in enumerate(model.transformer_blocks):
        kept = cache.get_layer(k)
        words = _words(block, words, still, rotary_emb=of_words, attention_mask=before, layer_cache=kept)
        picture = block(
            hidden_states=picture,
            modulation=moved,
            rotary_emb=of_picture,
            attention_mask=seen,
            layer_cache=kept,
            kv_cache_mode="cached",
        )
    return (model.proj_out(model.norm_out(picture, time)),)


def _words(block: Any, words: Any, modulation: Any, **of_attention: Any) -> Any:
    """A block over the words, which fills its cache; no hook of its modules sees them, as they are no site's rows."""
    import torch

    first, second = modulation.chunk(2, -1)
    rows, gate = block._modulate(block.img_norm1(words), first, None)
    filled = {"kv_cache_mode": "extract", "cache_write_slice": slice(None), **of_attention}
    words = words + gate.tanh() * block.attn.forward(rows, **filled)
    rows, gate = block._modulate(block.img_norm2(words), second, None)
    words = words + gate.tanh() * block.img_mlp.forward(rows)
    return words.clip(-65504, 65504) if words.dtype == torch.float16 else words


def _turns(rope: Any, *places: Any) -> Any:
    """Rows `[T, D / 2]` of the model's complex tables, for places `[T]` along each axis."""
    import torch

    axes = zip(places, rope.axes_dim, strict=True)
    return torch.cat([rope.rope_params(place.float(), width, rope.theta) for place, width in axes], -1)


_TOLD = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_TOKENS = Tokens(
    "tokens",
    "processor",
    1024,
    size="text_tokens",
    padded=False,
    template=_TOLD + asked() + "{}" + ANSWER,
    dropped=_TOLD,
    blank=" ",
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The last states of Qwen3-VL before they are normed."""
    model = encoders["text_encoder"].model.language_model
    with one_place(model), replaced(model.norm, forward=lambda states: states):
        states = model(given["tokens"], use_cache=False).last_hidden_state
    return {"encoder_hidden_states": states[:, given["tokens_dropped"] :]}


def _picture(vae: Any, latents: Any) -> Any:
    """Latents `[1, C / 4, 2 H, 2 W]`, as tokens are unpacked everywhere, are `[1, C, H, W]` to its VAE."""
    _, _, height, width = latents.shape
    return still(vae, in_tokens(latents).transpose(1, 2).unflatten(2, (height // 2, width // 2)))


QWEN_IMAGE_21 = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    model_class="QwenImage21Transformer2DModel",
    reference="Qwen/Qwen-Image-2.1",
    sites=(r"transformer_blocks\.\d+\.(attn|img_mlp)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "hidden_states"),
    inputs=_inputs,
    dimensions=lambda config: {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 1024)},
    latent_sizes=packed,  # a latent pixel of its VAE is 16 pixels wide, as two of those that others pack
    defaults=Defaults(steps=40, interval=4, warmup=3, order=1),
    scheduler_config={"use_dynamic_shifting": True},
    guidance="branches",
    guidance_scale=1.0,
    timestep_divisor=1000.0,
    pipeline=Pipeline(
        noise="tokens", arguments="first-shape", ignored_inputs=("img_mask", "kv_cache", "kv_cache_mode")
    ),
    whole=Whole(decode=_picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode),
    attributes=lambda config: {"transformer_blocks": tuple(range(config["num_layers"]))},
    forward=unless_traced(_forward),
    by_config=_by_config,
    patched=instead(_traced),
)
