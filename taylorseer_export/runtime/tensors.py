"""Requests from tensors: a sampling loop of any model, its conditioning under diffusers' argument names.

What a pipeline puts around such tensors is decided here: the noise and how it is packed, the places of
tokens, the guidance that the model takes as an input, and the second set of conditioning that guidance needs.
"""

# Shapes: N samples, C channels, F frames, H and W latent pixels, T tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from taylorseer_export.bundle.latents import refuse_several
from taylorseer_export.bundle.manifest import Manifest, Pipeline
from taylorseer_export.bundle.part_agreement import CONDITION as CONDITION
from taylorseer_export.bundle.shapes import match, resolve
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import driven_of
from taylorseer_export.runtime.frames import frames_at_once
from taylorseer_export.runtime.joined import Joined
from taylorseer_export.runtime.places import sides_of, value_from_fill
from taylorseer_export.runtime.sampling import Request, noise_of, tokens_of
from taylorseer_export.runtime.sections import frames_of_section, sections_of, window_of

_Extent = TypeVar("_Extent", int, int | str)

NEGATIVE = "negative_"  # before the name of an input: its value for the unconditional half or branch
BLANK = "visual_cond"  # what a pipeline asks a transformer whose channels for a picture are zeros where there is none


def tensor_request(
    denoiser: Denoiser,
    tensors: Mapping[str, np.ndarray],
    seeds: Sequence[int] = (0,),
    sizes: Mapping[str, int] | None = None,
    sides: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
) -> Request:
    """A request of any model.

    Args:
        denoiser: The loaded bundle.
        tensors: Constant inputs by name, with one row for all samples or one for each. Their `negative_` twins turn
            classifier-free guidance on, where its scale is no input; `condition` is what an image-to-video model has
            beside the noise. Masks, places of tokens and the guidance that is an input may be left out.
        seeds: One per sample; noise is drawn as diffusers' pipelines do, on the CPU in float32.
        sizes: Sizes of the latent by dimension; those of the tensors, or the bundle's typical ones, if left out.
        sides: (rows, columns) of a packed latent in tokens; as square as their number allows if left out.
        guidance_scale: Dimensionless; the bundle's default if left out.

    Raises:
        ConfigError: A tensor is missing or not known.
        StepError: A tensor is of another shape, or a size is out of the bundle's range.
    """
    manifest, constants, count = denoiser.manifest, denoiser.constants, len(seeds)
    check_guidance(manifest, guidance_scale, any(name.startswith(NEGATIVE) for name in tensors))
    scale = manifest.guidance_of(guidance_scale)
    for name in tensors:
        if name.removeprefix(NEGATIVE) not in constants and name != CONDITION:
            raise ConfigError(f"input `{name}` is not known, expected {', '.join(constants)}; leave it out of --inputs")
    own = {n: _rows(n, constants[n].shape, tensors[n], count) for n in constants if n in tensors}
    given, extents = completed(denoiser, own, {**(sizes or {}), "batch": count}, sides, scale)
    latent = resolve(denoiser.latent.shape, extents)
    joined, sampled = joined_to(manifest, latent, tensors.get(CONDITION))
    noise = np.concatenate([_noise(sampled, manifest.pipeline, sides, seed) for seed in seeds])
    if joined is not None and (share := manifest.pipeline.condition_share):
        noise = np.float32(1 - share) * noise + np.float32(share) * joined.value[:, : sampled[1], :1]
    twins = {
        n: _rows(n, constants[n].shape, tensors[NEGATIVE + n], count) for n in constants if NEGATIVE + n in tensors
    }
    if twins and manifest.sampling.guidance in ("none", "embedded"):
        raise ConfigError(
            f"input `{NEGATIVE}{min(twins)}` is given, expected none for family {manifest.family}, whose guidance is "
            "one input or none; leave it out of --inputs"
        )
    if not twins or scale == 1.0:
        return Request(noise, given, False, 1.0, 0, 0, joined=joined)
    # A negative prompt may have another number of tokens, and so masks and places of its own.
    other, lengths = completed(denoiser, {**own, **twins}, {**(sizes or {}), "batch": count}, sides, scale)
    if manifest.sampling.guidance != "batched":
        return Request(noise, given, True, scale, 0, 0, negative=other, joined=joined)
    for name, size in extents.items():
        if lengths[name] != size:
            raise ConfigError(
                f"`{name}` of the `{NEGATIVE}` inputs is {lengths[name]}, expected {size} as of the others, which are "
                "halves of one batch; pad the shorter ones"
            )
    axes = {name: tensor.shape.index("batch") for name, tensor in constants.items() if "batch" in tensor.shape}
    halves = {n: np.concatenate([v, other[n]], axes[n]) if n in axes else v for n, v in given.items()}
    return Request(noise, halves, True, scale, 0, 0, joined=joined)


def check_guidance(manifest: Manifest, scale: float | None, negative: bool) -> None:
    """Refuse a guidance scale that would be ignored.

    Args:
        manifest: Of the bundle.
        scale: As asked; None where nothing was.
        negative: Whether the request brings what the second prediction of guidance is made from.

    Raises:
        ConfigError: The model has no guidance, or its guidance has nothing to guide away from.
    """
    if scale is None:
        return
    if manifest.sampling.guidance == "none":
        raise ConfigError(
            f"guidance scale is {scale:g} for {manifest.family}-{manifest.name}, expected none: this model has no "
            "guidance; leave it out"
        )
    if manifest.sampling.guidance in ("batched", "branches") and not negative and manifest.guidance_of(scale) != 1.0:
        raise ConfigError(
            f"guidance scale is {scale:g} without `{NEGATIVE}` inputs, expected them to be guided away from; add them "
            "to --inputs, or leave the scale out"
        )


def completed(
    denoiser: Denoiser,
    given: Mapping[str, Any],
    sizes: Mapping[str, int],
    sides: tuple[int, int] | None,
    scale: float,
) -> tuple[dict[str, Any], dict[str, int]]:
    """(all constant inputs of one branch, sizes by dimension): masks, places of tokens and guidance are made.

    Args:
        denoiser: The loaded bundle.
        given: Inputs by name, of any library.
        sizes: Of dimensions that they do not tell.
        sides: (rows, columns) of a packed latent in tokens; as square as their number allows if None.
        scale: Of guidance, where that is an input.

    Raises:
        ConfigError: An input is missing that does not follow from the sizes.
        StepError: One is of another shape, or a size is out of the bundle's range.
    """
    manifest, constants, whole = denoiser.manifest, denoiser.constants, dict(given)
    found: dict[str, int] = {}
    for name, value in given.items():
        found = match(constants[name].shape, value.shape, found, name)
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    extents = {**typical, **found, **sizes}
    denoiser.check_sizes(extents)
    for name, tensor in constants.items():
        if name not in whole:
            made = value_from_fill(tensor, extents, sides)
            if tensor.fill == "guidance":
                made = np.full(sizes["batch"], scale * manifest.pipeline.guidance_factor, np.float32)
            if made is None:
                shape = ", ".join(map(str, tensor.shape))
                raise ConfigError(f"input `{name}` is missing, expected {tensor.dtype} [{shape}]; add it to --inputs")
            whole[name] = made
    return whole, extents


def condition_shape(manifest: Manifest, latent: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of what an image-to-video model has beside the noise, for its latent `[N, C, F, H, W]`; None for others."""
    if len(latent) != 5:
        return None
    if manifest.replaces_first_frame:
        return (*latent[:2], 1, *latent[3:])
    axis, noise = channel_axis(manifest), noise_shape(manifest, latent)
    return None if noise == latent else (*latent[:axis], latent[axis] - noise[axis], *latent[axis + 1 :])


def channel_axis(manifest: Manifest) -> int:
    """Where the channels of the latent of a picture or video stand."""
    return {"rotary": 2, "channels-last": 4}.get(manifest.pipeline.arguments, 1)


def extents_of(manifest: Manifest, shape: tuple[_Extent, ...]) -> tuple[_Extent, ...]:
    """(frames, rows, columns) of the latent of a video, (rows, columns) of that of a picture, of its shape."""
    axis = channel_axis(manifest)
    return shape[1:axis] + shape[axis + 1 :]


def frames_axis(manifest: Manifest) -> int:
    """Where the frames of the latent of a video stand."""
    return 2 if channel_axis(manifest) == 1 else 1


def joins(manifest: Manifest) -> bool:
    """Whether a video has something beside the noise along the channels."""
    latent = manifest.graphs["full"].input_of("latent").shape
    return len(latent) == 5 and latent[channel_axis(manifest)] != _channels(manifest)


def noise_shape(manifest: Manifest, latent: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what is sampled, for a transformer's latent of this shape, which may have more channels."""
    axis = channel_axis(manifest)
    return (*latent[:axis], _channels(manifest), *latent[axis + 1 :]) if joins(manifest) else latent


def _channels(manifest: Manifest) -> int:
    """Of a prediction for videos."""
    (made,) = (t.shape for t in manifest.graphs["full"].outputs if t.role == "noise_pred")
    return int(made[channel_axis(manifest)])


def _rows(name: str, shape: tuple[int | str, ...], value: np.ndarray, count: int) -> np.ndarray:
    """The value for `count` samples: as given, or its one row for all."""
    if "batch" not in shape or len(shape) != value.ndim:
        return value
    axis = shape.index("batch")
    if value.shape[axis] not in (1, count):
        raise ConfigError(f"input `{name}` has {value.shape[axis]} rows, expected 1 or {count}; give one for each seed")
    return value if value.shape[axis] == count else np.repeat(value, count, axis)


def joined_to(
    manifest: Manifest, latent: tuple[int, ...], condition: np.ndarray | None
) -> tuple[Joined | None, tuple[int, ...]]:
    """(what is joined to the noise, shape of the noise) for a transformer's latent of this shape.

    Raises:
        ConfigError: `condition` is missing, of another shape, or not known.
    """
    expected = condition_shape(manifest, latent)
    if expected is None:
        if condition is not None:
            raise ConfigError(
                f"input `{CONDITION}` is given, expected none for a model from text alone; leave it out of --inputs"
            )
        return None, latent
    if condition is None and manifest.pipeline.attributes.get(BLANK):
        condition = np.zeros((1, *expected[1:]), np.float32)
    if condition is None:
        raise ConfigError(
            f"input `{CONDITION}` is missing, expected float32 {list(expected)}, the picture that the video begins "
            "with as the pipeline prepares it; add it to --inputs"
        )
    value = _rows(CONDITION, ("batch", *expected[1:]), np.asarray(condition, np.float32), expected[0])
    if value.shape != expected:
        raise ConfigError(f"input `{CONDITION}` is {list(value.shape)}, expected {list(expected)}; prepare it so")
    if manifest.replaces_first_frame:
        return Joined(2, value, ahead=True), latent
    return Joined(channel_axis(manifest), value), noise_shape(manifest, latent)


def _frames_of_section(manifest: Manifest, frames: int, option: str) -> list[int]:
    """The frames that one section of such a video would be alone."""
    step = frames_of_section(manifest)
    if frames <= step or (frames - 1) % step:
        several = ", ".join(str(step * count + 1) for count in (1, 2, 3))
        raise ConfigError(
            f"{option} frames is {frames}, expected {several} and so on (the picture, and sections of {step} frames); "
            "change it"
        )
    return [manifest.sampling.time_scale * (window_of(manifest) - 1) + 1]


def _latent_frames(manifest: Manifest, frames: int, option: str) -> int:
    """Those of a video of so many frames, with any that are not decoded."""
    scale, decode = manifest.sampling.time_scale, manifest.parts.get("decode")
    first, later = (1, 1) if decode is None or decode.later is None else frames_at_once(decode)
    count, rest = divmod(frames - 1, scale)
    if rest or count + 1 < first or (count + 1 - first) % later:
        least = scale * (first - 1) + 1
        known = (
            f"a multiple of {scale} and 1, like 81"
            if first == later == 1
            else (f"{least}, {least + scale * later}, {least + 2 * scale * later} and so on, which its decoder takes")
        )
        raise ConfigError(f"{option} frames is {frames}, expected {known}; change it")
    return count + 1 + (0 if decode is None else decode.skipped)


def _noise(shape: tuple[int, ...], pipeline: Pipeline, sides: tuple[int, int] | None, seed: int) -> np.ndarray:
    """`[1, ...]`; of packed latents as the pipelines draw it, before it is packed."""
    if pipeline.packing == 1:
        return noise_of((1, *shape[1:]), seed)
    rows, columns = sides or sides_of(shape[1])
    side = pipeline.packing if pipeline.noise == "latents" else 1
    return tokens_of(noise_of((1, shape[2] // side**2, side * rows, side * columns), seed), side)


def latent_sizes(
    manifest: Manifest, pixels: tuple[int, ...] | None, option: str = "--size"
) -> tuple[dict[str, int], tuple[int, int] | None]:
    """(sizes of the latent by dimension, (rows, columns) in tokens where it is packed) of a picture or video.

    They follow from the contract: `latent_scale` pixels make a latent pixel, behind the first `time_scale` frames make
    a latent frame, and what remains is solved by the shape of the latent. Of a video in sections it is that of one.

    Args:
        manifest: Of the bundle.
        pixels: (height, width), or (frames, height, width) of a video; nothing is fixed where it is None.
        option: What it was given as, for the errors.

    Raises:
        ConfigError: It has another form, does not divide, or is out of the bundle's range.
    """
    if pixels is None:
        return {}, None
    refuse_several(manifest, option)
    latent, sampling, packing = manifest.graphs["full"].input_of("latent"), manifest.sampling, manifest.pipeline.packing
    shown, video = "x".join(map(str, pixels)), len(latent.shape) == 5
    if video and len(pixels) == 2 and extents_of(manifest, latent.shape)[0] == 1:  # a picture is the one frame
        pixels = (1, *pixels)
    if len(pixels) != 2 + video:
        form = "FxHxW (frames first)" if video else "HxW"
        raise ConfigError(f"{option} is {shown}, expected {form} for family {manifest.family}; write it so")
    *frames, height, width = pixels
    side = sampling.latent_scale * packing
    for label, length in (("height", height), ("width", width)):
        if length < side or length % side:
            raise ConfigError(f"{option} {label} is {length}, expected a multiple of {side} (pixels); change it")
    if frames and sections_of(manifest) is not None:
        frames = _frames_of_section(manifest, frames[0], option)
    if frames and driven_of(manifest) is not None:  # of any length: the last section is cut off
        frames = [sampling.time_scale * (window_of(manifest) - 1) + 1]
    rows, columns = height // side, width // side
    made = [rows * columns] if packing > 1 else [*(_latent_frames(manifest, f, option) for f in frames), rows, columns]
    shape = latent.shape[1:2] if packing > 1 else extents_of(manifest, latent.shape)
    try:
        sizes = match(shape, tuple(made), {}, option)
    except StepError as error:
        raise ConfigError(
            f"{option} is {shown}, a latent of {'x'.join(map(str, made))}, expected [{', '.join(map(str, shape))}] "
            "(latent pixels), which the bundle takes; change it"
        ) from error
    for name, size in sizes.items():
        known = manifest.dimensions[name]
        if not known.minimum <= size <= known.maximum:
            raise ConfigError(
                f"{option} is {shown}, of `{name}` {size}, expected {known.minimum} to {known.maximum}; change it, or "
                "export again without --size"
            )
    return sizes, (rows, columns) if packing > 1 else None
