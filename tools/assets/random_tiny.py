"""The embedded models of the families that have no trained one: tiny, random, seeded, of the real diffusers class.

    python tools/make_asset.py random-tiny                all of them
    python tools/make_asset.py random-tiny --family wan   one

They are there so that every command of a family runs without a download, and what they make is no picture. Their
weights have the scale of a trained model's, so that a comparison with them can fail: every linear keeps its input's
variance, and the timestep embedding is smooth over a step (a random one makes every feature jump from step to step).
The same seed gives the same bits with the same version of torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from randomised import randomised
from record import ROOT
from safetensors.torch import save_file

from taylorseer_export.families import FAMILIES

ASSETS = ROOT / "taylorseer_export" / "assets"
SEED = 0
_QWEN_IMAGE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX2 = {
    "in_channels": 128,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
# What each differs by from its class's defaults. Latents have the channels of the published models; widths are tiny.
CONFIGS: dict[str, dict[str, Any]] = {
    "flux-kontext": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    "flux2": _FLUX2,
    "flux2-edit": _FLUX2,
    "flux2-kv": _FLUX2 | {"guidance_embeds": False},
    "flux3": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "chroma": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "approximator_hidden_dim": 32,
        "approximator_layers": 2,
    },
    "krea-2": {
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "text_hidden_dim": 32,
        "num_text_layers": 4,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 48,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    "longcat-image": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "ltx-2": {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "audio_in_channels": 16,
        "audio_out_channels": 16,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 32,
        "rope_type": "split",
    },
    "ovis-image": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "z-image": {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    },
    "framepack": {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 4, 4),
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    },
    "hidream": {
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,  # its experts are at least 256 wide
        "num_attention_heads": 2,
        "caption_channels": [32, 24],
        "text_emb_dim": 32,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (64, 64),
        "llama_layers": [2, 0, 1],
    },
    "hunyuan-video": {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 4, 4),
    },
    "hunyuan-video-1.5": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 24,
        "image_embed_dim": 16,
        "rope_axes_dim": (4, 4, 4),
        "task_type": "t2v",
    },
    "qwen-image": _QWEN_IMAGE,
    "qwen-image-edit": _QWEN_IMAGE,
    "qwen-image-2.1": {
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "caption_channels": 32,
        "use_additional_conditions": False,
        "interpolation_scale": 1,
    },
    "sana": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "sample_size": 8,
    },
    "sd3": {
        "sample_size": 16,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "wan": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 96,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    },
    "kandinsky-5": {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 32,
        "in_text_dim2": 24,
        "time_dim": 32,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "visual_cond": True,
    },
    "cogvideox": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "time_embed_dim": 32,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    },
    "wan-5b-image": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    },
    "wan-vace": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "rope_max_seq_len": 64,
        "vace_layers": [0],
    },
    "wan-animate": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "image_dim": 32,
        "added_kv_proj_dim": 48,
        "rope_max_seq_len": 64,
        "motion_encoder_channel_sizes": {"4": 12, "8": 12, "16": 12},
        "motion_encoder_size": 16,
        "motion_style_dim": 24,
        "motion_dim": 8,
        "motion_encoder_dim": 24,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
}
CONFIGS["ltx-2-image"] = CONFIGS["ltx-2"]
# Dimensions at which estimates are quoted, latent size first; all else the config says.
SIZES: dict[str, dict[str, Any]] = {
    "flux-kontext": {"latent_size": [16, 16], "text_tokens": 12, "condition_tokens": 64},
    "flux2": {"latent_size": [16, 16], "text_tokens": 12},
    "flux2-edit": {"latent_size": [16, 16], "text_tokens": 12, "condition_tokens": 64},
    "flux2-kv": {"latent_size": [16, 16], "text_tokens": 12, "condition_tokens": 64},
    "flux3": {"latent_size": [16, 16], "text_tokens": 12},
    "chroma": {"latent_size": [16, 16], "text_tokens": 12},
    "krea-2": {"latent_size": [16, 16], "text_tokens": 12},
    "longcat-image": {"latent_size": [16, 16], "text_tokens": 12},
    "ltx-2": {"latent_size": [3, 4, 6], "audio_tokens": 18, "text_tokens": 12},
    "ltx-2-image": {"latent_size": [3, 4, 6], "audio_tokens": 18, "text_tokens": 12},
    "ovis-image": {"latent_size": [16, 16], "text_tokens": 12},
    "z-image": {"latent_size": [16, 16], "text_tokens": 12},
    "framepack": {"latent_size": [3, 16, 16], "text_tokens": 12},
    "hidream": {"latent_size": [16, 16], "text_tokens": 12},
    "hunyuan-video": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "hunyuan-video-1.5": {"latent_size": [3, 4, 6], "text_tokens": 12, "glyph_tokens": 6},
    "qwen-image": {"latent_size": [16, 16], "text_tokens": 12},
    "qwen-image-edit": {"latent_size": [16, 16], "text_tokens": 12, "condition_tokens": 64},
    "qwen-image-2.1": {"latent_size": [16, 16], "text_tokens": 12},
    "pixart": {"latent_size": [16, 16], "text_tokens": 12},
    "sana": {"latent_size": [8, 8], "text_tokens": 12},
    "sd3": {"latent_size": [16, 16], "text_tokens": 12},
    "wan": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "kandinsky-5": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "cogvideox": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "wan-5b-image": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "wan-vace": {"latent_size": [3, 8, 12], "text_tokens": 12},
    "wan-animate": {"latent_size": [3, 8, 12]},
}


LARGE, KEPT = 1_000_000, 64


def narrow(weight: torch.Tensor) -> None:
    """Leave of a matrix that no config makes smaller its first rows and columns: zeros take no space in a package."""
    if weight.numel() > LARGE:
        kept = weight[:KEPT, :KEPT] * (weight.shape[1] / KEPT) ** 0.5  # of the same variance
        weight.zero_()[:KEPT, :KEPT] = kept


def write(name: str, folder: Path) -> int:
    """Write the diffusers folder of one family, its weights as float16; returns the number of parameters."""
    family = FAMILIES[name]
    model = randomised(lambda: getattr(diffusers, family.model_class)(**CONFIGS[name]), SEED)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_config(folder / "transformer")
    for parameter in model.parameters():
        narrow(parameter.data)
    weights = {key: value.detach().to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    scheduler = getattr(diffusers, family.scheduler)(**family.scheduler_config)
    scheduler.save_config(folder / "scheduler")
    card = {
        "name": f"random {family.name}",
        "model": family.model_class,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": f"random, seed {SEED}, float16: trained on nothing, so whatever it makes is noise and no picture",
        **SIZES[name],
        "tool": "tools/assets/random_tiny.py",
        "torch": torch.__version__,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return int(card["parameters"])  # type: ignore[call-overload]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(CONFIGS), nargs="+", default=list(CONFIGS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets FAMILY/ (default: the package's)")
    given = parser.parse_args()
    for name in given.family:
        count = write(name, given.out / name)
        print(f"{name:<14}{count:>9} parameters, {given.out / name}")
    return 0
