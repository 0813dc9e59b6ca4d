"""Chroma: FLUX's blocks without pooled text, all modulation from one small network, guidance by a second call.

Padding of the prompt is masked, but for its first token. The pipeline's mask has a one for each token of the picture
behind those of the text; here it is the text's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from taylorseer_export.families.family import Defaults, Input, Pipeline, call, no_counterpart, replaced
from taylorseer_export.families.flux import FLUX
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return (
        Input("hidden_states", ("batch", "image_tokens", config["in_channels"]), "latent"),
        Input("timestep", ("batch",), "step"),
        Input("encoder_hidden_states", ("batch", "text_tokens", config["joint_attention_dim"]), "constant"),
        # Added to the scores of attention as it is, so of the float type of the model.
        Input("attention_mask", ("batch", "text_tokens"), "constant", fill="ones"),
        Input("img_ids", ("image_tokens", 3), "constant", "float32", fill="grid"),
        Input("txt_ids", ("text_tokens", 3), "constant", "float32", fill="zeros"),
    )


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    mask = inputs["attention_mask"]
    seen = mask.new_ones(inputs["hidden_states"].shape[:2])
    return call(model, {**inputs, "attention_mask": torch.cat([mask, seen], 1)})


@contextmanager
def _any_batch(model: Any) -> Iterator[None]:
    """The input of the modulation without a list of as many zeros as there are samples, which a trace would fix."""
    import torch
    from torch.nn.functional import pad

    embedder = model.time_text_embed

    def forward(timestep: Any) -> Any:
        time, guidance = (
            embed(value).to(timestep.dtype)
            for embed, value in (
                (embedder.time_proj, timestep),
                (embedder.guidance_proj, torch.zeros_like(timestep)),
            )
        )
        places = embedder.mod_proj.to(timestep.dtype)
        rows = torch.cat([time, guidance], 1).unsqueeze(1).expand(-1, places.shape[0], -1)
        # Side by side, as a sum: a concatenation would expand the places to a batch, which here is one of all steps.
        return pad(rows, (0, places.shape[1])) + pad(places, (rows.shape[-1], 0))

    with replaced(embedder, forward=forward):
        yield


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    """T5's words, and which of them count: those of the prompt and the first behind it."""
    import torch

    words, mask = given["t5"], given["t5_mask"]
    states = encoders["text_encoder"](words, attention_mask=mask)[0]
    seen = torch.arange(words.shape[1]) <= mask.sum(1, keepdim=True)
    return {"encoder_hidden_states": states, "attention_mask": seen.to(states.dtype)}


CHROMA = replace(
    FLUX,
    comfy=no_counterpart,
    name="chroma",
    title="Chroma1",
    model_class="ChromaTransformer2DModel",
    reference="lodestones/Chroma1-HD",
    inputs=_inputs,
    defaults=Defaults(steps=35, interval=4, warmup=3, order=1),
    guidance="branches",
    guidance_scale=5.0,
    pipeline=Pipeline(arguments="mask-of-all"),
    whole=Whole(
        decode=picture,
        encoders=("text_encoder",),
        tokens=(Tokens("t5", "tokenizer", 512, size="text_tokens", mask="t5_mask"),),
        encode=_encode,
        negative="",
    ),
    forward=_forward,
    variants={},
    patched=_any_batch,
)
