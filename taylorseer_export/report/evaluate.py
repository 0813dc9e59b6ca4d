"""Evaluation: every way to sample with a bundle, side by side, against all steps full on the same samples.

The rows share noise, conditioning and engines; only the plan and the weights differ. Beside the ways that forecast
stands the honest baseline: a loop of only as many steps as a plan has full ones.

Where weights are quantised the rows say what forecasting costs, and each is compared once more, with the unquantised
model on the same samples: of all steps full that is what quantising costs, of every other way what both cost together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from taylorseer_export.bundle.quantised import UNQUANTISED
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.embedded.requests import frame_rate, pictures_of
from taylorseer_export.method import Forecasts, Guard, Plan, Rule
from taylorseer_export.report.guards import fit_threshold
from taylorseer_export.report.metrics import Metric, Shown
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Pool, Request, denoise

_WHITE = 255.0
_INTERVALS = (3, 9)  # beside the bundle's own


@dataclass(frozen=True)
class Case:
    """One way to sample."""

    name: str
    forecasts: Forecasts


@dataclass(frozen=True)
class Difference:
    """How far samples are from others of the same noise and conditioning.

    Attributes:
        latent_error: Norm of the difference of the final latents over the norm of those others.
        psnr: Of all pictures together, or of the latents where the bundle makes no pictures, in dB; None where nothing
            differs.
        psnr_worst: Of the worst sample.
        ssim: Mean over the pictures; None without them.
    """

    latent_error: float
    psnr: float | None
    psnr_worst: float | None
    ssim: float | None


@dataclass(frozen=True)
class Row:
    """What one way gave.

    Attributes:
        full_steps: That ran, the mean over groups.
        loop_ms: Time of all steps of the loop in the denoiser, for one group of samples; the median over groups.
        prepare_ms, step_ms: Of its beginning and of each of its steps; the same.
        latent_error, psnr, psnr_worst, ssim: How far it is from all-full, as in `Difference`.
        metrics: Those of `metrics` that could be computed, by name; none without pictures.
        step_errors: `latent_error` after each step; none for a loop of another length.
        executed: The steps that ran, for each group; other than `plan` only where something decides at run time.
        shown: The first pictures, `[K, H, W, 3]` uint8; none without them.
        unquantised: How far it is from the unquantised model, all steps full; None where that was not run.
    """

    name: str
    plan: str
    full_steps: float
    loop_ms: float
    prepare_ms: float
    step_ms: tuple[float, ...]
    latent_error: float
    psnr: float | None
    psnr_worst: float | None
    ssim: float | None
    metrics: Mapping[str, float]
    step_errors: tuple[float, ...]
    executed: tuple[str, ...]
    shown: np.ndarray
    unquantised: Difference | None = None

    def median_ms(self, kind: str) -> float | None:
        """Median time of the steps that were full (`F`) or forecast (`.`) in every group; None where none was."""
        times = [
            ms for ms, kinds in zip(self.step_ms, zip(*self.executed, strict=True), strict=True) if {*kinds} == {kind}
        ]
        return float(np.median(times)) if times else None


def compared_plan(denoiser: Denoiser, asked: Forecasts) -> Plan:
    """The plan that stands in the table at several orders: the one asked for, or the bundle's rule over as many steps
    where a guard or a profile brings its own."""
    own = asked.guard is None and asked.weights is None
    return asked.plan if own else denoiser.forecasts(steps=len(asked)).plan


def cases(denoiser: Denoiser, asked: Forecasts) -> list[Case]:
    """All-full; `compared_plan` at the orders that the buffers hold, and beside it shorter and longer intervals; the
    profiles; and what was asked for, where that is none of these.

    Every number of full steps that some plan has stands there a second time as a loop of fewer steps.

    Args:
        denoiser: The loaded bundle.
        asked: One way to sample, whose length all others have.
    """
    state, steps, plan = denoiser.manifest.state, len(asked), compared_plan(denoiser, asked)
    order = min(state.order, 2)
    names = {0: "reuse", 1: "order 1", 2: "order 2"}
    forecasts = [Case(f"regular, {names[k]}", Forecasts(plan, k)) for k in range(order + 1)]
    if state.layout == "snapshots" and order > 1:
        forecasts.append(Case("regular, Newton", Forecasts(plan, order, "newton")))
    for interval in _INTERVALS:
        other = denoiser.forecasts(steps=steps, interval=interval, order=order)
        if len(other.plan.full_steps) not in (len(plan.full_steps), steps):
            forecasts.append(Case(f"interval {interval}, {names[order]}", other))
    for name, profile in denoiser.profiles.items():
        if len(profile.plan) == steps:
            forecasts.append(Case(f"profile {name}", denoiser.forecasts(profile=name)))
    if asked not in [case.forecasts for case in forecasts]:
        forecasts.append(Case("as asked", asked))
    planned = [case.forecasts.plan for case in forecasts if case.forecasts.guard is None]
    counts = sorted({len(plan.full_steps) for plan in planned}, reverse=True)
    fewer = [Case(f"{count} steps", Forecasts(Plan.all_full(count), 0)) for count in counts]
    return [Case("all full", Forecasts(Plan.all_full(steps), 0)), *fewer, *forecasts]


def guarded_cases(
    denoiser: Denoiser, plan: Plan, requests: Sequence[Request], on_step: Callable[[], object] = lambda: None
) -> list[Case]:
    """One way for every guard of the bundle, with about as many full steps as `plan` has.

    None where `plan` has fewer than a guard starts from: the warm-up of the bundle's rule, and the last step. The
    threshold is that of a profile with as many full steps, where the bundle has one, or else fitted to `requests`.

    Args:
        denoiser: The loaded bundle.
        plan: The regular plan.
        requests: Groups of samples that are not those evaluated.
        on_step: Called after every step.
    """
    state, steps, count = denoiser.manifest.state, len(plan), len(plan.full_steps)
    base = Forecasts(Plan.guarded(steps, denoiser.defaults.warmup), min(state.order, 2))
    if not len(base.plan.full_steps) <= count < steps:
        return []
    known: dict[Rule, float] = {}
    for profile in denoiser.profiles.values():
        if len(profile.plan) == steps and profile.plan.count("F") == count:
            known |= profile.thresholds
    found, pool = [], Pool(denoiser)
    for rule in state.guards:
        if rule not in known:
            known[rule] = fit_threshold(denoiser, pool, requests, base, rule, count, on_step)
        guard = Guard(rule, known[rule])
        found.append(Case(f"guard {rule} at {known[rule]:.3g}", replace(base, guard=guard)))
    return found


class Source(Protocol):
    """Where a request finds what answers it: the slots of a `Pool`, or a model in their place."""

    def of(self, request: Request) -> Branches:
        """What answers."""


def evaluate(
    denoiser: Denoiser,
    requests: Sequence[Request],
    ways: Sequence[Case],
    measures: Sequence[Metric] = (),
    captions: Sequence[str] = (),
    shown: int = 6,
    on_step: Callable[[], object] = lambda: None,
    unquantised: Source | None = None,
) -> list[Row]:
    """One row per case; the first case is what the others are compared with.

    Args:
        denoiser: The loaded bundle.
        requests: Groups of samples of one size.
        ways: From `cases`.
        measures: From `metrics`.
        captions: Of every sample, for the measures that read them.
        shown: Pictures kept of each row.
        on_step: Called after every step.
        unquantised: The model without quantised weights, where the bundle has such, for a second comparison.
    """
    pool = Pool(denoiser)
    _run(denoiser, pool, requests[0], ways[-1], on_step)  # both engines run once before anything is timed
    exact = [_run(denoiser, pool, request, ways[0], on_step) for request in requests]
    plain = [_run(denoiser, unquantised, request, ways[0], on_step) for request in requests] if unquantised else []
    labels = [request.conditioning.get("class_labels", np.zeros(0))[: len(request.latents)] for request in requests]
    rows = []
    for case in ways:
        runs = exact if case is ways[0] else [_run(denoiser, pool, request, case, on_step) for request in requests]
        row = _row(case, runs, exact, shown)
        if measures and len(runs[0].pictures):
            made, true = (np.concatenate([run.pictures for run in group]) for group in (runs, exact))
            seen = Shown(made, true, captions, np.concatenate(labels))
            row = replace(row, metrics={metric.name: metric.measure(seen) for metric in measures})
        rows.append(replace(row, unquantised=_difference(runs, plain) if plain else None))
    return rows


@dataclass(frozen=True)
class _Run:
    latents: list[np.ndarray]  # after each step
    pictures: np.ndarray
    prepare_ms: float
    step_ms: list[float]
    executed: str


def _run(denoiser: Denoiser, source: Source, request: Request, case: Case, on_step: Callable[[], object]) -> _Run:
    loop, branches = Loop(denoiser, request, case.forecasts), source.of(request)
    began = time.perf_counter()
    loop.begin(branches)
    prepare_ms = 1e3 * (time.perf_counter() - began)
    latents, step_ms = [], []
    for step in denoise(loop, branches):
        step_ms.append(step.milliseconds)
        latents.append(loop.latents.copy())
        on_step()
    made = np.zeros((0, 1, 1, 3), np.uint8)
    if draws(denoiser):
        made = pictures_of(denoiser, request, latents[-1])
        made = opaque(made) if made.shape[-1] == 4 else made  # measures know three colours
    return _Run(latents, made, prepare_ms, step_ms, branches.executed)


def draws(denoiser: Denoiser) -> bool:
    """Whether the bundle makes pictures to compare; videos are compared by their latents, as what has no decoder."""
    return denoiser.manifest.sampling.pictures is not None and frame_rate(denoiser.manifest) is None


def _row(case: Case, runs: Sequence[_Run], exact: Sequence[_Run], shown: int) -> Row:
    same_length = len(runs[0].latents) == len(exact[0].latents)
    return Row(
        name=case.name,
        plan=str(case.forecasts.plan),
        full_steps=float(np.mean([run.executed.count("F") for run in runs])),
        loop_ms=float(np.median([sum(run.step_ms) for run in runs])),
        prepare_ms=float(np.median([run.prepare_ms for run in runs])),
        step_ms=tuple(np.median([run.step_ms for run in runs], 0).tolist()),
        **vars(_difference(runs, exact)),
        metrics={},
        step_errors=tuple(_error(runs, exact, step) for step in range(len(case.forecasts))) if same_length else (),
        executed=tuple(run.executed for run in runs),
        shown=np.concatenate([run.pictures for run in runs])[:shown],
    )


def _error(runs: Sequence[_Run], exact: Sequence[_Run], step: int) -> float:
    """`Difference.latent_error` after a step."""
    seen, expected = (
        np.concatenate([run.latents[step] for run in group]).astype(np.float64) for group in (runs, exact)
    )
    return float(np.linalg.norm(seen - expected) / np.linalg.norm(expected))


def _difference(runs: Sequence[_Run], exact: Sequence[_Run]) -> Difference:
    made, reference = (np.concatenate([run.pictures for run in group]) for group in (runs, exact))
    seen, expected, peak = made.astype(np.float64), reference.astype(np.float64), _WHITE
    if not len(made):
        seen, expected = (
            np.concatenate([run.latents[-1] for run in group]).astype(np.float64) for group in (runs, exact)
        )
        peak = float(expected.max() - expected.min())
    squares = np.square(seen - expected).reshape(len(seen), -1).mean(1)
    return Difference(
        latent_error=_error(runs, exact, -1),
        psnr=_decibel(squares.mean(), peak),
        psnr_worst=_decibel(squares.max(), peak),
        ssim=_ssim(made, reference),
    )


def _ssim(made: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean structural similarity; None without pictures."""
    from skimage.metrics import structural_similarity

    if not len(made):
        return None
    return float(np.mean([structural_similarity(a, b, channel_axis=2) for a, b in zip(reference, made, strict=True)]))


def _decibel(square: float, peak: float) -> float | None:
    return float(10 * np.log10(peak**2 / square)) if square else None


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    names = list(rows[0].metrics)
    head = "".join(f"{name:>{len(name) + 2}}" for name in names)
    lines = [f"  {'way':<22}{'full':>6}{'loop ms':>10}{'latent error':>14}{'PSNR dB':>10}{'worst':>8}{'SSIM':>8}{head}"]
    for row in rows:
        cells = "".join(f"{row.metrics[name]:>{len(name) + 2}.3f}" for name in names)
        lines.append(
            f"  {row.name:<22}{round(row.full_steps, 1):>6g}{row.loop_ms:>10.1f}{row.latent_error:>14.4f}"
            f"{number(row.psnr, 1):>10}{number(row.psnr_worst, 1):>8}"
            f"{'-' if row.ssim is None else number(row.ssim, 3):>8}{cells}"
        )
    return "\n".join(lines)


def table_of_errors(rows: Sequence[Row], against: str = UNQUANTISED) -> str:
    """The rows against the unquantised model, for a terminal; nothing where that was not run.

    Args:
        rows: From `evaluate`.
        against: What that model is, as `Quantised.compared_with` has it.
    """
    alone = "" if against == UNQUANTISED else " of activations alone"
    found = [(row.name, row.unquantised) for row in rows if row.unquantised]
    lines = [
        f"  against {against}, all steps full: `all full` is the quantisation error{alone}, every other way both",
        f"  {'way':<22}{'latent error':>14}{'PSNR dB':>10}{'worst':>8}{'SSIM':>8}",
    ]
    for name, off in found:
        lines.append(
            f"  {name:<22}{off.latent_error:>14.4f}{number(off.psnr, 1):>10}{number(off.psnr_worst, 1):>8}"
            f"{'-' if off.ssim is None else number(off.ssim, 3):>8}"
        )
    return "\n".join(lines if found else [])


def number(value: float | None, digits: int) -> str:
    """A PSNR as text; `same` where nothing differs."""
    return "same" if value is None else f"{value:.{digits}f}"
