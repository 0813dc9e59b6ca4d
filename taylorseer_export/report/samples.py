"""Samples: the requests that calibration and evaluation rest on, in groups of one size.

The embedded models bring their own: captions in the words that FLUX knows, classes in turn for DiT. Any other model is
given the outputs of its text encoders, one row for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.shapes import match, resolve
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Request, dit_request, flux_request

_LARGEST = 8  # samples of a group: memory grows with it, not with the number of groups
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
_SHAPES = ("circle", "square", "triangle", "cross")
_RELATIONS = ("left of", "right of", "above", "below")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ConfigError: It is missing, not text, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts {path} is not readable ({error}), expected a text file; check the path"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"--prompts {path} is empty, expected one caption or class per line; add some")
    return prompts


class Groups(Sequence[Request]):
    """Requests that are made when they are asked for, so that memory does not grow with their number.

    Args:
        count: How many.
        make: The request of a number.
    """

    def __init__(self, count: int, make: Callable[[int], Request]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not -self._count <= number < self._count:
            raise IndexError(number)
        return self._make(number % self._count)


def groups(
    denoiser: Denoiser,
    count: int,
    seed: int,
    prompts: Sequence[str] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    least: int = 1,
) -> Groups:
    """`count` samples as requests of one size each; every sample has a seed of its own, from `seed` on.

    Args:
        denoiser: The loaded bundle.
        count: How many; rounded up to whole groups where the bundle takes one batch size only.
        seed: Of the first sample's noise.
        prompts: Captions or classes, taken in turn; the embedded model's own if left out.
        tensors: Conditioning with one row per sample, for models without an encoder here; taken in turn.
        least: Groups there are at least, as far as there are samples.

    Raises:
        ConfigError: The model needs tensors and has none, or a prompt is not one of its own.
    """
    size = _group_size(denoiser, count, least)
    made = Groups(
        -(-count // size), lambda k: _request(denoiser, range(k * size, (k + 1) * size), seed, prompts, tensors)
    )
    made[0]  # what is wrong with the input is said now, not after hours
    return made


def captions(count: int, seed: int) -> list[str]:
    """Captions of the embedded FLUX: two shapes of different colours and how they stand, or every fourth time one."""
    drawn = np.random.default_rng((seed, count))

    def thing(colour: str) -> str:
        return f"{'an' if colour[0] == 'o' else 'a'} {colour} {_SHAPES[drawn.integers(len(_SHAPES))]}"

    made = []
    for number in range(count):
        first, second = (_COLOURS[k] for k in drawn.permutation(len(_COLOURS))[:2])
        relation = _RELATIONS[drawn.integers(len(_RELATIONS))]
        made.append(thing(first) if number % 4 == 3 else f"{thing(first)} {relation} {thing(second)}")
    return made


def _group_size(denoiser: Denoiser, count: int, least: int) -> int:
    batch = denoiser.manifest.dimensions["batch"]
    halves = 2 if denoiser.manifest.sampling.guidance == "batched" else 1
    if batch.minimum == batch.maximum:
        return max(batch.maximum // halves, 1)
    most = max(min(_LARGEST, batch.maximum // halves, count // least), 1)
    return next(size for size in range(most, 0, -1) if count % size == 0 or size == 1)


def _request(
    denoiser: Denoiser,
    numbers: range,
    seed: int,
    prompts: Sequence[str] | None,
    tensors: Mapping[str, np.ndarray] | None,
) -> Request:
    manifest = denoiser.manifest
    seeds = [seed + number for number in numbers]
    if manifest.family == "dit":
        chosen = prompts or [str(c) for c in range(int(manifest.model.config["num_embeds_ada_norm"]))]
        wrong = next((label for label in chosen if not label.isdigit()), None)
        if wrong is not None:
            raise ConfigError(f"--prompts has the line `{wrong}`, expected a class per line (a whole number); mend it")
        labels = [chosen[number % len(chosen)] for number in numbers]
        return dit_request(denoiser, [int(label) for label in labels], seeds)
    if manifest.model.embedded:
        chosen = prompts or captions(numbers.stop, seed)
        return flux_request(denoiser, [chosen[number % len(chosen)] for number in numbers], seeds)
    if tensors is None:
        raise ConfigError(
            f"--inputs is missing, expected the text encoders' outputs for {manifest.family}, one row per sample "
            f"({', '.join(denoiser.constants)}); pass --inputs FILE.safetensors"
        )
    return tensor_request(denoiser, tensors, numbers, seeds)


def tensor_request(
    denoiser: Denoiser, tensors: Mapping[str, np.ndarray], numbers: Sequence[int], seeds: Sequence[int]
) -> Request:
    """A request from conditioning tensors: rows `numbers` of those with a batch dimension, taken in turn.

    Raises:
        ConfigError: The model takes guidance in another way than one call per step.
        StepError: A tensor is missing or of another shape.
    """
    manifest = denoiser.manifest
    if manifest.sampling.guidance not in ("none", "embedded"):
        raise ConfigError(
            f"guidance of {manifest.family} is `{manifest.sampling.guidance}`, expected none or embedded for samples "
            "from tensors; calibrate such a model from Python with requests of its pipeline"
        )
    conditioning, sizes = {}, {"batch": len(seeds)}
    for name, tensor in denoiser.constants.items():
        if name not in tensors:
            continue
        value = np.asarray(tensors[name])
        if tensor.shape[0] == "batch":
            value = value[[number % len(value) for number in numbers]]
        conditioning[name] = value
        sizes = match(tensor.shape, value.shape, sizes, name)
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    shape = resolve(denoiser.latent.shape, typical | sizes)
    noise = np.stack([np.random.default_rng(s).standard_normal(shape[1:], np.float32) for s in seeds])
    return Request(noise, conditioning, False, 1.0, 0, 0)
