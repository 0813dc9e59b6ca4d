"""FLUX.1 (dev, schnell): double blocks over image and text, then single blocks over both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    guidance = (Input("guidance", ("batch",), "constant"),) if config["guidance_embeds"] else ()
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        *guidance,
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
        Input("img_ids", ("image_tokens", 3), "constant", "float32"),
        Input("txt_ids", ("text_tokens", 3), "constant", "float32"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 512)}


def _latent_sizes(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    for label, size in (("height", height), ("width", width)):
        if size % 2:
            raise ConfigError(
                f"latent {label} is {size}, expected an even number (latent pixels), which pack 2 x 2 into tokens; "
                "change --size or --latent-size"
            )
    return {"image_tokens": (height // 2) * (width // 2)}


FLUX = Family(
    name="flux",
    title="FLUX.1 dev and schnell",
    model_class="FluxTransformer2DModel",
    reference="black-forest-labs/FLUX.1-dev",
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
    defaults=Defaults(steps=50, interval=6, warmup=3, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    guidance="embedded",
    guidance_scale=3.5,
    latent_size=(128, 128),
)
