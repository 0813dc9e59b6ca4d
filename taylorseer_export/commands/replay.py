"""`replay`: given latents through a bundle, teacher-forced.

`latents` are the rows of `hidden_states` that change with the step. Rows that a pipeline joins to them and never
changes, like the conditioning picture of FLUX-Kontext, are an input of their own (`image_latents`) and are not in
`noise_pred`. Where a model has further latents, they stand under their diffusers argument names, with a step axis too,
and what is predicted of them under `noise_pred.` and that name. A model that is told the timestep of the
next step too takes the next one of the file, and behind the last that of no noise, unless the file has them under the
name of that argument.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from taylorseer_export.commands.options import bundle_options, lora_option, parallel_option, plan_options
from taylorseer_export.commands.ranks import rank_option
from taylorseer_export.commands.terminal import (
    check_out,
    forecasts_of,
    open_denoiser,
    progress,
    read_tensors,
    report_guard,
    write_tensors,
)

if TYPE_CHECKING:
    import numpy as np

    from taylorseer_export.bundle.manifest import Tensor

SUMMARY = "Run given latents through a bundle, teacher-forced and without a sampler."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    lora_option(parser)
    rank_option(parser)
    parallel_option(parser)
    plan_options(parser, steps=False)
    parser.add_argument(
        "--inputs", type=Path, required=True, help="safetensors: latents [S, ...], timestep [S], conditioning"
    )
    parser.add_argument("--outputs", type=Path, required=True, help="safetensors to write: noise_pred [S, ...]")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    import numpy as np

    from taylorseer_export.errors import StepError
    from taylorseer_export.runtime.lead import told
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
    others = {name: _beside(tensors, tensor, latents) for name, tensor in denoiser.others.items()}
    after = denoiser.next_timestep
    following = None if after is None else tensors.pop(after.name, None)
    if after is not None and following is not None and following.shape != timesteps.shape:
        raise StepError(
            f"tensor `{after.name}` is {list(following.shape)}, expected {list(timesteps.shape)}, one for each "
            "timestep; correct it, or leave it out, and it is the next timestep of each, and that of no noise"
        )
    forecasts = forecasts_of(denoiser, given, len(latents))
    plan, guard = forecasts.plan, forecasts.guard
    for group in share.groups:
        facts = {name: told(value) for name, value in tensors.items()}
        facts |= {name: told(value) for name, value in others.items()}
        facts |= {} if following is None else {"next timesteps": following.tolist()}
        group.agree({**facts, "latents": list(latents.shape), "timestep": timesteps.tolist(), "plan": forecasts})
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], tensors), own=True)
    latents, tensors = share.latents(latents), share.conditioning(tensors)
    others = {name: share.latents(values, denoiser.others[name]) for name, values in others.items()}
    slot.start(tensors, forecasts, timesteps if following is None else None)
    predictions: dict[str, list[np.ndarray]] = {name: [] for name in denoiser.contract.predictions.values()}
    with progress("replaying", len(plan)) as advance:
        for step, latent in enumerate(latents):
            times = {}
            if following is not None:
                times = {"timestep": float(timesteps[step]), "next_timestep": float(following[step])}
            first = slot.step(latent, others={name: values[step] for name, values in others.items()}, **times)
            for made, prediction in zip(predictions.values(), (first, *slot.others.values()), strict=True):
                check_prediction(bool(np.isfinite(prediction).all()), step, plan)
                made.append(prediction)
            advance(step + 1, len(plan))
    taken = (denoiser.latent, *denoiser.others.values())
    stacked = {
        name: share.joined(np.stack(made), latent)
        for (name, made), latent in zip(predictions.items(), taken, strict=True)
    }
    if not share.first:
        return 0  # what one process writes, rank 0 does
    write_tensors(given.outputs, stacked, {"plan": slot.executed})
    if guard:
        report_guard(guard, str(plan), slot.executed, slot.errors)
    print(f"plan      {slot.executed}\nwrote     {given.outputs}")
    return 0


def _beside(tensors: dict[str, np.ndarray], tensor: Tensor, latents: np.ndarray) -> np.ndarray:
    """A further latent of every step, taken out of the tensors of the file."""
    from taylorseer_export.errors import StepError

    found = tensors.pop(tensor.name, None)
    if found is None or len(found) != len(latents):
        seen = "missing" if found is None else f"{list(found.shape)}"
        shape = ", ".join(map(str, (len(latents), *tensor.shape)))
        raise StepError(
            f"tensor `{tensor.name}` is {seen}, expected [{shape}], one for each of the latents; give it beside them"
        )
    return found
