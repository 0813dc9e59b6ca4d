"""HunyuanVideo 1.5: double blocks over video and text; text to video, and image to video by channels.

Both are one network. From text its pipeline fills what a picture would bring with zeros; here a model of that task has
no such inputs, and its graphs no tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, replaced, video_patches

_IMAGE = 729  # tokens of the image encoder
_TASKS = ("t2v", "i2v")
_HD = 960  # `target_size` of the models for 720p; the others are for 480p
_HD_SHIFT = {"t2v": 9.0, "i2v": 7.0}


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    task, side = config["task_type"], config["patch_size"]
    if task not in _TASKS:
        raise ConfigError(f"config entry `task_type` is {task}, expected {' or '.join(_TASKS)}; pass another model")
    if config.get("use_meanflow"):
        raise ConfigError(
            "config entry `use_meanflow` is true, expected false; no family covers a model that is told the "
            "timestep of the next step too: pass one that was not distilled so"
        )
    picture = ("rows", "columns") if side == 1 else (f"{side}*rows", f"{side}*columns")
    seen = Input("image_embeds", ("batch", _IMAGE, config["image_embed_dim"]), "constant")
    channels = config["out_channels" if task == "t2v" else "in_channels"]
    return (
        Input("hidden_states", ("batch", channels, "frames", *picture), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["text_embed_dim"]), "constant"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", "float32", fill="ones"),
        Input("encoder_hidden_states_2", ("batch", "glyph_tokens", config["text_embed_2_dim"]), "constant"),
        Input("encoder_attention_mask_2", ("batch", "glyph_tokens"), "constant", "float32", fill="ones"),
        *((seen,) if task == "i2v" else ()),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    latent = {"batch": (1, 8), "frames": (1, 64), "rows": (2, 128), "columns": (2, 128)}
    return {**latent, "text_tokens": (2, 1024), "glyph_tokens": (2, 512)}


def _from_text(model: Any, inputs: dict[str, Any]) -> Any:
    """As HunyuanVideo15Pipeline: zeros for the latents of a picture, their mask, and what the image encoder saw."""
    import torch

    if torch.compiler.is_exporting():
        return call(model, {**inputs, "image_embeds": None})  # `_forward` takes that
    config, latents = model.config, inputs["hidden_states"]
    batch, channels, *sides = latents.shape
    empty = latents.new_zeros(batch, config.in_channels - channels, *sides)
    seen = latents.new_zeros(batch, _IMAGE, config.image_embed_dim)
    return call(model, {**inputs, "hidden_states": torch.cat([latents, empty], 1), "image_embeds": seen})


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    task = config.get("task_type", "i2v")
    made = {"pipeline": Pipeline(), "forward": call} if task == "i2v" else {}
    if config.get("target_size") != _HD:
        return made
    return {**made, "scheduler_config": {"shift": _HD_SHIFT.get(task, 7.0)}, "latent_size": (31, 45, 80)}


def _masked(model: Any) -> AbstractContextManager[None]:
    return replaced(model, forward=partial(_forward, model))


def _forward(model: Any, hidden_states: Any, timestep: Any, image_embeds: Any, return_dict: bool, **given: Any) -> Any:
    """The model's own forward, but for the text: every token stays where it is, and those that do not count are masked.

    The original moves those to the end, in a loop over the batch, and asks by a value whether there is a picture.
    Attention sees no order of text tokens, and rows that no one attends to and that do not leave the network change
    nothing.
    """
    import torch

    batch, channels, frames, height, width = hidden_states.shape
    if image_embeds is None:
        more = model.config.in_channels - channels
        hidden_states = torch.nn.functional.pad(hidden_states, (0, 0, 0, 0, 0, 0, 0, more))
    rotary, temb, tokens = model.rope(hidden_states), model.time_embed(timestep), model.x_embedder(hidden_states)
    kinds, mask = model.cond_type_embed.weight, given["encoder_attention_mask"]
    texts = [
        model.context_embedder_2(given["encoder_hidden_states_2"]) + kinds[1],
        model.context_embedder(given["encoder_hidden_states"], timestep, mask) + kinds[0],
    ]
    masks = [given["encoder_attention_mask_2"].bool(), mask.bool()]
    if image_embeds is not None:
        shown = image_embeds.ne(0).flatten(1).any(1, keepdim=True)
        texts.insert(0, model.image_embedder(image_embeds) + kinds[2])
        masks.insert(0, shown.expand(-1, image_embeds.shape[1]))
    text, seen = torch.cat(texts, 1), torch.cat(masks, 1)
    for block in model.transformer_blocks:
        tokens, text = block(tokens, text, temb, seen, rotary)
    tokens, side = model.proj_out(model.norm_out(tokens, temb)), model.config.patch_size
    pixels = tokens.reshape(batch, frames, height // side, width // side, -1, 1, side, side)
    return (pixels.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3),)


HUNYUAN_VIDEO_15 = Family(
    name="hunyuan-video-1.5",
    title="HunyuanVideo 1.5: text to video, and image to video",
    model_class="HunyuanVideo15Transformer3DModel",
    reference="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    sites=(r"transformer_blocks\.\d+\.(attn|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "x"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=video_patches,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 5.0},
    guidance="branches",
    guidance_scale=6.0,
    latent_size=(31, 30, 53),
    latent_scale=16,
    typical={"text_tokens": 1000, "glyph_tokens": 256},
    pipeline=Pipeline(arguments="noise-alone", ignored_inputs=("image_embeds",)),
    by_config=_by_config,
    forward=_from_text,
    patched=_masked,
)
