"""`run`: sample with a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from taylorseer_export.commands.terminal import (
    forecasts_of,
    need,
    open_denoiser,
    progress,
    read_tensors,
    spread,
    write_tensors,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.options import bundle_options, plan_options, size, whole

SUMMARY = "Sample with a bundle: a picture, or tensors."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    plan_options(parser)
    parser.add_argument("--label", type=whole(0), nargs="+", help="classes to draw (dit)")
    parser.add_argument("--prompt", nargs="+", help="captions to draw (embedded flux)")
    parser.add_argument("--inputs", type=Path, help="safetensors with the text encoders' outputs (flux)")
    parser.add_argument("--seed", type=whole(0), nargs="+", default=[0], help="seeds of the noise (default: 0)")
    parser.add_argument("--size", type=size, default=(32, 32), metavar="HxW", help="picture in pixels (default: 32x32)")
    parser.add_argument("--guidance-scale", type=float, help="dimensionless (default: the bundle's)")
    parser.add_argument("--out", type=Path, help="picture.png or latents.safetensors")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    need("sample", "torch", "diffusers", "PIL")
    import numpy as np

    from taylorseer_export.runtime import sampling
    from taylorseer_export.runtime.picture import grid

    denoiser = open_denoiser(given)
    plan, order, weights = forecasts_of(denoiser, given, given.steps)
    manifest = denoiser.manifest
    if manifest.family not in ("dit", "flux"):
        raise ConfigError(
            f"family is {manifest.family}, expected dit or flux, which `run` can sample without a text encoder; "
            "set `pipe.transformer = taylorseer_export.load(BUNDLE).as_transformer()` in its diffusers pipeline"
        )
    if len(given.size) != 2:
        raise ConfigError(f"--size is {'x'.join(map(str, given.size))}, expected HxW for a picture; write it so")
    count = max(len(given.label or ()), len(given.prompt or ()), len(given.seed))
    seeds = spread("--seed", given.seed, count)
    if manifest.family == "dit":
        labels = spread("--label", given.label or list(range(10))[:count], count)
        request = sampling.dit_request(denoiser, labels, seeds, given.guidance_scale)
        names = [f"label {label}" for label in labels]
    else:
        prompts = given.prompt or (None if given.inputs else ["a red circle left of a blue square"])
        prompts = None if prompts is None else spread("--prompt", prompts, count)
        tensors = read_tensors(given.inputs) if given.inputs else None
        request = sampling.flux_request(denoiser, prompts, seeds, given.size, tensors, given.guidance_scale)
        names = list(prompts or [f"seed {seed}" for seed in seeds])
    with progress("sampling", len(plan)) as advance:
        result = sampling.sample(
            denoiser, request, plan, order, given.form, on_step=lambda k: advance(k + 1, len(plan)), weights=weights
        )
    out = given.out or Path(
        f"{manifest.family}-{manifest.name}.png" if manifest.model.embedded else "latents.safetensors"
    )
    if out.suffix == ".safetensors":
        write_tensors(out, {"latents": result.latents}, {"plan": str(plan)})
    else:
        made = sampling.pictures(denoiser, request, result)
        scale = max(1, 256 // made.shape[1])
        grid([list(made)], scale, (), names if len(names) > 1 else ()).save(out)
    kinds = np.array(list(result.executed))
    times = np.array(result.milliseconds)
    forecast = times[kinds == "."]
    print(f"plan      {result.executed} ({result.executed.count('F')} of {len(plan)} steps full, as planned)")
    print(
        f"times     prepare {result.prepare_ms:.1f} ms, full {np.median(times[kinds == 'F']):.2f} ms"
        + (f", forecast {np.median(forecast):.2f} ms" if len(forecast) else "")
        + f", loop {times.sum():.0f} ms"
    )
    print(f"wrote     {out}")
    return 0
