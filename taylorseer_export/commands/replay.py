"""`replay`: given latents through a bundle, teacher-forced.

`latents` are the rows of `hidden_states` that change with the step. Rows that a pipeline joins to them and never
changes, like the conditioning picture of FLUX-Kontext, are an input of their own (`image_latents`) and are not in
`noise_pred`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from taylorseer_export.commands.options import bundle_options, lora_option, plan_options
from taylorseer_export.commands.terminal import (
    check_out,
    forecasts_of,
    open_denoiser,
    progress,
    read_tensors,
    report_guard,
    write_tensors,
)

SUMMARY = "Run given latents through a bundle, teacher-forced and without a sampler."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    lora_option(parser)
    plan_options(parser, steps=False)
    parser.add_argument(
        "--inputs", type=Path, required=True, help="safetensors: latents [S, ...], timestep [S], conditioning"
    )
    parser.add_argument("--outputs", type=Path, required=True, help="safetensors to write: noise_pred [S, ...]")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from zlib import crc32

    import numpy as np

    from taylorseer_export.errors import StepError
    from taylorseer_export.runtime.values import check_prediction

    check_out(given.outputs, "--outputs")
    tensors = read_tensors(given.inputs)
    for name in ("latents", "timestep"):
        if name not in tensors:
            raise StepError(
                f"tensor `{name}` is missing in {given.inputs}, expected latents [S, ...] and timestep [S]; add it"
            )
    latents, timesteps = tensors.pop("latents"), tensors.pop("timestep")
    if latents.ndim < 2 or timesteps.shape != (len(latents),):
        raise StepError(
            f"tensor `timestep` is {list(timesteps.shape)}, expected [{len(latents)}], one for each of the latents "
            f"{list(latents.shape)}; give both the same first dimension"
        )
    denoiser = open_denoiser(given, ranks=True)
    share = denoiser.share
    forecasts = forecasts_of(denoiser, given, len(latents))
    plan, guard = forecasts.plan, forecasts.guard
    if share.group:
        facts = {name: f"{value.dtype} {list(value.shape)} {crc32(value)}" for name, value in tensors.items()}
        share.group.agree({**facts, "latents": list(latents.shape), "timestep": timesteps.tolist(), "plan": forecasts})
    latents, tensors = share.latents(latents), share.conditioning(tensors)
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], tensors))
    slot.start(tensors, forecasts, timesteps)
    predictions = []
    with progress("replaying", len(plan)) as advance:
        for step, latent in enumerate(latents):
            predictions.append(slot.step(latent))
            check_prediction(bool(np.isfinite(predictions[-1]).all()), step, plan)
            advance(step + 1, len(plan))
    whole = share.joined(np.stack(predictions))
    if share.rank:
        return 0  # what one process writes, rank 0 does
    write_tensors(given.outputs, {"noise_pred": whole}, {"plan": slot.executed})
    if guard:
        report_guard(guard, str(plan), slot.executed, slot.errors)
    print(f"plan      {slot.executed}\nwrote     {given.outputs}")
    return 0
