"""DiT: class-conditional transformer blocks with adaLN-Zero, guidance by a batch of two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, fixed
from taylorseer_export.families.whole import Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    size = config["sample_size"]
    return (
        Input("hidden_states", ("batch", config["in_channels"], size, size), "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        # One label more than there are classes: the last is "no class", for guidance.
        Input("class_labels", ("batch",), "constant", "int64", values=(0, config["num_embeds_ada_norm"])),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 64)}


DIT = Family(
    name="dit",
    title="DiT-XL/2 at 256 and 512 pixels",
    model_class="DiTTransformer2DModel",
    reference="facebook/DiT-XL-2-256",
    sites=(r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "input"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=fixed,
    defaults=Defaults(steps=50, interval=4, warmup=2, order=4),
    scheduler="DDIMScheduler",
    scheduler_config={"clip_sample": False},
    guidance="batched",
    guidance_scale=4.0,
    latent_size=(32, 32),
    whole=Whole(decode=picture),
    source="labels",
)
