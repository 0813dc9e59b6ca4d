"""`client`: send a request to a served model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taylorseer_export.commands.options import plan_options
from taylorseer_export.commands.terminal import (
    check_out,
    progress,
    read_tensors,
    request_options,
    require_extra,
    write_tensors,
)
from taylorseer_export.errors import ConfigError
from taylorseer_export.values import finite, real, seed, size, whole

SUMMARY = "Send a request to a served model: a picture, or tensors."


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", metavar="MODEL", help="name of the model on the server")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server (default: %(default)s, gRPC)")
    parser.add_argument(
        "--protocol", choices=("http", "grpc", "stream"), help="protocol (default: stream for MODEL-stream, else grpc)"
    )
    parser.add_argument("--prompt", help="what to draw (models with text encoders)")
    parser.add_argument("--negative-prompt", help="what guidance leads away from (models that take one)")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        help="picture to edit, to animate or to begin with (models that take one; some take several)",
    )
    parser.add_argument("--strength", type=real(0), help="share of the steps that run after beginning with --image")
    parser.add_argument("--label", type=whole(0), help="class to draw (models of classes)")
    parser.add_argument("--inputs", type=Path, help="safetensors with the inputs of a denoiser model")
    parser.add_argument("--seed", type=seed, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--size",
        type=size,
        metavar="[Fx]HxW",
        help="size in pixels, FxHxW of a video of F frames (default: the bundle's)",
    )
    parser.add_argument(
        "--fps", type=whole(1), help="frames per second that a video is shown at (default: as the family's videos)"
    )
    plan_options(parser)
    parser.add_argument("--guidance-scale", type=finite, help="guidance scale, dimensionless (default: the bundle's)")
    parser.add_argument(
        "--lora", metavar="NAME[:STRENGTH]", help="a LoRA that the model was written with, by its name (default: none)"
    )
    parser.add_argument(
        "--timeout",
        type=real(0),
        default=600.0,
        help="seconds after which server and client give up (default: %(default)g)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="picture.png, video.webp, video.gif, video.mp4 or latents.safetensors"
    )


def run(given: argparse.Namespace) -> int:
    """The command itself; returns the exit code."""
    require_extra("triton", "tritonclient")
    from taylorseer_export.embedded.video import MP4, check_video, write_video
    from taylorseer_export.serve.client import Protocol, infer
    from taylorseer_export.serve.contract import DRAWN

    whole_tensors, film = given.out.suffix == ".safetensors", given.out.suffix.lower() == MP4
    if not whole_tensors:
        require_extra(*(("video", "av") if film else ("sample", "PIL")))
    check_out(given.out, picture=not whole_tensors and not film)
    protocol: Protocol = given.protocol or ("stream" if given.model.endswith("-stream") else "grpc")
    values = _values(given)
    with progress("steps", given.steps or 1) as advance:

        def stepped(done: int, told: Mapping[str, Any]) -> None:
            advance(done, len(told["planned"][0]))

        made = infer(given.url, given.model, values, protocol, given.timeout, stepped)
    if whole_tensors:
        drawn = {name: made[name] for name in DRAWN if name in made}
        kept = drawn or {"latents": made["denoised"]}
        write_tensors(given.out, kept, {"plan": made["executed"][0].decode()})
    elif "picture" in made:
        from taylorseer_export.embedded.picture import grid, write_picture

        write_picture(given.out, grid([[made["picture"]]], max(1, 256 // made["picture"].shape[0]), (), ()))
    elif "video" in made:
        check_video(given.out, len(made["video"]))
        write_video(given.out, made["video"], given.fps or int(made["frame_rate"][0]))
    else:
        raise ConfigError(f"--out is {given.out}, expected a .safetensors file for latents; change its name")
    plan = made["executed"][0].decode()
    print(f"plan      {plan} ({plan.count('F')} of {len(plan)} steps full)")
    print(f"wrote     {given.out}")
    return 0


def _values(given: argparse.Namespace) -> dict[str, Any]:
    from taylorseer_export.serve.contract import pictures_named, sides_named

    what = ("prompt", "negative_prompt", "label", "seed", "guidance_scale", "strength", "lora")
    values = {name: getattr(given, name) for name in what} | vars(request_options(given))
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    if given.size:
        values |= sides_named(given.size)
    if given.image is not None:
        require_extra("whole", "PIL")
        from taylorseer_export.embedded.picture import read_picture

        values |= pictures_named([read_picture(path) for path in given.image])
    return values | (read_tensors(given.inputs) if given.inputs else {})
