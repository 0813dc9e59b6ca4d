"""FLUX.3: blocks over words and over the picture by themselves, then over both, each kind modulated by one vector.

Words are modulated at timestep 0. The model modulates token by token, all of a kind alike; here one row serves them.
As distilled it is a flow map: it is told the timestep of the next step too, which moves words and picture, and it needs
no guidance.

Its pipeline is modular, and has another model write a prompt anew first; here a prompt is encoded as it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from taylorseer_export.families.autoencoders import picture_of_tokens
from taylorseer_export.families.encoders import layers, one_place, told
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, instead, packed
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole

_PLACES = 4  # of a token: time, row, column, and the number of a word
_SPACING = 0.5  # between rows and columns
_LONGEST = 8192  # tokens of a prompt


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    following = (Input("target_timestep", ("batch",), "step", fill="next"),) if config.get("flow_map") else ()
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        *following,
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        Input("img_ids", ("image_tokens", _PLACES), "constant", "float32", fill="grid", spacing=_SPACING),
        Input("txt_ids", ("text_tokens", _PLACES), "constant", "float32", fill="line"),
    )


def _traced(
    model: Any,
    hidden_states: Any,
    timestep: Any,
    encoder_hidden_states: Any,
    img_ids: Any,
    txt_ids: Any,
    return_dict: bool,
    target_timestep: Any = None,
) -> Any:
    import torch

    def embedded(embedder: Any, of_which: Any) -> Any:
        return embedder(model.time_proj(of_which.to(hidden_states.dtype) * 1000).to(hidden_states.dtype))[:, None]

    time, start = (embedded(model.timestep_embedder, of) for of in (timestep, torch.zeros(1)))
    if target_timestep is not None:
        following = embedded(model.target_timestep_embedder, target_timestep)
        time, start = time + following, start + following
    told = {"image": time, "txt": start}
    told = {kind: torch.nn.functional.silu(row) for kind, row in told.items()}
    early = {kind: model.early_stream_modulations[kind](row) for kind, row in told.items()}
    joint = {kind: model.single_stream_modulations[kind](row) for kind, row in told.items()}
    words, of_words = model.context_embedder(encoder_hidden_states), model.pos_embed(txt_ids)
    picture, of_picture = model.x_embedders["image"](hidden_states), model.pos_embed(img_ids)
    for block in model.txt_mode_blocks:
        words = block(words, early["txt"], of_words)
    for block in model.mode_blocks["image"]:
        picture = block(picture, early["image"], of_picture)
    turned = tuple(torch.cat(both) for both in zip(of_words, of_picture, strict=True))
    for block in model.single_transformer_blocks:
        words, picture = _joint(block, (words, picture), (joint["txt"], joint["image"]), turned)
    return (model.proj_out(model.norm_out(picture, time)),)


def _joint(block: Any, rows: tuple[Any, ...], modulations: tuple[Any, ...], turned: Any) -> tuple[Any, Any]:
    """A block over both, whose result is cut by slices: through those the rows of words are left out of a forecast."""
    import torch

    told = [row.chunk(3, -1) for row in modulations]  # shift, scale and gate
    normed = [(1 + scale) * block.norm(of) + shift for of, (shift, scale, _) in zip(rows, told, strict=True)]
    both, count = torch.cat(normed, 1), rows[0].shape[1]
    made = block.attn(hidden_states=both, image_rotary_emb=turned) + block.ff(both)
    return rows[0] + told[0][2] * made[:, :count], rows[1] + told[1][2] * made[:, count:]


def _by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return _DISTILLED if config.get("flow_map") else {}


def _encode(chosen: tuple[int, ...], encoders: Modules, given: Tensors) -> dict[str, Any]:
    """The states of some layers of Qwen3-VL side by side, those of padding too, of which each has place 1."""
    import torch

    model, mask = encoders["text_encoder"].model.language_model, given["mask"]
    places = torch.where(mask > 0, mask.cumsum(1) - 1, 1).expand(3, 1, -1)
    with one_place(model):
        states = layers(model, given["tokens"], attention_mask=mask, position_ids=places)
    return {"encoder_hidden_states": torch.cat([states[layer] for layer in chosen], -1)}


_TOKENS = Tokens(
    "tokens",
    "tokenizer",
    _LONGEST,
    size="text_tokens",
    multiple=80,
    side="right",
    chat=told(add_generation_prompt=True),
    mask="mask",
)
_DISTILLED = {
    "guidance": "none",
    "guidance_scale": 1.0,
    "defaults": Defaults(steps=16, interval=4, warmup=3, order=1),
}

FLUX3 = Family(
    name="flux3",
    title="FLUX.3",
    model_class="Flux3Transformer2DModel",
    reference="black-forest-labs/FLUX.3-dev",
    sites=(r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.(attn|ff)",),
    stack_input=("mode_blocks.image.0", "hidden_states"),
    stack_output=("norm_out", "hidden_states"),
    inputs=_inputs,
    dimensions=lambda config: {"batch": (1, 16), "image_tokens": (4, 16384), "text_tokens": (1, _LONGEST)},
    latent_sizes=packed,
    defaults=Defaults(steps=50, interval=4, warmup=3, order=1),
    scheduler_config={"shift": 6.93},
    guidance="branches",
    guidance_scale=3.5,
    timestep_divisor=1000.0,
    pipeline=Pipeline(noise="tokens"),
    whole=Whole(
        decode=picture_of_tokens,
        encoders=("text_encoder",),
        tokens=(_TOKENS,),
        encode=partial(_encode, (4, 8, 12, 16, 20, 24, 28, 32)),
        negative="",
    ),
    by_config=_by_config,
    patched=instead(_traced),
)
