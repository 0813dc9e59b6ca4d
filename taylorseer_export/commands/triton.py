"""`triton`: write a model repository that a stock Triton Inference Server serves."""

from __future__ import annotations

import argparse
from pathlib import Path

from taylorseer_export.commands.options import bundle_options, device_option, service_options
from taylorseer_export.values import numbers, whole

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
    service_options(parser, "instance")
    parser.add_argument(
        "--lora",
        metavar="NAME=FILE[:SCALE]",
        action="append",
        default=[],
        help="a LoRA that requests choose by their input `lora`, of a bundle exported with --lora-rank; may be "
        "repeated (default: none)",
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    from taylorseer_export.serve.loras import named
    from taylorseer_export.serve.repository import Deployment, write_repository
    from taylorseer_export.serve.server import start_lines

    asked = {name: value for name, value in vars(given).items() if name not in ("bundle", "out", "models", "lora")}
    deployment = Deployment(models=tuple(given.models), loras=named(given.lora), **asked)
    for version in write_repository(given.bundle, given.out, deployment):
        print(f"wrote {version.parent.name} version {version.name}")
    for line in start_lines(given.out):
        print(line)
    return 0
