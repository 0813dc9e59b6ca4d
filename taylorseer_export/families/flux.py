"""FLUX.1 (dev, schnell, Kontext): double blocks over image and text, then single blocks over both.

Kontext is the same network on longer rows: the latent of the picture to be edited follows the noisy one, and what it
returns for those rows is thrown away. Here both are separate inputs, so that the bundle knows which rows never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.families.family import Comfy, Defaults, Family, Input, Pipeline, call, no_counterpart, packed
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, in_tokens, latents, picture, spread


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    guidance = (Input("guidance", ("batch",), "constant", fill="guidance"),) if config["guidance_embeds"] else ()
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        *guidance,
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("pooled_projections", ("batch", config["pooled_projection_dim"]), "constant"),
        Input("img_ids", ("image_tokens", 3), "constant", "float32", fill="grid"),
        Input("txt_ids", ("text_tokens", 3), "constant", "float32", fill="zeros"),
    )


def _kontext_inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return (
        *_inputs(config),
        Input("image_latents", ("batch", "condition_tokens", config["in_channels"]), "constant"),
        # A 1 in column 0 tells the picture to be edited from the noise.
        Input("image_ids", ("condition_tokens", 3), "constant", "float32", fill="grid", first=1),
    )


def rows_behind(model: Any, inputs: dict[str, Any]) -> Any:
    """The pipeline's `hidden_states` are (latents, image_latents), its `img_ids` (img_ids, image_ids)."""
    import torch

    rest = dict(inputs)
    latents, ids = rest.pop("hidden_states"), rest.pop("img_ids")
    rest["hidden_states"] = torch.cat([latents, rest.pop("image_latents")], 1)
    rest["img_ids"] = torch.cat([ids, rest.pop("image_ids")], -2)
    return call(model, rest)[:, : latents.shape[1]]


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 512)}


def _kontext_dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {**_dimensions(config), "condition_tokens": (4, 16384)}


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    return {
        "encoder_hidden_states": encoders["text_encoder_2"](given["t5"])[0],
        "pooled_projections": encoders["text_encoder"](given["clip"]).pooler_output,
    }


def _see(vae: Any, picture: Any) -> dict[str, Any]:
    return {"image_latents": in_tokens(latents(vae, picture))}


_WHOLE = Whole(
    decode=picture,
    begin=spread,
    encoders=("text_encoder", "text_encoder_2"),
    tokens=(Tokens("clip", "tokenizer", 77), Tokens("t5", "tokenizer_2", 512, size="text_tokens")),
    encode=_encode,
)

# About a megapixel each, in steps of 16 pixels: what Kontext was trained on.
_SEEN_AT = (
    (1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944),
    (1024, 1024),
    (944, 1104), (880, 1184), (832, 1248), (800, 1328), (752, 1392), (720, 1456), (688, 1504), (672, 1568),
)  # fmt: skip


def _comfy(config: Mapping[str, Any]) -> Comfy:
    channels = config["in_channels"] // 4  # of the latent, which a token has 2 x 2 pixels of
    inputs = {"encoder_hidden_states": "context", "pooled_projections": "y"}
    told = {"in_channels": channels, "out_channels": channels}
    if config["guidance_embeds"]:
        return Comfy("Flux", {**inputs, "guidance": "guidance"}, told)
    return Comfy("FluxSchnell", inputs, told, ignored=("guidance",))


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
    latent_sizes=packed,
    defaults=Defaults(steps=50, interval=6, warmup=3, order=1),
    scheduler_config={"use_dynamic_shifting": True, "shift": 3.0},
    guidance="embedded",
    guidance_scale=3.5,
    timestep_divisor=1000.0,
    comfy=_comfy,
    whole=_WHOLE,
    lora_loader="FluxLoraLoaderMixin",
    variants={"schnell": {"defaults": Defaults(steps=4, interval=6, warmup=3, order=1), "scheduler_config": {}}},
)

FLUX_KONTEXT = replace(
    FLUX,
    name="flux-kontext",
    title="FLUX.1 Kontext",
    reference="black-forest-labs/FLUX.1-Kontext-dev",
    inputs=_kontext_inputs,
    dimensions=_kontext_dimensions,
    typical={"text_tokens": 512, "condition_tokens": 4096},
    forward=rows_behind,
    pipeline=Pipeline(arguments="rows-behind"),
    pipelines=("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
    comfy=no_counterpart,
    whole=replace(_WHOLE, begin=None, see=_see, seen_at=_SEEN_AT),
    variants={},
    defaults=Defaults(steps=50, interval=4, warmup=3, order=2),
    guidance_scale=2.5,
)
