"""Stable Diffusion 3 and 3.5: joint blocks over image and text, guidance by a batch of two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, patches


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    height, width = (f"{config['patch_size']}*{side}" for side in ("rows", "columns"))
    return (
        Input("hidden_states", ("batch", config["in_channels"], height, width), "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    side = (2, config["pos_embed_max_size"])
    return {"batch": (1, 16), "rows": side, "columns": side, "text_tokens": (1, 1024)}


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    model_class="SD3Transformer2DModel",
    reference="stabilityai/stable-diffusion-3.5-large",
    sites=(r"transformer_blocks\.\d+\.(attn2?|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "x"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=patches,
    defaults=Defaults(steps=28, interval=4, warmup=3, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 3.0},
    guidance="batched",
    guidance_scale=7.0,
    latent_size=(128, 128),
    typical={"text_tokens": 333},
)
