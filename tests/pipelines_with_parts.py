"""Whole pipelines and what is exported of them: which there are, and a denoiser that has their parts."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from harness import eager_denoiser
from PIL import Image
from tiny_bundles import options_of
from tiny_pipelines import LAYERS
from torch import nn

from taylorseer_export.bundle.manifest import PipelinePart
from taylorseer_export.bundle.store import Bundle, hash_files
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import describe
from taylorseer_export.compile.parts import parts_of, write_parts
from taylorseer_export.embedded.requests import pictures_of
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.sampling import sample

PROMPT, OTHER = "a small red circle", "x"


class Case(NamedTuple):
    """How a pipeline of `WHOLE` is asked.

    Attributes:
        size: (height, width) in pixels.
        length: Most tokens of a prompt; the pipeline's own if None.
        scale: Of guidance, with `OTHER` as the negative prompt; None where guidance is an input.
        asked: What else the pipeline is called with.
        picture: That it is to edit, `[height, width, 3]` uint8.
    """

    size: tuple[int, int]
    length: int | None = None
    scale: float | None = None
    asked: Mapping[str, Any] = MappingProxyType({})
    picture: np.ndarray | None = None


# Neither of whole tokens nor of the size that is drawn.
EDITED = np.random.default_rng(5).integers(0, 256, (26, 38, 3), dtype=np.uint8)

GUIDED = {"guidance_scale": 4.0, "negative_prompt": OTHER}
# No picture of a size that is close to the one that is asked for, and no words of a web page left out of a caption.
AS_THEY_ARE = {"use_resolution_binning": False, "clean_caption": False}

CASES = {
    "flux": Case((32, 48), 16),
    "sd3": Case((16, 24), 16, 4.0, {"guidance_scale": 4.0, "negative_prompt": OTHER}),
    "qwen-image": Case((32, 48), None, 3.0, {"true_cfg_scale": 3.0, "negative_prompt": OTHER}),
    "kontext": Case(
        (32, 48),
        16,
        asked={"image": Image.fromarray(EDITED), "max_area": 32 * 48, "_auto_resize": False, "guidance_scale": 2.5},
        picture=EDITED,
    ),
    "flux2": Case((16, 24), 48, asked={"text_encoder_out_layers": LAYERS}),
    "flux3": Case((20, 28), None, 3.0, {"negative_prompt": OTHER, "text_encoder_out_layers": LAYERS}),
    "chroma": Case((16, 24), 16, 4.0, {"guidance_scale": 4.0, "negative_prompt": OTHER}),
    "z-image": Case((16, 24), None, 4.0, {"guidance_scale": 4.0, "negative_prompt": OTHER}),
    "hidream": Case((16, 16), None, 5.0, {"guidance_scale": 5.0, "negative_prompt": OTHER}),
    "pixart": Case((32, 32), 16, 4.0, {**GUIDED, **AS_THEY_ARE}),
    "sana": Case((96, 160), 16, 4.0, {**GUIDED, **AS_THEY_ARE}),
    "ovis-image": Case((20, 28), 16, 4.0, GUIDED),
    "longcat-image": Case((16, 24), None, 4.0, {**GUIDED, "enable_prompt_rewrite": False}),
    "krea-2": Case((32, 48), 16, 3.0, {"guidance_scale": 3.0, "negative_prompt": OTHER}),
    "qwen-image-2.1": Case((32, 96), None, 3.0, {"true_cfg_scale": 3.0, "negative_prompt": OTHER}),
}
TEXT_ALONE = {"flux2-base": 48, "wan": 32, "hunyuan": 200}  # most tokens of a prompt


def depth_and_length(*modules: nn.Module) -> tuple[int, int]:
    """(layers, longest contraction) for the bound of some modules."""
    layers = [m for one in modules for m in one.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    return len(layers), max(m.weight[0].numel() for m in layers)


def write_pipeline(pipe, family, folder, **changes):
    """A pipeline, its parts, and their contracts in a folder."""
    pipe.save_pretrained(folder / "pipeline")
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES[family])
    options = options_of(**{"parts": parts_of(checkpoint), **changes})
    parts = write_parts(checkpoint, options, folder, lambda *_: None)
    described = {key: part.model_dump(mode="json") for key, part in parts.items()}
    (folder / "parts.json").write_text(json.dumps(described))
    return folder


def denoiser_with_parts(draft, folder):
    """A denoiser over eager graphs, whose bundle holds parts alone."""
    described = json.loads((folder / "parts.json").read_text())
    parts = {name: PipelinePart.model_validate_json(json.dumps(part)) for name, part in described.items()}
    denoiser = eager_denoiser(draft)
    root = folder / "pipeline"
    checkpoint = open_checkpoint(str(root), FAMILIES[denoiser.manifest.family])
    own = replace(draft, checkpoint=replace(draft.checkpoint, folder=checkpoint.folder))
    files = {f"{part}/{name}": file for part in parts for name, file in hash_files(folder / part).items()}
    empty = describe(own, "eager").files
    manifest = describe(own, "eager", files={**empty, **files}, parts=parts)
    if "encode" in parts:  # the sizes that published models see pictures at would take minutes
        parts["encode"] = parts["encode"].model_copy(update={"sizes": ()})
        manifest = manifest.model_copy(update={"parts": parts})
    denoiser.manifest = denoiser.contract.manifest = manifest
    denoiser.bundle = Bundle(folder, manifest)
    return denoiser


def drawn(denoiser, request, plan):
    """What a loop of this plan draws of the one sample, channels before rows, from 0 to 1."""
    made = sample(denoiser, request, denoiser.forecasts(plan=plan))
    return torch.from_numpy(pictures_of(denoiser, request, made.latents)[0].copy()).movedim(-1, -3) / 255


def filmed(pipe, size, steps, scale, seed, **more):
    """The video `[F, 3, height, width]` from 0 to 1 that an untouched pipeline makes, away from `OTHER`."""
    frames, height, width = size
    with torch.no_grad():
        return pipe(
            prompt=PROMPT,
            negative_prompt=OTHER,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **more,
        ).frames[0]


def bound_of_picture(expected, pipe, calls, scale=None):
    """What a picture or video may be away from that of the pipeline, in which the transformer was called so often."""
    depth, length = depth_and_length(*encoders_of(pipe), *[pipe.transformer] * calls, pipe.vae)
    gain = 1.0 if scale is None else 2 * scale - 1  # sum of the weights of both predictions
    return oracle.bound(expected, gain, torch.float32, depth, length) + 0.5 / 255  # a picture is rounded to bytes


def encoders_of(pipe):
    seers = ("text_encoder", "image_encoder")
    return [part for name, part in pipe.components.items() if name.startswith(seers) and part is not None]
