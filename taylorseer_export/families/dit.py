"""DiT: class-conditional transformer blocks with adaLN-Zero, guidance by a batch of two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.families.apart import apart, in_table, of_table, side_of_table
from taylorseer_export.families.family import Defaults, Family, Input, fixed, instead, uncut
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


def _forward(model: Any, hidden_states: Any, timestep: Any, class_labels: Any, return_dict: bool) -> Any:
    """As the model's own, of rows and columns, where that knows squares alone."""
    from torch.nn.functional import silu

    patch, states = model.config.patch_size, in_table(model.pos_embed, hidden_states)
    counts = [side // patch for side in hidden_states.shape[2:]]
    for block in model.transformer_blocks:
        states = block(states, timestep=timestep, class_labels=class_labels)
    embed = model.transformer_blocks[0].norm1.emb
    told = model.proj_out_1(silu(embed(timestep, class_labels, hidden_dtype=states.dtype)))
    shift, scale = told[:, None].chunk(2, dim=2)
    made = model.proj_out_2(model.norm_out(states) * (1 + scale) + shift)
    return (uncut(made, counts, (patch, patch), channels_last=True),)


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
    shared=apart(_inputs, _dimensions, of_table, side_of_table, patched=instead(_forward)),
)
