"""HunyuanVideo: double blocks over video and text, then single blocks over both; text to video, image to video."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.families.autoencoders import all_seen, past_seen
from taylorseer_export.families.encoders import layers
from taylorseer_export.families.family import (
    Comfy,
    Defaults,
    Family,
    Input,
    Pipeline,
    no_counterpart,
    replaced,
    video_patches,
)
from taylorseer_export.families.whole import Modules, Shown, Tensors, Tiling, Tokens, Whole

_CHANNELS = "latent_concat"  # how the published configs call it


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
    # Where a picture comes as channels, the pipeline leaves out what the first latent frame becomes.
    least = 2 if config.get("image_condition_type") == _CHANNELS else 1
    return {"batch": (1, 8), "frames": (least, 64), "rows": (2, 128), "columns": (2, 128), "text_tokens": (2, 1024)}


ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video",
)
_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    f"{''.join(ASPECTS)}:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
_LLAMA = Tokens("llama", "tokenizer", 256, size="text_tokens", template=_TEMPLATE, dropped=95, mask="mask")
_CLIP = Tokens("clip", "tokenizer_2", 77)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = layers(encoders["text_encoder"], given["llama"], attention_mask=given["mask"])
    return {
        "encoder_hidden_states": states[-3][:, _LLAMA.dropped :],
        "encoder_attention_mask": given["mask"][:, _LLAMA.dropped :].float(),
        "pooled_projections": encoders["text_encoder_2"](given["clip"]).pooler_output,
    }


# Where the token for the picture stands, in whose place its states are. How many tokens the header of the answer has,
# which are left out, and which of them is the last.
_PICTURE_AT, _HEADER, _HEADER_ENDS = 5, 4, "<|end_header_id|>"
_PICTURE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\n"
    "Describe the video by detailing the following aspects according to the reference image: "
    f"{''.join(ASPECTS)}:<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_PICTURE_LLAMA = Tokens(
    "llama", "tokenizer", 256, template=_PICTURE_TEMPLATE, dropped=103, mask="mask", sought=(_HEADER_ENDS,)
)


def _encode_with_picture(encoders: Modules, given: Tensors, every: int) -> dict[str, Any]:
    """What Llava makes of picture and prompt: of the states of the picture one of `every`, then those of the prompt.

    As in diffusers, what the language model does not see is told by its own number for padding, what the transformer
    does not see by the tokenizer's mask, and where a long prompt cut the answer's header off, its end stands for that.
    """
    import torch

    llava, ids, mask = encoders["text_encoder"], given["llama"], given["mask"]
    features = llava.model.get_image_features(given["pixels"], return_dict=True)
    seen = getattr(features, "pooler_output", features)[0].unsqueeze(0)  # transformers 4 returns them alone
    count, words, behind = seen.shape[1], llava.get_input_embeddings()(ids), _PICTURE_AT + 1
    kept, ones = (ids != llava.config.pad_token_id).long(), torch.ones_like(seen[..., 0], dtype=torch.long)
    attended = torch.cat([kept[:, :_PICTURE_AT], ones, kept[:, behind:]], 1)
    states = layers(
        llava.model.language_model,
        None,
        inputs_embeds=torch.cat([words[:, :_PICTURE_AT], seen.to(words.dtype), words[:, behind:]], 1),
        attention_mask=attended,
        position_ids=(attended.cumsum(-1) - 1).masked_fill(attended == 0, 1),
    )[-3]
    ends, at = ids[0] == given[_HEADER_ENDS], torch.arange(ids.shape[1])
    last = torch.where(ends.sum() == 2, at[-1], torch.where(ends, at, -1).amax(0))
    prompt = at[_PICTURE_LLAMA.dropped : -_HEADER]
    prompt = torch.where(prompt > last - _HEADER, prompt + _HEADER, prompt)
    shown = states[:, _PICTURE_AT : _PICTURE_AT + count : every]
    return {
        "encoder_hidden_states": torch.cat([shown, states.index_select(1, prompt + count - 1)], 1),
        "encoder_attention_mask": torch.cat([ones[:, ::every], mask.index_select(1, prompt)], 1).float(),
        "pooled_projections": encoders["text_encoder_2"](given["clip"]).pooler_output,
    }


def _tile(vae: Any, latents: Any) -> Any:
    """The decoder that diffusers has, written so that one graph holds for any number of latent frames and pixels."""
    with ExitStack() as changed:
        # Where its class is, its attention finds the function that makes masks.
        changed.enter_context(replaced(sys.modules[type(vae).__module__], prepare_causal_attention_mask=past_seen))
        for module in vae.decoder.modules():
            if type(module).__name__ == "HunyuanVideoUpsampleCausal3D":
                changed.enter_context(replaced(module, forward=_upsampled(module)))
        return vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor)) / 2 + 0.5


def _animate(
    modules: Modules, given: Tensors, caches: Sequence[Any] | None, marked: bool
) -> tuple[dict[str, Any], list[Any]]:
    """The latents of the picture, as the one frame that they are; where it comes as channels, a mask follows them."""
    import torch

    vae = modules["vae"]
    with replaced(sys.modules[type(vae).__module__], prepare_causal_attention_mask=all_seen):
        made = vae.quant_conv(vae.encoder((2 * given["picture"] - 1).unsqueeze(2))).chunk(2, 1)[0]
    latents = made * vae.config.scaling_factor
    # No constant: an engine would store it.
    return {"condition": torch.cat([latents, latents[:, :1].clamp(1, 1)], 1) if marked else latents}, []


def _upsampled(module: Any) -> Any:
    """Its `forward`: all frames are repeated and the first copy is dropped; diffusers sets the first frame aside."""
    from torch.nn.functional import interpolate

    def forward(states: Any) -> Any:
        factors = [float(factor) for factor in module.upsample_factor]
        states = interpolate(states, scale_factor=factors, mode="nearest")
        return module.conv(states[:, :, int(factors[0]) - 1 :])

    return forward


def _tiling(vae: Any) -> Tiling:
    space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return Tiling(
        frames=vae.tile_sample_min_num_frames // time,
        frame_stride=vae.tile_sample_stride_num_frames // time,
        side=vae.tile_sample_min_height // space,
        side_stride=vae.tile_sample_stride_height // space,
        time_scale=time,
        scale=space,
    )


_WHOLE = Whole(
    encoders=("text_encoder", "text_encoder_2"),
    tokens=(_LLAMA, _CLIP),
    encode=_encode,
    tile=_tile,
    tiling=_tiling,
    frame_rate=24,
)


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """From a picture, whose encoder sees that too. Without an input for it, guidance is a second call."""
    condition = config.get("image_condition_type")
    if condition is None:
        return {}
    channels = condition == _CHANNELS
    whole = replace(
        _WHOLE,
        tokens=(_PICTURE_LLAMA, _CLIP),
        encode=partial(_encode_with_picture, every=2 if channels else 4),
        read=Shown("pixels", "image_processor"),
        animate=partial(_animate, marked=channels),
        dropped=4 if channels else 0,
    )
    made: dict[str, Any] = {"guidance_scale": 1.0, "whole": whole, "comfy": no_counterpart}
    if not channels:
        made["undivided"] = ("frames",)  # of which the first is modulated by itself
    # For a replaced frame diffusers takes more states of the picture with a negative prompt than with the prompt.
    return {**made, "guidance": "branches"} if channels and not config.get("guidance_embeds") else made


def _comfy(config: Mapping[str, Any]) -> Comfy:
    inputs = {
        "encoder_hidden_states": "context",
        "encoder_attention_mask": "attention_mask",
        "pooled_projections": "y",
        "guidance": "guidance",
    }
    return Comfy("HunyuanVideo", inputs)


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
    latent_sizes=video_patches,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler_config={"shift": 7.0},
    guidance="embedded",
    guidance_scale=6.0,
    latent_size=(33, 90, 160),
    # From a picture, its pipeline begins a little off the noise; it passes guidance whether or not the model takes it.
    pipeline=Pipeline(guidance_factor=1000.0, condition_share=0.001, ignored_inputs=("guidance",)),
    comfy=_comfy,
    whole=_WHOLE,
    by_config=_by_config,
    lora_loader="HunyuanVideoLoraLoaderMixin",
)
