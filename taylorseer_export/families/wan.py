"""Wan 2.1 and 2.2: video transformer blocks with self-attention, cross-attention to the text, and an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.families.family import Defaults, Family, Input, patches
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole

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
    return {"frames": frames, **patches({"patch_size": config["patch_size"][1]}, height, width)}


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = encoders["text_encoder"](given["tokens"], given["mask"]).last_hidden_state
    return {"encoder_hidden_states": states * given["mask"][..., None].to(states.dtype)}


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
    whole=Whole(
        encoders=("text_encoder",),
        tokens=(Tokens("tokens", "tokenizer", _TEXT, size="text_tokens", mask="mask", cleaned=True),),
        encode=_encode,
        negative="",
    ),
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
