"""Requests from tensors: a sampling loop of any family, its conditioning under diffusers' argument names.

What a family's pipeline puts around such tensors is decided here: the noise and how it is packed, the places of
tokens, the guidance that the model takes as an input, and the second set of conditioning that guidance needs.
"""

# Shapes: N samples, C channels, F frames, H and W latent pixels, T tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.shapes import match, resolve
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.places import place, sides_of
from taylorseer_export.runtime.sampling import Joined, Request, drawn, packed

NEGATIVE = "negative_"  # before the name of an input: its value for the unconditional half or branch
CONDITION = "condition"  # what an image-to-video model has beside the noise
_GUIDANCE_FACTOR = {"hunyuan-video": 1000.0, "framepack": 1000.0}  # by which the pipelines multiply the scale


def tensor_request(
    denoiser: Denoiser,
    tensors: Mapping[str, np.ndarray],
    seeds: Sequence[int] = (0,),
    sizes: Mapping[str, int] | None = None,
    sides: tuple[int, int] | None = None,
    guidance_scale: float | None = None,
) -> Request:
    """A request of any family.

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
    scale = manifest.sampling.guidance_scale if guidance_scale is None else guidance_scale
    for name in tensors:
        if name.removeprefix(NEGATIVE) not in constants and name != CONDITION:
            raise ConfigError(f"input `{name}` is not known, expected {', '.join(constants)}; leave it out of --inputs")
    own = {n: _rows(n, constants[n].shape, tensors[n], count) for n in constants if n in tensors}
    given, extents = _completed(denoiser, own, {**(sizes or {}), "batch": count}, sides, scale)
    latent = resolve(denoiser.latent.shape, extents)
    joined, sampled = joined_to(manifest, latent, tensors.get(CONDITION))
    noise = np.concatenate([_noise(sampled, sides, seed) for seed in seeds])
    if joined is not None and manifest.family == "hunyuan-video":  # its pipeline begins a little off the noise
        noise = np.float32(0.999) * noise + np.float32(0.001) * joined.value[:, : sampled[1], :1]
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
    other, lengths = _completed(denoiser, {**own, **twins}, {**(sizes or {}), "batch": count}, sides, scale)
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


def _completed(
    denoiser: Denoiser,
    given: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    sides: tuple[int, int] | None,
    scale: float,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(all constant inputs of one branch, sizes by dimension): masks, places of tokens and guidance are made."""
    manifest, constants, completed = denoiser.manifest, denoiser.constants, dict(given)
    found: dict[str, int] = {}
    for name, value in given.items():
        found = match(constants[name].shape, value.shape, found, name)
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    extents = {**typical, **found, **sizes}
    denoiser.check_sizes(extents)
    for name, tensor in constants.items():
        if name not in completed:
            made = place(name, resolve(tensor.shape, extents), extents, sides)
            if name == "guidance":
                made = np.full(sizes["batch"], scale * _GUIDANCE_FACTOR.get(manifest.family, 1.0), np.float32)
            if made is None:
                shape = ", ".join(map(str, tensor.shape))
                raise ConfigError(f"input `{name}` is missing, expected {tensor.dtype} [{shape}]; add it to --inputs")
            completed[name] = made
    return completed, extents


def condition_shape(manifest: Manifest, latent: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of what an image-to-video model has beside the noise, for its latent `[N, C, F, H, W]`; None for others."""
    config = manifest.model.config
    if len(latent) != 5:
        return None
    if config.get("image_condition_type") == "token_replace":  # the first frame, in the place of the noise's
        return (*latent[:2], 1, *latent[3:])
    channels = latent[1] - int(config.get("out_channels") or latent[1])
    return (latent[0], channels, *latent[2:]) if channels else None


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
    if condition is None:
        raise ConfigError(
            f"input `{CONDITION}` is missing, expected float32 {list(expected)}, the picture that the video begins "
            "with as the pipeline prepares it; add it to --inputs"
        )
    value = _rows(CONDITION, ("batch", *expected[1:]), np.asarray(condition, np.float32), expected[0])
    if value.shape != expected:
        raise ConfigError(f"input `{CONDITION}` is {list(value.shape)}, expected {list(expected)}; prepare it so")
    if expected[1] < latent[1]:
        return Joined(1, value), (latent[0], latent[1] - expected[1], *latent[2:])
    return Joined(2, value), latent


def _noise(shape: tuple[int, ...], sides: tuple[int, int] | None, seed: int) -> np.ndarray:
    """`[1, ...]`; of packed latents as the pipelines draw it, before it is packed."""
    if len(shape) != 3:
        return drawn((1, *shape[1:]), seed)
    rows, columns = sides or sides_of(shape[1])
    return packed(drawn((1, shape[2] // 4, 2 * rows, 2 * columns), seed))
