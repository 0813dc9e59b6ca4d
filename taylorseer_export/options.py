"""What the options of several commands share: the parser, the types of values, and groups that recur."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from taylorseer_export.errors import ConfigError
from taylorseer_export.method.guard import RULES

PROGRAM = "taylorseer-export"
_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class Parser(argparse.ArgumentParser):
    """Errors as one sentence, on the way every other error takes."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"{PROGRAM} {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = message.replace("argument ", "", 1) if message.startswith("argument ") else message
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def bundle_options(parser: argparse.ArgumentParser, runs: bool = True) -> None:
    """The bundle itself and, where it runs, on what."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by an export")
    if runs:
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)"
        )
        parser.add_argument(
            "--threads", type=whole(0), default=0, help="CPU threads of each engine, 0 for all (default: %(default)s)"
        )
        parser.add_argument(
            "--no-cuda-graphs", action="store_true", help="launch every kernel by itself, to look for a fault (slow)"
        )


def sample_options(parser: argparse.ArgumentParser) -> None:
    """What samples are made of, where a command makes many."""
    parser.add_argument(
        "--prompts", type=Path, help="text file: a caption or a class per line (default: the embedded model's own)"
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        help="safetensors with the conditioning under diffusers' argument names, a row per sample; `negative_NAME` for "
        "guidance (default: random, for an embedded model that has learned nothing)",
    )
    parser.add_argument(
        "--size", type=size, metavar="HxW or FxHxW", help="in pixels (default: the bundle's; not for flux and dit)"
    )
    parser.add_argument("--guidance-scale", type=real(0), help="dimensionless (default: the bundle's)")


def plan_options(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    """Which plan and which forecasts; `steps` where the request does not bring their number."""
    if steps:
        parser.add_argument("--steps", type=whole(1, 1000), help="denoising steps (default: the bundle's)")
    parser.add_argument(
        "--plan", help="explicit plan, F for a full and . for a forecast step (default: the bundle's rule)"
    )
    parser.add_argument(
        "--order", "--max-order", type=whole(0, 4), help="order of the forecasts (default: the bundle's)"
    )
    parser.add_argument(
        "--profile", help="plan, order and weights of a calibration, in the place of --plan, --order and --form"
    )
    parser.add_argument(
        "--form", choices=("taylor", "newton"), default="taylor", help="form of the forecast (default: %(default)s)"
    )
    guard = parser.add_argument_group("guard: forecasts that may become full steps, after the warm-up")
    guard.add_argument(
        "--guard", choices=RULES, help="rule; the bundle must have been exported with it (default: none)"
    )
    guard.add_argument(
        "--threshold", type=real(0), help="error under which a step is forecast, dimensionless (default: the profile's)"
    )
    guard.add_argument("--guard-order", type=whole(0, 4), help="order of the expected first block (default: --order)")
    guard.add_argument("--cap", type=whole(1), help="most forecast steps in a row (default: no limit)")
    guard.add_argument("--accumulate", action="store_true", help="errors add up until the next full step")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def value_of(text: str) -> int:
        span = f"{low} to {high}" if high is not None else f"at least {low}"
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"is {text}, expected a whole number, {span}")
        return value

    return value_of


def real(above: float) -> Callable[[str], float]:
    """A finite number above `above`."""

    def value_of(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"is {text}, expected a number above {above:g}")
        return value

    return value_of


def memory(text: str) -> int:
    """Bytes of `24GiB`, `1.5 GB`, `512MiB` or `1000000`; a fraction of a byte is dropped."""
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,18})?\s*([a-z]*)", text.strip().lower())
    value = int(Fraction(found[1] + (found[2] or "")) * _UNITS.get(found[3], 0)) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a size above 0 in GiB, GB, MiB, MB or bytes, like 24GiB")
    return value


def size(text: str) -> tuple[int, ...]:
    """(height, width) of `1024x768`, or (frames, height, width) of `81x480x832`."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"is {text}, expected HxW, like 1024x1024, or FxHxW for a video")
    return tuple(int(p) for p in parts)
