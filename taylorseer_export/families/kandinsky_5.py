"""Kandinsky 5.0 Lite: blocks over the words, then blocks over the video that attend to them; channels stand last.

Its code rounds turned queries and keys to bfloat16 in any precision, so that float32 is no more exact than that there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, instead, unless_traced, video_patches


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if (kind := config.get("attention_type", "regular")) != "regular":
        raise ConfigError(
            f"config entry `attention_type` is {kind}, expected regular; its sparse attention chooses blocks by their "
            "content while it runs, which no graph here does: pass a model with full attention"
        )
    _, high, wide = config["patch_size"]
    channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + bool(config["visual_cond"])
    return (
        Input("hidden_states", ("batch", "frames", f"{high}*rows", f"{wide}*columns", channels), "latent"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["in_text_dim"]), "constant"),
        Input("timestep", ("batch",), "step"),
        Input("pooled_projections", ("batch", config["in_text_dim2"]), "constant"),
        Input("scale_factor", (3,), "constant", "float32", fill="ones"),
    )


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    """As its pipelines, with the places that follow from the sizes; what its code has in float32 meets the weights."""
    import torch

    _, frames, height, width, _ = inputs["hidden_states"].shape
    sides = (frames, height // model.patch_size[1], width // model.patch_size[2])
    rest = {
        "visual_rope_pos": [torch.arange(side) for side in sides],
        "text_rope_pos": torch.arange(inputs["encoder_hidden_states"].shape[1]),
        "scale_factor": inputs["scale_factor"].tolist(),
    }
    meeting = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)] + [model.time_embeddings.in_layer]
    hooks = [m.register_forward_pre_hook(lambda m, given: tuple(x.to(m.weight.dtype) for x in given)) for m in meeting]
    try:
        return model(**{**inputs, **rest}, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()


def _forward(
    model: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    timestep: Any,
    pooled_projections: Any,
    scale_factor: Any,
    return_dict: bool,
) -> Any:
    """The model's own forward, whose tokens stay rows up to the end."""
    import torch

    time = model.time_embeddings(timestep) + model.pooled_text_embeddings(pooled_projections)
    text = model.text_embeddings(encoder_hidden_states)
    turned = model.text_rope_embeddings(torch.arange(text.shape[1])).unsqueeze(0)
    for block in model.text_transformer_blocks:
        text = block(text, time, turned)
    states = model.visual_embeddings(hidden_states)
    batch, *sides = states.shape[:-1]
    places = [torch.arange(side) for side in sides]
    turned = model.visual_rope_embeddings((1, *sides), places, scale_factor.unbind()).flatten(1, 3)
    states = states.flatten(1, 3)
    for block in model.visual_transformer_blocks:
        states = block(states, text, time, turned, None)
    last = model.out_layer
    shift, scale = last.modulation(time).unsqueeze(1).float().chunk(2, -1)
    made = last.out_layer((last.norm(states.float()) * (scale + 1) + shift).type_as(states))
    made = made.reshape(batch, *sides, -1, *model.patch_size).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return (made.flatten(1, 2).flatten(2, 3).flatten(3, 4),)


KANDINSKY_5 = Family(
    name="kandinsky-5",
    title="Kandinsky 5.0 of full attention, from text and from a picture",
    model_class="Kandinsky5Transformer3DModel",
    reference="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    sites=(r"visual_transformer_blocks\.\d+\.(self_attention|cross_attention|feed_forward)",),
    stack_input=("visual_transformer_blocks.0", "visual_embed"),
    stack_output=("out_layer.norm", "input"),
    inputs=_inputs,
    dimensions=lambda config: {
        "batch": (1, 8),
        "frames": (1, 128),
        "rows": (2, 128),
        "columns": (2, 128),
        "text_tokens": (2, 1024),
    },
    latent_sizes=video_patches,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler_config={"shift": 5.0},
    guidance="branches",
    guidance_scale=5.0,
    latent_size=(31, 64, 96),
    typical={"text_tokens": 512},
    pipeline=Pipeline(
        arguments="channels-last",
        cast_inputs=("encoder_hidden_states", "pooled_projections"),
        ignored_inputs=("visual_rope_pos", "text_rope_pos"),
    ),
    attributes=lambda config: {"visual_cond": int(config["visual_cond"])},
    lora_loader="KandinskyLoraLoaderMixin",
    rounded=(r"(text|visual)_transformer_blocks\.\d+\.self_attention",),
    forward=unless_traced(_call),
    patched=instead(_forward),
)
