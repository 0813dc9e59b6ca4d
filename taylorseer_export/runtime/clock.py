"""The clock of a loop: the timesteps of a bundle's scheduler, set as the pipeline of its family sets them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import BundleError, ConfigError, first_line
from taylorseer_export.runtime.schedulers import Scheduler, scheduler_of


def clock(
    manifest: Manifest,
    shape: tuple[int, ...],
    steps: int,
    sigmas: np.ndarray | None = None,
    scheduler: Scheduler | None = None,
) -> np.ndarray:
    """`[S]`, what the transformer takes as its timestep in a loop of `steps` steps over latents of `shape`.

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
    name, flow = scheduler.name, "FlowMatch" in scheduler.name
    if not flow and sigmas is not None:
        raise ConfigError(f"sigmas are given, but {name} takes only a number of steps, expected none; leave them out")
    try:
        mu = None
        if flow:
            config = scheduler.config
            mu = _shift(manifest, config, shape, steps) if config.get("use_dynamic_shifting", False) else None
            if sigmas is None and manifest.pipeline.flow_steps == "sigmas":
                sigmas = np.linspace(1.0, 1.0 / steps, steps)
        scheduler.set(steps, sigmas, mu)
        timesteps = scheduler.timesteps.astype(np.float32)
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
    return model_timesteps(manifest, timesteps)


def model_timesteps(manifest: Manifest, timesteps: np.ndarray) -> np.ndarray:
    """What the pipeline passes to the model, of the scheduler's timesteps: float32 both."""
    divisor = np.float32(manifest.sampling.timestep_divisor)
    return ((divisor - timesteps) if manifest.pipeline.timestep_reversed else timesteps) / divisor


def _shift(manifest: Manifest, config: Mapping[str, Any], shape: tuple[int, ...], steps: int) -> float:
    """What the pipelines shift the sigmas by: linear in the number of tokens of a packed or an unpacked latent."""
    if isinstance(manifest.pipeline.shift, float):
        return manifest.pipeline.shift
    if manifest.pipeline.shift == "tokens-and-steps":
        return _shift_by_steps(shape[1], steps)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    tokens = shape[1] if len(shape) == 3 else math.prod(shape[2:]) / int(manifest.model.config["patch_size"]) ** 2
    shift = float(config["base_shift"] + slope * (tokens - low))
    largest = manifest.pipeline.largest_shift
    return shift if largest is None else min(shift, largest)


def _shift_by_steps(tokens: int, steps: int) -> float:
    """The same as FLUX.2's authors fitted it, of T tokens and S steps:

    mu(T, S) = mu_200 + (S - 200) (mu_200 - mu_10) / 190,   mu_200 alone above 4300 tokens
    mu_200 = 1.6927e-4 T + 0.45666666,   mu_10 = 8.73809524e-5 T + 1.89833333

    The order of the sums is that of diffusers, whose bits the sigmas have.
    """
    many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    if tokens > 4300:
        return many
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)
