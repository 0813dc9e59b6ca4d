"""HunyuanVideo 1.5: double blocks over video and text; text to video, and image to video by channels.

Both are one network. From text its pipeline fills what a picture would bring with zeros; here a model of that task has
no such inputs, and its graphs no tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.autoencoders import all_seen, past_seen
from taylorseer_export.families.encoders import layers, told
from taylorseer_export.families.family import (
    Defaults,
    Family,
    Input,
    Pipeline,
    call,
    instead,
    replaced,
    uncut,
    unless_traced,
    video_patches,
)
from taylorseer_export.families.hunyuan_video import ASPECTS
from taylorseer_export.families.whole import Modules, Shown, Tensors, Tiling, Tokens, Whole

_IMAGE = 729  # tokens of the image encoder
_FRAMES = 64  # latent frames that a bundle takes at most
_TASKS = ("t2v", "i2v")
_HD = 960  # `target_size` of the models for 720p; the others are for 480p
_HD_SHIFT = {"t2v": 9.0, "i2v": 7.0}


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    task, side = config["task_type"], config["patch_size"]
    if task not in _TASKS:
        raise ConfigError(f"config entry `task_type` is {task}, expected {' or '.join(_TASKS)}; pass another model")
    if config.get("use_meanflow"):
        raise ConfigError(
            "config entry `use_meanflow` is true, expected false; this family covers no model that is told the "
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
    latent = {"batch": (1, 8), "frames": (1, _FRAMES), "rows": (2, 128), "columns": (2, 128)}
    return {**latent, "text_tokens": (2, 1024), "glyph_tokens": (2, 512)}


def _from_text(model: Any, inputs: dict[str, Any]) -> Any:
    """As HunyuanVideo15Pipeline: zeros for the latents of a picture, their mask, and what the image encoder saw."""
    import torch

    config, latents = model.config, inputs["hidden_states"]
    batch, channels, *sides = latents.shape
    empty = latents.new_zeros(batch, config.in_channels - channels, *sides)
    seen = latents.new_zeros(batch, _IMAGE, config.image_embed_dim)
    return call(model, {**inputs, "hidden_states": torch.cat([latents, empty], 1), "image_embeds": seen})


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    task = config.get("task_type", "i2v")
    made: dict[str, Any] = {}
    if task == "i2v":
        whole = replace(
            _WHOLE,
            animate=_animate,
            seers=("image_encoder",),
            shown=Shown("pixels", "feature_extractor", as_bytes=True),
            cropped=config.get("target_size", 640),
        )
        made = {"pipeline": Pipeline(), "forward": call, "whole": whole}
    if config.get("target_size") != _HD:
        return made
    return {**made, "scheduler_config": {"shift": _HD_SHIFT.get(task, 7.0)}, "latent_size": (31, 45, 80)}


def _forward(
    model: Any, hidden_states: Any, timestep: Any, return_dict: bool, image_embeds: Any = None, **given: Any
) -> Any:
    """The model's own forward, but for the text: every token stays where it is, and those that do not count are masked.

    The original moves those to the end, in a loop over the batch, and asks by a value whether there is a picture.
    Attention sees no order of text tokens, and rows that no one attends to and that do not leave the network change
    nothing.
    """
    import torch

    _, channels, frames, height, width = hidden_states.shape
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
    return (uncut(tokens, (frames, height // side, width // side), (1, side, side)),)


# Its pipeline has it so, with the spaces of a line that goes on.
_SYSTEM = (" " * 9).join(
    ("You are a helpful assistant. Describe the video by detailing the following aspects:", *ASPECTS)
) + "."
_TOLD = told(_SYSTEM, add_generation_prompt=True)
_QWEN = Tokens("tokens", "tokenizer", 1000, dropped=108, mask="mask", chat=_TOLD, special=False, blank=" ")
_GLYPHS = Tokens("glyphs", "tokenizer_2", 256, mask="glyph_mask", quoted=True)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of the prompt, and of what it has in quotes, which are zeros where that is nothing."""
    states = layers(encoders["text_encoder"], given["tokens"], attention_mask=given["mask"])[-3]
    mask = given["glyph_mask"].float()
    glyphs = encoders["text_encoder_2"](input_ids=given["glyphs"], attention_mask=mask)[0]
    return {
        "encoder_hidden_states": states[:, _QWEN.dropped :],
        "encoder_attention_mask": given["mask"][:, _QWEN.dropped :].float(),
        "encoder_hidden_states_2": glyphs * mask.amax(1)[:, None, None].to(glyphs.dtype),
        "encoder_attention_mask_2": mask,
    }


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """The latents of the picture, the one frame that it is, and a mask behind them; and what the image encoder sees."""
    import torch

    vae = modules["vae"]
    with _plain(vae.encoder, HunyuanVideo15AttnBlock=_seeing(all_seen), HunyuanVideo15Downsample=_downsampled):
        made = vae.encoder((2 * given["picture"] - 1).unsqueeze(2)).chunk(2, 1)[0]
    latents = made * vae.config.scaling_factor
    # No constant: an engine would store it.
    condition = torch.cat([latents, latents[:, :1].clamp(1, 1)], 1)
    return {"image_embeds": modules["image_encoder"](given["pixels"]).last_hidden_state, "condition": condition}, []


def _tile(vae: Any, latents: Any) -> Any:
    """The decoder that diffusers has, written so that one graph holds for any number of latent frames and pixels."""
    with _plain(vae.decoder, HunyuanVideo15AttnBlock=_seeing(past_seen), HunyuanVideo15Upsample=_upsampled):
        return vae.decoder(latents / vae.config.scaling_factor) / 2 + 0.5


def _tiling(vae: Any) -> Tiling:
    """As diffusers tiles it: pixels alone, all frames at once."""
    side = vae.tile_latent_min_height
    return Tiling(
        frames=_FRAMES,
        frame_stride=_FRAMES,
        side=side,
        side_stride=int(side * (1 - vae.tile_overlap_factor)),
        time_scale=vae.temporal_compression_ratio,
        scale=vae.spatial_compression_ratio,
    )


@contextmanager
def _plain(modules: Any, **changes: Callable[[Any], Mapping[str, Any]]) -> Iterator[None]:
    """Modules of these classes with other attributes."""
    with ExitStack() as stack:
        for module in modules.modules():
            if (change := changes.get(type(module).__name__)) is not None:
                stack.enter_context(replaced(module, **change(module)))
        yield


def _seeing(mask: Callable[..., Any]) -> Callable[[Any], Mapping[str, Any]]:
    return lambda module: {"prepare_causal_attention_mask": mask}


def _downsampled(module: Any) -> Mapping[str, Any]:
    """Of one frame: the original also shrinks the frames behind it, of which there are none."""
    import torch

    if not module.add_temporal_downsample:
        return {}
    folded = module._dcae_downsample_rearrange

    def forward(states: Any) -> Any:
        made = folded(module.conv(states), r1=1, r2=2, r3=2)
        made = torch.cat([made, made], 1)
        short = folded(states, r1=1, r2=2, r3=2)
        return made + short.unflatten(1, (made.shape[1], module.group_size // 2)).mean(2)

    return {"forward": forward}


def _upsampled(module: Any) -> Mapping[str, Any]:
    """All frames are doubled, and the first one in another way; the original sets that aside."""
    import torch

    if not module.add_temporal_upsample:
        return {}
    unfolded = module._dcae_upsample_rearrange

    def joined(first: Any, doubled: Any) -> Any:
        return torch.cat([first, doubled[:, :, 2:]], 2)

    def forward(states: Any) -> Any:
        made, begin = module.conv(states), states[:, :, :1]
        first = unfolded(made[:, :, :1], r1=1, r2=2, r3=2)
        made = joined(first[:, : first.shape[1] // 2], unfolded(made, r1=2, r2=2, r3=2))
        first = unfolded(begin, r1=1, r2=2, r3=2).repeat_interleave(module.repeats // 2, 1)
        return made + joined(first, unfolded(states, r1=2, r2=2, r3=2).repeat_interleave(module.repeats, 1))

    return {"forward": forward}


_WHOLE = Whole(
    encoders=("text_encoder", "text_encoder_2"),
    tokens=(_QWEN, _GLYPHS),
    encode=_encode,
    negative="",
    tile=_tile,
    tiling=_tiling,
    frame_rate=24,
)

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
    scheduler_config={"shift": 5.0},
    guidance="branches",
    guidance_scale=6.0,
    latent_size=(31, 30, 53),
    latent_scale=16,
    typical={"text_tokens": 1000, "glyph_tokens": 256},
    pipeline=Pipeline(arguments="noise-alone", ignored_inputs=("image_embeds",)),
    whole=_WHOLE,
    by_config=_by_config,
    forward=unless_traced(_from_text),
    patched=instead(_forward),
)
