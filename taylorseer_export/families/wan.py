"""Wan 2.1 and 2.2: video transformer blocks with self-attention, cross-attention to the text, and an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from taylorseer_export.families.family import Comfy, Defaults, Family, Input, Pipeline, video_patches
from taylorseer_export.families.whole import Modules, Shown, Tensors, Tokens, Whole, normed, scaled, unit

_TEXT = 512  # tokens; diffusers splits image from text tokens at this count
_IMAGE = 257  # tokens of the image encoder
_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    _, high, wide = config["patch_size"]
    latent = ("batch", config["in_channels"], "frames", f"{high}*rows", f"{wide}*columns")
    image = config["image_dim"] is not None
    text = _TEXT if image else "text_tokens"
    inputs = (
        Input("hidden_states", latent, "latent"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_hidden_states", ("batch", text, config["text_dim"]), "constant"),
    )
    if not image:
        return inputs
    return (*inputs, Input("encoder_hidden_states_image", ("batch", _IMAGE, config["image_dim"]), "constant"))


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    longest = config["rope_max_seq_len"]  # positions in the table of each axis
    ranges = {"batch": (1, 16), "frames": (1, min(longest, 256)), "rows": (2, min(longest, 256))}
    ranges["columns"] = ranges["rows"]
    return ranges if config["image_dim"] is not None else {**ranges, "text_tokens": (1, _TEXT)}


def _latent_sizes(config: Mapping[str, Any], frames: int, height: int, width: int) -> dict[str, int]:
    return video_patches({"patch_size": config["patch_size"][1]}, frames, height, width)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = encoders["text_encoder"](given["tokens"], given["mask"]).last_hidden_state
    return {"encoder_hidden_states": states * given["mask"][..., None].to(states.dtype)}


def _frames(vae: Any, latents: Any, caches: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """One latent frame by the decoder that diffusers has, with the cache of each causal convolution made plain.

    diffusers keeps less after the first latent frame: one frame of features where later there are two, and a mark where
    a convolution over time was left out. Both stand for frames of zeros, which is what the convolutions pad with.
    """
    used = [None] * len(list(vae.decoder.modules())) if caches is None else list(caches)
    z = vae.post_quant_conv(normed(vae, latents))
    made = vae.decoder(z, feat_cache=used, feat_idx=[0], first_chunk=caches is None)
    side = vae.config.patch_size or 1
    if side > 1:  # a square of pixels is in the channels, its columns first
        count, channels, frames, height, width = made.shape
        made = made.view(count, channels // side**2, side, side, frames, height, width).permute(0, 1, 4, 5, 3, 6, 2)
        made = made.reshape(count, channels // side**2, frames, side * height, side * width)
    if caches is None:
        used = _filled(used)
    return unit(made), used


def _animate(modules: Modules, given: Tensors, caches: Sequence[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """One latent frame of the condition: a mask, then the latents of a video that is the picture and grey from then on.

    The encoder is diffusers' with the cache of each causal convolution made plain, as in `_frames`. What the image
    encoder makes of the picture comes with the first.
    """
    import torch

    vae, made = modules["vae"], {}
    scale = vae.config.scale_factor_temporal
    if caches is None:
        video = (2 * given["picture"] - 1).unsqueeze(2)
    else:
        video = caches[0].clamp(0, 0).repeat(1, 1, scale // 2, 1, 1)  # grey, and no constant: see `_filled`
    latents, used = encoded(vae, video, caches)
    mark = 1 if caches is None else 0
    mask = latents[:, :1].clamp(mark, mark).repeat(1, scale, 1, 1, 1)
    if caches is None and "image_encoder" in modules:
        made["encoder_hidden_states_image"] = seen(modules, given)
    return {**made, "condition": torch.cat([mask, latents], 1)}, used


def encoded(vae: Any, video: Any, caches: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """The latents `[N, C, 1, H, W]` of one latent frame of videos from -1 to 1, and the caches that it leaves."""
    used = [None] * len(list(vae.encoder.modules())) if caches is None else list(caches)
    side = vae.config.patch_size or 1
    if side > 1:  # a square of pixels goes into the channels, its columns first
        count, channels, frames, height, width = video.shape
        video = video.reshape(count, channels, frames, height // side, side, width // side, side)
        video = video.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
    mean = vae.quant_conv(vae.encoder(video, feat_cache=used, feat_idx=[0])).chunk(2, 1)[0]
    return scaled(vae, mean), _filled(used)


def seen(modules: Modules, given: Tensors) -> Any:
    """What the image encoder makes of the picture that it is shown."""
    return modules["image_encoder"](given["pixels"], output_hidden_states=True).hidden_states[-2]


def _filled(caches: Sequence[Any]) -> list[Any]:
    """Caches as they are after any latent frame but the first: two frames of features each."""
    from torch.nn.functional import pad

    filled: list[Any] = []
    for cache in caches:
        if isinstance(cache, str):
            # Of the features of the convolution before, which it reads. No constant: an engine would store it.
            filled.append(filled[-1].clamp(0, 0))
        elif cache is not None:  # some places are never used
            filled.append(cache if cache.shape[2] == 2 else pad(cache, (0, 0, 0, 0, 1, 0)))
    return filled


_TOKENS = Tokens("tokens", "tokenizer", _TEXT, size="text_tokens", mask="mask", cleaned=True)
_WHOLE = Whole(
    encoders=("text_encoder",),
    tokens=(_TOKENS,),
    encode=_encode,
    negative="",
    frames=_frames,
    frame_rate=16,
)


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What follows the noise along the channels comes from a picture; Wan 2.2 shows it to no image encoder."""
    channels = config.get("in_channels")
    if channels == (config.get("out_channels") or channels):
        return {}
    from_picture = replace(_WHOLE, animate=_animate)
    if config.get("image_dim") is None:
        return {"whole": from_picture}
    shown = Shown("pixels", "image_processor")
    tokens = (replace(_TOKENS, size=""),)  # the transformer tells text and picture apart by this number
    return {"whole": replace(from_picture, tokens=tokens, seers=("image_encoder",), shown=shown)}


def _comfy(config: Mapping[str, Any]) -> Comfy:
    """ComfyUI puts the channels of a picture behind those of the noise as diffusers does, and calls other models so."""
    wide = config["num_attention_heads"] * config["attention_head_dim"]
    image = {"encoder_hidden_states_image": "clip_fea"} if config["image_dim"] is not None else {}
    kind = "T2V" if config["in_channels"] == config["out_channels"] else "I2V"
    return Comfy(
        "WAN22_T2V" if config["out_channels"] == 48 else f"WAN21_{kind}",
        {"encoder_hidden_states": "context", **image},
        {"dim": wide},
        weights={"patch_embedding": (wide, config["in_channels"], *config["patch_size"])},
    )


WAN = Family(
    name="wan",
    title="Wan 2.1 (text and image to video), 2.2 A14B (a bundle for each of its two experts), 2.2 5B from text alone",
    model_class="WanTransformer3DModel",
    reference="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    sites=(r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"),
    stack_input=("blocks.0", "hidden_states"),
    stack_output=("norm_out", "inputs"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=50, interval=5, warmup=1, order=1),
    scheduler="UniPCMultistepScheduler",
    scheduler_config=_SCHEDULER,
    guidance="branches",
    guidance_scale=5.0,
    latent_size=(21, 60, 104),
    pipeline=Pipeline(flow_steps="count"),
    comfy=_comfy,
    whole=_WHOLE,
    by_config=_by_config,
    lora_loader="WanLoraLoaderMixin",
    variants={
        "i2v": {"defaults": Defaults(steps=40, interval=5, warmup=1, order=1)},
        # From text its pipeline passes one timestep to all tokens; from a picture the first frame has another.
        "ti2v": {
            "scheduler_config": {**_SCHEDULER, "flow_shift": 5.0},
            "latent_scale": 16,
            "latent_size": (31, 44, 80),
        },
    },
)
