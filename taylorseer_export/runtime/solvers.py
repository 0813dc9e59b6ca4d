"""Schedulers of diffusers that look back, in numpy: UniPC under flow matching, and DPM-Solver++.

Each is here as the families use it. A config that asks for more is left to diffusers, see `of`. `ddim.py` has those
that do not look back.

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
_DPM_USUAL: dict[str, Any] = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
    "beta_schedule": "linear", "trained_betas": None, "rescale_betas_zero_snr": False, "variance_type": None,
    "lambda_min_clipped": -float("inf"), "use_dynamic_shifting": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
}  # fmt: skip
# Entries of which a class here knows several values; the first is diffusers' default.
_DPM_KNOWN: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False, True), "prediction_type": ("epsilon", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
    "lower_order_final": (True, False), "euler_at_final": (False, True),
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
        if not fits(config, _UNIPC_ASKED, _UNIPC_USUAL) or not is_count(count) or not is_positive(shift):
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


class DPMSolver:
    """Denoising by DPM-Solver++ of second order in many steps, from a prediction of the noise or of a flow.

    With noise levels `s` and shares `a` of the picture (`a = 1 - s` of a flow; else `s = a t` and
    `a = 1 / sqrt(1 + t^2)` at levels `t` of noise added to a picture), `l[k] = log(a[k] / s[k])`, and the step's end of
    the loop `m[k]`, which is `x[k] - s[k] v[k]` of a flow and else `(x[k] - s[k] v[k]) / a[k]`, a step from k to b is

        x[b] = (s[b] / s[k]) x[k] + w (m[k] + (l[b] - l[k]) / (2 (l[k] - l[k - 1])) (m[k] - m[k - 1]))
        w = a[b] - a[k] s[b] / s[k] = -a[b] (exp(l[k] - l[b]) - 1)

    The first step has no sum, and neither has the last where the loop ends without noise, where the config asks for it,
    or where it says so of loops of less than 15 steps.

    Timesteps have the bits of diffusers'; levels and ends too, of a flow. Weights are computed in float64 and rounded
    once, where diffusers rounds every part of them to float32.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2; `DPMSolverMultistepScheduler` of diffusers.
    """

    name = "DPMSolverMultistepScheduler"

    def __init__(self, known: Mapping[str, Any], count: int, betas: tuple[float, float], shift: float, offset: int):
        self._known, self._count, self._betas, self._shift, self._offset = known, count, betas, shift, offset
        self.config: Mapping[str, Any] = {
            **_DPM_USUAL, **known, "num_train_timesteps": count, "beta_start": betas[0], "beta_end": betas[1],
            "flow_shift": shift, "steps_offset": offset,
        }  # fmt: skip
        self._flow = bool(known["use_flow_sigmas"])
        self.timesteps, self._levels = np.empty(0, np.int64), np.empty(0, np.float32)
        self._ends: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DPMSolver | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        count, shift, offset = (
            config.get(name, usual)
            for name, usual in (("num_train_timesteps", 1000), ("flow_shift", 1.0), ("steps_offset", 0))
        )
        betas = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        known = {name: config.get(name, values[0]) for name, values in _DPM_KNOWN.items()}
        alike = (
            any(type(known[name]) is type(value) and known[name] == value for value in values)
            for name, values in _DPM_KNOWN.items()
        )
        if not fits(config, {}, _DPM_USUAL) or not all(alike) or not is_count(count) or not is_positive(shift):
            return None
        if known["use_flow_sigmas"] != (known["prediction_type"] == "flow_prediction"):
            return None
        if not all(is_positive(beta) and beta < 1 for beta in betas) or not (offset == 0 or is_count(offset)):
            return None
        return cls(known, count, (float(betas[0]), float(betas[1])), float(shift), int(offset))

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        """Fix the steps; it takes a number of them alone."""
        shares = products(*self._betas, self._count)
        added = np.sqrt((_ONE - shares) / shares)  # noise to a picture
        if self._flow:
            even = 1.0 - np.linspace(1, 1 / self._count, steps + 1)
            levels = (self._shift * even / (1 + (self._shift - 1) * even))[:0:-1]
            self.timesteps = (levels * self._count).astype(np.int64)
        else:
            self.timesteps = self._spaced(steps)
            levels = added[self.timesteps.clip(0, self._count - 1)]
        last = added[0] if self._known["final_sigmas_type"] == "sigma_min" else 0
        self._levels = np.append(levels, last).astype(np.float32)
        self._ends = ()

    def _spaced(self, steps: int) -> np.ndarray:
        """`[S]` int64: timesteps by the three rules of diffusers."""
        count, spacing = self._count, self._known["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
        if spacing == "leading":
            return np.arange(steps + 1)[:0:-1] * (count // (steps + 1)) + self._offset
        return np.arange(count, 0, -count / steps).round().astype(np.int64) - 1

    def start(self, noise: np.ndarray) -> np.ndarray:
        self._ends = ()
        return noise.copy()

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        return latents

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        self._ends = self._with(answer, step, latents)
        return self._moved(self._ends, step, latents)

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        return self._moved(self._with(answer, step, latents), step, latents)

    def estimate(self) -> np.ndarray:
        assert self._ends, "bug in taylorseer-export: no step was taken"
        return self._ends[-1]

    def _with(self, answer: np.ndarray, step: int, latents: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where the step before and this one think that the loop will end."""
        level = self._levels[step]
        if not self._flow:
            latents = np.float32(1 / self._share(step)) * latents
        return *self._ends[-1:], latents - level * answer

    def _share(self, step: int) -> float:
        """That of the picture at the level of a step."""
        level = float(self._levels[step])
        return 1 - level if self._flow else (1 + level**2) ** -0.5

    def _noise(self, step: int) -> float:
        """Level of noise beside that share."""
        return float(self._levels[step]) * (1 if self._flow else self._share(step))

    def _moved(self, ends: tuple[np.ndarray, ...], step: int, latents: np.ndarray) -> np.ndarray:
        """From the level of a step to the next one."""
        kept = self._noise(step + 1) / self._noise(step)
        weight = self._share(step + 1) - self._share(step) * kept
        moved = np.float32(kept) * latents
        moved += np.float32(weight) * ends[-1]
        if len(ends) == 2 and not self._plain_at(step):
            with np.errstate(
                all="ignore"
            ):  # equal levels have no weights, and who samples looks for what is not finite
                before, now, after = (
                    np.log(np.float64(self._share(k)) / self._noise(k)) for k in range(step - 1, step + 2)
                )
                slope = (after - now) / (2 * (now - before))
                moved += np.float32(weight * slope) * (ends[-1] - ends[-2])
        return moved

    def _plain_at(self, step: int) -> bool:
        """Whether a step is the last one and of first order."""
        steps, known = len(self.timesteps), self._known
        short = known["lower_order_final"] and steps < 15
        return step == steps - 1 and (short or known["euler_at_final"] or known["final_sigmas_type"] == "zero")


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


def products(first: float, last: float, count: int) -> np.ndarray:
    """`[T]` float32: of 1 - beta up to each timestep, betas evenly spaced from first to last."""
    return np.cumprod((1 - linear(first, last, count)).astype(np.float64)).astype(np.float32)


def fits(config: Mapping[str, Any], asked: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether entries are what they must be, those of `usual` where they are there."""
    found = {name: config[name] for name in (*asked, *usual) if name in config}
    wanted = {**asked, **usual}
    return asked.keys() <= found.keys() and all(
        type(value) is type(wanted[name]) and value == wanted[name] for name, value in found.items()
    )


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: object) -> bool:
    """Whether it is a number above 0 that float64 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= float(np.finfo(float).max)
