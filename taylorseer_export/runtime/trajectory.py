"""Inputs for measurements: random conditioning and a smooth path of latents, made from the contract alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.runtime.check import random_constants
from taylorseer_export.runtime.clock import clock
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.tensors import CONDITION, NEGATIVE, condition_shape

_TEXT = re.compile(r"(encoder_hidden_states|pooled_|cap_feats)(?!.*(_image|_mask)$)")  # what a negative prompt changes


@dataclass(frozen=True)
class Trajectory:
    """A teacher-forced run: what the transformer is given at every step.

    Attributes:
        latents: `[S, ...]`, the transformer's `hidden_states`.
        timesteps: `[S]`, as passed to the transformer.
        conditioning: Constant inputs by name.
        others: Further latents by name, `[S, ...]` each.
    """

    latents: np.ndarray
    timesteps: np.ndarray
    conditioning: dict[str, np.ndarray]
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def beside(self, step: int) -> dict[str, np.ndarray]:
        """The further latents of a step."""
        return {name: values[step] for name, values in self.others.items()}


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
    conditioning = random_conditioning(denoiser, sizes, seed)
    generator = np.random.default_rng(seed + 1)
    angles = np.linspace(0, np.pi / 2, steps, dtype=np.float32)

    def path(tensor: Tensor) -> np.ndarray:
        shape = resolve(tensor.shape, sizes)
        start, end = generator.standard_normal((2, *shape)).astype(np.float32)
        angle = angles.reshape(-1, *[1] * len(shape))
        turned: np.ndarray = np.cos(angle) * start + np.sin(angle) * end
        return turned

    latents = path(denoiser.latent)
    others = {name: path(tensor) for name, tensor in denoiser.others.items()}
    return Trajectory(latents, clock(manifest, latents.shape[1:], steps), conditioning, others)


def random_conditioning(
    denoiser: Denoiser, sizes: Mapping[str, int], seed: int = 0, guided: bool = False
) -> dict[str, np.ndarray]:
    """Constant inputs of these sizes: places of tokens in order, labels and embeddings at random.

    Args:
        denoiser: The loaded bundle.
        sizes: Of every dimension.
        seed: Of the numbers.
        guided: Whether it is for `tensor_request`: with a negative prompt where guidance of this model needs one, with
            the picture of an image-to-video model, and without the guidance that is an input.

    Raises:
        StepError: A size is out of the bundle's range; nothing was allocated.
    """
    denoiser.check_sizes(sizes)
    generator = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    made = random_constants(denoiser.contract, sizes, generator)
    if guided:
        made = {name: value for name, value in made.items() if denoiser.constants[name].fill != "guidance"}
        if denoiser.manifest.sampling.guidance in ("batched", "branches"):
            texts = [n for n in made if _TEXT.match(n)]
            made |= {NEGATIVE + name: normal(made[name].shape) for name in texts}
        beside = condition_shape(denoiser.manifest, resolve(denoiser.latent.shape, sizes))
        made |= {} if beside is None else {CONDITION: normal(beside)}
    return made
