"""Reuse errors: what it costs to predict one step from the snapshot of another, measured on the engines themselves.

For a full step t and a later step s of an all-full loop, the reuse error is

    d(t, s) = c(s) · (prediction(s) - prediction of s forecast from the snapshot of t alone)

with c(s) how far the scheduler moves the latents per unit of prediction. Weights that sum to 1 mix predictions as they
mix snapshots, to first order, so a forecast of s from full steps t₁ … tₙ moves the latents wrong by Σᵢ w[i] · d(tᵢ, s).
Everything a calibration asks of a model is therefore in the inner products of its reuse errors: which granularity,
which sites and how much each of them matters is already in the predictions.

Each source runs once more as the only full step of a short request, so no snapshot is kept: memory holds the latents of
one loop and a fixed random choice of elements of each reuse error, whatever the number of samples. Loops that are
needed again lie in files (`Archive`).

A few samples of a model can be far harder than the rest. So that they do not decide for all, the products of each
sample are divided by their trace.

Shapes: S steps, P pairs of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Request, denoise

_ELEMENTS = 2048  # of each reuse error and sample; inner products over them are good to a few per cent
_MOST_PAIRS = 4096  # their inner products are a matrix of 128 MiB


@dataclass(frozen=True)
class Trajectory:
    """An all-full loop: the latents `[N, ...]` before each step and after the last, and the prediction of each step."""

    request: Request
    latents: list[np.ndarray]
    predictions: list[np.ndarray]
    model_timesteps: np.ndarray
    reach: tuple[float, ...]  # c(s)


class ReuseErrors:
    """Inner products of reuse errors `[P, P]`, the sum over samples of equal weight.

    Args:
        steps: Length of the loop.
        window: Largest distance between the two steps of a pair; shortened where the matrix would grow too large.
    """

    def __init__(self, steps: int, window: int) -> None:
        self.steps, self.window = steps, max(min(window, steps - 1, _MOST_PAIRS // steps), 1)
        pairs = [(t, s) for s in range(steps) for t in range(max(s - self.window, 0), s)]
        self.index = {pair: k for k, pair in enumerate(pairs)}
        self.products = np.zeros((len(pairs), len(pairs)))
        self.samples = 0

    def add(self, denoiser: Denoiser, slot: Branches, trajectory: Trajectory, on_step: Callable[[], object]) -> None:
        """Measure the reuse errors of the samples of a trajectory."""
        samples = len(trajectory.request.latents)
        size = trajectory.predictions[0][0].size
        chosen = np.random.default_rng(0).permutation(size)[:_ELEMENTS]
        errors = np.zeros((samples, len(self.index), len(chosen)), np.float32)
        loop = Loop(denoiser, trajectory.request, Forecasts(Plan.all_full(self.steps), 0))
        # One step more than any request runs, since a model may be told what follows each.
        timesteps = np.append(trajectory.model_timesteps, np.float32(denoiser.contract.noiseless))
        reuse = Forecasts(Plan("F" + "." * (self.window + 1)), 0)
        for source in range(self.steps - 1):
            # Of one length whatever the source, so that the prepare graph is bound once.
            steps = np.minimum(np.arange(source, source + self.window + 2), self.steps)
            slot.start(trajectory.request.branches, reuse, timesteps[steps])
            for step in range(source, min(source + self.window, self.steps - 1) + 1):
                found = loop.prediction(slot.step(loop.model_input(trajectory.latents[step])))
                if step > source:
                    error = (trajectory.predictions[step] - found).reshape(samples, -1)[:, chosen]
                    errors[:, self.index[source, step]] = trajectory.reach[step] * error
                on_step()
        for sample in errors.astype(np.float64):
            products = sample @ sample.T
            self.products += products / max(np.trace(products), np.finfo(np.float64).tiny)
        self.samples += samples


def all_full(
    denoiser: Denoiser, slot: Branches, request: Request, steps: int, on_step: Callable[[], object]
) -> Trajectory:
    """Run the loop with every step full, and keep what it went through."""
    loop = Loop(denoiser, request, Forecasts(Plan.all_full(steps), 0))
    loop.begin(slot)
    latents, predictions, reach = [loop.latents], [], []
    nudged: list[tuple[np.ndarray, np.floating[Any]]] = []  # where a nudged prediction leads, and how long the nudge is

    def nudge(noise_pred: np.ndarray) -> None:
        predictions.append(loop.prediction(noise_pred))
        by = np.random.default_rng(0).standard_normal(predictions[-1].shape).astype(np.float32)
        by *= np.float32(1e-2 * predictions[-1].std())
        nudged.append((loop.preview(predictions[-1] + by), np.linalg.norm(by)))

    for _ in denoise(loop, slot, answered=nudge):
        moved, length = nudged.pop()
        reach.append(float(np.linalg.norm(moved - loop.latents) / length))
        latents.append(loop.latents)
        on_step()
    return Trajectory(request, latents, predictions, loop.model_timesteps, tuple(reach))


class Archive:
    """All-full loops of groups of samples: requests are made and latents read from files when they are asked for.

    The files go with the archive. Each holds `(S + 1) · N` latents in float32.

    Args:
        requests: The groups; indexing one makes it.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests, self._files = requests, [Path()] * len(requests)
        self._folder = TemporaryDirectory(prefix="taylorseer-export-")
        self.samples = 0

    def __len__(self) -> int:
        return len(self._requests)

    def request(self, group: int) -> Request:
        """One group."""
        return self._requests[group]

    def keep(self, group: int, trajectory: Trajectory) -> None:
        """Write the latents of a group's loop."""
        file = Path(self._folder.name) / f"{group}.npy"
        np.save(file, np.stack(trajectory.latents))
        self._files[group] = file
        self.samples += len(trajectory.request.latents)

    def latents(self, group: int) -> np.ndarray:
        """`[S + 1, N, ...]` float32, read from the file where it is looked at."""
        return np.load(self._files[group], mmap_mode="r")
