"""Qwen-Image: double blocks over image and text, guidance by a second call with the negative prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, packed, replaced
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, still, still_spread


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    for option in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if config.get(option):
            raise ConfigError(
                f"config entry `{option}` is true, expected false: that is another variant of Qwen-Image (edited or "
                "layered pictures); pass the text-to-image model"
            )
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("encoder_hidden_states_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
        # (frames, height, width) of each sample in tokens, as `np.asarray` makes it of the pipeline's nested lists.
        Input("img_shapes", ("batch", 1, 3), "constant", "int64", fill="sides"),
    )


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    """The model reads `img_shapes` as numbers; while it is traced they are a tensor, with the tokens they describe."""
    import torch

    shapes = inputs["img_shapes"]
    given = (shapes, inputs["hidden_states"].shape[1]) if torch.compiler.is_exporting() else shapes.tolist()
    return call(model, {**inputs, "img_shapes": given})


@contextmanager
def _real_rotary_embedding(model: Any) -> Iterator[None]:
    """Rotate by cosines and sines of positions computed from a tensor, not by complex tables cut with numbers."""
    import torch

    embedder = model.pos_embed

    def angles(of_image: Any, max_txt_seq_len: int, device: Any) -> Any:
        shapes, count = of_image
        _, height, width = shapes[0, 0].unbind()
        token = torch.arange(count)
        line = token // width  # counted over all frames; the middle of a picture is at (0, 0)
        places = (line // height, line % height - (height - height // 2), token % width - (width - width // 2))
        text = torch.arange(max_txt_seq_len) + torch.maximum(height // 2, width // 2)
        return turns(places), turns((text, text, text))

    def turns(places: tuple[Any, ...]) -> tuple[Any, Any]:
        angles = []
        for place, dim in zip(places, embedder.axes_dim, strict=True):
            frequency = 1.0 / torch.pow(embedder.theta, torch.arange(0, dim, 2).float().div(dim))
            angles.append(torch.outer(place.float(), frequency))
        angle = torch.cat(angles, -1)[:, None]
        return angle.cos(), angle.sin()

    def rotated(x: Any, freqs_cis: tuple[Any, Any], use_real: bool) -> Any:
        cos, sin = freqs_cis
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pair = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
        return pair.flatten(3).type_as(x)

    def lengths(text: Any, mask: Any) -> Any:
        return text.shape[1], None, mask.bool()

    code = sys.modules[type(model).__module__]
    with (
        replaced(embedder, forward=angles),
        replaced(code, apply_rotary_emb_qwen=rotated, compute_text_seq_len_from_mask=lengths),
    ):
        yield


_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    encoder = encoders["text_encoder"]
    states = encoder(given["tokens"], output_hidden_states=True, use_cache=False).hidden_states
    return {"encoder_hidden_states": states[-1][:, _TOKENS.dropped :]}


_TOKENS = Tokens("tokens", "tokenizer", 1024, size="text_tokens", padded=False, template=_TEMPLATE, dropped=34)

QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    model_class="QwenImageTransformer2DModel",
    reference="Qwen/Qwen-Image",
    sites=(r"transformer_blocks\.\d+\.(attn|img_mlp)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "x"),
    inputs=_inputs,
    dimensions=lambda config: {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 1024)},
    latent_sizes=packed,
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    guidance="branches",
    guidance_scale=4.0,
    latent_size=(128, 128),
    timestep_divisor=1000.0,
    pipeline=Pipeline(guidance_keeps_norm=True, arguments="first-shape"),
    whole=Whole(decode=still, begin=still_spread, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode),
    lora_loader="QwenImageLoraLoaderMixin",
    forward=_forward,
    patched=_real_rotary_embedding,
)
