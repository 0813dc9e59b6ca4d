"""Requests from prompts and labels, and the pictures that come of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.shapes import linear, resolve
from taylorseer_export.embedded.animating import animated, drawn_from, in_sections
from taylorseer_export.embedded.conditioning import ConditioningCache, Encoded, Key
from taylorseer_export.embedded.controlling import VIDEO, control, controlled_of
from taylorseer_export.embedded.driving import POSE, check_videos, driven_by
from taylorseer_export.embedded.edits import (
    Given,
    begun_with,
    black_for,
    brought_to,
    check_pictures,
    cut_for,
    draws_condition,
    seen,
    shown_to,
    use_of,
)
from taylorseer_export.embedded.patches import sides_of_shape
from taylorseer_export.embedded.picture import pictures_from_dit_latents
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.decoding import decoded, decoded_in_sections
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import DrivenCourse, decoded_in_driven_sections, driven_of, frames_in_section
from taylorseer_export.runtime.parts import Cut
from taylorseer_export.runtime.places import ROWS, sides_of
from taylorseer_export.runtime.runner import host_dtype
from taylorseer_export.runtime.sampling import Request, Result, latents_of, noise_of
from taylorseer_export.runtime.sections import frames_of_section, sections_of, window_of
from taylorseer_export.runtime.tensors import (
    CONDITION,
    NEGATIVE,
    channel_axis,
    extents_of,
    latent_sizes,
    tensor_request,
)


def prompt_request(
    denoiser: Denoiser,
    prompts: Sequence[str] | Mapping[str, np.ndarray],
    seeds: Sequence[int] = (0,),
    size: tuple[int, ...] | None = None,
    guidance_scale: float | None = None,
    negative: str | None = None,
    length: int | None = None,
    cache: ConditioningCache | None = None,
    given: Given | None = None,
) -> Request:
    """A request from prompts: what the bundle's own encoders make of them, and a picture of a size.

    Args:
        denoiser: The loaded bundle.
        prompts: One for all pictures or one for each; or the tensors that an encoder made of them.
        seeds: One per picture; noise is drawn as diffusers' pipelines do, on the CPU in float32.
        size: (height, width) of the picture in pixels, or (frames, height, width); see `size_of` if left out.
        guidance_scale: Dimensionless; the bundle's default if left out.
        negative: What guidance leads away from; what the family's pipeline takes if left out.
        length: Most tokens of a prompt, where the bundle leaves that open; its own if left out.
        cache: Where what prompts become is kept; the encoders run for each if left out.
        given: The picture, or for some models several, that a model is to edit or to animate, or that the loop of
            another begins with; with it the videos that drive another.

    Raises:
        ConfigError: The size does not divide into tokens or is out of the bundle's range, or a negative prompt is given
            where guidance takes none; nothing was allocated for it.
        BundleError: The bundle has no text encoders.
    """
    manifest = denoiser.manifest
    use = use_of(manifest)
    needed = use in ("edits", "animates")
    if given is None and needed and not (isinstance(prompts, Mapping) and _holds_a_picture(manifest, prompts)):
        name, what = f"{manifest.family}-{manifest.name}", "edit" if use == "edits" else "animate"
        raise ConfigError(f"picture is missing for {name}, expected the one that it is to {what}; pass it")
    if given is not None:
        check_pictures(manifest, given)
        check_videos(manifest, given.videos)
    size = size_of(manifest, given) if size is None else size
    sizes, sides = latent_sizes(manifest, size, "size")
    if isinstance(prompts, Mapping):
        tensors = dict(prompts)
    else:
        tensors = _encoded(denoiser, prompts, guidance_scale, negative, length, cache, given)
    made, ahead = None, 0
    if (by := controlled_of(manifest)) is not None and (given is not None or by.control not in tensors):
        ahead = 0 if given is None else len(given.pictures)
        tensors[by.control] = control(denoiser, by, given, size)
        frames = str(extents_of(manifest, denoiser.latent.shape)[0])
        sizes = {**sizes, frames: sizes[frames] + ahead} if frames in sizes else sizes
    elif given is not None and (driven := driven_of(manifest)) is not None:
        made = driven_by(denoiser, driven, given, size, seeds, any(name.startswith(NEGATIVE) for name in tensors))
        tensors |= made.tensors
    elif given is not None and (sections_of(manifest) is not None or draws_condition(manifest)):
        draw = drawn_from if sections_of(manifest) is None else in_sections
        made = draw(denoiser, given.picture, size, seeds)
        tensors |= made.tensors
    elif given is not None and needed:
        tensors |= seen(denoiser, given.pictures, sides) if use == "edits" else animated(denoiser, given.picture, size)
    request = tensor_request(denoiser, tensors, seeds, sizes, sides, guidance_scale)
    request = replace(request, height=size[-2], width=size[-1], ahead=ahead)
    if made is not None:
        request = replace(request, latents=made.noise, course=made.course)
    return request if given is None or use != "begins" else begun_with(denoiser, request, given, seeds)


def _holds_a_picture(manifest: Manifest, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors have all that the picture for a model that edits or animates one becomes; of a video in sections
    what one of them has of it."""
    made, sections = manifest.parts["encode"].graph.outputs, sections_of(manifest)
    if sections is None and not draws_condition(manifest):
        return all(tensor.name in tensors for tensor in made if tensor.role != "cache_out")
    names = [tensor.name for tensor in made if tensor.role == "constant"]
    beside = [CONDITION] if sections is None else [frames for frames, _ in sections.past]
    return all(name in tensors for name in (*names, *beside))


def warm_parts(denoiser: Denoiser, size: tuple[int, ...] | None = None) -> None:
    """Load the parts of a bundle, encode a prompt and decode noise, so that no request waits for first calls.

    Args:
        denoiser: The loaded bundle.
        size: As in `prompt_request`.
    """
    denoiser.open_parts()
    manifest = denoiser.manifest
    if manifest.sampling.source != "prompts" or manifest.sampling.pictures != "decoder":
        return
    if driven_of(manifest) is not None:  # no server draws what videos drive
        return
    size = usual_size(manifest) if size is None else size
    given = black_for(manifest, size)
    guided = manifest.sampling.guidance in ("batched", "branches")  # by a second prompt, which is as long
    unguided = 1.0 - manifest.pipeline.guidance_offset
    request = prompt_request(
        denoiser, ["a picture"], size=size, guidance_scale=unguided if guided else None, given=given
    )
    pictures_of(denoiser, request, request.latents)


def frame_rate(manifest: Manifest) -> int | None:
    """Frames per second of the videos that a bundle makes; None where it makes pictures, or latents alone."""
    return manifest.parts["decode"].frame_rate if "decode" in manifest.parts else None


def channels_drawn(manifest: Manifest) -> int:
    """Of a pixel: red, green and blue, and 4 with transparency."""
    if "decode" not in manifest.parts:
        return 3
    (picture,) = (t for t in manifest.parts["decode"].graph.outputs if t.role == "picture")
    return int(picture.shape[1])


def frames_dropped(manifest: Manifest) -> int:
    """How many of the frames that are asked for are no part of the video: those at its beginning."""
    return manifest.parts["decode"].dropped if "decode" in manifest.parts else 0


def size_of(manifest: Manifest, given: Given | None) -> tuple[int, ...]:
    """(height, width) in pixels of what is made where nobody asks for another; (frames, height, width) of a video.

    Without a picture the bundle's usual one. With one that of the picture as it is encoded, of several the last, of
    fitted ones the first, as the published models have it; of a video made from it the usual area in the shape of the
    picture, as they have it too, each side rounded down to tokens and kept in the bundle's range; where a picture is
    cut to a video, see `sides_of_shape`. One that a pose drives has that one's frames and shape.
    """
    usual = usual_size(manifest)
    if given is None:
        return usual
    encode, use = manifest.parts["encode"], use_of(manifest)
    if use == "controls" and VIDEO not in given.videos:
        return usual
    if use not in ("animates", "controls"):
        return brought_to(manifest, given.pictures[-1 if encode.fitted is None else 0])
    latent, made = extents_of(manifest, manifest.graphs["full"].input_of("latent").shape), [*usual]
    high, wide = given.picture.shape[:2]
    for name in (POSE, VIDEO):
        if name in given.videos:
            made[0], high, wide, _ = given.videos[name].shape
    if use == "controls":
        made[0] -= (made[0] - 1) % manifest.sampling.time_scale
    wished = [round(sqrt(usual[-2] * usual[-1] * ratio)) for ratio in (high / wide, wide / high)]
    if (square := encode.cropped) is not None:
        wished = [*sides_of_shape(square, manifest.sampling.latent_scale, high, wide)]
    for axis, extent in zip((-2, -1), wished, strict=True):
        name, factor, _ = linear(latent[axis])
        side, allowed = factor * manifest.sampling.latent_scale, manifest.dimensions[name]
        made[axis] = side * min(max(extent // side, allowed.minimum), allowed.maximum)
    return tuple(made)


def usual_size(manifest: Manifest) -> tuple[int, ...]:
    """(height, width) in pixels of the picture that a bundle is quoted at; (frames, height, width) of a video."""
    if manifest.pipeline.packing > 1 and "decode" in manifest.parts:  # the count of tokens is of any shape
        part = manifest.parts["decode"]
        extents = {name: dimension.typical for name, dimension in part.dimensions.items()}
        shown = resolve(part.graph.inputs[0].shape, extents)[-2:]
        return tuple(manifest.sampling.latent_scale * side for side in shown)
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    side = manifest.sampling.latent_scale * manifest.pipeline.packing
    latent = resolve(manifest.graphs["full"].input_of("latent").shape, typical)
    sides = extents_of(manifest, latent) if manifest.pipeline.packing == 1 else sides_of(typical[ROWS])
    skipped = manifest.parts["decode"].skipped if "decode" in manifest.parts else 0
    pictured = "decode" in manifest.parts and frame_rate(manifest) is None  # one frame, which is not counted
    counts = () if pictured else sides[:-2]
    frames = [manifest.sampling.time_scale * (count - skipped - 1) + 1 for count in counts]
    if (sections := sections_of(manifest)) is not None:
        frames = [frames_of_section(manifest) * sections.usual + 1]
    if (driven := driven_of(manifest)) is not None:
        frames = [frames_in_section(manifest, driven)]
    return *frames, *(side * extent for extent in sides[-2:])


def _encoded(
    denoiser: Denoiser,
    prompts: Sequence[str],
    guidance_scale: float | None,
    negative: str | None,
    length: int | None,
    cache: ConditioningCache | None,
    given: Given | None,
) -> dict[str, np.ndarray]:
    """Conditioning of one prompt for all pictures or one for each, with the `negative_` twins that guidance needs."""
    manifest = denoiser.manifest
    described = manifest.parts.get("text") or denoiser.encoder.part.described  # which says that there is none
    scale = manifest.guidance_of(guidance_scale)
    guided = manifest.sampling.guidance in ("batched", "branches")
    if negative is not None and not guided:
        raise ConfigError(
            f"negative prompt is given for {manifest.family}-{manifest.name}, expected none: its guidance takes no "
            "second prompt; leave it out"
        )
    if negative is not None and guidance_scale is None and scale == 1.0:
        raise ConfigError(
            f"negative prompt is given for {manifest.family}-{manifest.name} without a guidance scale, expected one "
            "beside it, since the usual one is 1, which is no guidance; add it, or leave the negative prompt out"
        )
    away = described.negative if negative is None else negative
    cut = cut_for(described, given)
    pictures: list[np.ndarray | Cut] = [] if given is None else [*shown_to(described, given.picture).values()]
    shown = [value for value in pictures if isinstance(value, np.ndarray)]
    if cut is not None:
        pictures, shown = [cut], [*cut.inputs.values()]
    digest = hashlib.sha256(b"".join(value.tobytes() for value in shown)).digest() if shown else None

    def encode(prompt: str, digest: bytes | None = None, *picture: np.ndarray | Cut, negative: bool = False) -> Encoded:
        apart = negative and denoiser.encoder.distinguishes

        def read() -> Encoded:
            if apart:
                return denoiser.encoder.encode(prompt, length, *picture, negative=True)
            return denoiser.encoder.encode(prompt, length, *picture)

        return read() if cache is None else cache.of(Key(denoiser, prompt, length, digest, apart), read)

    rows = [encode(prompt, digest, *pictures) for prompt in prompts]
    if not guided or scale == 1.0 or away is None:
        return _together(denoiser, rows)
    beside = () if cut is None else (digest, cut)  # a negative prompt sees these too
    if manifest.sampling.guidance == "batched":  # halves of one batch are as long as each other
        every = [*rows, encode(away, *beside, negative=True)]
        made, twins = _parted(denoiser, _together(denoiser, every), len(rows))
    else:
        made, twins = _together(denoiser, rows), _together(denoiser, [encode(away, *beside, negative=True)])
    return {**made, **{NEGATIVE + name: value for name, value in twins.items()}}


def _parted(
    denoiser: Denoiser, rows: Mapping[str, np.ndarray], count: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Conditioning of the first prompts, and of the others."""
    parts = {n: np.split(value, [count], denoiser.constants[n].shape.index("batch")) for n, value in rows.items()}
    return {n: part[0] for n, part in parts.items()}, {n: part[1] for n, part in parts.items()}


def _together(denoiser: Denoiser, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Conditioning of several prompts side by side: shorter ones filled up with zeros, and masks that say so.

    Raises:
        ConfigError: They are of several lengths, and the model has no mask.
    """
    made: dict[str, np.ndarray] = {}
    lengths: dict[str, list[int]] = {}  # dimension -> that of each prompt
    for name in rows[0]:
        shape, values = denoiser.constants[name].shape, [row[name] for row in rows]
        most = np.max([value.shape for value in values], 0)
        for axis, entry in enumerate(shape):
            if isinstance(entry, str) and entry != "batch":
                lengths[entry] = [value.shape[axis] for value in values]
        filled = [np.pad(value, [(0, m - n) for m, n in zip(most, value.shape, strict=True)]) for value in values]
        made[name] = np.concatenate(filled, shape.index("batch"))
    masked = {str(tensor.shape[-1]) for tensor in denoiser.constants.values() if tensor.fill == "ones"}
    for size, counts in lengths.items():
        if size not in masked and len(seen := sorted(set(counts))) > 1:
            raise ConfigError(
                f"prompts are {' and '.join(map(str, seen))} tokens long, expected all of one length, since "
                "this model has no mask for what fills up; ask for those of each length alone"
            )
    for name, tensor in denoiser.constants.items():
        counts = lengths.get(str(tensor.shape[-1]), [])
        if name not in made and tensor.fill == "ones" and str(tensor.shape[-1]) in lengths:
            made[name] = (np.arange(max(counts)) < np.array(counts)[:, None]).astype(host_dtype(tensor.dtype))
    return made


def label_request(
    denoiser: Denoiser, labels: Sequence[int], seeds: Sequence[int] = (0,), guidance_scale: float | None = None
) -> Request:
    """A request from classes: one label and one seed per picture.

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
    noise = np.concatenate([noise_of((1, int(channels), int(height), int(width)), seed) for seed in seeds])
    guided = scale != 1.0
    null = [classes] * len(labels) if guided else []
    conditioning = {"class_labels": np.array([*labels, *null], np.int64)}
    return Request(noise, conditioning, guided, scale, int(height), int(width))


def pictures(denoiser: Denoiser, request: Request, result: Result) -> np.ndarray:
    """What the latents of a result show. Returns and raises what `pictures_of` does."""
    return pictures_of(denoiser, request, result.latents)


def pictures_of(denoiser: Denoiser, request: Request, latents: np.ndarray) -> np.ndarray:
    """The pictures of latents `[N, H, W, 3]`, or videos `[N, F, H, W, 3]` of F frames, uint8; 4 with transparency.

    Raises:
        ConfigError: The bundle brings no decoder; its latents go to the model's own VAE.
    """
    decoder = denoiser.manifest.sampling.pictures
    if decoder == "decoder":
        sections, packing = sections_of(denoiser.manifest), denoiser.manifest.pipeline.packing
        if (driven := driven_of(denoiser.manifest)) is not None:
            frames = request.course.frames if isinstance(request.course, DrivenCourse) else None
            return decoded_in_driven_sections(denoiser, latents, driven, frames)
        if sections is not None:
            window = window_of(denoiser.manifest)
            if latents.shape[2] > window and (latents.shape[2] - 1) % window == 0:  # not one section from tensors
                return decoded_in_sections(denoiser.decoder, latents, window, sections)
        side = denoiser.manifest.sampling.latent_scale * packing
        sides = (request.height // side, request.width // side)
        if packing > 1:
            return decoded(denoiser.decoder, latents_of(latents, *sides, packing))
        latents = np.moveaxis(latents, channel_axis(denoiser.manifest), 1)
        latents = latents[:, :, request.ahead :] if request.ahead else latents
        pictured = latents.ndim == 5 and frame_rate(denoiser.manifest) is None
        return decoded(denoiser.decoder, latents[:, :, 0] if pictured else latents)
    if decoder is None:
        raise ConfigError(
            f"bundle {denoiser.manifest.family}-{denoiser.manifest.name} has no picture decoder, expected one "
            "exported with --whole; write latents with --out latents.safetensors and decode them with the model's VAE"
        )
    return pictures_from_dit_latents(latents)
