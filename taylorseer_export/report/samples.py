"""Samples: the requests that calibration and evaluation rest on, in groups of one size.

A bundle that draws from captions or labels brings its own: captions in the words that its encoder knows, classes in
turn. Any other model is given the outputs of its text encoders, one row for each sample, under diffusers' argument
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.embedded.caption import captions
from taylorseer_export.embedded.requests import label_request, prompt_request
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Request
from taylorseer_export.runtime.tensors import CONDITION, NEGATIVE, tensor_request
from taylorseer_export.runtime.trajectory import random_conditioning

_LARGEST = 8  # samples of a group: memory grows with it, not with the number of groups


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
    guidance_scale: float | None = None,
    sizes: tuple[Mapping[str, int], tuple[int, int] | None] = ({}, None),
) -> Groups:
    """`count` samples as requests of one size each; every sample has a seed of its own, from `seed` on.

    Args:
        denoiser: The loaded bundle.
        count: How many; rounded up to whole groups where the bundle takes one batch size only.
        seed: Of the first sample's noise.
        prompts: Captions or classes, taken in turn; the embedded model's own if left out.
        tensors: Conditioning with one row per sample, for models without an encoder here; taken in turn.
        least: Groups there are at least, as far as there are samples.
        guidance_scale: Dimensionless; the bundle's default if left out.
        sizes: Of the latent by dimension, and (rows, columns) of a packed one in tokens; the bundle's where left out.

    Raises:
        ConfigError: The model needs tensors and has none, or a prompt is not one of its own.
    """
    size = _group_size(denoiser, count, least)
    if tensors is not None:
        check_inputs(denoiser, tensors, guidance_scale)
    made = Groups(
        -(-count // size),
        lambda k: _request(denoiser, range(k * size, (k + 1) * size), seed, prompts, tensors, guidance_scale, sizes),
    )
    made[0]  # what is wrong with the input is said now, not after hours
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
    guidance_scale: float | None,
    sizes: tuple[Mapping[str, int], tuple[int, int] | None],
) -> Request:
    manifest = denoiser.manifest
    seeds = [seed + number for number in numbers]
    source = manifest.sampling.source
    if source == "labels":
        chosen = prompts or [str(c) for c in range(int(manifest.model.config["num_embeds_ada_norm"]))]
        if tensors is not None:
            raise ConfigError(
                f"--inputs is given for {manifest.family}, whose only input is a class, expected none; pass --prompts "
                "FILE"
            )
        wrong = next((label for label in chosen if not label.isdigit()), None)
        if wrong is not None:
            raise ConfigError(f"--prompts has the line `{wrong}`, expected a class per line (a whole number); mend it")
        labels = [chosen[number % len(chosen)] for number in numbers]
        return label_request(denoiser, [int(label) for label in labels], seeds, guidance_scale)
    if chosen := prompts_of(denoiser, numbers, seed, prompts):
        given = rows_of(denoiser, tensors, numbers) if tensors is not None and not prompts else chosen
        side = manifest.sampling.latent_scale * manifest.pipeline.packing
        size = None if sizes[1] is None else (side * sizes[1][0], side * sizes[1][1])
        return prompt_request(denoiser, given, seeds, size, guidance_scale)
    if prompts is not None and source != "prompts":
        raise ConfigError(
            f"--prompts is given for {manifest.family}, whose bundle has no text encoder, expected tensors; pass its "
            "outputs with --inputs FILE.safetensors"
        )
    if tensors is None and source == "prompts":
        raise ConfigError(
            f"--prompts is missing for {manifest.family}-{manifest.name}, expected a text file with a prompt per line; "
            "pass --prompts FILE"
        )
    if tensors is None:
        raise ConfigError(
            f"--inputs is missing, expected the text encoders' outputs for {manifest.family}, one row per sample "
            f"({', '.join(denoiser.constants)}); pass --inputs FILE.safetensors"
        )
    return tensor_request(denoiser, rows_of(denoiser, tensors, numbers), seeds, *sizes, guidance_scale)


def prompts_of(denoiser: Denoiser, numbers: range, seed: int, prompts: Sequence[str] | None = None) -> list[str]:
    """The prompts of the samples `numbers`; none where the bundle reads no text."""
    manifest = denoiser.manifest
    if manifest.sampling.source != "prompts":
        return []
    chosen = prompts or (captions(numbers.stop, seed) if manifest.model.embedded else [])
    if not chosen:
        return []
    return [chosen[number % len(chosen)] for number in numbers]


def rows_of(denoiser: Denoiser, tensors: Mapping[str, np.ndarray], numbers: range) -> dict[str, np.ndarray]:
    """The rows `numbers`, taken in turn, of tensors that have one for each sample; the others as they are."""
    found = {}
    for name, value in tensors.items():
        known = denoiser.constants.get(name.removeprefix(NEGATIVE))
        shape = denoiser.latent.shape if name == CONDITION else () if known is None else known.shape
        axis = shape.index("batch") if "batch" in shape and len(shape) == value.ndim else None
        if axis is None or value.shape[axis] == 1:
            found[name] = value
        else:
            found[name] = value.take([number % value.shape[axis] for number in numbers], axis)
    return found


def check_inputs(denoiser: Denoiser, tensors: Mapping[str, np.ndarray], guidance_scale: float | None = None) -> None:
    """Refuse conditioning that does not say which row belongs to which, or what guidance needs.

    Raises:
        ConfigError: Tensors have different numbers of rows, or a negative prompt is missing.
    """
    manifest, counts = denoiser.manifest, {}
    for name, value in tensors.items():
        known = denoiser.constants.get(name.removeprefix(NEGATIVE))
        if known is not None and "batch" in known.shape and len(known.shape) == value.ndim:
            counts[name] = value.shape[known.shape.index("batch")]
    several = {name: count for name, count in counts.items() if count != 1}
    if len(set(several.values())) > 1:
        (first, one), (second, other) = (
            min(several.items(), key=lambda x: x[1]),
            max(several.items(), key=lambda x: x[1]),
        )
        raise ConfigError(
            f"--inputs has {one} rows of `{first}` and {other} of `{second}`, expected as many of each, or 1; mend it"
        )
    scale = manifest.sampling.guidance_scale if guidance_scale is None else guidance_scale
    if (
        manifest.sampling.guidance in ("batched", "branches")
        and manifest.guidance_of(scale) != 1
        and not any(name.startswith(NEGATIVE) for name in tensors)
    ):
        raise ConfigError(
            f"--inputs has no tensor `{NEGATIVE}...`, expected those of the negative prompt, since the model is "
            f"guided with scale {scale:g}; add them, or pass --guidance-scale {1 - manifest.pipeline.guidance_offset:g}"
        )


def random_inputs(
    denoiser: Denoiser, count: int, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray] | None:
    """Random conditioning for the embedded models that have learned nothing; None for all others."""
    manifest = denoiser.manifest
    if not manifest.model.embedded or manifest.sampling.pictures is not None:
        return None
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    return random_conditioning(denoiser, {**typical, **(sizes or {}), "batch": count}, guided=True)
