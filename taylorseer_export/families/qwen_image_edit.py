"""Qwen-Image-Edit: Qwen-Image on longer rows. The latents of one picture or of several follow the noisy one, and what
it returns for those rows is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from taylorseer_export.families.encoders import ANSWER, asked, layers, seen_by_qwen
from taylorseer_export.families.family import Input, Pipeline, no_counterpart, replaced
from taylorseer_export.families.qwen_image import QWEN_IMAGE, places_of_a_tensor, with_shapes
from taylorseer_export.families.whole import Modules, Patches, Tensors, Tokens, Whole, in_tokens, scaled, still


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    *inputs, shapes = QWEN_IMAGE.inputs({**config, "zero_cond_t": False})
    latents = Input("image_latents", ("batch", "condition_tokens", config["in_channels"]), "constant")
    return (*inputs, latents, replace(shapes, shape=("batch", "pictures", 3)))  # that of the latent comes first


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Up to four pictures beside the one that is made; the text encoder sees them too, at up to a megapixel."""
    more = {"text_tokens": (1, 4096), "condition_tokens": (4, 20480), "pictures": (2, 5)}
    return {**QWEN_IMAGE.dimensions(config), **more}


def _edit(model: Any, inputs: dict[str, Any]) -> Any:
    """The pipelines' `hidden_states` are (latents, image_latents)."""
    import torch

    rest = dict(inputs)
    latents, pictures = rest["hidden_states"], rest.pop("image_latents")
    rest["hidden_states"] = torch.cat([latents, pictures], 1)
    if torch.compiler.is_exporting():
        rest["additional_t_cond"] = pictures  # no variant that we take reads it; `_pictures_at_zero` does
    return with_shapes(model, rest)[:, : latents.shape[1]]


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
def _patched(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(places_of_a_tensor(model))
        if model.config.zero_cond_t:
            stack.enter_context(_pictures_at_zero(model))
        yield


_PICTURE = "<|image_pad|>"
_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_TOKENS = Tokens(
    "tokens",
    "processor",
    4096,
    "text_tokens",
    padded=False,
    template=asked(_SYSTEM) + "{}" + ANSWER,
    dropped=64,
    sought=(_PICTURE,),
)


def _encode_with_pictures(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of pictures and prompt in one row, the tokens of pictures replaced by what the eyes see.

    As diffusers' pipelines call it, the language model counts all tokens in one line, those of pictures too.
    """
    import torch

    model, ids = encoders["text_encoder"].model, given["tokens"]
    seen = seen_by_qwen(model.visual, given["patches"], given["places"])
    words, shown = model.get_input_embeddings()(ids), ids[0] == given[_PICTURE]
    of_each = seen.index_select(0, (shown.long().cumsum(0) - 1).clamp(min=0)).to(words.dtype)
    states = layers(model.language_model, None, inputs_embeds=torch.where(shown[:, None], of_each, words))
    return {"encoder_hidden_states": states[-1][:, _TOKENS.dropped :]}


def _see(vae: Any, picture: Any) -> dict[str, Any]:
    made = scaled(vae, vae.encode((2 * picture - 1).unsqueeze(2)).latent_dist.mode())
    return {"image_latents": in_tokens(made.squeeze(2))}


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
_WHOLE = Whole(
    decode=still,
    see=_see,
    area=_AREA,
    encoders=("text_encoder",),
    tokens=(_TOKENS,),
    encode=_encode_with_pictures,
    read=_PICTURES,
)

QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    name="qwen-image-edit",
    title="Qwen-Image-Edit (also 2509 and 2511, of several pictures)",
    reference="Qwen/Qwen-Image-Edit",
    inputs=_inputs,
    dimensions=_dimensions,
    typical={"text_tokens": 1408, "condition_tokens": 4096, "pictures": 2},
    pipeline=Pipeline(guidance_keeps_norm=True, arguments="pictures-behind"),
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"),
    comfy=no_counterpart,
    whole=_WHOLE,
    by_pipeline={
        "QwenImageEditPipeline": {"whole": replace(_WHOLE, read=_ONE_PICTURE)},
        "QwenImageEditInpaintPipeline": {"whole": None},
    },
    forward=_edit,
    patched=_patched,
)
