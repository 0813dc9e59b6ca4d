"""Pictures that are animated: what a video has of one, at once, drawn, or section by section.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taylorseer_export.bundle.part_agreement import BEGINNING, CONDITION
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.embedded.edits import as_unit, shown_to
from taylorseer_export.embedded.picture import covering
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import DrivenCourse
from taylorseer_export.runtime.frames import FrameEncoder
from taylorseer_export.runtime.noise import Generator
from taylorseer_export.runtime.parts import Part
from taylorseer_export.runtime.sections import Course, course_of, frames_of_section, sections_of, window_of
from taylorseer_export.runtime.tensors import frames_axis, latent_sizes, noise_shape


def animated(denoiser: Denoiser, picture: np.ndarray, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a video of a size has of a picture `[height, width, 3]` uint8, by name: constant inputs, and `condition`.

    Args:
        denoiser: The loaded bundle.
        picture: It is brought to the size of the video, and to that of the image encoder if there is one.
        size: (frames, height, width) in pixels.
    """
    encoder, frames = denoiser.picture_encoder, (size[0] - 1) // denoiser.manifest.sampling.time_scale + 1
    if encoder.described.cropped is not None:
        picture = covering(picture, *size[-2:])
    given = {"picture": as_unit(picture, size[-2:]), **shown_to(encoder.described, picture, size[-2:])}
    if isinstance(encoder, FrameEncoder):
        return encoder(given, frames)
    made = encoder(given)
    return {**made, CONDITION: _with_later_frames(denoiser, made[CONDITION], frames)}


def _with_later_frames(denoiser: Denoiser, first: np.ndarray, frames: int) -> np.ndarray:
    """A condition of so many latent frames, of which there is nothing behind the first, or of that alone."""
    if denoiser.manifest.replaces_first_frame:
        return first
    axis = frames_axis(denoiser.manifest)
    condition = np.zeros((*first.shape[:axis], frames, *first.shape[axis + 1 :]), first.dtype)
    condition[(slice(None),) * axis + (slice(1),)] = first
    return condition


class Drawn(NamedTuple):
    """What a picture becomes where more than the noise is drawn, or noise more than once.

    Attributes:
        tensors: What the transformer is given of it, by name; of a video in sections what the first one is.
        course: How one section follows another; None where there is one loop.
        noise: `[N, ...]` float32, of all sections as a request has it.
    """

    tensors: dict[str, np.ndarray]
    course: Course | DrivenCourse | None
    noise: np.ndarray


def drawn_from(denoiser: Denoiser, picture: np.ndarray, size: tuple[int, ...], seeds: Sequence[int]) -> Drawn:
    """What a video of a size has of a picture whose latents the encoder leaves open.

    Args:
        denoiser: The loaded bundle.
        picture: `[height, width, 3]` uint8, treated as in `animated`.
        size: (frames, height, width) in pixels.
        seeds: One per sample; the latents and then the noise are drawn from one generator, as diffusers' pipeline does.
    """
    encoder, manifest = denoiser.picture_encoder, denoiser.manifest
    assert isinstance(encoder, Part), "bug in taylorseer-export: an encoder of one latent frame after the other"
    made = encoder({"picture": as_unit(picture, size[-2:]), **shown_to(encoder.described, picture, size[-2:])})
    mean, deviation = (made.pop(name) for name in BEGINNING)
    sizes, _ = latent_sizes(manifest, size, "size")
    shape = noise_shape(manifest, resolve(denoiser.latent.shape, {**sizes, "batch": 1}))
    first, noise = [], []
    for seed in seeds:
        generator = Generator(seed)
        first.append(mean + deviation * generator.normals(mean.size).reshape(mean.shape))
        noise.append(generator.normals(math.prod(shape)).reshape(shape))
    condition = np.concatenate(first).astype(np.float32)
    condition = _with_later_frames(denoiser, condition, shape[frames_axis(manifest)])
    return Drawn({**made, CONDITION: condition}, None, np.concatenate(noise))


def in_sections(denoiser: Denoiser, picture: np.ndarray, size: tuple[int, ...], seeds: Sequence[int]) -> Drawn:
    """What a request of a video of a size, made in sections, has of a picture.

    Args:
        denoiser: The loaded bundle, whose videos are made in sections.
        picture: `[height, width, 3]` uint8, treated as in `animated`.
        size: (frames, height, width) of the video in pixels.
        seeds: One per sample. The latents of the picture, which its encoder leaves open, and then the noise of one
            section after the other are drawn from one generator, as diffusers' pipeline does.
    """
    manifest, encoder = denoiser.manifest, denoiser.picture_encoder
    sections = sections_of(manifest)
    assert isinstance(encoder, Part) and sections is not None, "bug in taylorseer-export: sections of one loop"
    made = encoder({"picture": as_unit(picture, size[-2:]), **shown_to(encoder.described, picture, size[-2:])})
    mean, deviation = (made.pop(name) for name in BEGINNING)
    window, count = window_of(manifest), (size[0] - 1) // frames_of_section(manifest)
    shape = (1, mean.shape[1], window, *mean.shape[3:])
    clean, noise = [], []
    for seed in seeds:
        generator = Generator(seed)
        clean.append(mean + deviation * generator.normals(mean.size).reshape(mean.shape))
        noise.append(np.concatenate([generator.normals(math.prod(shape)).reshape(shape) for _ in range(count)], 2))
    latents, noisy = (np.concatenate(values).astype(np.float32) for values in (clean, noise))
    course = course_of(manifest, sections, count, latents)
    return Drawn({**made, **course.inputs(0, latents[:, :, :0])}, course, noisy)
