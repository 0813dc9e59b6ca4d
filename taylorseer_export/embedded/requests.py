"""Requests from captions and labels, and the pictures that come of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from taylorseer_export.embedded.caption import TABLE_FILE, VOCABULARY_FILE, CaptionEncoder
from taylorseer_export.embedded.picture import pictures_from_dit_latents, pictures_from_flux_latents
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Request, Result, drawn, packed


def flux_request(
    denoiser: Denoiser,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    size: tuple[int, int] = (32, 32),
    conditioning: Mapping[str, np.ndarray] | None = None,
    guidance_scale: float | None = None,
) -> Request:
    """A FLUX request from captions (embedded model) or from the tensors of text encoders.

    Args:
        denoiser: The loaded bundle.
        prompts: One caption per picture; only the embedded model brings a text encoder.
        seeds: One per picture; noise is drawn as diffusers' pipelines do, on the CPU in float32.
        size: (height, width) of the picture in pixels for the embedded model, of 8 x the latent image otherwise.
        conditioning: `encoder_hidden_states` and `pooled_projections` where `prompts` is left out.
        guidance_scale: For models that take it as an input; the bundle's default if left out.

    Raises:
        ConfigError: Neither prompts nor tensors, or both; or a size that does not divide into tokens.
    """
    sampling = denoiser.manifest.sampling
    if (prompts is None) == (conditioning is None):
        raise ConfigError(
            "--prompt is missing, expected a caption or the text encoders' tensors; "
            "pass --prompt TEXT (embedded model) or --inputs FILE.safetensors"
        )
    if conditioning is None:
        conditioning = _caption_encoder(denoiser).encode(list(prompts or ()))
    embedded = denoiser.manifest.model.embedded
    pixels = 4 if embedded else 16  # per token and side: latent scale (2 or 8) x packing (2)
    rows, columns = _tokens(size[0], pixels, "height"), _tokens(size[1], pixels, "width")
    count = len(seeds)
    inputs = {k: np.asarray(v, np.float32) for k, v in conditioning.items()}
    for name in ("encoder_hidden_states", "pooled_projections"):
        if name not in inputs:
            raise ConfigError(
                f"input `{name}` is missing, expected the output of FLUX's text encoders; add it to --inputs"
            )
        if len(inputs[name]) == 1 and count > 1:
            inputs[name] = np.repeat(inputs[name], count, axis=0)
    grid = np.zeros((rows, columns, 3), np.float32)
    grid[..., 1] += np.arange(rows)[:, None]
    grid[..., 2] += np.arange(columns)[None, :]
    inputs["img_ids"] = grid.reshape(-1, 3)
    inputs["txt_ids"] = np.zeros((inputs["encoder_hidden_states"].shape[1], 3), np.float32)
    if sampling.guidance == "embedded":
        scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
        inputs["guidance"] = np.full(count, scale, np.float32)
    channels = int(denoiser.latent.shape[-1]) // 4
    latents = np.concatenate([packed(drawn((1, channels, 2 * rows, 2 * columns), seed)) for seed in seeds])
    return Request(latents, inputs, False, 1.0, size[0] if embedded else 0, size[1])


def dit_request(
    denoiser: Denoiser, labels: Sequence[int], seeds: Sequence[int] = (0,), guidance_scale: float | None = None
) -> Request:
    """A class-conditional DiT request: one label and one seed per picture.

    Raises:
        ConfigError: A label is not a class of the model.
    """
    manifest = denoiser.manifest
    classes = int(manifest.model.config["num_embeds_ada_norm"])
    for label in labels:
        if not 0 <= label < classes:
            raise ConfigError(f"--label is {label}, expected 0 to {classes - 1} (class index); choose one of those")
    scale = manifest.sampling.guidance_scale if guidance_scale is None else guidance_scale
    _, channels, height, width = denoiser.latent.shape
    noise = np.concatenate([drawn((1, int(channels), int(height), int(width)), seed) for seed in seeds])
    guided = scale != 1.0
    null = [classes] * len(labels) if guided else []
    conditioning = {"class_labels": np.array([*labels, *null], np.int64)}
    return Request(noise, conditioning, guided, scale, int(height), int(width))


def pictures(denoiser: Denoiser, request: Request, result: Result) -> np.ndarray:
    """The pictures of an embedded model: `[N, H, W, 3]` uint8. Raises what `pictures_of` raises."""
    return pictures_of(denoiser, request, result.latents)


def pictures_of(denoiser: Denoiser, request: Request, latents: np.ndarray) -> np.ndarray:
    """The pictures of latents of an embedded model: `[N, H, W, 3]` uint8.

    Raises:
        ConfigError: The bundle brings no decoder; its latents go to the model's own VAE.
    """
    if not denoiser.manifest.model.embedded:
        raise ConfigError(
            f"bundle {denoiser.manifest.family}-{denoiser.manifest.name} has no picture decoder, expected an embedded "
            "model; write latents with --out latents.safetensors and decode them with the model's VAE"
        )
    if denoiser.manifest.family == "dit":
        return pictures_from_dit_latents(latents)
    return pictures_from_flux_latents(latents, request.height, request.width)


def _tokens(pixels: int, per_token: int, name: str) -> int:
    if pixels < per_token or pixels % per_token:
        raise ConfigError(f"{name} is {pixels}, expected a multiple of {per_token} (pixels); change --size")
    return pixels // per_token


def _caption_encoder(denoiser: Denoiser) -> CaptionEncoder:
    if denoiser.bundle is None or not (denoiser.bundle.folder / "text").is_dir():
        raise ConfigError(
            "--prompt is given, but the bundle has no text encoder, expected tensors; "
            "pass encoder_hidden_states and pooled_projections with --inputs FILE.safetensors"
        )
    for name in (VOCABULARY_FILE, TABLE_FILE):
        denoiser.bundle.path(f"text/{name}")  # what the manifest does not list was never checked
    return CaptionEncoder.load(denoiser.bundle.folder / "text")
