"""Inputs for measurements: random conditioning and a smooth path of latents, made from the contract alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import clock


@dataclass(frozen=True)
class Trajectory:
    """A teacher-forced run: what the transformer is given at every step.

    Attributes:
        latents: `[S, ...]`, the transformer's `hidden_states`.
        timesteps: `[S]`, as passed to the transformer.
        conditioning: Constant inputs by name.
    """

    latents: np.ndarray
    timesteps: np.ndarray
    conditioning: dict[str, np.ndarray]


def random_trajectory(
    denoiser: Denoiser, steps: int, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> Trajectory:
    """Random constants, and latents that turn slowly from one noise sample to another.

    x(s) = cos(a) u + sin(a) v with a from 0 to pi / 2: unit variance at every step, and smooth, as a sampler's
    path is.

    Args:
        denoiser: The loaded bundle.
        steps: Steps of the run.
        sizes: Dimension sizes; the bundle's typical ones where left out.
        seed: Of the numbers.
    """
    manifest = denoiser.manifest
    sizes = {name: d.typical for name, d in manifest.dimensions.items()} | dict(sizes or {})
    generator = np.random.default_rng(seed)
    conditioning = {}
    for name, tensor in denoiser.constants.items():
        shape = resolve(tensor.shape, sizes)
        if name == "img_shapes":  # frames, height and width in tokens
            conditioning[name] = np.broadcast_to([1, *_sides(sizes["image_tokens"])], shape).astype(np.int64)
        elif tensor.dtype == "int64":
            conditioning[name] = generator.integers(0, 2, shape)
        elif name.endswith("_mask"):
            conditioning[name] = np.ones(shape, np.float32)
        elif name.endswith("_ids"):
            conditioning[name] = np.zeros(shape, np.float32) if name == "txt_ids" else _positions(shape)
        else:
            conditioning[name] = generator.standard_normal(shape).astype(np.float32)
    shape = resolve(denoiser.latent.shape, sizes)
    start, end = generator.standard_normal((2, *shape)).astype(np.float32)
    angle = np.linspace(0, np.pi / 2, steps, dtype=np.float32).reshape(-1, *[1] * len(shape))
    latents = np.cos(angle) * start + np.sin(angle) * end
    return Trajectory(latents, clock(manifest, shape, steps).model_timesteps, conditioning)


def _positions(shape: tuple[int, ...]) -> np.ndarray:
    """(0, row, column) of each token of an image as square as the count allows: `[T, 3]`."""
    count = shape[0]
    _, width = _sides(count)
    ids = np.zeros(shape, np.float32)
    ids[:, 1], ids[:, 2] = np.divmod(np.arange(count), width)
    return ids


def _sides(count: int) -> tuple[int, int]:
    """(height, width) of a picture of `count` tokens, as square as the count allows."""
    width = max(w for w in range(1, int(count**0.5) + 1) if count % w == 0)
    return count // width, width
