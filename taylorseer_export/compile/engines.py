"""The kinds of engine: which file of this folder builds each, and the options that only some of them take.

A builder is a module with the functions of `Builder`. It is imported when it is asked for, so that a machine without
its library can build everything else; this file imports nothing heavy, because the command line lists the options.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from taylorseer_export.errors import BuildError, ConfigError
from taylorseer_export.values import memory, whole

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Engine
    from taylorseer_export.compile.draft import BaseDraft, Options

Progress = Callable[[str, int, int], object]

# Library -> what else pip may know it as: its CUDA build is another distribution of the same module.
ALIASES = {"onnxruntime": ("onnxruntime-gpu",)}


class Builder(Protocol):
    """What the module of one kind of engine offers."""

    def check(self, options: Options) -> None:
        """Refuse what this engine does not do: precision, device, values of its own options.

        Raises:
            ConfigError: Says what it does instead.
        """

    def engine(self, options: Options) -> Engine:
        """What the engines are tied to: kind, exact versions, limits of the device.

        Raises:
            BuildError: A library is not installed.
        """

    def graph_file(self, graph: str) -> str:
        """File of the bundle that holds the graph called `graph`; graphs may share one."""

    def build(self, draft: BaseDraft, folder: Path, progress: Progress) -> None:
        """Write the files of all graphs, and the weights they read, into `folder`.

        Raises:
            BuildError: A graph has no form in this engine, or a tool that builds it is missing.
        """


@dataclass(frozen=True)
class Option:
    """An option that only some kinds of engine take.

    Attributes:
        name: `gpu-arch`: `--gpu-arch` on the command line, and the key in `Options.engine_options`.
        help: One line for `--help`, without the default.
        parse: Text -> value, as argparse calls it; None for a flag without a value.
        metavar: What stands for the value in `--help`.
    """

    name: str
    help: str
    parse: Callable[[str], Any] | None = str
    metavar: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of engine: the module that builds it and the options that it takes besides those of every kind."""

    module: str
    options: tuple[Option, ...] = ()


def one_of(*values: str) -> Callable[[str], str]:
    """One of a few words."""

    def value_of(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(f"is {text}, expected {', '.join(values)}")
        return text

    return value_of


def capabilities(text: str) -> str:
    """Compute capabilities, `8.9,12.0`."""
    if not re.fullmatch(r"[1-9][0-9]?\.[0-9](,[1-9][0-9]?\.[0-9])*", text):
        raise argparse.ArgumentTypeError(f"is {text}, expected compute capabilities, like 8.9,12.0")
    return text


def pools(text: str) -> str:
    """Memory pools with their limits in bytes: `dla-local-dram:1GiB` becomes `dla-local-dram:1073741824`."""
    limits = []
    for entry in text.split(","):
        name, _, size = entry.partition(":")
        if not re.fullmatch(r"[a-z-]+", name):
            raise argparse.ArgumentTypeError(f"is {text}, expected POOL:SIZE, like tactic-shared-memory:48KiB")
        limits.append(f"{name}:{memory(size)}")
    return ",".join(limits)


# Names as in `trtexec` and Polygraphy.
_EVERY_TENSORRT = (
    Option(
        "workspace",
        "scratch memory a layer may use at the largest sizes (default: the GPU's; 64GiB without one)",
        memory,
        "SIZE",
    ),
    Option("tf32", "let float32 products round their inputs to 10 bits", None),
    Option("weight-streaming", "let weights stay on the host at run time, for small GPUs; no CUDA graphs", None),
)
_EFFORT = (
    Option("builder-optimization-level", "0 to 5, more time for faster engines", whole(0, 5), "N"),
    Option("max-aux-streams", "streams that one engine may use beside its own", whole(0), "N"),
)
_BUILDER = (
    Option("pool-limit", "other memory pools: tactic-dram, dla-managed-sram, …", pools, "POOL:SIZE,…"),
    Option(
        "profiling-verbosity",
        "layer-names-only, detailed or none",
        one_of("layer-names-only", "detailed", "none"),
        "LEVEL",
    ),
)
_ANY_RELEASE = (
    Option("version-compatible", "run on later releases too", None),
    Option("timing-cache", "file of kernel timings, read and written", str, "FILE"),
)
_ONE_GPU = (
    Option(
        "hardware-compatibility-level",
        "GPUs that may run it: none (this model alone), ampere-plus or same-compute-capability",
        one_of("none", "ampere-plus", "same-compute-capability"),
        "LEVEL",
    ),
    Option("refit", "weights may be replaced in the plan", None),
    Option("strip-plan", "plans without weights, which they take from the bundle when they are loaded", None),
)

ENGINES: Mapping[str, Kind] = {
    "onnxruntime": Kind(
        "taylorseer_export.compile.onnxruntime",
        (
            Option(
                "provider", "what runs it on a GPU: cuda or tensorrt (default: cuda)", one_of("cuda", "tensorrt"), "P"
            ),
        ),
    ),
    "inductor": Kind(
        "taylorseer_export.compile.inductor",
        (Option("max-autotune", "try every kernel torch knows for each operation; many times slower to build", None),),
    ),
    "tensorrt": Kind(
        "taylorseer_export.compile.tensorrt", (*_EVERY_TENSORRT, *_EFFORT, *_BUILDER, *_ANY_RELEASE, *_ONE_GPU)
    ),
    "tensorrt-rtx": Kind(
        "taylorseer_export.compile.tensorrt",
        (
            *_EVERY_TENSORRT,
            *_EFFORT,
            *_BUILDER,
            Option(
                "gpu-arch", "compute capabilities to build for (default: all from 8.0 on)", capabilities, "8.9,12.0"
            ),
        ),
    ),
    "torch-tensorrt": Kind("taylorseer_export.compile.torch_tensorrt", (*_EVERY_TENSORRT, *_EFFORT, *_ANY_RELEASE)),
}


def builder(kind: str) -> Builder:
    """The builder of one kind of engine."""
    return cast(Builder, import_module(ENGINES[kind].module))


def check_engine(options: Options) -> None:
    """Refuse an unknown kind of engine, an option of another kind, and what the builder of this kind refuses.

    Raises:
        ConfigError: Nothing is ever dropped in silence.
    """
    if options.engine not in ENGINES:
        raise ConfigError(
            f"--engine is {options.engine}, expected one this version builds ({', '.join(ENGINES)}); "
            "use --engine onnxruntime"
        )
    taken = {option.name for option in ENGINES[options.engine].options}
    for name in options.engine_options:
        if name not in taken:
            kinds = [kind for kind, entry in ENGINES.items() if name in {o.name for o in entry.options}]
            raise ConfigError(
                f"--{name} is given with --engine {options.engine}, expected it with {' or '.join(kinds) or 'none'} "
                "alone; leave it out or choose another --engine"
            )
    builder(options.engine).check(options)


def library_versions(kind: str, *names: str) -> dict[str, str]:
    """Exact installed version of each library that builds one kind of engine.

    Raises:
        BuildError: One is not installed.
    """
    try:
        return {name: _version(name) for name in names}
    except PackageNotFoundError as error:
        raise BuildError(
            f"{error.name} is not installed, expected it for --engine {kind}; "
            f"pip install 'taylorseer-export[export,{kind}]'"
        ) from error


def _version(name: str) -> str:
    """The version of a library, under the first of its names that it is installed by."""
    for known in (name, *ALIASES.get(name, ())):
        try:
            return version(known)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError(name)
