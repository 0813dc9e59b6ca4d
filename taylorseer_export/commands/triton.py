"""`triton`: write a model repository that a stock Triton Inference Server serves."""

from __future__ import annotations

import argparse
from pathlib import Path

from taylorseer_export.commands.options import bundle_options, device_option
from taylorseer_export.values import MOST_THREADS, memory, numbers, whole

SUMMARY = "Write a Triton model repository that serves a bundle."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    bundle_options(parser, runs=False)
    parser.add_argument("--out", type=Path, required=True, help="the repository; a model that is there gets a version")
    device_option(parser)
    parser.add_argument(
        "--gpus",
        type=numbers,
        metavar="N,N",
        default=(),
        help="GPUs with instances of each model, like 0,1, by their numbers for the server (default: all that it has)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=(),
        help="picture, picture-stream, denoiser, denoiser-stream (default: all that the bundle can be served as)",
    )
    parser.add_argument(
        "--instances",
        type=whole(1),
        default=1,
        help="processes of each model, with own engines, on each of the GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--slots", type=whole(1), default=4, help="requests under way at one time, per instance (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=whole(0), default=64, help="requests that may wait for a slot (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=0,
        help="requests of one engine call (default: the slots on the CPU, else 1)",
    )
    parser.add_argument(
        "--workers",
        type=whole(0),
        default=0,
        help="engine calls at one time, 0: one per core (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=whole(0, MOST_THREADS),
        default=1,
        help="CPU threads of one engine call, 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=memory,
        help="memory of one instance for weights and slots, like 24GiB (default: slots of four times the typical size)",
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.serve.repository import Deployment, write_repository
    from taylorseer_export.serve.server import start_lines

    asked = {name: value for name, value in vars(given).items() if name not in ("bundle", "out", "models")}
    for version in write_repository(given.bundle, given.out, Deployment(models=tuple(given.models), **asked)):
        print(f"wrote {version.parent.name} version {version.name}")
    for line in start_lines(given.out):
        print(line)
    return 0
