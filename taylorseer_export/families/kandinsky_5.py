"""Kandinsky 5.0: blocks over the words, then blocks over the video that attend to them; channels stand last.

Its code rounds turned queries and keys to bfloat16 in any precision, so that float32 is no more exact than that there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.encoders import DESCRIBE, asked, layers
from taylorseer_export.families.family import (
    Defaults,
    Family,
    Input,
    Pipeline,
    instead,
    patches,
    unless_traced,
    video_patches,
)
from taylorseer_export.families.hunyuan_video import HUNYUAN_VIDEO
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, unit


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
        Input("scale_factor", (3,), "constant", "float32", fill="scales"),
    )


def _inputs_of_picture(config: Mapping[str, Any]) -> tuple[Input, ...]:
    """One frame; its pipeline divides no places and adds no channels."""
    if config["visual_cond"]:
        raise ConfigError(
            "config entry `visual_cond` is true, expected false for Kandinsky5T2IPipeline, which passes a model no "
            "channels of a picture; pass a model that draws from text alone"
        )
    latent, *between, scale = _inputs(config)
    return (replace(latent, shape=("batch", 1, *latent.shape[2:])), *between, replace(scale, fill="ones"))


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


# What its pipelines say to Qwen2.5-VL before the prompt, and how many tokens of it they leave out. Of diffusers 0.42:
# older ones misspell a word, which is a token more.
_VIDEO = (
    "You are a prompt engineer. Describe the video in detail.\n"
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.\n"
    "Describe the location of the video, main characters or objects and their action.\n"
    "Describe the dynamism of the video and presented actions.\n"
    "Name the visual style of the video: whether it is a professional footage, user generated content, some kind of "
    "animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.\n"
    "Pay attention to the order of key actions shown in the scene."
)
_VIDEO_DROPPED, _PICTURE_DROPPED = 128, 40
_NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, walking "
    "backwards"
)


def _tokens(said: str, dropped: int) -> tuple[Tokens, ...]:
    qwen = Tokens(
        "qwen",
        "tokenizer",
        512,
        size="text_tokens",
        padded=False,
        template=f"{asked(said)}{{}}<|im_end|>",
        dropped=dropped,
        cleaned=True,
        shortened=True,
    )
    return qwen, Tokens("clip", "tokenizer_2", 77, cleaned=True)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    return {
        "encoder_hidden_states": layers(encoders["text_encoder"], given["qwen"])[-1][:, given["qwen_dropped"] :],
        "pooled_projections": encoders["text_encoder_2"](given["clip"]).pooler_output,
    }


def _decode(vae: Any, latents: Any) -> Any:
    """As its pipeline: what FLUX's VAE shifts latents by is left out."""
    return unit(vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0])


assert HUNYUAN_VIDEO.whole is not None

# The VAE is HunyuanVideo's.
_WHOLE = replace(
    HUNYUAN_VIDEO.whole, tokens=_tokens(_VIDEO, _VIDEO_DROPPED), encode=_encode, negative=_NEGATIVE, frame_rate=24
)


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 8), "frames": (1, 128), "rows": (2, 128), "columns": (2, 128), "text_tokens": (1, 1024)}


def _dimensions_of_picture(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: extents for name, extents in _dimensions(config).items() if name != "frames"}


_OF_PICTURE = {
    "title": "Kandinsky 5.0, pictures from text",
    "inputs": _inputs_of_picture,
    "dimensions": _dimensions_of_picture,
    "latent_sizes": patches,
    "latent_size": (128, 128),
    "guidance_scale": 3.5,
    "whole": Whole(
        decode=_decode,
        encoders=_WHOLE.encoders,
        tokens=_tokens(f"You are a prompt engineer. {DESCRIBE}", _PICTURE_DROPPED),
        encode=_encode,
        negative="",
    ),
}

KANDINSKY_5 = Family(
    name="kandinsky-5",
    title="Kandinsky 5.0 of full attention, from text and from a picture",
    model_class="Kandinsky5Transformer3DModel",
    reference="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    sites=(r"visual_transformer_blocks\.\d+\.(self_attention|cross_attention|feed_forward)",),
    stack_input=("visual_transformer_blocks.0", "visual_embed"),
    stack_output=("out_layer.norm", "input"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=video_patches,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler_config={"shift": 5.0},
    guidance="branches",
    guidance_scale=5.0,
    latent_size=(31, 64, 96),
    typical={"text_tokens": 512},
    pipeline=Pipeline(
        flow_steps="count",
        arguments="channels-last",
        cast_inputs=("encoder_hidden_states", "pooled_projections"),
        ignored_inputs=("visual_rope_pos", "text_rope_pos"),
    ),
    whole=_WHOLE,
    by_pipeline={
        "Kandinsky5T2IPipeline": _OF_PICTURE,
        "Kandinsky5I2VPipeline": {"whole": None},
        "Kandinsky5I2IPipeline": {"whole": None},
    },
    attributes=lambda config: {"visual_cond": int(config["visual_cond"])},
    lora_loader="KandinskyLoraLoaderMixin",
    rounded=(r"(text|visual)_transformer_blocks\.\d+\.self_attention",),
    forward=unless_traced(_call),
    patched=instead(_forward),
)
