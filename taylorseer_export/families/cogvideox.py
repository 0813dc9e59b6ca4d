"""CogVideoX: blocks over words and video in one attention and one MLP; from text, and from a picture by channels.

Frames stand before channels. Places are a table that the model adds, at one size, or turn queries and keys by tables
that the pipeline makes: `[2, frames, rows, columns, width of a head]`, cosines and sines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, replaced, video_patches
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, unit

_PLACES = "image_rotary_emb"


def _inputs(config: Mapping[str, Any], shared: bool = False) -> tuple[Input, ...]:
    side, times, turned = config["patch_size"], config.get("patch_size_t") or 1, _turned(config)
    frames: int | str = f"{times}*frames" if times > 1 else "frames"
    sides: tuple[int | str, ...] = (f"{side}*rows", f"{side}*columns")
    text: int | str = "text_tokens"
    if _one_size(config):  # of video and of text, of which the table has rows of zeros
        text = config["max_text_seq_length"]
        if not shared:
            frames, *sides = _size(config)  # type: ignore[assignment]
    ofs = (Input("ofs", (1,), "constant", fill="frames", first=2),) if config.get("ofs_embed_dim") else ()
    grid: tuple[int | str, ...] = ("frames", "rows", "columns")
    if _one_size(config) and not shared:
        grid = (frames // times, *(n // side for n in sides))  # type: ignore[operator]
    # In version 1.0 places are stretched into those of the size that it was trained at.
    within = None if times > 1 else (config["sample_height"] // side, config["sample_width"] // side)
    shape = (2, *grid, config["attention_head_dim"])
    table = Input(_PLACES, shape, "constant", "float32", fill="turns", within=within)
    return (
        Input("hidden_states", ("batch", frames, config["in_channels"], *sides), "latent"),
        Input("encoder_hidden_states", ("batch", text, config["text_embed_dim"]), "constant"),
        Input("timestep", ("batch",), "step", "float32"),
        *ofs,
        *((table,) if turned else ()),
    )


def _turned(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_rotary_positional_embeddings"))


def _one_size(config: Mapping[str, Any]) -> bool:
    """Whether it adds a table, which for any other size it computes anew while it runs, or refuses."""
    return not _turned(config) or bool(config.get("use_learned_positional_embeddings"))


def _size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    frames = (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1
    return frames, config["sample_height"], config["sample_width"]


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    if _one_size(config):
        return {"batch": (1, 16)}
    return {"batch": (1, 16), "frames": (1, 64), "rows": (2, 128), "columns": (2, 128), "text_tokens": (2, 512)}


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    times = config.get("patch_size_t") or 1
    if _one_size(config):
        if (frames, height, width) != _size(config):
            only = "x".join(map(str, _size(config)))
            raise ConfigError(
                f"latent size is {frames}x{height}x{width}, expected {only} (latent frames and pixels), the one size "
                "of this model's position table; leave --size out or choose another model"
            )
        return {}
    if frames % times:
        raise ConfigError(
            f"latent frames is {frames}, expected a multiple of {times}, which make one token; change --size or "
            "--latent-size"
        )
    return video_patches(config, frames // times, height, width)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """T5's words, padding too, without a mask."""
    return {"encoder_hidden_states": encoders["text_encoder"](given["tokens"])[0]}


def _frames(vae: Any, latents: Any, caches: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """Three latent frames at first and then two, as the decoder that diffusers has takes an odd number of them.

    Its caches are the last two frames of what each convolution over time was given.
    """
    known: dict[str, Any] = {}
    # Those of the others, which look at one frame, would be copies of what they were given.
    kept = [name for name, module in vae.decoder.named_modules() if getattr(module, "time_kernel_size", 1) > 1]
    paths = [re.sub(r"(\w+)s\.(\d+)", r"\1_\2", name).split(".") for name in kept]
    for path, cache in zip(paths, caches or (), strict=caches is not None):
        _within(known, path[:-1])[path[-1]] = cache
    z = latents / vae.config.scaling_factor
    z = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    with _in_one_part(vae):
        made, left = vae.decoder(z, conv_cache=known)
    return unit(made), [_within(left, path[:-1])[path[-1]] for path in paths]


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """The latents of the picture as the encoder leaves them open, in the order of the latent: frames, then channels."""
    vae = modules["vae"]
    scale = vae.config.scaling_factor
    factor = 1 / scale if vae.config.invert_scale_latents else scale
    with _in_one_part(vae):
        made = vae.encode((2 * given["picture"] - 1).unsqueeze(2)).latent_dist
    return {name: factor * of.transpose(1, 2) for name, of in (("mean", made.mean), ("deviation", made.std))}, []


@contextmanager
def _in_one_part(vae: Any) -> Iterator[None]:
    """Convolutions as they are, which the VAE makes in parts where they take gigabytes."""
    from torch import nn

    with ExitStack() as stack:
        for module in vae.modules():
            if type(module).__name__ == "CogVideoXSafeConv3d":
                stack.enter_context(replaced(module, forward=partial(nn.Conv3d.forward, module)))
        yield


def _within(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


_TOKENS = Tokens("tokens", "tokenizer", 226, size="text_tokens")
_WHOLE = Whole(
    encoders=("text_encoder",),
    tokens=(_TOKENS,),
    encode=_encode,
    negative="",
    frames=_frames,
    at_once=(3, 2),
    frame_rate=8,
)


def _ranges_shared(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), **{name: (1, most) for name, most in _tokens(config).items()}}


def _sizes_shared(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    _latent_sizes(config, frames, height, width)
    return _tokens(config)


def _tokens(config: Mapping[str, Any]) -> dict[str, int]:
    """Of the one size of a table."""
    frames, height, width = _size(config)
    return video_patches(config, frames // (config.get("patch_size_t") or 1), height, width)


@contextmanager
def _part_of_table(model: Any) -> Iterator[None]:
    """The part of its table that is as large as what a rank has."""
    import torch

    embed, config = model.patch_embed, model.config
    sides = [*_tokens(config).values()]
    plain = {"use_positional_embeddings": False, "use_learned_positional_embeddings": False}

    def forward(words: Any, video: Any) -> Any:
        with replaced(embed, **plain):
            tokens = type(embed).forward(embed, words, video)
        table, text = embed.pos_embedding[0], words.shape[1]
        frames, rows, columns = video.shape[1] // (embed.patch_size_t or 1), *_patches(embed, video)
        part = table[text:].view(*sides, -1)[:frames, :rows, :columns]
        return tokens + torch.cat([table[:text], part.flatten(0, 2)]).to(tokens.dtype)

    with replaced(embed, forward=forward):
        yield


def _patches(embed: Any, video: Any) -> list[Any]:
    return [side // embed.patch_size for side in video.shape[3:]]


_SHARED = {
    "inputs": partial(_inputs, shared=True),
    "dimensions": _ranges_shared,
    "latent_sizes": _sizes_shared,
    "patched": _part_of_table,
}


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    """The tables as two, a row for each token."""
    if _PLACES not in inputs:
        return call(model, inputs)
    return call(model, {**inputs, _PLACES: tuple(inputs[_PLACES].flatten(1, 3).unbind(0))})


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    whole = _WHOLE
    if config.get("in_channels") != config.get("out_channels"):
        whole = replace(whole, animate=_animate)
    if _one_size(config):
        whole = replace(whole, tokens=(replace(_TOKENS, length=config.get("max_text_seq_length", 226), size=""),))
    if (times := config.get("patch_size_t") or 1) > 1:  # an odd number, filled up in front
        whole = replace(whole, skipped=times - 1, frame_rate=16)
    return {**_size_by_config(config), "whole": whole}


def _size_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if _one_size(config) and "sample_frames" in config:
        return {"latent_size": _size(config), "shared": _SHARED}
    return {"latent_size": (22, 96, 170)} if config.get("patch_size_t") else {}  # 1.5: 81 frames of 768 x 1360


COGVIDEOX = Family(
    name="cogvideox",
    title="CogVideoX and CogVideoX 1.5, from text and from a picture",
    model_class="CogVideoXTransformer3DModel",
    reference="zai-org/CogVideoX-5b",
    sites=(r"transformer_blocks\.\d+\.(attn1|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_final", "input"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=50, interval=5, warmup=3, order=1),
    scheduler="CogVideoXDDIMScheduler",
    scheduler_config={
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    },
    guidance="batched",
    guidance_scale=6.0,
    latent_size=(13, 60, 90),
    typical={"text_tokens": 226},
    pipeline=Pipeline(arguments="rotary"),
    lora_loader="CogVideoXLoraLoaderMixin",
    forward=_call,
    by_config=_by_config,
    by_pipeline={name: {"whole": None} for name in ("CogVideoXFunControlPipeline", "CogVideoXVideoToVideoPipeline")},
)
