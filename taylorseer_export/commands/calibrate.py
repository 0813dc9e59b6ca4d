"""`calibrate`: find the plan and the weights that suit a model, and keep them as a profile of its bundle."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from taylorseer_export.commands.options import bundle_options, sample_options
from taylorseer_export.commands.terminal import open_denoiser, progress, read_tensors, require_extra
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import real, whole

SUMMARY = "Find the plan and weights that suit the model, and keep them in the bundle as a profile."
_FIRST_SEED = 1_000_000  # far from the seeds people use, so that a profile is not judged on its own samples


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    parser.add_argument("--name", required=True, help="name of the profile")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--full-steps", type=whole(1), help="full steps of the plan")
    budget.add_argument("--speedup", type=real(1), help="steps over full steps, at least; dimensionless")
    budget.add_argument(
        "--psnr", type=real(0), help="PSNR of held-out latents in dB, at least, with the fewest full steps"
    )
    parser.add_argument("--steps", type=whole(2, 1000), help="denoising steps (default: the bundle's)")
    parser.add_argument(
        "--order",
        "--max-order",
        type=whole(0, 4),
        help="order of the forecasts (default: what the buffers hold, at most 2)",
    )
    parser.add_argument("--samples", type=whole(2), default=8, help="samples to fit to (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=whole(2), default=8, help="further samples that must agree (default: %(default)s)"
    )
    sample_options(parser)


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    require_extra("sample", "torch", "diffusers")
    from taylorseer_export.bundle.profile import check_name, check_place_of_profile, write_profile
    from taylorseer_export.report.calibrate import Calibrator, check_full_steps, profile_of
    from taylorseer_export.report.samples import groups, random_inputs, read_prompts
    from taylorseer_export.runtime.tensors import latent_sizes

    check_name(given.name)
    prompts = read_prompts(given.prompts) if given.prompts else None
    tensors = read_tensors(given.inputs) if given.inputs else None
    denoiser = open_denoiser(given, "calibrate")
    assert denoiser.bundle is not None
    check_place_of_profile(denoiser.bundle, given.name)
    manifest = denoiser.manifest
    steps = given.steps or manifest.plan.steps
    order = min(manifest.state.order, 2) if given.order is None else given.order
    if order > manifest.state.order:
        raise ConfigError(
            f"--order is {order}, expected at most {manifest.state.order}, which the bundle's buffers hold; lower it"
        )
    full_steps = given.full_steps or (math.floor(steps / given.speedup) if given.speedup else None)
    if full_steps is not None:
        check_full_steps(full_steps, steps)
    sizes = latent_sizes(manifest, given.size)
    tensors = tensors or random_inputs(denoiser, given.samples, sizes[0])
    fitted = groups(denoiser, given.samples, _FIRST_SEED, prompts, tensors, 2, given.guidance_scale, sizes)
    held_out = groups(
        denoiser,
        given.held_out,
        _FIRST_SEED + given.samples,
        prompts,
        tensors,
        guidance_scale=given.guidance_scale,
        sizes=sizes,
    )
    window = min(steps - 1, 4 * math.ceil(steps / (full_steps or max(steps // 5, 1))))
    total = len(fitted) * steps * (window + 2) + len(held_out) * steps
    with progress("calibrating", total) as advance:
        done = iter(range(1, 1 << 62))
        calibrator = Calibrator(
            denoiser, fitted, held_out, steps, window, lambda: advance(count := next(done), max(total, count))
        )
        found = (
            calibrator.calibrate(full_steps, order)
            if full_steps is not None
            else calibrator.calibrate_to(given.psnr, order)
        )
        full_steps = len(found.calibrated.forecasts.plan.full_steps)
        others = calibrator.margins(order, full_steps)
        found = replace(found, thresholds=calibrator.thresholds(full_steps), others=others)
    print(f"verdict   {found.verdict}")
    path = write_profile(denoiser.bundle, profile_of(manifest, given.name, found))
    best = found.calibrated
    plan = best.forecasts.plan
    print(f"plan      {plan} ({len(plan.full_steps)} of {steps} steps full)")
    print(f"samples   {found.samples} fitted, {found.held_out} held out; PSNR of their latents against all full:")
    for name, way in (("calibrated", best), ("regular", found.regular), ("fewer steps", found.fewer_steps)):
        print(f"  {name:<12}{way.fitted:6.1f} dB fitted  {way.held_out:6.1f} dB held out  {way.forecasts.plan}")
    for rule, threshold in found.thresholds.items():
        print(f"  guard {rule} at {threshold:.4g} has as many full steps")
    print(f"wrote     {path}")
    print(f"next      taylorseer-export run {denoiser.bundle.folder} --profile {given.name}")
    return 0
