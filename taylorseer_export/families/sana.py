"""Sana: linear attention over the picture, attention to the text, an MLP of convolutions; guidance by two halves of a
batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, fixed, patches


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if config.get("guidance_embeds") or config.get("timestep_scale", 1.0) != 1:
        raise ConfigError(
            f"config entries `guidance_embeds` and `timestep_scale` are {config.get('guidance_embeds')} and "
            f"{config.get('timestep_scale')}, expected false and 1: that is Sana-Sprint, whose 1 to 4 steps leave "
            "nothing to forecast; pass the model it is made from"
        )
    patch, side = config["patch_size"], config["sample_size"]
    sides = (side, side) if _placed(config) else (f"{patch}*rows", f"{patch}*columns")
    return (
        Input("hidden_states", ("batch", config["in_channels"], *sides), "latent"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["caption_channels"]), "constant"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", fill="ones"),
    )


def _placed(config: Mapping[str, Any]) -> bool:
    """Whether it adds a table of places, which for any other size it computes anew while it runs."""
    return config.get("interpolation_scale") is not None


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    sides = {} if _placed(config) else {"rows": (2, 256), "columns": (2, 256)}
    return {"batch": (1, 16), **sides, "text_tokens": (2, 512)}


SANA = Family(
    name="sana",
    title="Sana and Sana 1.5",
    model_class="SanaTransformer2DModel",
    reference="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    sites=(r"transformer_blocks\.\d+\.(attn1|attn2|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "hidden_states"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=patches,
    defaults=Defaults(steps=20, interval=4, warmup=3, order=1),
    scheduler="DPMSolverMultistepScheduler",
    scheduler_config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    guidance="batched",
    guidance_scale=4.5,
    latent_size=(32, 32),
    latent_scale=32,
    typical={"text_tokens": 300},
    pipeline=Pipeline(cast_inputs=("encoder_hidden_states",)),
    pipelines=("SanaPipeline", "SanaPAGPipeline"),
    by_config=lambda config: {"latent_sizes": fixed} if _placed(config) else {},
)
