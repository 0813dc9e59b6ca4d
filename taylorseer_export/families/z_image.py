"""Z-Image: blocks over the picture, then over picture and text, each gated by a tanh behind a second norm.

Its `forward` takes lists with a tensor for each sample, and fills up picture and text to whole 32s with tokens that
attention sees. Here samples lie in one tensor, as many tokens more stand behind as that may need, and a mask shows
those that it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.encoders import ANSWER, asked, layers
from taylorseer_export.families.family import (
    Defaults,
    Family,
    Input,
    Pipeline,
    patches,
    replaced,
    uncut,
    unless_traced,
)
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture

_PATCH, _OF_PATCHES = 2, "2-1"  # what the pipeline cuts, and its layers among those of other patches
_FILLED = 32  # tokens of which picture and text are made a multiple each


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    sizes = list(zip(config["all_patch_size"], config["all_f_patch_size"], strict=True))
    if config.get("siglip_feat_dim") is not None or (_PATCH, 1) not in sizes:
        raise ConfigError(
            f"config entries `siglip_feat_dim` and `all_patch_size` are {config.get('siglip_feat_dim')} and "
            f"{list(config['all_patch_size'])}, expected none and one of {_PATCH}: that is another variant of Z-Image "
            "(Omni, with pictures to go by); pass the text-to-image model"
        )
    sides = (f"{_PATCH}*rows", f"{_PATCH}*columns")
    return (
        Input("x", ("batch", config["in_channels"], *sides), "latent"),
        Input("t", ("batch",), "step", "float32"),
        Input("cap_feats", ("batch", "text_tokens", config["cap_feat_dim"]), "constant"),
        # How many words each sample has: ones, then zeros.
        Input("cap_mask", ("batch", "text_tokens"), "constant", "int64", fill="ones"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    text, rows, columns = config["axes_lens"]  # places that it has for each; the picture's comes behind the text's
    words = (text - 2) // _FILLED * _FILLED
    return {"batch": (1, 16), "rows": (2, rows), "columns": (2, columns), "text_tokens": (1, words)}


def _latent_sizes(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    return patches({"patch_size": _PATCH}, height, width)


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    """The model takes lists."""
    import torch

    texts = [text[: int(count)] for text, count in zip(inputs["cap_feats"], inputs["cap_mask"].sum(1), strict=True)]
    made = model(list(inputs["x"].unsqueeze(2)), inputs["t"], texts, return_dict=False)[0]
    return torch.stack(made).squeeze(2)


def _in_one_tensor(model: Any) -> AbstractContextManager[None]:
    rope = model.rope_embedder
    tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    return replaced(model, forward=partial(_traced, model, tables))


def _traced(model: Any, tables: Any, x: Any, t: Any, cap_feats: Any, cap_mask: Any, return_dict: bool) -> Any:
    """The model's own forward for samples of one size, `x` [B, C, H, W] and `cap_feats` [B, T, D]."""
    import torch

    batch, channels, height, width = x.shape
    rows, columns = height // _PATCH, width // _PATCH
    count = rows * columns
    time = model.t_embedder(t * model.t_scale).type_as(x)
    words = (cap_mask.sum(1) + _FILLED - 1) // _FILLED * _FILLED  # [B], filled up

    def filled(tokens: Any, filler: Any) -> Any:
        return torch.cat([tokens, filler.expand(batch, _FILLED - 1, -1)], 1)

    def turns(*places: Any) -> Any:  # of the first, second and third place of each token
        return torch.cat([table[of.expand(batch, -1)] for table, of in zip(tables, places, strict=True)], -1)

    token = torch.arange(count + _FILLED - 1)
    own = (token < count).long()  # padding stands at (0, 0, 0)
    seen = (token // _FILLED <= (count - 1) // _FILLED).expand(batch, -1)
    line = token // columns
    turned = turns((words[:, None] + 1) * own, line * own, (token - line * columns) * own)
    cut = x.reshape(batch, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 3, 5, 1)
    picture = filled(model.all_x_embedder[_OF_PATCHES](cut.flatten(3).flatten(1, 2)), model.x_pad_token)
    for block in model.noise_refiner:
        picture = block(picture, seen, turned, time)

    word = torch.arange(cap_feats.shape[1] + _FILLED - 1)
    nowhere = torch.zeros_like(word)
    read, placed = word < words[:, None], turns(word + 1, nowhere, nowhere)
    text = torch.where(cap_mask.bool().unsqueeze(-1), model.cap_embedder(cap_feats), model.cap_pad_token)
    text = filled(text, model.cap_pad_token)
    for block in model.context_refiner:
        text = block(text, read, placed)

    tokens, seen, turned = (torch.cat(both, 1) for both in ((picture, text), (seen, read), (turned, placed)))
    for block in model.layers:
        tokens = block(tokens, seen, turned, time)
    made = model.all_final_layer[_OF_PATCHES](tokens[:, :count], c=time)
    return (uncut(made, (rows, columns), (_PATCH, _PATCH), channels_last=True),)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    return {"cap_feats": layers(encoders["text_encoder"], given["tokens"])[-2]}


_TOKENS = Tokens("tokens", "tokenizer", 512, size="text_tokens", padded=False, template=asked() + "{}" + ANSWER)

Z_IMAGE = Family(
    name="z-image",
    title="Z-Image and Z-Image-Turbo",
    model_class="ZImageTransformer2DModel",
    reference="Tongyi-MAI/Z-Image",
    sites=(r"(noise_refiner|layers)\.\d+\.(attention_norm2|ffn_norm2)",),
    stack_input=("noise_refiner.0", "x"),
    stack_output=(f"all_final_layer.{_OF_PATCHES}", "x"),
    first_input=("noise_refiner.0.attention", "hidden_states"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    scheduler_config={"shift": 6.0},
    guidance="batched",
    guidance_scale=5.0,
    timestep_divisor=1000.0,
    pipeline=Pipeline(
        guidance_offset=1.0,
        prediction_sign=-1,
        timestep_reversed=True,
        arguments="lists",
        positional=("t", "cap_feats"),
    ),
    whole=Whole(decode=picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode, negative=""),
    attributes=lambda config: {"in_channels": config["in_channels"]},
    lora_loader="ZImageLoraLoaderMixin",
    variants={
        "turbo": {
            "guidance": "none",
            "guidance_scale": 1.0,
            "scheduler_config": {"shift": 3.0},
            "defaults": Defaults(steps=9, interval=4, warmup=3, order=1),
        },
    },
    forward=unless_traced(_forward),
    patched=_in_one_tensor,
)
