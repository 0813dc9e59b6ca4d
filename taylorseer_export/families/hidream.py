"""HiDream-I1 (full, dev, fast): double blocks over image and text, then single blocks over both, MLPs of experts.

Every block has its own Llama layer, so the text has one more axis than elsewhere: `[layers, batch, tokens, width]`.
The pipeline pads T5 and Llama to one number of tokens; here it is one dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.apart import apart
from taylorseer_export.families.encoders import layers
from taylorseer_export.families.family import Defaults, Family, Input, Pipeline, patches, replaced, uncut
from taylorseer_export.families.whole import Modules, Tensors, Tokens, Whole, picture


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    side = f"{config['patch_size']}*side"
    t5, llama = config["caption_channels"]
    layers = max(config["llama_layers"]) + 1
    return (
        Input("hidden_states", ("batch", config["in_channels"], side, side), "latent"),
        Input("timesteps", ("batch",), "step", "float32"),
        Input("encoder_hidden_states_t5", ("batch", "text_tokens", t5), "constant"),
        Input("encoder_hidden_states_llama3", (layers, "batch", "text_tokens", llama), "constant"),
        Input("pooled_embeds", ("batch", config["text_emb_dim"]), "constant"),
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {"batch": (1, 16), "side": _extents(config), "text_tokens": (1, 512)}


def _extents(config: Mapping[str, Any]) -> tuple[int, int]:
    return 2, max(config["max_resolution"]) // config["patch_size"]


def _latent_sizes(config: Mapping[str, Any], height: int, width: int) -> dict[str, int]:
    if height != width:
        raise ConfigError(
            f"latent size is {height}x{width}, expected a square (latent pixels): HiDream pads any other picture to "
            "its largest and lets attention see the padding; change --size"
        )
    return {"side": patches(config, height, width)["rows"]}


def _attributes(config: Mapping[str, Any]) -> dict[str, int]:
    height, width = config["max_resolution"]
    return {"max_seq": height * width // config["patch_size"] ** 2}


@contextmanager
def _static(model: Any) -> Iterator[None]:
    """Experts without a loop over data, and patches of a picture, or of some of its rows, without sizes on the device.

    Every token goes through all experts, weighted by 0 where the router did not send it:

        y = sum_e w_e expert_e(x),   w_e the router's weight of expert e, 0 if e is not among the chosen
    """
    import torch

    patch = model.config.patch_size

    def experts(layer: Any) -> Any:
        def moe_infer(x: Any, flat_expert_indices: Any, flat_expert_weights: Any) -> Any:
            routes = (x.shape[0], -1, 1)
            chosen = flat_expert_indices.view(routes) == torch.arange(len(layer.experts))  # [tokens, chosen, experts]
            weights = (flat_expert_weights.view(routes) * chosen).sum(1)
            first, *others = (expert(x) * weights[:, e, None] for e, expert in enumerate(layer.experts))
            return sum(others, first)

        return moe_infer

    def patchify(x: Any) -> Any:
        batch, channels, *sides = x.shape
        rows, columns = counts = [side // patch for side in sides]
        tokens = x.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        row, column = (torch.arange(count) for count in counts)
        row, column = row[:, None].expand(counts), column.expand(counts)
        place = torch.stack([torch.zeros_like(row), row, column], -1).reshape(1, rows * columns, 3)
        # The rotary embedding multiplies them with float64, which an engine does not do for it.
        return tokens.flatten(3).flatten(1, 2), None, counts, place.double().expand(batch, -1, -1)

    def unpatchify(x: Any, counts: Any, is_training: bool) -> Any:
        return uncut(x, counts, (patch, patch), channels_last=True)

    with ExitStack() as stack:
        stack.enter_context(replaced(model, patchify=patchify, unpatchify=unpatchify))
        for layer in model.modules():
            if hasattr(layer, "moe_infer"):
                stack.enter_context(replaced(layer, moe_infer=experts(layer)))
        yield


# Distilled, so without guidance: one prompt to a batch, and the scheduler of flow matching.
_DISTILLED = {"guidance": "none", "guidance_scale": 1.0, "scheduler": "FlowMatchEulerDiscreteScheduler"}


def _encode(encoders: Modules, given: Tensors) -> dict[str, Any]:
    import torch

    t5 = encoders["text_encoder_3"](given["t5"], attention_mask=given["t5_mask"])[0]
    states = layers(encoders["text_encoder_4"], given["llama"], attention_mask=given["llama_mask"])
    pooled = [encoders["text_encoder"](given["l"])[0], encoders["text_encoder_2"](given["g"])[0]]
    return {
        "encoder_hidden_states_t5": t5,
        "encoder_hidden_states_llama3": torch.stack(states[1:]),
        "pooled_embeds": torch.cat(pooled, 1),
    }


HIDREAM = Family(
    name="hidream",
    title="HiDream-I1 full, dev and fast",
    model_class="HiDreamImageTransformer2DModel",
    reference="HiDream-ai/HiDream-I1-Full",
    sites=(r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i)",),
    stack_input=("double_stream_blocks.0", "hidden_states"),
    stack_output=("final_layer", "hidden_states"),
    inputs=_inputs,
    dimensions=_dimensions,
    latent_sizes=_latent_sizes,
    defaults=Defaults(steps=50, interval=4, warmup=1, order=2),
    scheduler="UniPCMultistepScheduler",
    scheduler_config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    guidance="batched",
    guidance_scale=5.0,
    pipeline=Pipeline(prediction_sign=-1, flow_steps="count"),
    whole=Whole(
        decode=picture,
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
        tokens=(
            Tokens("l", "tokenizer", 128),
            Tokens("g", "tokenizer_2", 128),
            Tokens("t5", "tokenizer_3", 128, mask="t5_mask"),
            Tokens("llama", "tokenizer_4", 128, mask="llama_mask", filled_with="end"),
        ),
        encode=_encode,
        negative="",
    ),
    attributes=_attributes,
    lora_loader="HiDreamImageLoraLoaderMixin",
    typical={"text_tokens": 128},
    variants={
        "dev": {
            **_DISTILLED,
            "defaults": Defaults(steps=28, interval=4, warmup=1, order=2),
            "scheduler_config": {"shift": 6.0},
        },
        "fast": {
            **_DISTILLED,
            "defaults": Defaults(steps=16, interval=4, warmup=1, order=2),
            "scheduler_config": {"shift": 3.0},
        },
    },
    # At the one size that is exported, where both are fixed: a picture that is no square is none of its sizes.
    shared=apart(_inputs, _dimensions, _extents, lambda *latent: _latent_sizes(*latent)["side"]),
    patched=_static,
)
