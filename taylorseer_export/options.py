"""The command line's options: every parser, with units and defaults in its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.family import Family

PROGRAM = "taylorseer-export"
_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class _Parser(argparse.ArgumentParser):
    """Errors as one sentence, on the way every other error takes."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("argument ", "", 1) if message.startswith("argument ") else message
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def family_parser(family: Family) -> argparse.ArgumentParser:
    """Options of an export."""
    default = family.defaults
    parser = _parser(family.name, f"Export {family.title} as a bundle of engines.")
    what = parser.add_argument_group("what to export")
    what.add_argument("--model", metavar="REF", help="diffusers folder or hub id (default: the embedded tiny model)")
    what.add_argument(
        "--size", metavar="HxW", type=_size, help="picture in pixels; makes the bundle static (default: any)"
    )
    what.add_argument("--latent-size", metavar="HxW", type=_size, help="the same in latent pixels (default: any)")
    what.add_argument("--batch", metavar="B", type=_whole(1), help="samples per call of the transformer (default: any)")
    what.add_argument("--name", help="name of the bundle (default: the model's)")
    how = parser.add_argument_group("how to forecast")
    how.add_argument(
        "--order",
        "--max-order",
        type=_whole(0, 4),
        default=default.order,
        help="highest order kept, 0 to 4, dimensionless (default: %(default)s)",
    )
    how.add_argument(
        "--interval",
        "--cache-interval",
        type=_whole(1),
        default=default.interval,
        help="steps from one full step to the next (default: %(default)s)",
    )
    how.add_argument(
        "--warmup",
        "--warmup-steps",
        type=_whole(1),
        default=default.warmup,
        help="full steps at the start (default: %(default)s)",
    )
    how.add_argument(
        "--steps",
        type=_whole(1, 1000),
        default=default.steps,
        help="denoising steps of the default plan (default: %(default)s)",
    )
    how.add_argument(
        "--dialect",
        choices=("original", "diffusers"),
        default="original",
        help="rule that places full steps after warm-up (default: %(default)s)",
    )
    how.add_argument(
        "--state",
        choices=("module", "residual", "last"),
        help="granularity: what is forecast (default: module, or the best that fits --memory-budget)",
    )
    how.add_argument(
        "--layout",
        choices=("snapshots", "derivatives"),
        help="what the Taylor buffers hold (default: snapshots, or the best that fits --memory-budget)",
    )
    how.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=_memory,
        help="memory for weights, Taylor buffers and step tables, like 24GiB; chooses --state and --layout "
        "(default: no limit)",
    )
    how.add_argument(
        "--slots",
        metavar="N",
        type=_whole(1),
        default=1,
        help="requests that share the memory budget at one time (default: %(default)s)",
    )
    engine = parser.add_argument_group("what to build")
    engine.add_argument("--engine", default="onnxruntime", help="kind of engine: onnxruntime (default: %(default)s)")
    engine.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="dtype of weights and arithmetic (default: %(default)s)",
    )
    engine.add_argument(
        "--state-dtype",
        choices=("fp32", "fp16", "bf16"),
        help="dtype of the Taylor buffers; sums over them stay float32 (default: the precision)",
    )
    engine.add_argument(
        "--out", type=Path, default=Path("engines"), help="folder that gets <family>-<name>/ (default: %(default)s/)"
    )
    engine.add_argument("--dry-run", action="store_true", help="print the card and the memory table, write nothing")
    return parser  # fmt: skip


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(f"{PROGRAM} {command}", description=description, allow_abbrev=False)


def _bundle_parser(command: str) -> argparse.ArgumentParser:
    parser = _parser(command, VERBS[command][1])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by an export")
    if command != "inspect":
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)"
        )
        parser.add_argument(
            "--threads", type=_whole(0), default=0, help="CPU threads of each engine, 0 for all (default: %(default)s)"
        )
    return parser  # fmt: skip


def _plan_options(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    if steps:
        parser.add_argument("--steps", type=_whole(1, 1000), help="denoising steps (default: the bundle's)")
    parser.add_argument(
        "--plan", help="explicit plan, F for a full and . for a forecast step (default: the bundle's rule)"
    )
    parser.add_argument(
        "--order", "--max-order", type=_whole(0, 4), help="order of the forecasts (default: the bundle's)"
    )
    parser.add_argument(
        "--form", choices=("taylor", "newton"), default="taylor", help="form of the forecast (default: %(default)s)"
    )


def _run_parser(command: str) -> argparse.ArgumentParser:
    parser = _bundle_parser(command)
    _plan_options(parser)
    parser.add_argument("--label", type=_whole(0), nargs="+", help="classes to draw (dit)")
    parser.add_argument("--prompt", nargs="+", help="captions to draw (embedded flux)")
    parser.add_argument("--inputs", type=Path, help="safetensors with the text encoders' outputs (flux)")
    parser.add_argument("--seed", type=_whole(0), nargs="+", default=[0], help="seeds of the noise (default: 0)")
    parser.add_argument(
        "--size", type=_size, default=(32, 32), metavar="HxW", help="picture in pixels (default: 32x32)"
    )
    parser.add_argument("--guidance-scale", type=float, help="dimensionless (default: the bundle's)")
    parser.add_argument("--out", type=Path, help="picture.png or latents.safetensors")
    return parser


def _replay_parser(command: str) -> argparse.ArgumentParser:
    parser = _bundle_parser(command)
    _plan_options(parser, steps=False)
    parser.add_argument(
        "--inputs", type=Path, required=True, help="safetensors: latents [S, ...], timestep [S], conditioning"
    )
    parser.add_argument("--outputs", type=Path, required=True, help="safetensors to write: noise_pred [S, ...]")
    return parser  # fmt: skip


def _verify_parser(command: str) -> argparse.ArgumentParser:
    parser = _bundle_parser(command)
    parser.add_argument("--model", metavar="REF", help="the checkpoint (default: the one the bundle was made from)")
    parser.add_argument(
        "--steps", type=_whole(1, 1000), default=16, help="denoising steps to compare (default: %(default)s)"
    )
    return parser  # fmt: skip


def _bench_parser(command: str) -> argparse.ArgumentParser:
    parser = _bundle_parser(command)
    _plan_options(parser)
    parser.add_argument("--repeats", type=_whole(1), default=3, help="counted pairs of loops (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


VERBS: dict[str, tuple[Callable[[str], argparse.ArgumentParser], str]] = {
    "run": (_run_parser, "Sample with a bundle: a picture, or tensors."),
    "replay": (_replay_parser, "Run given latents through a bundle, teacher-forced and without a sampler."),
    "verify": (_verify_parser, "Compare a bundle with the eager model, step by step; exit 1 on a broken bound."),
    "bench": (_bench_parser, "Time a plan against the same engine computing every step."),
    "inspect": (_bundle_parser, "Check every byte of a bundle and print its card."),
}


def help_text() -> str:
    """The first page: families in one group, verbs in another."""
    lines = [
        f"usage: {PROGRAM} FAMILY [options]      export a model as a bundle of engines",
        f"       {PROGRAM} VERB BUNDLE [options] use a bundle",
        "",
        "Compiles a diffusion transformer into a full graph and a forecast graph with explicit Taylor buffers.",
        "",
        "families:",
    ]
    for family in FAMILIES.values():
        d = family.defaults
        lines.append(
            f"  {family.name:<10}{family.title} (order {d.order}, interval {d.interval}, warmup {d.warmup} steps)"
        )
    lines += ["", "verbs:"]
    lines += [f"  {name:<10}{text}" for name, (_, text) in VERBS.items()]
    lines += ["", f"`{PROGRAM} FAMILY --help` and `{PROGRAM} VERB --help` list the options with units and defaults."]
    return "\n".join(lines)


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def whole(text: str) -> int:
        span = f"{low} to {high}" if high is not None else f"at least {low}"
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"is {text}, expected a whole number, {span}")
        return value

    return whole


def _memory(text: str) -> int:
    """Bytes of `24GiB`, `1.5 GB`, `512MiB` or `1000000`; a fraction of a byte is dropped."""
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,18})?\s*([a-z]*)", text.strip().lower())
    value = int(Fraction(found[1] + (found[2] or "")) * _UNITS.get(found[3], 0)) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a size above 0 in GiB, GB, MiB, MB or bytes, like 24GiB")
    return value


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"is {text}, expected HxW, like 1024x1024")
    return int(parts[0]), int(parts[1])
