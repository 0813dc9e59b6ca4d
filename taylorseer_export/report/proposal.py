"""A model that no family declares: its proposed declaration, verified against the model itself before it is exported.

A proposal is told from names and shapes, so nothing of it is believed. The graphs that follow from it are run operator
by operator over plans with every kind of step, beside the untouched model with the forecasts put in by hooks; each step
must agree within the bound of `verify`. What passes is exported as any family is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile import export
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.errors import ExportError, ParityError, TaylorSeerError
from taylorseer_export.graph.propose import Proposal, settled
from taylorseer_export.graph.trace import Trace
from taylorseer_export.method import Forecasts, Granularity, Plan
from taylorseer_export.report.verify import compare, reference_model
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.trajectory import Trajectory, random_trajectory

GRANULARITIES: tuple[Granularity, ...] = ("module", "residual", "last")
_PLANS = _ALL_FULL, _ = ("FFFFFFF", "FF..F..")
_SIZES = {"batch": 2, "rows": 3, "columns": 4, "frames": 3, "image_tokens": 12}  # of the open dimensions
_OTHER = 6


@dataclass(frozen=True)
class Verified:
    """A proposal that agrees with its model.

    Attributes:
        checkpoint: The model, with the proposal as its family.
        proposal: The proposal, with the sizes that it leaves open.
        granularity: The finest that verifies, or the one that was asked for.
        ratio: Largest difference of a step over its bound, dimensionless, at most 1.
        refused: Granularity -> why it was passed over.
    """

    checkpoint: Checkpoint
    proposal: Proposal
    granularity: Granularity
    ratio: float
    refused: dict[Granularity, str]


def verified(
    checkpoint: Checkpoint,
    model: nn.Module,
    proposal: Proposal,
    options: export.Options,
    wanted: Granularity | None = None,
) -> Verified:
    """Hold what follows from a proposal against the model.

    Args:
        checkpoint: Of a class that no family declares; its weights are read.
        model: Its skeleton in float32.
        proposal: Read off that.
        options: Of the export; a size that cannot stay open is that of its latent, or of the checkpoint's config.
        wanted: The one granularity that will do; the finest that verifies if left out.

    Raises:
        ExportError: What is missing, in one sentence.
    """
    family = proposal.family()
    size = options.latent_size or replace(checkpoint, family=family).latent_size
    sizes = {**family.typical, **family.latent_sizes(checkpoint.config, *size)}
    known: Mapping[str, Any] = dict(model.config)  # type: ignore[arg-type]
    if places := known.get("axes_lens"):  # of the table that the text's are looked up in
        sizes["text_tokens"] = min(sizes["text_tokens"], places[0] - 1)
    if options.batch is not None:
        sizes["batch"] = options.batch
    config = {key: value for key, value in known.items() if not key.startswith("_")}
    refused: dict[Granularity, str] = {}
    for any_size in (True, False):
        proposal, traced = settled(model, proposal, sizes, any_size)
        named = replace(checkpoint, family=proposal.family(), config=config)
        for granularity in (wanted,) if wanted else GRANULARITIES:
            try:
                ratio = _agreement(named, traced, model, replace(options, granularity=granularity, precision="fp32"))
            except TaylorSeerError as error:
                refused.setdefault(granularity, str(error))
                if _ALL_FULL in str(error):
                    break  # forecasts have no part in it
                continue
            passed = GRANULARITIES[: GRANULARITIES.index(granularity)]
            return Verified(named, proposal, granularity, ratio, {g: refused[g] for g in passed if g in refused})
    raise ExportError(next(iter(refused.values())))


def agreement(checkpoint: Checkpoint, options: export.Options) -> float:
    """The same of a checkpoint whose family is declared: largest difference of a step over its bound.

    Raises:
        ParityError: It is above 1.
    """
    return _held(checkpoint, export.draft(checkpoint, options))


def _agreement(checkpoint: Checkpoint, traced: Trace, model: nn.Module, options: export.Options) -> float:
    """Largest difference over its bound, of all steps of the plans of `verify`."""
    stored = checkpoint.files.keys() | checkpoint.derived.keys()
    computed = {name: value for name, value in model.named_buffers() if name not in stored}
    return _held(
        checkpoint, export.draft(export.Traced(checkpoint, traced, "fp32", computed | traced.constants), options)
    )


def _held(checkpoint: Checkpoint, made: export.Draft) -> float:
    manifest = export.describe(made, "proposal")
    graphs = {str(name): graph for name, graph in manifest.graphs.items()}
    denoiser = Denoiser(manifest, EagerRunner(eager_modules(made), graphs))
    ranges = made.ranges()
    wanted = {name: _SIZES.get(name, _OTHER) for name in ranges if name != "steps"}
    sizes = {name: min(max(size, ranges[name][0]), ranges[name][1]) for name, size in wanted.items()}
    data = random_trajectory(denoiser, len(_ALL_FULL), sizes)
    _refuse_deaf(denoiser, data)
    first: Exception | None = None
    for reference in _references(checkpoint):
        try:
            return max(
                _ratio(reference, denoiser, data, Forecasts(Plan.parse(plan), made.options.order)) for plan in _PLANS
            )
        except (ParityError, RuntimeError) as error:  # the latter of a model whose code is of float32 alone
            first = error
    assert first is not None
    raise first


def _refuse_deaf(denoiser: Denoiser, data: Trajectory) -> None:
    """Refuse a model that answers two latents alike: its other inputs are not what a pipeline passes."""
    slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
    slot.start(data.conditioning, Forecasts(Plan.parse("FF"), 0), np.repeat(data.timesteps[:1], 2))
    one, other = (slot.step(latent).copy() for latent in data.latents[[0, -1]])
    if np.array_equal(one, other):
        raise ExportError(
            "the prediction does not depend on the latent with the inputs that could be told, expected it to; "
            "declare it by hand, see families/README.md"
        )


def _references(checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """The model as exactly as memory allows, then as it is exported: places of tokens that it turns into angles of
    thousands of radians have no more digits than float32, whoever computes them."""
    best = reference_model(checkpoint)
    yield best
    if any(parameter.dtype == torch.float64 for parameter in best.parameters()):
        yield checkpoint.load(torch.float32)


def _ratio(model: nn.Module, denoiser: Denoiser, data: Trajectory, forecasts: Forecasts) -> float:
    result = compare(model, denoiser, data, forecasts)
    if result.ratio <= 1:
        return result.ratio
    step = result.worst
    raise ParityError(
        f"step {step} of plan {result.executed} differs from the model by {result.seen[step]:.3g}, expected at most "
        f"{result.bound[step]:.3g}; declare it by hand, see families/README.md"
    )
