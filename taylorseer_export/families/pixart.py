"""PixArt: blocks of self-attention, cross-attention to the text and an MLP, guidance by a batch of two halves.

Its pipelines put prompts in lower case and, where the libraries for that are installed, clean them of what web pages
leave in captions; here they are in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.apart import apart, of_table, part_of_table, side_of_table
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, fixed
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    size, told = config["sample_size"], config.get("use_additional_conditions")
    if told or (told is None and size == 128):
        raise ConfigError(
            f"config entry `use_additional_conditions` is {told}, expected false: a model that is told its resolution "
            "is PixArt-Alpha at 1024 pixels; pass a PixArt-Sigma"
        )
    return (  # for any other size it computes a new position table while it runs
        Input("hidden_states", ("batch", config["in_channels"], size, size), "latent"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["caption_channels"]), "constant"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", fill="ones"),
    )


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """T5's words, padding too, and which of them count."""
    states = encoders["text_encoder"](given["t5"], attention_mask=given["mask"])[0]
    return {"encoder_hidden_states": states, "encoder_attention_mask": given["mask"].to(states.dtype)}


_TOKENS = Tokens("t5", "tokenizer", 300, size="text_tokens", mask="mask", lowered=True)
_WHOLE = Whole(decode=picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode, negative="")


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "text_tokens": (2, 512)}


PIXART = Family(
    name="pixart",
    title="PixArt-Sigma, and PixArt-Alpha up to 512 pixels",
    model_class="PixArtTransformer2DModel",
    reference="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    sites=(r"transformer_blocks\.\d+\.(attn1|attn2|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "input"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=fixed,
    defaults=Defaults(steps=20, interval=4, warmup=3, order=1),
    scheduler="DPMSolverMultistepScheduler",
    guidance="batched",
    guidance_scale=4.5,
    typical={"text_tokens": 300},
    pipeline=Pipeline(ignored_inputs=("added_cond_kwargs",)),
    whole=_WHOLE,
    shared=apart(_inputs, _dimensions, of_table, side_of_table, patched=part_of_table),
    by_pipeline={"PixArtAlphaPipeline": {"whole": replace(_WHOLE, tokens=(replace(_TOKENS, length=120),))}},
)
