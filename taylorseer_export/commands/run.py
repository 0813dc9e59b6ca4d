"""`run`: sample with a bundle.

The embedded DiT and FLUX draw pictures from labels and captions. Any other model samples latents from the tensors that
its pipeline passes to the transformer, under their diffusers names; `negative_NAME` beside NAME turns guidance on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from taylorseer_export.commands.options import bundle_options, plan_options
from taylorseer_export.commands.terminal import (
    forecasts_of,
    need,
    open_denoiser,
    progress,
    read_tensors,
    report_guard,
    spread,
    write_tensors,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import size, whole

if TYPE_CHECKING:
    from taylorseer_export.runtime.denoiser import Denoiser
    from taylorseer_export.runtime.sampling import Request

SUMMARY = "Sample with a bundle: a picture, or tensors."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    plan_options(parser)
    parser.add_argument("--label", type=whole(0), nargs="+", help="classes to draw (dit)")
    parser.add_argument("--prompt", nargs="+", help="captions to draw (embedded flux)")
    parser.add_argument(
        "--inputs",
        type=Path,
        help="safetensors with the conditioning, under diffusers' argument names; `negative_NAME` for guidance, "
        "`condition` for what image-to-video joins to the noise (all but dit; default: random, but for flux)",
    )
    parser.add_argument("--seed", type=whole(0), nargs="+", default=[0], help="seeds of the noise (default: 0)")
    parser.add_argument(
        "--size",
        type=size,
        metavar="HxW or FxHxW",
        help="picture or video in pixels (default: the bundle's; flux 32x32)",
    )
    parser.add_argument("--guidance-scale", type=float, help="dimensionless (default: the bundle's)")
    parser.add_argument("--out", type=Path, help="picture.png or latents.safetensors")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    need("sample", "torch", "diffusers", "PIL")
    import numpy as np

    from taylorseer_export.embedded import requests
    from taylorseer_export.embedded.picture import grid
    from taylorseer_export.runtime import sampling

    denoiser = open_denoiser(given)
    forecasts = forecasts_of(denoiser, given)
    plan, guard = forecasts.plan, forecasts.guard
    manifest = denoiser.manifest
    count = max(len(given.label or ()), len(given.prompt or ()), len(given.seed))
    seeds = spread("--seed", given.seed, count)
    for option, family in (("label", "dit"), ("prompt", "flux")):
        if getattr(given, option) is not None and manifest.family != family:
            raise ConfigError(
                f"--{option} is given for family {manifest.family}, expected it for {family}; leave it out"
            )
    if manifest.family == "dit":
        labels = spread("--label", given.label or list(range(10))[:count], count)
        request = requests.dit_request(denoiser, labels, seeds, given.guidance_scale)
        names = [f"label {label}" for label in labels]
    elif manifest.family == "flux":
        picture = given.size or (32, 32)
        if len(picture) != 2:
            raise ConfigError(f"--size is {'x'.join(map(str, picture))}, expected HxW for a picture; write it so")
        prompts = given.prompt or (None if given.inputs else ["a red circle left of a blue square"])
        prompts = None if prompts is None else spread("--prompt", prompts, count)
        tensors = read_tensors(given.inputs) if given.inputs else None
        request = requests.flux_request(denoiser, prompts, seeds, picture, tensors, given.guidance_scale)
        names = list(prompts or [f"seed {seed}" for seed in seeds])
    else:
        request, names = _tensor_request(denoiser, given, seeds), []
    with progress("sampling", len(plan)) as advance:
        result = sampling.sample(denoiser, request, forecasts, on_step=lambda k: advance(k + 1, len(plan)))
    out = given.out or Path(
        f"{manifest.family}-{manifest.name}.png" if names and manifest.model.embedded else "latents.safetensors"
    )
    if out.suffix == ".safetensors":
        write_tensors(out, {"latents": result.latents}, {"plan": result.executed})
    else:
        made = requests.pictures(denoiser, request, result)
        scale = max(1, 256 // made.shape[1])
        grid([list(made)], scale, (), names if len(names) > 1 else ()).save(out)
    kinds = np.array(list(result.executed))
    times = np.array(result.milliseconds)
    forecast = times[kinds == "."]
    how = f"guard {guard}" if guard else "as planned"
    print(f"plan      {result.executed} ({result.executed.count('F')} of {len(plan)} steps full, {how})")
    if guard:
        report_guard(guard, str(plan), result.executed, result.errors)
    print(
        f"times     prepare {result.prepare_ms:.1f} ms, full {np.median(times[kinds == 'F']):.2f} ms"
        + (f", forecast {np.median(forecast):.2f} ms" if len(forecast) else "")
        + f", loop {times.sum():.0f} ms"
    )
    print(f"wrote     {out}")
    return 0


def _tensor_request(denoiser: Denoiser, given: argparse.Namespace, seeds: list[int]) -> Request:
    """A request from the tensors of `--inputs`, or from random ones, which is said."""
    from taylorseer_export.runtime import tensors
    from taylorseer_export.runtime.trajectory import random_conditioning

    manifest = denoiser.manifest
    if given.out and given.out.suffix != ".safetensors":
        raise ConfigError(
            f"--out is {given.out} for family {manifest.family}, expected NAME.safetensors, since only its own VAE "
            "makes a picture of its latents; change it"
        )
    sizes, sides = latent_sizes(denoiser, given.size)
    if given.inputs:
        values = read_tensors(given.inputs)
    else:
        print("no --inputs: the conditioning is random, so the result shows that the loop runs and is no picture")
        typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
        values = random_conditioning(denoiser, {**typical, **sizes, "batch": 1}, guided=True)
    return tensors.tensor_request(denoiser, values, seeds, sizes, sides, given.guidance_scale)


def latent_sizes(denoiser: Denoiser, asked: tuple[int, ...] | None) -> tuple[dict[str, int], tuple[int, int] | None]:
    """Sizes of the latent by dimension for `--size`, and (rows, columns) in tokens where it is packed."""
    from taylorseer_export.commands.export import latent_size
    from taylorseer_export.families import family_named

    if asked is None:
        return {}, None
    family = family_named(denoiser.manifest.family).variant(denoiser.manifest.model.reference)
    latent = latent_size("--size", asked, family, family.latent_scale)
    sizes = family.latent_sizes(denoiser.manifest.model.config, *latent)
    return sizes, (latent[0] // 2, latent[1] // 2) if "image_tokens" in sizes else None
