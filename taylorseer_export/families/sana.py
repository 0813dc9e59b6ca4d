"""Sana: linear attention over the picture, attention to the text, an MLP of convolutions; guidance by two halves of a
batch.

Gemma is told how to enhance a prompt before it reads one, but for a negative one; it does not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, fixed, patches, replaced
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    if config.get("guidance_embeds") or config.get("timestep_scale", 1.0) != 1:
        raise ConfigError(
            f"config entries `guidance_embeds` and `timestep_scale` are {config.get('guidance_embeds')} and "
            f"{config.get('timestep_scale')}, expected false and 1: that is Sana-Sprint, whose 1 to 4 steps leave "
            "nothing to forecast; pass the model it is made from"
        )
    patch, side = config["patch_size"], config["sample_size"]
    sides = (side, side) if _placed(config) else (f"{patch}*rows", f"{patch}*columns")
    return (
        Input("hidden_states", ("batch", config["in_channels"], *sides), "latent"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["caption_channels"]), "constant"),
        Input("timestep", ("batch",), "step", "float32"),
        Input("encoder_attention_mask", ("batch", "text_tokens"), "constant", fill="ones"),
    )


def _placed(config: Mapping[str, Any]) -> bool:
    """Whether it adds a table of places, which for any other size it computes anew while it runs."""
    return config.get("interpolation_scale") is not None


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    sides = {} if _placed(config) else {"rows": (2, 256), "columns": (2, 256)}
    return {"batch": (1, 16), **sides, "text_tokens": (2, 512)}


_TOLD = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
_TOKENS = Tokens(
    "tokens",
    "tokenizer",
    300,
    size="text_tokens",
    side="right",
    template=_TOLD + "{}",
    lowered=True,
    dropped=_TOLD,
    mask="mask",
    kept="kept",
)


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    mask, kept = given["mask"], given["kept"][0]
    states = encoders["text_encoder"](given["tokens"], attention_mask=mask, use_cache=False)[0]
    return {
        "encoder_hidden_states": states.index_select(1, kept),
        "encoder_attention_mask": mask.index_select(1, kept).to(states.dtype),
    }


def _picture(vae: Any, latents: Any) -> Any:
    """As `picture`. Of a few latent pixels its attention sums the same products in another order than of many, which
    a graph of all sizes cannot; here it is that of many."""
    with ExitStack() as stack:
        for module in vae.decoder.modules():
            if hasattr(module, "apply_quadratic_attention"):
                stack.enter_context(replaced(module, forward=partial(_linear, module)))
        return picture(vae, latents)


def _linear(attention: Any, states: Any) -> Any:
    import torch

    _, _, height, width = states.shape
    rows = states.movedim(1, -1)
    made = torch.cat([project(rows) for project in (attention.to_q, attention.to_k, attention.to_v)], 3).movedim(-1, 1)
    made = torch.cat([made, *(scale(made) for scale in attention.to_qkv_multiscale)], 1).float()
    query, key, value = made.reshape(1, -1, 3 * attention.attention_head_dim, height * width).chunk(3, 2)
    made = attention.apply_linear_attention(attention.nonlinearity(query), attention.nonlinearity(key), value)
    made = attention.to_out(made.to(states.dtype).reshape(1, -1, height, width).movedim(1, -1))
    if attention.norm_type != "rms_norm":
        made = attention.norm_out(made.movedim(-1, 1))
    else:
        made = attention.norm_out(made).movedim(-1, 1)
    return made + states if attention.residual_connection else made


SANA = Family(
    name="sana",
    title="Sana and Sana 1.5",
    model_class="SanaTransformer2DModel",
    reference="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    sites=(r"transformer_blocks\.\d+\.(attn1|attn2|ff)",),
    stack_input=("transformer_blocks.0", "hidden_states"),
    stack_output=("norm_out", "hidden_states"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=patches,
    defaults=Defaults(steps=20, interval=4, warmup=3, order=1),
    scheduler="DPMSolverMultistepScheduler",
    scheduler_config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    guidance="batched",
    guidance_scale=4.5,
    latent_size=(32, 32),
    latent_scale=32,
    typical={"text_tokens": 300},
    pipeline=Pipeline(cast_inputs=("encoder_hidden_states",)),
    pipelines=("SanaPipeline", "SanaPAGPipeline"),
    whole=Whole(decode=_picture, encoders=("text_encoder",), tokens=(_TOKENS,), encode=_encode, negative=""),
    by_pipeline={"SanaPAGPipeline": {"whole": None}},
    by_config=lambda config: {"latent_sizes": fixed} if _placed(config) else {},
)
