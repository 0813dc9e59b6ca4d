"""Schedulers of diffusers that take more than one product, in numpy: UniPC under flow matching, and DDIM.

Each is here as the families use it. A config that asks for more is left to diffusers, see `of`.

Shapes: S steps, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ONE = np.float32(1)  # before numpy 2 a plain 1 less a float32 is a float64
# Entries of a config -> the only values under which a class here is diffusers'. Those in the first table are to be
# there, since diffusers' defaults are others.
_UNIPC_ASKED = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_UNIPC_USUAL: dict[str, Any] = {
    "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "disable_corrector": [],
    "solver_p": None, "thresholding": False, "final_sigmas_type": "zero", "shift_terminal": None,
    "use_dynamic_shifting": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}  # fmt: skip
_DDIM_ASKED = {"clip_sample": False}
_DDIM_USUAL: dict[str, Any] = {
    "prediction_type": "epsilon", "beta_schedule": "linear", "trained_betas": None, "set_alpha_to_one": True,
    "steps_offset": 0, "thresholding": False, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
}  # fmt: skip


@dataclass(frozen=True)
class _Past:
    """What a step of UniPC leaves to the next.

    Attributes:
        latents: Those that it went from, corrected.
        ends: Where the last two steps, or the first alone, think that the loop will end.
        order: Of its prediction, 1 or 2.
    """

    latents: np.ndarray
    ends: tuple[np.ndarray, ...]
    order: int


class UniPC:
    """Flow matching by UniPC of second order: each step corrects the latents by its answer, then predicts the next.

    With noise levels `s`, `l[k] = log((1 - s[k]) / s[k])`, and the step's end of the loop `m[k] = x[k] - s[k] v[k]`,
    every correction and prediction is, from level `a` to level `b`,

        x = (s[b] / s[a]) x[a] + (1 - s[b] / s[a]) (m[a] + sum_i w_i (m[i] - m[a]))

    A prediction from k of second order has `i = k - 1`, `w = (l[k + 1] - l[k]) / (2 (l[k - 1] - l[k]))`, one of first
    order no sum. A correction, from k - 1 to k, has `i = k` with 1/2 where the prediction was of first order, and else
    `i = k` and `i = k - 2` with weights that make it exact on the polynomials of second degree in `l`.

    Levels, timesteps and ends have the bits of diffusers'. Weights are computed in float64 and rounded once; diffusers
    rounds every part of them to float32, with logarithms that differ between CPUs. So the latents agree within its
    rounding, which the tests derive step by step: in a correction it is the larger, the closer the levels.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2 with B(h) = exp(h) - 1; `UniPCMultistepScheduler` of
    diffusers.
    """

    name = "UniPCMultistepScheduler"

    def __init__(self, count: int, shift: float) -> None:
        self._count, self._shift = count, shift
        self.config: Mapping[str, Any] = {
            **_UNIPC_ASKED, **_UNIPC_USUAL, "num_train_timesteps": count, "flow_shift": shift
        }  # fmt: skip
        self.timesteps = self._sigmas = np.empty(0, np.float32)
        self._past: _Past | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UniPC | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        count, shift = config.get("num_train_timesteps", 1000), config.get("flow_shift", 1.0)
        if not _fits(config, _UNIPC_ASKED, _UNIPC_USUAL) or not _is_count(count) or not _is_positive(shift):
            return None
        return cls(count, float(shift))

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        """Fix the steps; it takes a number of them alone."""
        levels = np.linspace(1, 1 / self._count, steps + 1)[:-1]
        levels = self._shift * levels / (1 + (self._shift - 1) * levels)
        if abs(levels[0] - 1) < 1e-6:
            levels[0] -= 1e-6  # the logarithm of 1 - 1 is not finite
        self.timesteps = (levels * self._count).astype(np.int64)
        self._sigmas = np.append(levels, 0).astype(np.float32)
        self._past = None

    def start(self, noise: np.ndarray) -> np.ndarray:
        self._past = None
        return noise.copy()

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        return latents

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        self._past = self._corrected(answer, step, latents)
        return self._predicted(self._past, step)

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        return self._predicted(self._corrected(answer, step, latents), step)

    def estimate(self) -> np.ndarray:
        assert self._past is not None, "bug in taylorseer-export: no step was taken"
        return self._past.ends[-1]

    def _corrected(self, answer: np.ndarray, step: int, latents: np.ndarray) -> _Past:
        end, past = latents - self._sigmas[step] * answer, self._past
        if past is None:
            return _Past(latents, (end,), 1)
        with np.errstate(all="ignore"):  # equal levels have no weights, and who samples looks for what is not finite
            latest, weights = 0.5, []
            if past.order == 2:
                latest, earliest = self._correction(step)
                weights.append((earliest, past.ends[-2]))
            weights.append((latest, end))
        latents = self._moved(step - 1, past.latents, past.ends[-1], weights)
        return _Past(latents, (past.ends[-1], end), min(2, len(self.timesteps) - step))

    def _predicted(self, past: _Past, step: int) -> np.ndarray:
        weights = []
        if past.order == 2:
            with np.errstate(all="ignore"):
                before, now, after = self._log_ratios(step - 1)
                weights.append(((after - now) / (2 * (before - now)), past.ends[-2]))
        return self._moved(step, past.latents, past.ends[-1], weights)

    def _correction(self, step: int) -> tuple[float, float]:
        """Weights of the ends of the step and of two steps before, where a correction to it is of second order."""
        earliest, before, now = self._log_ratios(step - 2)
        h = now - before
        ratio = (earliest - before) / h
        first = -1 / h - 1 / np.expm1(-h)
        second = -2 / h * first - 1 / np.expm1(-h)
        latest = (second - ratio * first) / (1 - ratio)
        return latest, (first - latest) / ratio

    def _log_ratios(self, first: int) -> np.ndarray:
        """Of three levels from `first` on."""
        levels = self._sigmas[first : first + 3].astype(np.float64)
        return np.log1p(-levels) - np.log(levels)

    def _moved(
        self, step: int, latents: np.ndarray, end: np.ndarray, weights: Sequence[tuple[float, np.ndarray]]
    ) -> np.ndarray:
        """From the level of a step to the next one."""
        kept = float(self._sigmas[step + 1]) / float(self._sigmas[step])
        moved = np.float32(kept) * latents
        moved += np.float32(1 - kept) * end
        for weight, other in weights:
            moved += np.float32((1 - kept) * weight) * (other - end)
        return moved


class DDIM:
    """Denoising by DDIM without added noise, from a prediction of the noise.

    With `a[t]` the product of `1 - beta` up to t, and p the timestep after t, `a[p] = 1` after the last one:

        end = (x[t] - sqrt(1 - a[t]) v) / sqrt(a[t]),   x[p] = sqrt(a[p]) end + sqrt(1 - a[p]) v

    The steps are those of diffusers, operation by operation. Its bits are the same where torch's square roots are the
    nearest numbers, which those of MKL are not on every CPU, and where torch spaces the betas with one rounding each,
    as its builds for CPUs with fused products do. Elsewhere they agree within the rounding of that.

    Source: Song et al. 2021 (arXiv 2010.02502), equation 12; `DDIMScheduler` of diffusers.
    """

    name = "DDIMScheduler"

    def __init__(self, count: int, betas: tuple[float, float]) -> None:
        self._count, self._betas = count, betas
        self.config: Mapping[str, Any] = {
            **_DDIM_ASKED, **_DDIM_USUAL, "num_train_timesteps": count, "beta_start": betas[0], "beta_end": betas[1]
        }  # fmt: skip
        self.timesteps = np.empty(0, np.int64)
        self._products = self._after = np.empty(0, np.float32)
        self._end: np.ndarray | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DDIM | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        count = config.get("num_train_timesteps", 1000)
        betas = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if not _fits(config, _DDIM_ASKED, _DDIM_USUAL) or not _is_count(count):
            return None
        if not all(_is_positive(beta) and beta < 1 for beta in betas):
            return None
        return cls(count, (float(betas[0]), float(betas[1])))

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        """Fix the steps; it takes a number of them alone.

        Raises:
            ValueError: There are more of them than training timesteps.
        """
        if steps > self._count:
            raise ValueError(f"`steps` is {steps}, expected at most {self._count}, the number of training timesteps")
        self.timesteps = (np.arange(steps) * (self._count // steps))[::-1].copy()
        products = np.cumprod((1 - linear(*self._betas, self._count)).astype(np.float64)).astype(np.float32)
        self._products = products[self.timesteps]
        self._after = np.append(self._products[1:], np.float32(1))
        self._end = None

    def start(self, noise: np.ndarray) -> np.ndarray:
        return noise.copy()

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        return latents

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        self._end = self._end_of(answer, step, latents)
        return self._following(answer, step, self._end)

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        return self._following(answer, step, self._end_of(answer, step, latents))

    def estimate(self) -> np.ndarray:
        assert self._end is not None, "bug in taylorseer-export: no step was taken"
        return self._end

    def _end_of(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        product = self._products[step]
        end: np.ndarray = (latents - np.sqrt(_ONE - product) * answer) / np.sqrt(product)
        return end

    def _following(self, answer: np.ndarray, step: int, end: np.ndarray) -> np.ndarray:
        after = self._after[step]
        following: np.ndarray = np.sqrt(after) * end + np.sqrt(_ONE - after) * answer
        return following


def linear(first: float, last: float, count: int) -> np.ndarray:
    """`[count]` float32, evenly spaced from first to last, each half from its own end, in one rounding."""
    ends = np.array([first, last], np.float32)
    if count == 1:
        return ends[:1]
    gap = np.float64((ends[1] - ends[0]) / np.float32(count - 1))
    place = np.arange(count)
    # In float64 the product is exact and the sum nearly so.
    spaced = np.where(place < count // 2, ends[0] + gap * place, ends[1] - gap * (count - 1 - place))
    return spaced.astype(np.float32)


def _fits(config: Mapping[str, Any], asked: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether entries are what they must be, those of `usual` where they are there."""
    found = {name: config[name] for name in (*asked, *usual) if name in config}
    wanted = {**asked, **usual}
    return asked.keys() <= found.keys() and all(
        type(value) is type(wanted[name]) and value == wanted[name] for name, value in found.items()
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    """Whether it is a number above 0 that float64 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= float(np.finfo(float).max)
