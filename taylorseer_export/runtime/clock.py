"""The clock of a loop: the timesteps of a bundle's scheduler, set as the pipeline of its family sets them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import BundleError, ConfigError, first_line


@dataclass(frozen=True)
class Clock:
    """Timesteps as the scheduler counts them, and as the transformer takes them."""

    timesteps: Sequence[Any]
    model_timesteps: np.ndarray


def clock(
    manifest: Manifest, shape: tuple[int, ...], steps: int, sigmas: np.ndarray | None = None, scheduler: Any = None
) -> Clock:
    """The timesteps of a loop of `steps` steps over latents of `shape`.

    As diffusers' pipelines do: most give flow schedulers evenly spaced sigmas, some the number of steps, as all do to
    other schedulers; `pipeline.flow_steps` of the manifest says which.

    Args:
        manifest: Of the bundle, whose own scheduler it is.
        shape: Of the latents.
        steps: Of the loop.
        sigmas: `[S]` noise levels for flow schedulers; evenly spaced if left out.
        scheduler: From `scheduler_of`, to be set; a new one if left out.

    Raises:
        ConfigError: The scheduler takes no sigmas, or steps with more timesteps than that, like Heun's.
        BundleError: Its config sets no timesteps.
    """
    scheduler = scheduler_of(manifest) if scheduler is None else scheduler
    name = manifest.sampling.scheduler
    if "FlowMatch" not in type(scheduler).__name__ and sigmas is not None:
        raise ConfigError(f"sigmas are given, but {name} takes only a number of steps, expected none; leave them out")
    try:
        if "FlowMatch" in type(scheduler).__name__:
            config = scheduler.config
            mu = _shift(manifest, config, shape) if config.get("use_dynamic_shifting", False) else None
            if sigmas is None and manifest.pipeline.flow_steps == "sigmas":
                sigmas = np.linspace(1.0, 1.0 / steps, steps)
            scheduler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=mu)
        else:
            scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.numpy().astype(np.float32)
    except Exception as error:  # whatever a class makes of values that it was not written for
        raise BundleError(
            f"config of {name} sets no timesteps for {steps} steps ({first_line(error)}), expected one that diffusers' "
            f"class takes; ask for another number of steps, or {manifest.REMEDY}"
        ) from error
    if not np.isfinite(timesteps).all():
        raise BundleError(
            f"timesteps of {name} are NaN or infinite by its config, expected finite numbers; {manifest.REMEDY}"
        )
    if len(timesteps) != steps:
        raise ConfigError(
            f"{name} sets {len(timesteps)} timesteps for {steps} steps, expected one for each; use the bundle in a "
            "diffusers pipeline, or export with another scheduler in scheduler/scheduler_config.json"
        )
    return Clock(scheduler.timesteps, timesteps / np.float32(manifest.sampling.timestep_divisor))


def _shift(manifest: Manifest, config: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """What the pipelines shift the sigmas by: linear in the number of tokens of a packed or an unpacked latent."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    tokens = shape[1] if len(shape) == 3 else math.prod(shape[2:]) / int(manifest.model.config["patch_size"]) ** 2
    shift = float(config["base_shift"] + slope * (tokens - low))
    largest = manifest.pipeline.largest_shift
    return shift if largest is None else min(shift, largest)


def scheduler_of(manifest: Manifest) -> Any:
    """A new scheduler of a bundle, not set yet."""
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
