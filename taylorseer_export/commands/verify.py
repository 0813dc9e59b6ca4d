"""`verify`: parity with the eager model."""

from __future__ import annotations

import argparse

from taylorseer_export.commands.options import bundle_options
from taylorseer_export.commands.terminal import open_denoiser, progress, require_extra
from taylorseer_export.values import whole

SUMMARY = "Compare a bundle with the eager model, step by step; exit 1 on a broken bound."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    parser.add_argument("--model", metavar="REF", help="the checkpoint (default: the one the bundle was made from)")
    parser.add_argument(
        "--steps", type=whole(1, 1000), default=16, help="denoising steps to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--polygraphy", action="store_true", help="compare each graph by itself with Polygraphy's Comparator, before"
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    require_extra("export", "torch", "diffusers")
    if given.polygraphy:
        require_extra("polygraphy", "polygraphy", "onnxruntime")
    from taylorseer_export.report import verify
    from taylorseer_export.runtime.trajectory import random_trajectory

    denoiser = open_denoiser(given)
    checkpoint = verify.checkpoint_of(denoiser, given.model)
    if given.polygraphy:
        from taylorseer_export.report.polygraphy import compare_graphs

        compare_graphs(
            denoiser,
            checkpoint,
            lambda graph, seen, bound: print(f"{graph:<9} differs by {seen:.1e}, {seen / bound:.2f} of its bound"),
        )
    data = random_trajectory(denoiser, given.steps)
    total = len(verify.plans(denoiser, given.steps)) + len(denoiser.manifest.state.guards)
    done = 0
    with progress("comparing", total) as advance:

        def on_plan(result: verify.Parity) -> None:
            nonlocal done
            done += 1
            advance(done, total)
            seen = max(result.seen)
            how = result.forecasts
            guard = f", guard {how.guard}" if how.guard else ""
            print(
                f"{result.executed}  order {how.order}{guard}  differs by {seen:.1e}, {result.ratio:.2f} of its bound"
            )

        lost = verify.verify(denoiser, checkpoint, data, on_plan)
    if lost is not None:
        print(lost)
    held = ""
    if (quantised := denoiser.manifest.quantised) is not None:
        held = f" with its {quantised.weights} weights" + (f" ({quantised.reads})" if quantised.reads else "")
    print(f"{denoiser.manifest.family}-{denoiser.manifest.name} equals the eager model{held} within its bounds")
    return 0
