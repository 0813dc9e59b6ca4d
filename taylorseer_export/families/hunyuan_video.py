"""HunyuanVideo: double blocks over video and text, then single blocks over both; text to video, image to video."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, expanded_masks, patches, replaced
from taylorseer_export.families.whole import Modules, Tensors, Tiling, Tokens, Whole


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


_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
_LLAMA = Tokens("llama", "tokenizer", 256, size="text_tokens", template=_TEMPLATE, dropped=95, mask="mask")


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = encoders["text_encoder"](
        input_ids=given["llama"], attention_mask=given["mask"], output_hidden_states=True, use_cache=False
    ).hidden_states
    return {
        "encoder_hidden_states": states[-3][:, _LLAMA.dropped :],
        "encoder_attention_mask": given["mask"][:, _LLAMA.dropped :].float(),
        "pooled_projections": encoders["text_encoder_2"](given["clip"]).pooler_output,
    }


def _tile(vae: Any, latents: Any) -> Any:
    """The decoder that diffusers has, written so that one graph holds for any number of latent frames and pixels."""
    with ExitStack() as changed:
        # Where its class is, its attention finds the function that makes masks.
        changed.enter_context(replaced(sys.modules[type(vae).__module__], prepare_causal_attention_mask=_mask))
        for module in vae.decoder.modules():
            if type(module).__name__ == "HunyuanVideoUpsampleCausal3D":
                changed.enter_context(replaced(module, forward=_upsampled(module)))
        return vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor)) / 2 + 0.5


def _mask(frames: Any, pixels: Any, dtype: Any, device: Any, batch_size: Any = None) -> Any:
    """`[B, F P, F P]`: 0 where a pixel sees its own frame and those before, else minus infinity. diffusers repeats each
    frame by a number that is known when it runs, for which ONNX has no sound form."""
    import torch

    frame = torch.arange(frames, device=device).unsqueeze(1).expand(frames, pixels).flatten()
    mask = torch.where(frame.unsqueeze(0) <= frame.unsqueeze(1), 0.0, -float("inf")).to(dtype)
    return mask.unsqueeze(0).expand(batch_size, -1, -1)


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
    whole=Whole(
        encoders=("text_encoder", "text_encoder_2"),
        tokens=(_LLAMA, Tokens("clip", "tokenizer_2", 77)),
        encode=_encode,
        tile=_tile,
        tiling=_tiling,
        frame_rate=24,
    ),
    lora_loader="HunyuanVideoLoraLoaderMixin",
    # From a picture its encoder sees that too, and its pipeline cuts frames off.
    variants={"i2v": {"guidance_scale": 1.0, "whole": None}},
    patched=expanded_masks,
)
