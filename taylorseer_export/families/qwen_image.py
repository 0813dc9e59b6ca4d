"""Qwen-Image and Qwen-Image-Edit: double blocks over image and text, guidance by a second call with another prompt.

The one that edits is the same network on longer rows: the latents of one picture or of several follow the noisy one,
and what it returns for those rows is thrown away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import (
    Comfy,
    Defaults,
    Family,
    Input,
    Pipeline,
    call,
    no_counterpart,
    packed,
    replaced,
)
from taylorseer_export.families.whole import (
    Modules,
    Patches,
    Tensors,
    Tokens,
    Whole,
    in_tokens,
    scaled,
    still,
    still_spread,
)

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


def _edit_inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    *inputs, shapes = _inputs({**config, "zero_cond_t": False})
    latents = Input("image_latents", ("batch", "condition_tokens", config["in_channels"]), "constant")
    return (*inputs, latents, replace(shapes, shape=("batch", "pictures", 3)))  # that of the latent comes first


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    """The model reads `img_shapes` as numbers; while it is traced they are a tensor, with the tokens they describe."""
    import torch

    shapes = inputs["img_shapes"]
    given = (shapes, inputs["hidden_states"].shape[1]) if torch.compiler.is_exporting() else shapes.tolist()
    return call(model, {**inputs, "img_shapes": given})


def _edit(model: Any, inputs: dict[str, Any]) -> Any:
    """The pipelines' `hidden_states` are (latents, image_latents)."""
    import torch

    rest = dict(inputs)
    latents, pictures = rest["hidden_states"], rest.pop("image_latents")
    rest["hidden_states"] = torch.cat([latents, pictures], 1)
    if torch.compiler.is_exporting():
        rest["additional_t_cond"] = pictures  # no variant that we take reads it; `_pictures_at_zero` does
    return _forward(model, rest)[:, : latents.shape[1]]


@contextmanager
def _places_of_a_tensor(model: Any) -> Iterator[None]:
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


@contextmanager
def _pictures_at_zero(model: Any) -> Iterator[None]:
    """Qwen-Image-Edit-2511 modulates the rows of pictures by timestep 0 and those of the latent by that of the step.

    The original puts both in a batch twice as long, and picks one for each row. Here both stand in one row of the
    batch, which a table of all steps can hold, and the rows of the latent come first.
    """
    import torch

    embed = model.time_text_embed.forward
    seen: dict[str, Any] = {}

    def embedded(timestep: Any, hidden_states: Any, pictures: Any) -> Any:
        seen.update(at_zero=embed(timestep * 0, hidden_states), count=pictures.shape[1])
        return embed(timestep, hidden_states)

    def both(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda embedding: torch.stack([forward(embedding), forward(seen["at_zero"])], 1)

    def modulated(original: Callable[..., Any]) -> Callable[..., Any]:
        def modulate(x: Any, parameters: Any, index: Any = None) -> Any:
            if parameters.ndim == 2:  # of the text
                return original(x, parameters)
            counts = (x.shape[1] - seen["count"], seen["count"])
            shift, scale, gate = (spread(pair, counts) for pair in parameters.chunk(3, -1))
            return x * (1 + scale) + shift, gate

        return modulate

    def spread(pair: Any, counts: tuple[Any, Any]) -> Any:
        return torch.cat([pair[:, k : k + 1].expand(-1, count, -1) for k, count in enumerate(counts)], 1)

    with ExitStack() as stack:
        stack.enter_context(replaced(model, zero_cond_t=False))
        stack.enter_context(replaced(model.time_text_embed, forward=embedded))
        for block in model.transformer_blocks:
            stack.enter_context(replaced(block, zero_cond_t=False, _modulate=modulated(block._modulate)))
            stack.enter_context(replaced(block.img_mod, forward=both(block.img_mod.forward)))
        yield


@contextmanager
def _edit_patched(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_places_of_a_tensor(model))
        if model.config.zero_cond_t:
            stack.enter_context(_pictures_at_zero(model))
        yield


_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    encoder = encoders["text_encoder"]
    states = encoder(given["tokens"], output_hidden_states=True, use_cache=False).hidden_states
    return {"encoder_hidden_states": states[-1][:, _TOKENS.dropped :]}


_EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_PICTURE = "<|image_pad|>"
_EDIT_TOKENS = Tokens(
    "tokens", "processor", 4096, "text_tokens", padded=False, template=_EDIT_TEMPLATE, dropped=64, sought=(_PICTURE,)
)


def _encode_with_pictures(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of pictures and prompt in one row, the tokens of pictures replaced by what the eyes see.

    As diffusers' pipelines call it, the language model counts all tokens in one line, those of pictures too.
    """
    import torch

    model, ids = encoders["text_encoder"].model, given["tokens"]
    seen = _seen(model.visual, given["patches"], given["places"])
    words, shown = model.get_input_embeddings()(ids), ids[0] == given[_PICTURE]
    of_each = seen.index_select(0, (shown.long().cumsum(0) - 1).clamp(min=0)).to(words.dtype)
    states = model.language_model(
        inputs_embeds=torch.where(shown[:, None], of_each, words), output_hidden_states=True, use_cache=False
    ).hidden_states
    return {"encoder_hidden_states": states[-1][:, _EDIT_TOKENS.dropped :]}


def _seen(eyes: Any, patches: Any, places: Any) -> Any:
    """What the eyes of Qwen2.5-VL make of patches of several pictures, `[tokens, D]`.

    The original sorts patches by windows and splits them by numbers that are known when it runs. Here each stays in its
    place and attends to those of its window, or of its picture.
    """
    from torch.nn.functional import scaled_dot_product_attention

    rotate = sys.modules[type(eyes).__module__].apply_rotary_pos_emb_vision
    states = eyes.patch_embed(patches)
    turns = eyes.rotary_pos_emb(states, places[:, 2:])
    picture, window = (places[:, k : k + 1] == places[:, k] for k in range(2))
    for number, block in enumerate(eyes.blocks):
        own = block.attn
        parts = own.qkv(block.norm1(states)).unflatten(1, (3, own.num_heads, -1)).unbind(1)
        turned = (*rotate(*parts[:2], *turns), parts[2])
        query, key, value = (part.transpose(0, 1)[None] for part in turned)
        mask = picture if number in eyes.fullatt_block_indexes else window
        made = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=own.scaling)
        states = states + own.proj(made[0].transpose(0, 1).flatten(1))
        states = states + block.mlp(block.norm2(states))
    return eyes.merger(states)


def _see(vae: Any, picture: Any) -> dict[str, Any]:
    made = scaled(vae, vae.encode((2 * picture - 1).unsqueeze(2)).latent_dist.mode())
    return {"image_latents": in_tokens(made.squeeze(2))}


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, 1024)}


def _edit_dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Up to four pictures beside the one that is made; the text encoder sees them too, at up to a megapixel."""
    more = {"text_tokens": (1, 4096), "condition_tokens": (4, 20480), "pictures": (2, 5)}
    return {**_dimensions(config), **more}


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
    comfy=lambda config: Comfy("QwenImage", {"encoder_hidden_states": "context"}),
    whole=Whole(decode=still, begin=still_spread, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode),
    lora_loader="QwenImageLoraLoaderMixin",
    retired=("pooled_projection_dim",),
    forward=_forward,
    patched=_places_of_a_tensor,
)

# The pixels that pictures are brought to: for the VAE, and of several for the text encoder.
_AREA, _SMALLER = 1024 * 1024, 384 * 384
_PICTURES = Patches(
    "patches",
    "places",
    processor="processor",
    encoder="text_encoder",
    token=_PICTURE,
    each=f"Picture {{}}: <|vision_start|>{_PICTURE}<|vision_end|>",
    pictures=4,
    area=_SMALLER,
)
_ONE_PICTURE = replace(_PICTURES, each=f"<|vision_start|>{_PICTURE}<|vision_end|>", pictures=1, area=_AREA)
_EDIT_WHOLE = Whole(
    decode=still,
    see=_see,
    area=_AREA,
    encoders=("text_encoder",),
    tokens=(_EDIT_TOKENS,),
    encode=_encode_with_pictures,
    read=_PICTURES,
)

QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    name="qwen-image-edit",
    title="Qwen-Image-Edit (also 2509 and 2511, of several pictures)",
    reference="Qwen/Qwen-Image-Edit",
    inputs=_edit_inputs,
    dimensions=_edit_dimensions,
    typical={"text_tokens": 1408, "condition_tokens": 4096, "pictures": 2},
    pipeline=Pipeline(guidance_keeps_norm=True, arguments="pictures-behind"),
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"),
    comfy=no_counterpart,
    whole=_EDIT_WHOLE,
    by_pipeline={
        "QwenImageEditPipeline": {"whole": replace(_EDIT_WHOLE, read=_ONE_PICTURE)},
        "QwenImageEditInpaintPipeline": {"whole": None},
    },
    forward=_edit,
    patched=_edit_patched,
)
