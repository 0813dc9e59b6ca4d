"""HunyuanVideo: double blocks over video and text, then single blocks over both; text to video, image to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, expanded_masks, patches


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    """The same for all three kinds: image conditions come as channels, or replace the first frame of the latent."""
    side = config["patch_size"]
    latent = ("batch", config["in_channels"], "frames", f"{side}*rows", f"{side}*columns")
    inputs = (
        Input("hidden_states", latent, "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["text_embed_dim"]), "constant"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", "float32", fill="ones"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
    )
    guidance = Input("guidance", ("batch",), "constant", fill="guidance")
    return (*inputs, guidance) if config["guidance_embeds"] else inputs


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 8), "frames": (1, 64), "rows": (2, 128), "columns": (2, 128), "text_tokens": (2, 1024)}


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    return {"frames": frames, **patches(config, height, width)}


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    title="HunyuanVideo: text to video, and image to video by channels or by a replaced first frame",
    model_class="HunyuanVideoTransformer3DModel",
    reference="hunyuanvideo-community/HunyuanVideo",
    sites=(
        r"transformer_blocks\.\d+\.attn",
        r"transformer_blocks\.\d+\.ff",
        r"single_transformer_blocks\.\d+\.proj_out",
    ),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "x"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 7.0},
    guidance="embedded",
    guidance_scale=6.0,
    latent_size=(33, 90, 160),
    # From a picture, its pipeline begins a little off the noise; it passes guidance whether or not the model takes it.
    pipeline=Pipeline(guidance_factor=1000.0, condition_share=0.001, ignored_inputs=("guidance",)),
    lora_loader="HunyuanVideoLoraLoaderMixin",
    variants={"i2v": {"guidance_scale": 1.0}},
    patched=expanded_masks,
)
