"""Z-Image: blocks over the picture, then over picture and text, each gated by a tanh behind a second norm.

Its `forward` takes lists with a tensor for each sample, and fills up picture and text to whole 32s with tokens that
attention sees. Here samples lie in one tensor, as many tokens more stand behind as that may need, and a mask shows
those that it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import log
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, call, patches, replaced
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
    """The model takes lists; while it is traced, the tensors."""
    import torch

    if torch.compiler.is_exporting():
        return call(model, inputs)
    texts = [text[: int(count)] for text, count in zip(inputs["cap_feats"], inputs["cap_mask"].sum(1), strict=True)]
    made = model(list(inputs["x"].unsqueeze(2)), inputs["t"], texts, return_dict=False)[0]
    return torch.stack(made).squeeze(2)


@contextmanager
def _in_one_tensor(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(replaced(model, forward=partial(_traced, model)))
        stack.enter_context(replaced(model.t_embedder, timestep_embedding=_waves))
        for module in model.modules():
            if hasattr(module, "set_processor"):
                stack.enter_context(replaced(module, processor=_Rotated()))
        yield


def _traced(model: Any, x: Any, t: Any, cap_feats: Any, cap_mask: Any, return_dict: bool) -> Any:
    """The model's own forward for samples of one size, `x` [B, C, H, W] and `cap_feats` [B, T, D]."""
    import torch

    batch, channels, height, width = x.shape
    rows, columns = height // _PATCH, width // _PATCH
    count = rows * columns
    time = model.t_embedder(t * model.t_scale).type_as(x)
    words = (cap_mask.sum(1) + _FILLED - 1) // _FILLED * _FILLED  # [B], filled up

    def filled(tokens: Any, filler: Any) -> Any:
        return torch.cat([tokens, filler.expand(batch, _FILLED - 1, -1)], 1)

    def turns(*places: Any) -> tuple[Any, Any]:
        return _turns(model.rope_embedder, [place.expand(batch, -1) for place in places])

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

    tokens, seen = torch.cat([picture, text], 1), torch.cat([seen, read], 1)
    turned = torch.cat([turned[0], placed[0]], 1), torch.cat([turned[1], placed[1]], 1)
    for block in model.layers:
        tokens = block(tokens, seen, turned, time)
    made = model.all_final_layer[_OF_PATCHES](tokens[:, :count], c=time)
    pixels = made.reshape(batch, rows, columns, _PATCH, _PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    return (pixels.flatten(4).flatten(2, 3),)


def _turns(embedder: Any, places: list[Any]) -> tuple[Any, Any]:
    """Cosines and sines `[B, T, 1, D / 2]` of places `[B, T]` along each axis, from the model's tables of angles."""
    import torch

    angles = []
    for place, width, length in zip(places, embedder.axes_dims, embedder.axes_lens, strict=True):
        frequency = 1.0 / embedder.theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(torch.outer(torch.arange(length, dtype=torch.float64), frequency).float()[place])
    angle = torch.cat(angles, -1).unsqueeze(-2)
    return angle.cos(), angle.sin()


def _waves(t: Any, dim: int) -> Any:
    """The model's own sinusoids `[B, dim]` of timesteps `[B]`, outside of its region without autocast."""
    import torch

    half = dim // 2
    frequency = torch.exp(-log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class _Rotated:
    """Attention as the model's own processor makes it, with turns by cosines and sines instead of complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:
        import torch

        def turned(rows: Any, norm: Any) -> Any:
            rows = rows.unflatten(-1, (attn.heads, -1))
            rows = rows if norm is None else norm(rows)
            cos, sin = freqs_cis
            real, imaginary = rows.float().unflatten(-1, (-1, 2)).unbind(-1)
            pair = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
            return pair.flatten(3).type_as(rows).transpose(1, 2)

        query, key = turned(attn.to_q(hidden_states), attn.norm_q), turned(attn.to_k(hidden_states), attn.norm_k)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        mask = attention_mask[:, None, None]
        made = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attn.to_out[0](made.transpose(1, 2).flatten(2))


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    states = encoders["text_encoder"](given["tokens"], output_hidden_states=True, use_cache=False).hidden_states
    return {"cap_feats": states[-2]}


_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

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
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 6.0},
    guidance="batched",
    guidance_scale=5.0,
    latent_size=(128, 128),
    timestep_divisor=1000.0,
    pipeline=Pipeline(
        guidance_offset=1.0,
        prediction_sign=-1,
        timestep_reversed=True,
        arguments="lists",
        positional=("t", "cap_feats"),
    ),
    whole=Whole(
        decode=picture,
        encoders=("text_encoder",),
        tokens=(Tokens("tokens", "tokenizer", 512, size="text_tokens", padded=False, template=_TEMPLATE),),
        encode=_encode,
        negative="",
    ),
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
    forward=_forward,
    patched=_in_one_tensor,
)
