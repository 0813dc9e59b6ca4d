"""LTX-2: a video and its sound, two latents in one network. In every block each has self-attention, attention to the
text and an MLP, and looks at the other by an attention of its own; guidance by two halves of a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, replaced


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    # Where nothing projects the text, it comes as wide as each stream.
    projected = config.get("use_prompt_embeddings", True)
    wide, narrow = (config["caption_channels"] if projected else config[f"{of}cross_attention_dim"] for of in _STREAMS)
    return (
        Input("hidden_states", ("batch", "video_tokens", config["in_channels"]), "latent"),
        Input("audio_hidden_states", ("batch", "audio_tokens", config["audio_in_channels"]), "latent"),
        Input("encoder_hidden_states", ("batch", "text_tokens", wide), "constant"),
        Input("audio_encoder_hidden_states", ("batch", "text_tokens", narrow), "constant"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
        Input("audio_encoder_attention_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
        # Where each token begins and ends: seconds, rows and columns of pixels; seconds.
        Input("video_coords", ("batch", 3, "video_tokens", 2), "constant", "float32"),
        Input("audio_coords", ("batch", 1, "audio_tokens", 2), "constant", "float32"),
    )


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    """The sound is as long as the video at some frame rate, which a request may choose: its length stays open."""
    return {"video_tokens": frames * height * width}


def _predictions(model: Any, inputs: dict[str, Any]) -> Any:
    """Its pipeline from text passes the timestep once more as `sigma`; of both latents it is the same.

    Places stay float32 in every precision: they become angles of up to 15708, in which any rounding shows.
    """
    places = {name: inputs[name].float() for name in ("video_coords", "audio_coords")}
    return model(**{**inputs, **places}, sigma=inputs["timestep"], return_dict=False)


def _rotated(x: Any, freqs: tuple[Any, Any]) -> Any:
    """`apply_split_rotary_emb` of diffusers, which writes in place: the two halves of each head, rotated."""
    import torch

    cos, sin = freqs
    heads = x if x.ndim == 4 else x.unflatten(-1, (cos.shape[1], -1)).transpose(1, 2)
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return (turned if x.ndim == 4 else turned.transpose(1, 2).flatten(2)).to(x.dtype)


@contextmanager
def _patched(model: Any) -> Iterator[None]:
    with replaced(sys.modules[type(model).__module__], apply_split_rotary_emb=_rotated):
        yield


_STREAMS = ("", "audio_")
LTX_2 = Family(
    name="ltx-2",
    title="LTX-2 and 2.3, video and sound from text",
    model_class="LTX2VideoTransformer3DModel",
    reference="Lightricks/LTX-2",
    sites=(
        r"transformer_blocks\.\d+\.(audio_)?(attn1|attn2|ff)",
        r"transformer_blocks\.\d+\.(audio_to_video|video_to_audio)_attn",
    ),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "input"),
    others={"audio_hidden_states": (("transformer_blocks.0", "audio_hidden_states"), ("audio_norm_out", "input"))},
    inputs=_inputs,
    dimensions=lambda config: {
        "batch": (1, 16),
        "video_tokens": (2, 65536),
        "audio_tokens": (2, 1024),
        "text_tokens": (2, 1024),
    },
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=30, interval=4, warmup=3, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
    guidance="batched",
    guidance_scale=3.0,
    latent_size=(16, 16, 24),
    latent_scale=32,
    time_scale=8,
    typical={"text_tokens": 1024, "audio_tokens": 126},
    pipeline=Pipeline(
        ignored_inputs=("sigma", "use_cross_timestep", "num_frames", "height", "width", "fps", "audio_num_frames"),
        modules=("rope", "audio_rope"),
    ),
    lora_loader="LTX2LoraLoaderMixin",
    forward=_predictions,
    patched=_patched,
)
