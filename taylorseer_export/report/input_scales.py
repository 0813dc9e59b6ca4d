"""Input scales: the constants by which `--activations static` rounds what quantised layers read, found on samples.

The unquantised full graph runs eagerly, in the precision of the export, through all-full loops of the samples, as those
of a calibration do; so whatever plan a request brings, its full steps are among the steps that were looked at. Of each
layer the statistic is the largest size of any value it read:

    scale = the next power of two of max|x| / 448        fp8; of max|x| / 2688 for nvfp4; max|x| / 127 for int8

The largest and no percentile: e4m3 has as many digits for small values as for large ones, so that cutting large ones
off would gain nothing, and in these models few large channels carry much. Larger values than any that was seen saturate
at the largest number of the format, for fp8 and nvfp4 one to two times that value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.latents import refuse_several
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.sampling import Pool, sample

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Graph
    from taylorseer_export.compile.export import Options, Traced

SAMPLES = 8  # as many as `calibrate` fits to, where nothing says how many there are
_FIRST_SEED = 1_000_000  # far from the seeds people use


class Constants(NamedTuple):
    """What was found, and on how many samples.

    Attributes:
        scales: Weight -> what a value that its layer reads counts, of all layers that quantisation may choose.
        samples: Requests that ran; those of a bundle of one batch size are rounded up to whole batches.
    """

    scales: dict[str, float]
    samples: int


def check_samples(options: Options, source: str, count: int | None, prompts: object, inputs: object) -> bool:
    """Whether scales are to be found by samples; those of a checkpoint are taken where none are given.

    Args:
        options: Of the export.
        source: What the model draws from, as `Sampling.source` has it.
        count: How many samples.
        prompts, inputs: Files of them.

    Raises:
        ConfigError: Samples are given that nothing asks for, or asked for and not given.
    """
    given = {"--samples": count, "--prompts": prompts, "--inputs": inputs}
    named = [option for option, value in given.items() if value is not None]
    if options.activations != "static":
        if named:
            raise ConfigError(
                f"{named[0]} is given without --activations static, expected it too, which finds its scales by "
                f"samples; add it, or leave {named[0]} out"
            )
        return False
    if options.weights == "keep" and not named:
        return False
    if source != "labels" and inputs is None:
        raise ConfigError(
            "--inputs is missing, expected the text encoders' outputs for requests that --activations static finds its "
            "scales by, a row per sample; pass --inputs FILE.safetensors, or use --activations token"
        )
    if source != "labels" and prompts is not None:
        raise ConfigError(
            f"--prompts is {prompts} for a model that takes no classes, expected the text encoders' outputs alone to "
            "find scales by; leave it out"
        )
    if options.parallel:
        raise ConfigError(
            "--activations is static with --parallel, expected one process that samples run in; use --activations token"
        )
    return True


def input_scales(
    traced: Traced,
    options: Options,
    count: int | None = None,
    prompts: Sequence[str] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    on_step: Callable[[int, int], object] = lambda done, total: None,
) -> Constants:
    """The constants of a model.

    Needs memory for the unquantised model, and its time on the CPU.

    Args:
        traced: The model.
        options: Of the export; its steps are those of the loops.
        count: How many samples; as many as there are rows or lines, or `SAMPLES`, if left out.
        prompts, tensors: As of `groups`.
        on_step: Called with steps done and all steps.

    Raises:
        ConfigError: The model has no weights yet or several latents, or samples are not what it takes.
    """
    from taylorseer_export.compile.eager import eager_modules
    from taylorseer_export.compile.export import describe, draft
    from taylorseer_export.compile.kept import formats_of
    from taylorseer_export.graph.quantise import constant_scale, layers_of, watched

    checkpoint, names = traced.checkpoint, layers_of(traced.trace)
    if checkpoint.weightless:
        raise ConfigError(
            f"--activations is static, and {checkpoint.reference} is a config without weights, expected a checkpoint "
            "to run samples on; pass it as --model, or use --activations token"
        )
    form = str(options.weights)
    if form == "keep":
        form = next(iter(formats_of(checkpoint, names).values())).format
    plain = {"weights": None, "activations": None, "keep_precision": (), "guards": (), "parts": ()}
    made = draft(traced, replace(options, **plain))  # type: ignore[arg-type]
    manifest = describe(made, "samples")
    refuse_several(manifest, "--activations static")
    largest: dict[str, float] = {}

    def see(x: Any, weight: str) -> None:
        found = float(x.abs().amax())
        largest[weight] = float(np.maximum(largest.get(weight, 0.0), found))  # which keeps a NaN

    modules: dict[str, Any] = {**eager_modules(made)}
    modules["full"] = watched(modules["full"], names, see)
    graphs: dict[str, Graph] = dict(manifest.graphs.items())
    with Denoiser(manifest, EagerRunner(modules, graphs)) as denoiser:
        count = count or (len(prompts) if prompts else _rows(denoiser, tensors or {}))
        requests = groups(denoiser, count, _FIRST_SEED, prompts, tensors)
        pool, done = Pool(denoiser), iter(range(1, 1 << 62))
        total = len(requests) * requests[0].loops * options.steps
        forecasts, ran = Forecasts(Plan.all_full(options.steps), 0), 0
        for request in requests:
            ran += len(request.latents)
            sample(denoiser, request, forecasts, pool.of(request), lambda _: on_step(next(done), total))
    scales = {name: constant_scale(value, form, traced.trace.precision) for name, value in largest.items()}
    return Constants(scales, ran)


def _rows(denoiser: Denoiser, tensors: Mapping[str, np.ndarray]) -> int:
    """How many samples tensors hold, one for each row."""
    known = {name: denoiser.constants[name].shape for name in tensors if name in denoiser.constants}
    rows = [tensors[n].shape[s.index("batch")] for n, s in known.items() if "batch" in s and len(s) == tensors[n].ndim]
    return max(rows, default=1) if tensors else SAMPLES
