"""A tiny configuration of any transformer class of diffusers: its own defaults, each made small by the name it has.

Names mean the same in most classes, so a rule for a name serves them all; what is left is a table.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM  # of everything that has to be as wide as the hidden state
TEXT = 24  # of what an embedder brings to that width
CHANNELS = 4

# Parameter names (full match) -> value. The first rule that matches holds; a rule leaves None and False alone.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?n(um)?_(kv|key_value|key_value_attention)_heads", HEADS),
    (r"(.*_)?(n|num)_?(attention_|cross_attention_)?heads", HEADS),
    (r"(.*_)?(attention_)?head_dim", HEAD_DIM),
    (r"(n|num)_(.*_)?(layers|blocks)|depth|(n|num)_refiner_layers|mmdit_layers", 2),
    (
        r"(joint_attention|text_embed|text|in_text|text_in|caption|text_hidden|cap_feat|context_in|text_encoder)_dim2?",
        TEXT,
    ),
    (r"cap_feat_dim|caption_channels|encoder_hidden_states_channels|text_embed_2_dim|llm_features_dim", TEXT),
    (r"(pooled_projection|image_embed|image|text_emb)_dim", 20),
    (r"(freq|time|time_embed|timestep_embed|adaln|condition|time_step)_dim|timestep_(guidance_)?channels", 32),
    (r"(ffn|ff|intermediate|ffn_hidden|moe_intermediate)_(dim|size)|intermediate_size", 48),
    (r"(cross_attention|caption_projection|inner|model)_dim|hidden_size|dim|approximator_hidden_dim", WIDTH),
    (r"approximator_num_channels|adaln_lora_dim", 32),
    (r"in_channels|out_channels|latent_channels?|in_visual_dim|out_visual_dim", CHANNELS),
    (r"sample_size|sample_height|sample_width", 8),
    (r"sample_frames", 9),
    (r"rope_max_seq_len|pos_embed_max_size|max_sequence_length|.*max_pos", 64),
    (r"max_text_seq_length|text_len", 6),
    (r"num_experts", 4),
    (r"vocab_size|.*codebook_size", 64),
)
_AXES = re.compile(r"axes_dims?(_rope)?|axes_dim_rope|rope_axes_dim|rope_dim(_list)?|mrope_section")

# Class -> what the rules do not give.
TABLE: dict[str, dict[str, Any]] = {
    "CosmosTransformer3DModel": {
        "concat_padding_mask": False,  # it resizes the mask with torchvision
        "extra_pos_embed_type": None,
    },
    "EasyAnimateTransformer3DModel": {"in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [20, TEXT],
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (64, 64),
        "llama_layers": [0, 1, 0, 1],
    },
    "HunyuanDiT2DModel": {
        "in_channels": CHANNELS,
        "patch_size": 2,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": TEXT,
        "text_len_t5": 7,
    },
    "Ideogram4Transformer2DModel": {"mrope_section": (4, 2, 2)},
    "LatteTransformer3DModel": {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "cross_attention_dim": WIDTH,
        "patch_size": 2,
        "caption_channels": TEXT,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": HEADS, "multiple_of": 16},
    # A dense MLP is as wide as a multiple of 128, rounded down.
    "NucleusMoEImageTransformer2DModel": {
        "mlp_ratio": 6.0,
        "dense_moe_strategy": "leave_first_block_dense",
        "capacity_factors": 1.0,
    },
    "OmniGenTransformer2DModel": {
        "pad_token_id": 0,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": [1.0] * (HEAD_DIM // 2)},
    },
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "WanAnimateTransformer3DModel": {
        "in_channels": 2 * CHANNELS + 4,
        "image_dim": 20,
        "motion_encoder_channel_sizes": {str(2**k): 8 for k in range(2, 7)},
        "motion_encoder_size": 64,
    },
    "WanVACETransformer3DModel": {"vace_layers": [0, 1], "vace_in_channels": 12},
}

# Class -> size of its latent where it can be traced at one alone and its config tells none.
LATENTS: dict[str, tuple[int, ...]] = {"Kandinsky6SRTransformer3DModel": (2, 8, 16)}


def tiny_config(model_class: type) -> dict[str, Any]:
    """Arguments of the class that build a model of a few thousand weights."""
    config = {}
    parameters = list(inspect.signature(model_class.__init__).parameters.values())[1:]
    for parameter in parameters:
        if (value := _small(parameter.name, parameter.default)) is not None:
            config[parameter.name] = value
    return config | TABLE.get(model_class.__name__, {})


def _small(name: str, default: Any) -> Any:
    """The value of one parameter; None leaves the class its own."""
    if _AXES.fullmatch(name) and isinstance(default, list | tuple):
        return _axes(default)
    if default is None or default is inspect.Parameter.empty or isinstance(default, bool | str | float | list | tuple):
        return None
    return next((value for pattern, value in _RULES if re.fullmatch(pattern, name)), None)


def _axes(axes: Any) -> Any:
    """Even sizes in about the same proportion whose sum is one head."""
    least = 2 * round(HEAD_DIM * axes[0] / sum(axes) / 2) or 2
    rest = (
        [least] * len(axes)
        if len(set(axes)) == 1
        else [least, *[(HEAD_DIM - least) // (len(axes) - 1)] * (len(axes) - 1)]
    )
    rest = [2 * (size // 2) for size in rest]
    rest[0] += HEAD_DIM - sum(rest)
    return type(axes)(rest)
