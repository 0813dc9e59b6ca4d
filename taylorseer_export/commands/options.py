"""What the options of several commands share: the parser, and groups that recur."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from taylorseer_export.bundle.device import CPU, DEVICES, Device
from taylorseer_export.bundle.memory import CONDITIONING_ROOM
from taylorseer_export.compile.engines import ENGINES, Option
from taylorseer_export.errors import ConfigError
from taylorseer_export.method.guard import RULES
from taylorseer_export.values import MOST_THREADS, memory, memory_or_none, real, size, whole

PROGRAM = "taylorseer-export"


class Parser(argparse.ArgumentParser):
    """Errors as one sentence, on the way every other error takes."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"{PROGRAM} {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^(\S+): is ", r"\1 is ", message.removeprefix("argument "))
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def bundle_options(parser: argparse.ArgumentParser, runs: bool = True) -> None:
    """The bundle itself and, where it runs, on what."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    if runs:
        device_option(parser)
        parser.add_argument(
            "--threads",
            type=whole(0, MOST_THREADS),
            default=0,
            help="CPU threads of each engine, 0 for all (default: %(default)s)",
        )
        parser.add_argument(
            "--no-cuda-graphs", action="store_true", help="launch every kernel by itself, to look for a fault (slow)"
        )


def lora_option(parser: argparse.ArgumentParser) -> None:
    """Adapters of this load alone."""
    parser.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="LoRA to add to the weights while they are loaded, or to give to every request of a bundle exported with "
        "--lora-rank, under diffusers' names; may be repeated (default: none, scale 1)",
    )


def parallel_option(parser: argparse.ArgumentParser) -> None:
    """What ranks run of guidance."""
    parser.add_argument(
        "--parallel",
        choices=("guidance",),
        help="under torchrun, run each of the two branches of guidance on half of the ranks (default: on all of them)",
    )


def device(text: str) -> Device:
    """`cpu`, `cuda`, or one of several GPUs by its number: `cuda:1`."""
    try:
        return Device.parse(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error


def device_option(parser: argparse.ArgumentParser) -> None:
    """Where the engines run."""
    parser.add_argument(
        "--device", type=device, metavar="DEVICE", default=CPU, help=f"where to run: {DEVICES} (default: %(default)s)"
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
        "--size",
        type=size,
        metavar="HxW or FxHxW",
        help="size in pixels (default: the bundle's; not for models of classes)",
    )
    parser.add_argument("--guidance-scale", type=real(0), help="guidance scale, dimensionless (default: the bundle's)")


def plan_options(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    """Which plan and which forecasts; `steps` where the request does not bring their number.

    Only what is no number is refused here: ranges and combinations are judged once for all doors.
    """
    if steps:
        parser.add_argument("--steps", type=whole(), help="denoising steps (default: the bundle's)")
    parser.add_argument(
        "--plan", help="explicit plan, F for a full and . for a forecast step (default: the bundle's rule)"
    )
    parser.add_argument(
        "--interval", "--cache-interval", type=whole(), help="steps between full steps (default: the bundle's)"
    )
    parser.add_argument(
        "--warmup", "--warmup-steps", type=whole(), help="full steps at the start (default: the bundle's)"
    )
    parser.add_argument(
        "--dialect", metavar="{original,diffusers}", help="rule after the warm-up (default: the bundle's)"
    )
    parser.add_argument("--order", "--max-order", type=whole(), help="order of the forecasts (default: the bundle's)")
    parser.add_argument("--form", metavar="{taylor,newton}", help="form of the forecast (default: taylor)")
    parser.add_argument(
        "--profile", metavar="NAME", help="plan, order and weights of a calibration, in the place of the options above"
    )
    guard = parser.add_argument_group("guard: forecasts that may become full steps, after the warm-up")
    guard.add_argument(
        "--guard",
        metavar=f"{{{','.join(RULES)}}}",
        help="rule that decides at every step; the bundle must have been exported with it (default: none)",
    )
    guard.add_argument(
        "--threshold", type=real(), help="error under which a step is forecast, dimensionless (default: the profile's)"
    )
    guard.add_argument("--guard-order", type=whole(), help="order of the expected first block (default: --order)")
    guard.add_argument("--cap", type=whole(), help="most forecast steps in a row (default: no limit)")
    guard.add_argument("--accumulate", action="store_true", help="errors add up until the next full step")


def service_options(parser: argparse.ArgumentParser, each: str) -> None:
    """What a server may use, for each instance or bundle."""
    parser.add_argument(
        "--slots", type=whole(1), default=4, help=f"requests under way at one time, per {each} (default: %(default)s)"
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
        help=f"memory of one {each} for weights and slots, like 24GiB (default: slots of four times the typical size)",
    )
    parser.add_argument(
        "--conditioning-cache",
        metavar="SIZE",
        type=memory_or_none,
        default=CONDITIONING_ROOM,
        help=f"memory of one {each} for what prompts become, so that none is encoded twice; 0 turns it off (default: "
        "256MiB)",
    )
    parser.add_argument(
        "--warm",
        metavar="HxW",
        type=size,
        nargs="+",
        default=(),
        help="sizes in pixels that are warmed up before the first request, besides the usual one (default: none)",
    )


def engine_options(parser: argparse.ArgumentParser) -> None:
    """One group of options for each set of kinds that share them."""
    takers: dict[Option, list[str]] = {}
    for kind, entry in ENGINES.items():
        for option in entry.options:
            takers.setdefault(option, []).append(kind)
    groups: dict[str, Any] = {}
    for option, kinds in takers.items():
        title = f"for --engine {', '.join(kinds)}"
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        if option.parse is None:
            group.add_argument(f"--{option.name}", action="store_true", default=None, help=option.help)
        else:
            group.add_argument(f"--{option.name}", type=option.parse, metavar=option.metavar, help=option.help)


def given_engine_options(given: argparse.Namespace) -> dict[str, Any]:
    """The options of `engine_options` that were given, whatever kind of engine they are for."""
    names = {option.name for entry in ENGINES.values() for option in entry.options}
    values = {name: getattr(given, name.replace("-", "_")) for name in sorted(names)}
    return {name: value for name, value in values.items() if value is not None}
