"""Schedulers: what turns a prediction into the next latents.

The Euler step of flow matching, which most families use, is one product and one sum, and is taken here in numpy;
`solvers.py` and `ddim.py` have those that the other families use. Every other class is diffusers' own, and so
are these under a config of which they lack a part.

Shapes: S steps.
"""

from __future__ import annotations

import copy
import inspect
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import BundleError, ConfigError, first_line
from taylorseer_export.runtime.ddim import DDIM, VelocityDDIM
from taylorseer_export.runtime.solvers import DPMSolver, UniPC


class Scheduler(Protocol):
    """One of a loop: `set` and `start` begin it, `advance` is called once a step. Latents and answers are float32.

    Attributes:
        name: Class in diffusers.
        config: Its entries, those left out at their defaults.
        timesteps: `[S]`, as the scheduler counts them, once they are set.
    """

    name: str
    config: Mapping[str, Any]
    timesteps: np.ndarray

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        """Fix the steps: evenly spaced ones as the class has them, or at these noise levels `[S]`, shifted by `mu`."""

    def start(self, noise: np.ndarray) -> np.ndarray:
        """The latents before the first step."""

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        """As the transformer is given them."""

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        """The latents after a step, by the transformer's answer.

        Raises:
            BundleError: The scheduler does not step.
        """

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        """What `advance` would return; nothing advances."""

    def estimate(self) -> np.ndarray:
        """Where the last step thinks the loop will end."""


def scheduler_of(manifest: Manifest) -> Scheduler:
    """A new scheduler of a bundle, not set yet.

    Raises:
        BundleError: diffusers is needed and not installed, lacks the class, or refuses the config.
    """
    return own_scheduler(manifest) or FromDiffusers(manifest.sampling.scheduler, diffusers_scheduler(manifest))


def begun(scheduler: Scheduler, noise: np.ndarray, clean: np.ndarray, skipped: int) -> np.ndarray:
    """The latents before the first step of a loop that begins with a picture's: `sigma noise + (1 - sigma) clean`.

    Args:
        scheduler: Set; its step 0 is now the first that runs.
        noise, clean: `[N, ...]` float32.
        skipped: Steps before those that run.

    Raises:
        ConfigError: It is none of flow matching.
    """
    if "FlowMatch" in scheduler.name and isinstance(scheduler, FlowEuler | FromDiffusers):
        return scheduler.begin(noise, clean, skipped)
    raise ConfigError(
        f"{scheduler.name} begins no loop with a picture here, expected a scheduler of flow matching; leave the "
        "picture out, or export with another scheduler"
    )


def own_scheduler(manifest: Manifest) -> Scheduler | None:
    """A new scheduler of a bundle, not set yet, where it needs neither torch nor diffusers; None where it does."""
    name, config = manifest.sampling.scheduler, manifest.sampling.config
    found = {kind.name: kind for kind in (FlowEuler, UniPC, DPMSolver, DDIM, VelocityDDIM)}.get(name)
    return None if found is None else found.of(config)


@dataclass(frozen=True)
class FlowConfig:
    """The entries that `FlowEuler` knows, under diffusers' names and with its defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"


_OTHER_STEPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "float | None": (int, float, type(None)),
    "str": (str,),
}


class FlowEuler:
    """Flow matching by Euler's rule: `x[k + 1] = x[k] + (sigma[k + 1] - sigma[k]) v[k]`, with the bits of diffusers'.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 3; `FlowMatchEulerDiscreteScheduler` of diffusers.
    """

    name = "FlowMatchEulerDiscreteScheduler"

    def __init__(self, config: FlowConfig) -> None:
        self._known = config
        self.config: Mapping[str, Any] = vars(config)
        self.timesteps = self._sigmas = np.empty(0, np.float32)
        self._last = self.timesteps, self.timesteps, 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FlowEuler | None:
        """Under a config of diffusers; None where it asks for what is not here, or is none of that class."""
        own = {field.name: config[field.name] for field in fields(FlowConfig) if field.name in config}
        for field in fields(FlowConfig):
            value = own.get(field.name, field.default)
            if not isinstance(value, _KINDS[str(field.type)]) or (isinstance(value, bool) and field.type != "bool"):
                return None
        known = FlowConfig(**own)
        plain = not any(config.get(name, False) is not False for name in _OTHER_STEPS)
        usual = known.num_train_timesteps > 0 and known.time_shift_type in ("exponential", "linear")
        return cls(known) if plain and usual else None

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        known, count = self._known, self._known.num_train_timesteps
        with np.errstate(all="ignore"):  # who sets it looks for what is not finite
            if sigmas is None:
                ends = np.array([1.0, np.float32(1.0) / np.float32(count)], np.float32)
                if not known.use_dynamic_shifting:
                    ends = self._shifted(ends)
                levels: np.ndarray = np.linspace(float(ends[0]) * count, float(ends[1]) * count, steps) / count
            else:
                levels = np.asarray(sigmas).astype(np.float32)
            if not known.use_dynamic_shifting:
                levels = self._shifted(levels)
            elif mu is None:
                raise ValueError("`mu` is missing, expected it where the shift is dynamic")
            else:
                shift = math.exp(mu) if known.time_shift_type == "exponential" else mu
                levels = shift / (shift + (1 / levels - 1) ** 1.0)
            if known.shift_terminal:
                rest = 1 - levels
                levels = 1 - rest / (rest[-1] / (1 - known.shift_terminal))
            levels = levels.astype(np.float32)
            if known.invert_sigmas:
                levels = 1 - levels
            self.timesteps = levels * count
        self._sigmas = np.append(levels, np.float32(known.invert_sigmas))

    def _shifted(self, levels: np.ndarray) -> np.ndarray:
        shift = self._known.shift
        moved: np.ndarray = shift * levels / (1 + (shift - 1) * levels)
        return moved

    def start(self, noise: np.ndarray) -> np.ndarray:
        return noise.copy()

    def begin(self, noise: np.ndarray, clean: np.ndarray, skipped: int) -> np.ndarray:
        """As `begun` says."""
        self.timesteps, self._sigmas = self.timesteps[skipped:], self._sigmas[skipped:]
        level = self._sigmas[0]
        mixed: np.ndarray = level * noise + (np.float32(1) - level) * clean
        return mixed

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        return latents

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        self._last = latents, answer, step
        return self.ahead(answer, step, latents)

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        moved = (self._sigmas[step + 1] - self._sigmas[step]) * answer
        moved += latents
        return moved

    def estimate(self) -> np.ndarray:
        latents, answer, step = self._last
        clean: np.ndarray = latents - self._sigmas[step] * answer
        return clean


class FromDiffusers:
    """A scheduler of diffusers, of torch tensors, as one of numpy arrays."""

    def __init__(self, name: str, scheduler: Any) -> None:
        self.name, self._scheduler, self.config = name, scheduler, scheduler.config
        self.timesteps = np.empty(0, np.float32)
        self._draws: dict[str, Any] = {}
        self._last: tuple[Any, ...] = ()
        self._skipped = 0

    def set(self, steps: int, sigmas: np.ndarray | None = None, mu: float | None = None) -> None:
        if "FlowMatch" in self.name:
            self._scheduler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=mu)
        else:
            self._scheduler.set_timesteps(steps)
        self.timesteps = self._scheduler.timesteps.numpy()

    def start(self, noise: np.ndarray) -> np.ndarray:
        import torch

        # Noise that a scheduler adds on the way is this request's own, whatever else runs in the process.
        if "generator" in inspect.signature(self._scheduler.step).parameters:
            seed = zlib.crc32(np.ascontiguousarray(noise).tobytes())
            self._draws["generator"] = torch.Generator("cpu").manual_seed(seed)
        return noise * float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def begin(self, noise: np.ndarray, clean: np.ndarray, skipped: int) -> np.ndarray:
        """As `begun` says, for schedulers of flow matching."""
        import torch

        self._skipped, self.timesteps = skipped, self.timesteps[skipped:]
        self._scheduler.set_begin_index(skipped)
        first = self._scheduler.timesteps[skipped : skipped + 1]
        mixed = self._scheduler.scale_noise(torch.from_numpy(clean), first, torch.from_numpy(noise))
        return np.asarray(mixed.numpy())

    def model_input(self, latents: np.ndarray, step: int) -> np.ndarray:
        import torch

        scale = getattr(self._scheduler, "scale_model_input", None)
        if scale is None:
            return latents
        return np.asarray(scale(torch.from_numpy(latents), self._scheduler.timesteps[self._skipped + step]).numpy())

    def advance(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        import torch

        given, before = torch.from_numpy(answer), torch.from_numpy(latents)
        try:
            advanced = self._scheduler.step(
                given, self._scheduler.timesteps[self._skipped + step], before, **self._draws
            )
            following = np.asarray(advanced.prev_sample.numpy())
        except Exception as error:  # whatever a class makes of values that it was not written for
            raise BundleError(
                f"{self.name} does not step by its config ({first_line(error)}), expected a scheduler that makes the "
                "next latents of a prediction; export with another one, or drive the denoiser step by step"
            ) from error
        self._last = before, given, advanced, step
        return following

    def ahead(self, answer: np.ndarray, step: int, latents: np.ndarray) -> np.ndarray:
        other = FromDiffusers(self.name, copy.deepcopy(self._scheduler))
        other._skipped = self._skipped
        other._draws = {name: generator.clone_state() for name, generator in self._draws.items()}
        return other.advance(answer, step, latents)

    def estimate(self) -> np.ndarray:
        latents, answer, advanced, step = self._last
        clean = getattr(advanced, "pred_original_sample", None)
        if clean is None:  # flow matching: the answer is the velocity away from the picture
            clean = latents - self._scheduler.sigmas[self._skipped + step] * answer
        return np.asarray(clean.numpy())


def diffusers_scheduler(manifest: Manifest) -> Any:
    """The scheduler of a bundle as diffusers has it, not set yet.

    Raises:
        BundleError: diffusers is not installed, lacks the class, or refuses the config.
    """
    try:
        import diffusers
    except ImportError as error:
        raise BundleError(
            "diffusers is not installed, expected it for its schedulers; pip install 'taylorseer-export[sample]', "
            "or drive the denoiser step by step"
        ) from error
    found = getattr(diffusers, manifest.sampling.scheduler, None)  # one of `SCHEDULERS`, as the manifest was checked
    if found is None:
        raise BundleError(
            f"scheduler is `{manifest.sampling.scheduler}`, expected one that diffusers {diffusers.__version__} has; "
            "upgrade diffusers, or drive the denoiser step by step"
        )
    try:
        return found.from_config(manifest.sampling.config)
    except Exception as error:  # whatever a class makes of values that it was not written for
        raise BundleError(
            f"config of {manifest.sampling.scheduler} is not usable ({first_line(error)}), expected one that diffusers "
            f"{diffusers.__version__} takes; {manifest.REMEDY}"
        ) from error
