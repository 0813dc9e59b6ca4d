"""Quantised weights as an option of an export: which engine takes which format, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from taylorseer_export.bundle.quantised import Quantised as Entry
from taylorseer_export.compile.kept import Own, formats_of
from taylorseer_export.errors import BuildError, ConfigError
from taylorseer_export.graph.formats import FORMATS
from taylorseer_export.graph.quantise import Quantised, layers_of, quantise

if TYPE_CHECKING:
    from taylorseer_export.checkpoint.checkpoint import Checkpoint
    from taylorseer_export.compile.draft import Draft, Options
    from taylorseer_export.graph.trace import Trace

KEEP = "keep"
# Format -> the first compute capability whose matrix units have it.
_SINCE = {"fp8": (8, 9), "nvfp4": (10, 0), "int8": (8, 0)}
_PLANS = ("tensorrt", "tensorrt-rtx")
# Kind of engine -> formats that it takes, the first of them what is named where another is asked for.
_TAKES = {
    "onnxruntime": ("fp8", "int8"),
    "inductor": FORMATS,
    "tensorrt": FORMATS,
    "tensorrt-rtx": FORMATS,
    "torch-tensorrt": (),
}
# (kind of engine, format) -> how it takes what the layers read, the first if nothing is said.
_ACTIVATIONS = {
    **{(kind, form): ("token", "none", "static") for kind in _PLANS for form in ("fp8", "nvfp4")},
    **{(kind, "int8"): ("none", "token", "static") for kind in (*_PLANS, "onnxruntime", "inductor")},
    **{(kind, "fp8"): ("none", "token", "static") for kind in ("onnxruntime", "inductor")},
}


def activations_of(options: Options) -> str:
    """How what quantised layers read is quantised: as asked, else as the engine does best."""
    return options.activations or _taken(options)[0]


def check_weights(options: Options) -> None:
    """Refuse a format that the engine or a GPU it is built for does not take.

    Raises:
        ConfigError: Names the format that it takes.
    """
    form = options.weights
    if form is None:
        for option, value in (("activations", options.activations), ("keep-precision", options.keep_precision)):
            if value:
                shown = value if isinstance(value, str) else value[0]
                raise ConfigError(
                    f"--{option} is {shown} without --weights, expected it too; add --weights fp8, or leave it out"
                )
        return
    if form == KEEP:
        return  # the format is known once the checkpoint is open
    if form not in FORMATS:
        raise ConfigError(f"--weights is {form}, expected {', '.join(FORMATS)} or keep; choose one, or leave it out")
    if form not in (takes := _TAKES[options.engine]):
        remedy = f"use --weights {takes[0]}" if takes else "leave it out, or use --engine tensorrt"
        raise ConfigError(
            f"--weights is {form} with --engine {options.engine}, expected {' or '.join(takes) or 'none'}; {remedy}"
        )
    if options.activations not in (None, *_taken(options)):
        raise ConfigError(
            f"--activations is {options.activations} with --engine {options.engine} --weights {form}, expected "
            f"{' or '.join(_taken(options))}; change one of them or leave it out"
        )
    if options.engine in _PLANS:
        _check_capabilities(options, form)


def _taken(options: Options) -> tuple[str, ...]:
    return _ACTIVATIONS.get((options.engine, str(options.weights)), ("none",))


def _check_capabilities(options: Options, form: str) -> None:
    """Every GPU that plans are built for must have the format."""
    since = (12, 0) if (options.engine, form) == ("tensorrt-rtx", "nvfp4") else _SINCE[form]
    lacking = [entry for entry in _capabilities(options) if tuple(map(int, entry.split("."))) < since]
    if not lacking:
        return
    least = ".".join(map(str, since))
    if options.engine == "tensorrt-rtx":
        having = [
            entry for entry in _capabilities(options, anywhere=True) if tuple(map(int, entry.split("."))) >= since
        ]
        remedy = f"add --gpu-arch {','.join(having)}, or use --weights {_for(lacking)}"
    else:
        remedy = f"use --weights {_for(lacking)}, or build on such a GPU"
    raise ConfigError(
        f"--weights is {form} for compute capability {', '.join(lacking)}, expected {least} or later; {remedy}"
    )


def _for(capabilities: list[str]) -> str:
    """The format that all of these have, the smallest first."""
    oldest = min(tuple(map(int, entry.split("."))) for entry in capabilities)
    return next(form for form in ("fp8", "int8") if _SINCE[form] <= oldest)


def _capabilities(options: Options, anywhere: bool = False) -> list[str]:
    """What plans are built for, or with `anywhere` all that the library builds for."""
    from taylorseer_export.bundle.tensorrt import library
    from taylorseer_export.compile.tensorrt import architectures, this_gpu

    if options.engine == "tensorrt-rtx":
        return architectures(library(options.engine, BuildError), {} if anywhere else options.engine_options)
    level = options.engine_options.get("hardware-compatibility-level", "none")
    return [this_gpu(options.engine, level)["compute_capability"].rstrip("+")]


def quantised_trace(trace: Trace, options: Options, checkpoint: Checkpoint) -> Quantised:
    """The trace with its weights quantised, or as it is where no format is asked for.

    Raises:
        ConfigError: See `quantise`, `formats_of` and `check_weights`.
    """
    if options.weights is None:
        return Quantised(trace)
    own = None
    if options.weights == KEEP:
        own = formats_of(checkpoint, layers_of(trace))
        options = replace(options, weights=next(iter(own.values())).format)
        check_weights(options)
    activations, scales = activations_of(options), _input_scales(options, own or {}, trace.precision)
    if (options.engine, options.weights, activations) == ("onnxruntime", "int8", "token"):
        activations = "none"  # its own kernels round what int8 weights are multiplied with
    return quantise(trace, str(options.weights), activations, options.keep_precision, own, scales)


def _input_scales(options: Options, own: Mapping[str, Own], precision: torch.dtype) -> Mapping[str, float]:
    """Those that were found by samples; else the checkpoint's own, as numbers of the precision."""
    if options.input_scales:
        return options.input_scales
    given = {name: one.input_scale for name, one in own.items() if one.input_scale is not None}
    return {name: float(torch.tensor(scale).to(precision)) for name, scale in given.items()}


def quantised_entry(plan: Draft) -> Entry | None:
    """What the manifest says of a draft."""
    if plan.options.weights is None:
        return None
    stored: dict[str, Any] = plan.stored
    read = {name: part for name, part in plan.quantised.items() if name in stored}
    layers = tuple(dict.fromkeys(part.weight for part in read.values()))
    count = sum(part.count for part in read.values() if part.index == 0)
    first = next(iter(read.values()))
    scales = {part.weight: part.input_scale for part in read.values() if part.input_scale is not None}
    return Entry(
        weights=first.form,  # type: ignore[arg-type]
        kept=first.kept,
        activations=activations_of(replace(plan.options, weights=first.form)),  # type: ignore[arg-type]
        layers=layers,
        input_scales=scales,
        samples=plan.options.samples if scales else None,
        bytes=sum(stored[name][0].itemsize * math.prod(stored[name][1]) for name in read),
        unquantised_bytes=count * first.precision.itemsize,
        keep_precision=plan.options.keep_precision,
    )
