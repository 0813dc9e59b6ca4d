"""CogVideoX: blocks over words and video in one attention and one MLP; from text, and from a picture by channels.

Frames stand before channels. Places are a table that the model adds, at one size, or turn queries and keys by tables
that the pipeline makes: `[2, frames, rows, columns, width of a head]`, cosines and sines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, video_patches

_PLACES = "image_rotary_emb"


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    side, times, turned = config["patch_size"], config.get("patch_size_t") or 1, _turned(config)
    frames: int | str = f"{times}*frames" if times > 1 else "frames"
    sides: tuple[int | str, ...] = (f"{side}*rows", f"{side}*columns")
    text: int | str = "text_tokens"
    if _one_size(config):  # of video and of text, of which the table has rows of zeros
        (frames, *sides), text = _size(config), config["max_text_seq_length"]  # type: ignore[assignment]
    ofs = (Input("ofs", (1,), "constant"),) if config.get("ofs_embed_dim") else ()
    table = Input(_PLACES, (2, "frames", "rows", "columns", config["attention_head_dim"]), "constant", "float32")
    if _one_size(config) and turned:
        grid = (frames // times, *(n // side for n in sides))  # type: ignore[operator]
        table = Input(_PLACES, (2, *grid, config["attention_head_dim"]), "constant", "float32")
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


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    """The tables as two, a row for each token."""
    if _PLACES not in inputs:
        return call(model, inputs)
    return call(model, {**inputs, _PLACES: tuple(inputs[_PLACES].flatten(1, 3).unbind(0))})


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if _one_size(config) and "sample_frames" in config:
        return {"latent_size": _size(config)}
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
)
