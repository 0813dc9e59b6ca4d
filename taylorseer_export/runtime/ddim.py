"""DDIM of diffusers in numpy, as the families use it: from a prediction of the noise, and CogVideoX's of a velocity.

A config that asks for more is left to diffusers, see `of`.

Shapes: S steps, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from taylorseer_export.runtime.solvers import fits, is_count, is_positive, products

_ONE = np.float32(1)  # before numpy 2 a plain 1 less a float32 is a float64
# Entries of a config -> the only values under which a class here is diffusers'. Those in tables of what is asked are to
# be there, since diffusers' defaults are others.
_ASKED = {"clip_sample": False}
_USUAL: dict[str, Any] = {
    "prediction_type": "epsilon", "beta_schedule": "linear", "trained_betas": None, "set_alpha_to_one": True,
    "steps_offset": 0, "thresholding": False, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
}  # fmt: skip
_VELOCITY_ASKED = {"prediction_type": "v_prediction"}
_VELOCITY_USUAL: dict[str, Any] = {"beta_schedule": "scaled_linear", "trained_betas": None, "set_alpha_to_one": True}
_SPACINGS = ("leading", "linspace", "trailing")


class _Stepper:
    """What both have in common: a step is where the loop will end, and what follows from that.

    Attributes:
        timesteps: `[S]` int64, once they are set.
    """

    def __init__(self) -> None:
        self.timesteps = np.empty(0, np.int64)
        self._end: np.ndarray | None = None

    def start(self, noise: np.ndarray) -> np.ndarray:
        return noise.copy()

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        return latents

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        self._end = self._end_of(answer, step, latents)
        return self._following(answer, step, latents, self._end)

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        return self._following(answer, step, latents, self._end_of(answer, step, latents))

    def estimate(self) -> np.ndarray:
        assert self._end is not None, "bug in taylorseer-export: no step was taken"
        return self._end

    def _end_of(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        """Where a step thinks that the loop will end."""
        raise NotImplementedError

    def _following(self, answer: np.ndarray, step: int, latents: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The latents after it."""
        raise NotImplementedError


class DDIM(_Stepper):
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
        super().__init__()
        self._count, self._betas = count, betas
        self.config: Mapping[str, Any] = {
            **_ASKED, **_USUAL, "num_train_timesteps": count, "beta_start": betas[0], "beta_end": betas[1]
        }  # fmt: skip
        self._products = self._after = np.empty(0, np.float32)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DDIM | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        count = config.get("num_train_timesteps", 1000)
        betas = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if not fits(config, _ASKED, _USUAL) or not is_count(count):
            return None
        if not all(is_positive(beta) and beta < 1 for beta in betas):
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
        self._products = products(*self._betas, self._count)[self.timesteps]
        self._after = np.append(self._products[1:], np.float32(1))
        self._end = None

    def _end_of(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        product = self._products[step]
        end: np.ndarray = (latents - np.sqrt(_ONE - product) * answer) / np.sqrt(product)
        return end

    def _following(self, answer: np.ndarray, step: int, latents: np.ndarray, end: np.ndarray) -> np.ndarray:
        after = self._after[step]
        following: np.ndarray = np.sqrt(after) * end + np.sqrt(_ONE - after) * answer
        return following


class VelocityDDIM(_Stepper):
    """CogVideoX's DDIM, from a prediction of the velocity.

    With the share `a[t]` of the picture, squared, p the timestep `T // S` before t, and `a[p] = 1` where there is none:

        end = sqrt(a[t]) x[t] - sqrt(1 - a[t]) v
        k = sqrt((1 - a[p]) / (1 - a[t])),   x[p] = k x[t] + (sqrt(a[p]) - k sqrt(a[t])) end

    The shares are products of `1 - beta`, `a / (m + (1 - m) a)` of them for a shift m, and where the last one is to be
    0 their roots are moved and stretched. All weights are computed in float64 and rounded once, as torch does.

    Source: Song et al. 2021 (arXiv 2010.02502), equation 12; Salimans and Ho 2022 (arXiv 2202.00512), appendix D; Lin
    et al. 2023 (arXiv 2305.08891), algorithm 1; `CogVideoXDDIMScheduler` of diffusers.
    """

    name = "CogVideoXDDIMScheduler"

    def __init__(
        self, count: int, betas: tuple[float, float], shift: float, to_zero: bool, spacing: str, offset: int
    ) -> None:
        super().__init__()
        self._count, self._spacing, self._offset = count, spacing, offset
        self.config: Mapping[str, Any] = {
            **_VELOCITY_ASKED, **_VELOCITY_USUAL, "num_train_timesteps": count, "beta_start": betas[0],
            "beta_end": betas[1], "snr_shift_scale": shift, "rescale_betas_zero_snr": to_zero,
            "timestep_spacing": spacing, "steps_offset": offset,
        }  # fmt: skip
        shares = np.cumprod(1 - np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, count) ** 2)
        shares = shares / (shift + (1 - shift) * shares)
        if to_zero:
            roots = np.sqrt(shares)
            shares = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        self._shares = shares

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VelocityDDIM | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        count, shift = config.get("num_train_timesteps", 1000), config.get("snr_shift_scale", 3.0)
        betas = config.get("beta_start", 0.00085), config.get("beta_end", 0.0120)
        to_zero, offset = config.get("rescale_betas_zero_snr", False), config.get("steps_offset", 0)
        spacing = config.get("timestep_spacing", "leading")
        if not fits(config, _VELOCITY_ASKED, _VELOCITY_USUAL) or not is_count(count) or not is_positive(shift):
            return None
        if not all(is_positive(beta) and beta < 1 for beta in betas) or not isinstance(to_zero, bool):
            return None
        if spacing not in _SPACINGS or type(offset) is not int or not 0 <= offset < count or (to_zero and count == 1):
            return None
        return cls(count, (float(betas[0]), float(betas[1])), float(shift), to_zero, spacing, offset)

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        """Fix the steps; it takes a number of them alone.

        Raises:
            ValueError: There are more of them than training timesteps, or the offset leads past those.
        """
        count = self._count
        if steps > count:
            raise ValueError(f"`steps` is {steps}, expected at most {count}, the number of training timesteps")
        spaced: np.ndarray
        if self._spacing == "linspace":
            spaced = np.linspace(0, count - 1, steps).round()[::-1]
        elif self._spacing == "leading":
            spaced = (np.arange(steps) * (count // steps))[::-1] + self._offset
        else:
            spaced = np.arange(count, 0, -count / steps).round() - 1
        if spaced[0] >= count:
            raise ValueError(f"`steps_offset` is {self._offset}, expected timesteps below {count}; lower it")
        self.timesteps = spaced.astype(np.int64)
        before = self.timesteps - count // steps
        now, after = self._shares[self.timesteps], np.where(before >= 0, self._shares[before], 1.0)
        with np.errstate(all="ignore"):  # who samples looks for what is not finite
            kept = np.sqrt((1 - after) / (1 - now))
        weights = np.stack([np.sqrt(now), np.sqrt(1 - now), kept, np.sqrt(after) - np.sqrt(now) * kept])
        self._weights = weights.astype(np.float32)
        self._end = None

    def _end_of(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        share, noise = self._weights[:2, step]
        end: np.ndarray = share * latents - noise * answer
        return end

    def _following(self, answer: np.ndarray, step: int, latents: np.ndarray, end: np.ndarray) -> np.ndarray:
        kept, added = self._weights[2:, step]
        following: np.ndarray = kept * latents + added * end
        return following
