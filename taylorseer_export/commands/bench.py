"""`bench`: a plan against the same engine computing every step."""

from __future__ import annotations

import argparse
import json

from taylorseer_export.commands.options import bundle_options, lora_option, plan_options
from taylorseer_export.commands.terminal import forecasts_of, open_denoiser, progress
from taylorseer_export.values import whole

SUMMARY = "Time a plan against the same engine computing every step."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser)
    lora_option(parser)
    plan_options(parser)
    parser.add_argument("--repeats", type=whole(1), default=3, help="counted pairs of loops (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.report import bench

    denoiser = open_denoiser(given)
    forecasts = forecasts_of(denoiser, given)
    with progress("loops", 2 * (given.repeats + 1), quiet=given.json) as advance:
        done = iter(range(1, 2 * (given.repeats + 1) + 1))
        record = bench.bench(
            denoiser, forecasts, repeats=given.repeats, on_loop=lambda: advance(next(done), 2 * (given.repeats + 1))
        )
    print(json.dumps(record) if given.json else bench.table(record))
    return 0
