"""Qwen-Image: double blocks over image and text, guidance by a second call with another prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.encoders import ANSWER, DESCRIBE, asked, layers
from taylorseer_export.families.family import Comfy, Defaults, Family, Input, Pipeline, call, packed, replaced
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, still, still_spread

_LAYERED = "no family covers Qwen-Image-Layered, which draws several pictures at once; pass another model"
# Config entry that no model of the family sets -> what to do with one that does.
_OTHERS = {
    "zero_cond_t": "export Qwen-Image-Edit-2511 as family qwen-image-edit",
    "use_additional_t_cond": _LAYERED,
    "use_layer3d_rope": _LAYERED,
    "guidance_embeds": "no family covers a Qwen-Image that takes guidance as an input; pass another model",
}


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    for option, fix in _OTHERS.items():
        if config.get(option):
            raise ConfigError(f"config entry `{option}` is true, expected false; {fix}")
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("encoder_hidden_states_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
        # (frames, height, width) of each sample in tokens, as `np.asarray` makes it of the pipeline's nested lists.
        Input("img_shapes", ("batch", 1, 3), "constant", "int64", fill="sides"),
    )


def with_shapes(model: Any, inputs: dict[str, Any]) -> Any:
    """The model reads `img_shapes` as numbers; while it is traced they are a tensor, with the tokens they describe."""
    import torch

    shapes = inputs["img_shapes"]
    given = (shapes, inputs["hidden_states"].shape[1]) if torch.compiler.is_exporting() else shapes.tolist()
    return call(model, {**inputs, "img_shapes": given})


@contextmanager
def places_of_a_tensor(model: Any) -> Iterator[None]:
    """The model's turns for places that are computed from a tensor; the original cuts tables by numbers."""
    import torch

    embedder = model.pos_embed

    def turns(*places: Any) -> Any:
        sides = zip(places, embedder.axes_dim, strict=True)
        return torch.cat([embedder.rope_params(place.float(), dim, embedder.theta) for place, dim in sides], 1)

    def tables(of_images: Any, max_txt_seq_len: Any, device: Any) -> Any:
        shapes, count = of_images
        frames, heights, widths = shapes[0].unbind(1)
        token: Any = torch.arange(count)
        picture: Any = 0
        if shapes.shape[1] > 1:
            counts, order = frames * heights * widths, torch.arange(shapes.shape[1])
            starts = torch.where(order < order[:, None], counts, 0).sum(1)
            picture = (token[:, None] >= starts).sum(1) - 1
            start, heights, widths = (of_each.index_select(0, picture) for of_each in (starts, heights, widths))
            token = token - start
        line = token // widths  # counted over all frames; the middle of a picture is at (0, 0)
        row, column = line % heights - (heights - heights // 2), token % widths - (widths - widths // 2)
        text = torch.arange(max_txt_seq_len) + (shapes[0, :, 1:] // 2).amax((0, 1))
        return turns(picture + line // heights, row, column), turns(text, text, text)

    def lengths(text: Any, mask: Any) -> Any:  # without those of each sample, which nothing reads
        return text.shape[1], None, mask.bool()

    code = sys.modules[type(model).__module__]
    with replaced(embedder, forward=tables), replaced(code, compute_text_seq_len_from_mask=lengths):
        yield


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = layers(encoders["text_encoder"], given["tokens"])
    return {"encoder_hidden_states": states[-1][:, _TOKENS.dropped :]}


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 1024)}


_TEMPLATE = asked(DESCRIBE) + "{}" + ANSWER
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
    dimensions=_dimensions,
    latent_sizes=packed,
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    scheduler_config={
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    guidance="branches",
    guidance_scale=4.0,
    timestep_divisor=1000.0,
    pipeline=Pipeline(guidance_keeps_norm=True, arguments="first-shape"),
    comfy=lambda config: Comfy("QwenImage", {"encoder_hidden_states": "context"}),
    whole=Whole(decode=still, begin=still_spread, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode),
    lora_loader="QwenImageLoraLoaderMixin",
    retired=("pooled_projection_dim",),
    forward=with_shapes,
    patched=places_of_a_tensor,
)
