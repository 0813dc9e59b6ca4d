"""Calibration: the plan and the forecast weights that suit one model, found on its own engines.

1. All-full loops of the samples, and the inner products of their reuse errors (`reuse`).
2. Candidate plans with the number of full steps that the budget allows (`planning`), and the regular one.
3. For each, the weights, fitted where they act: the loop runs with the plan, and on each forecast step the weights are
   chosen that bring its latents nearest to those of the all-full loop. What earlier forecasts left wrong is thereby
   corrected as far as a forecast can. With r the way from the paper's forecast to the all-full latents of a sample, J
   how that forecast moves with the weights (their sum kept at 1), and the sums over all samples so far:

       change of the weights = (Σ Jᵀ J / |r|² + ridge)⁻¹ Σ Jᵀ r / |r|²

   Dividing by |r|² lets a sample that any forecast misses by far decide no more than another.
4. Candidates are judged on samples that their weights were not fitted to: fitted to one half of the groups, run on the
   other, and the reverse. From the best one, full steps are moved one at a time as long as that helps, and the ridge is
   chosen. Its weights are then fitted to all groups, and tried on samples that took no part in any of this.

The distance between two latents is a PSNR whose peak is the range of the exact ones, for each sample by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.profile import Evidence, Profile
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts, Plan, Rule, forecast_weights
from taylorseer_export.method.plan import FEW_STEPS
from taylorseer_export.report.guards import fit_threshold
from taylorseer_export.report.plan_search import RIDGE, Planner, directions, neighbours, regular_plan
from taylorseer_export.report.reuse import Archive, ReuseErrors, all_full
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Pool, Request, denoise

_NOT_LESS = 1e-3  # of the mean |r|², added to each, so that a sample without an error does not decide alone
_LEAST = 1e-20  # mean square over peak square that still counts as a difference: 200 dB
_KEPT = 0.5  # share of the gain over the regular plan, in dB, that must remain on held-out samples
_TILTS = (-1.5, 0.0, 1.5)
_COHERENT = (0.0, 0.5, 1.0)
_RIDGES = (1e-3, RIDGE, 1e-1)
MOVES = 12  # plans tried beside the best candidate, one full step moved


@dataclass(frozen=True, eq=False)
class Way:
    """One way to sample, and the PSNR of its latents to all-full: of each fitted and each held-out sample, in dB."""

    forecasts: Forecasts
    fitted_each: np.ndarray
    held_out_each: np.ndarray

    @property
    def fitted(self) -> float:
        """Mean over the fitted samples, in dB."""
        return float(self.fitted_each.mean())

    @property
    def held_out(self) -> float:
        """Mean over the held-out samples, in dB."""
        return float(self.held_out_each.mean())


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, beside what it has to beat.

    Attributes:
        calibrated, regular, fewer_steps: The plan found, the paper's of as many full steps, and as many steps all full.
        thresholds: Of guards, with as many full steps.
        others: Other numbers of full steps that were tried -> their margin over fewer steps, in dB.
    """

    calibrated: Way
    regular: Way
    fewer_steps: Way
    thresholds: Mapping[Rule, float] = field(default_factory=dict)
    others: Mapping[int, float] = field(default_factory=dict)

    @property
    def margin(self) -> float:
        """How far it is above fewer steps on held-out samples, in dB; below where negative."""
        return self.calibrated.held_out - self.fewer_steps.held_out

    @property
    def margins(self) -> dict[int, float]:
        """Full steps -> that margin, of it and of the other numbers that were tried."""
        return dict(sorted({**self.others, len(self.fewer_steps.forecasts): self.margin}.items()))

    @property
    def verdict(self) -> str:
        """Whether a plan beats fewer steps, in one sentence."""
        steps, ahead = len(self.calibrated.forecasts), {n: gap for n, gap in self.margins.items() if gap > 0}
        shown = ", ".join(f"{gap:+.1f} dB at {n}" for n, gap in self.margins.items())
        if not self.others:
            said = "beats" if ahead else "does not beat"
            return f"the plan {said} fewer steps: {shown} full steps"
        if not ahead:
            return f"no plan of {steps} steps beats fewer steps ({shown} full steps): take fewer, and forecast nothing"
        budgets = f"{len(ahead)} of {len(self.margins)} budgets"
        return f"a plan of {steps} steps beats fewer steps at {budgets}: {shown} full steps"

    @property
    def samples(self) -> int:
        """Samples that were fitted to."""
        return len(self.calibrated.fitted_each)

    @property
    def held_out(self) -> int:
        """Samples that took no part."""
        return len(self.calibrated.held_out_each)

    def check(self) -> None:
        """Refuse what held-out samples do not confirm.

        They must show a gain over the regular plan, half of that on the fitted samples or less by no more than chance
        explains (two standard errors of the mean), and nothing lost against fewer steps.

        Raises:
            ConfigError: They do not.
        """
        best, paper, fewer = self.calibrated, self.regular, self.fewer_steps
        each = best.held_out_each - paper.held_out_each
        gain, kept = best.fitted - paper.fitted, float(each.mean())
        chance = 2 * float(each.std(ddof=1)) / len(each) ** 0.5 if len(each) > 1 else 0.0
        if kept <= 0 or kept + chance < _KEPT * gain:
            raise ConfigError(
                f"calibration gains {gain:.1f} dB over the regular plan on its {self.samples} samples and "
                f"{kept:.1f} dB on {self.held_out} others, expected at least half as much; raise --samples"
            )
        if best.held_out < fewer.held_out:
            raise ConfigError(
                f"calibration reaches {best.held_out:.1f} dB on {self.held_out} held-out samples, expected at least "
                f"the {fewer.held_out:.1f} dB of {len(fewer.forecasts)} steps, all full; sample with --steps "
                f"{len(fewer.forecasts)}, or raise --full-steps"
            )


class Calibrator:
    """Calibrates one model on the samples of `requests`, for loops of one length.

    Args:
        denoiser: The loaded bundle.
        requests: Groups of samples that are fitted to; all of one size.
        held_out: Groups that are not.
        steps: Length of the loop.
        window: Largest distance from a full step to a forecast that draws on it.
        on_step: Called after every step of every loop.
        moves: Plans tried beside the best candidate.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        requests: Sequence[Request],
        held_out: Sequence[Request],
        steps: int,
        window: int,
        on_step: Callable[[], object] = lambda: None,
        moves: int = MOVES,
    ) -> None:
        self.denoiser, self.steps, self._on_step, self._moves = denoiser, steps, on_step, moves
        self._pool = Pool(denoiser)
        self.errors = ReuseErrors(steps, window)
        self.fitted, self.held_out = Archive(requests), Archive(held_out)
        for archive in (self.fitted, self.held_out):
            for group in range(len(archive)):
                request = archive.request(group)
                slot = self._pool.of(request)
                trajectory = all_full(denoiser, slot, request, steps, on_step)
                if archive is self.fitted:
                    self.errors.add(denoiser, slot, trajectory, on_step)
                archive.keep(group, trajectory)
        self._planners: dict[int, list[Planner]] = {}

    def calibrate(self, full_steps: int, order: int, moves: int | None = None) -> Calibration:
        """The best plan and weights found with `full_steps` full steps; `check` of what is returned judges them.

        Raises:
            ConfigError: The number leaves nothing to forecast, or nothing to forecast from.
        """
        check_full_steps(full_steps, self.steps)
        regular = regular_plan(self.steps, full_steps, self.denoiser.manifest.plan.warmup)
        best, ridge = self._search([Forecasts(p, order) for p in self._candidates(full_steps, order, regular)], moves)
        return Calibration(
            self._way(self._fit(best, range(len(self.fitted)), ridge)),
            self._way(Forecasts(regular, order)),
            self._way(Forecasts(Plan.all_full(full_steps), 0)),
        )

    def calibrate_to(self, psnr: float, order: int) -> Calibration:
        """The same with the fewest full steps that reach `psnr` on held-out samples, found by bisection.

        Raises:
            ConfigError: No plan with a forecast step reaches it.
        """
        low, high = 0, self.steps
        found: Calibration | None = None
        reached = 0.0
        while high - low > 1:
            middle = (low + high) // 2
            tried = self.calibrate(middle, order, moves=0)
            reached = max(reached, tried.calibrated.held_out)
            if tried.calibrated.held_out >= psnr:
                found, high = tried, middle
            else:
                low = middle
        if found is None:
            raise ConfigError(
                f"--psnr is {psnr:g}, expected at most {reached:.1f} (dB), what a plan with one forecast step reaches; "
                "lower it"
            )
        return found

    def margins(self, order: int, known: int) -> dict[int, float]:
        """Full steps -> margin over fewer steps in dB, of every number but the `known` one; none in a longer loop.

        A loop of few steps has few budgets, so that each is tried: whether any plan beats fewer steps is then known.
        """
        tried = range(1, self.steps) if self.steps <= FEW_STEPS else ()
        return {n: self.calibrate(n, order, moves=0).margin for n in tried if n != known}

    def thresholds(self, full_steps: int) -> dict[Rule, float]:
        """Of every guard of the bundle, the threshold that gives at most as many full steps on the fitted samples.

        None where the budget is too small for the warm-up of a guard's plan.
        """
        manifest = self.denoiser.manifest
        base = Forecasts(Plan.guarded(self.steps, manifest.plan.warmup), self.denoiser.defaults.order)
        if full_steps < len(base.plan.full_steps):
            return {}
        requests = [self.fitted.request(group) for group in range(len(self.fitted))]
        return {
            rule: fit_threshold(self.denoiser, self._pool, requests, base, rule, full_steps, self._on_step)
            for rule in manifest.state.guards
        }

    def _candidates(self, full_steps: int, order: int, regular: Plan) -> list[Plan]:
        """Plans of the least cost, whatever share and tilt the cost has, and the regular one where it has as many."""
        if order not in self._planners:
            self._planners[order] = [Planner(self.errors, order, tilt) for tilt in _TILTS]
        plans = {p.best(full_steps, share) for p in self._planners[order] for share in _COHERENT}
        if len(regular.full_steps) == full_steps:
            plans.add(regular)
        return sorted(plans, key=str)

    def _search(self, candidates: Sequence[Forecasts], moves: int | None) -> tuple[Forecasts, float]:
        """The plan that does best on samples it was not fitted to, and the ridge that suits it."""
        known = {candidate: self._crossed(candidate, RIDGE) for candidate in candidates}
        best = max(known, key=lambda candidate: known[candidate])
        left = self._moves if moves is None else moves
        drawn = np.random.default_rng(0)
        waiting = neighbours(best.plan)
        drawn.shuffle(waiting)
        while left and waiting:
            candidate = replace(best, plan=waiting.pop())
            if candidate in known:
                continue
            left -= 1
            known[candidate] = self._crossed(candidate, RIDGE)
            if known[candidate] > known[best]:
                best, waiting = candidate, neighbours(candidate.plan)
                drawn.shuffle(waiting)
        ridges = {ridge: known[best] if ridge == RIDGE else self._crossed(best, ridge) for ridge in _RIDGES}
        return best, max(ridges, key=lambda ridge: ridges[ridge])

    def _crossed(self, candidate: Forecasts, ridge: float) -> float:
        """Mean PSNR of the fitted samples, each run with weights fitted to the other half of the groups, in dB.

        With one group there is no other half: it is run with weights fitted to itself.
        """
        halves = [range(k, len(self.fitted), 2) for k in (0, 1)]
        if not halves[1]:
            halves = [halves[0], halves[0]]
        found = [
            self._psnr(self.fitted, run, self._fit(candidate, fitted, ridge)) for fitted, run in (halves, halves[::-1])
        ]
        return float(np.concatenate(found).mean())

    def _fit(self, paper: Forecasts, chosen: Sequence[int], ridge: float) -> Forecasts:
        """The same plan and order with weights fitted in the loop, group after group."""
        changes: dict[int, Any] = defaultdict(lambda: [0.0, 0.0])  # step -> [sum of J'J, sum of J'r]
        weights: list[tuple[float, ...]] = [()] * len(paper)
        for group in chosen:
            request, exact = self.fitted.request(group), self.fitted.latents(group)
            loop, branches = Loop(self.denoiser, request, paper), self._pool.of(request)
            fit = partial(self._fit_step, loop, branches, exact, ridge, changes, weights)
            loop.begin(branches)
            for _ in denoise(loop, branches, before=fit):
                self._on_step()
        return replace(paper, weights=tuple(weights))

    def _fit_step(
        self,
        loop: Loop,
        branches: Branches,
        exact: np.ndarray,
        ridge: float,
        changes: dict[int, Any],
        weights: list[tuple[float, ...]],
        step: int,
        model_input: np.ndarray,
    ) -> None:
        """Fit the weights of the step that comes next, if it is a forecast step, and leave them in place for it."""
        plan, order = loop.plan, loop.forecasts.order
        if plan.is_full(step):
            return
        start = np.array(forecast_weights(plan.history(step, order), step, order))
        free, count = directions(len(start)), len(exact[step + 1])

        def landing(tried: np.ndarray) -> np.ndarray:
            prediction = loop.prediction(branches.try_weights(model_input, tried))
            return loop.preview(prediction).reshape(count, -1).astype(np.float64)

        if free.size:
            base = landing(start)
            moves = np.stack([landing(start + column) - base for column in free.T], -1)
            missed = exact[step + 1].reshape(count, -1) - base
            squares = np.square(missed).sum(1)
            equal = 1 / (squares + _NOT_LESS * squares.mean() + np.finfo(np.float64).tiny)
            sums = changes[step]
            sums[0] = sums[0] + np.einsum("nkf,n,nkg->fg", moves, equal, moves)
            sums[1] = sums[1] + np.einsum("nkf,n,nk->f", moves, equal, missed)
            held = ridge * np.trace(sums[0]) / free.shape[1] * np.eye(free.shape[1])
            start = start + free @ np.linalg.solve(sums[0] + held, sums[1])
        weights[step] = tuple(float(w) for w in start)
        branches.try_weights(model_input, weights[step])

    def _way(self, forecasts: Forecasts) -> Way:
        fitted, held_out = (
            self._psnr(archive, range(len(archive)), forecasts) for archive in (self.fitted, self.held_out)
        )
        return Way(forecasts, fitted, held_out)

    def _psnr(self, archive: Archive, chosen: Sequence[int], forecasts: Forecasts) -> np.ndarray:
        """PSNR of the latents of each sample of the chosen groups against all-full, in dB."""
        found = [np.zeros(0)]
        for group in chosen:
            request = archive.request(group)
            loop = Loop(self.denoiser, request, forecasts)
            branches = self._pool.of(request)
            loop.begin(branches)
            for _ in denoise(loop, branches):
                self._on_step()
            found.append(psnr_of_each(loop.latents, archive.latents(group)[-1]))
        return np.concatenate(found)


def psnr_of_each(latents: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """PSNR of each sample's latents `[N, ...]`, with the range of its exact ones as the peak: `[N]` in dB."""
    seen, true = (x.reshape(len(x), -1).astype(np.float64) for x in (latents, exact))
    squares = np.square(seen - true).mean(1) / np.square(np.ptp(true, axis=1))
    return np.asarray(-10 * np.log10(np.maximum(squares, _LEAST)))


def profile_of(manifest: Manifest, name: str, found: Calibration) -> Profile:
    """The profile that keeps a calibration of the model of `manifest`; raises what `Calibration.check` raises."""
    found.check()
    best = found.calibrated.forecasts
    assert best.weights is not None

    def evidence(way: Way) -> Evidence:
        return Evidence(fitted=way.fitted, held_out=way.held_out)

    return Profile(
        tool_version=manifest.tool_version,
        name=name,
        family=manifest.family,
        weights_sha256=manifest.model.weights_sha256,
        granularity=manifest.state.granularity,
        order=best.order,
        plan=str(best.plan),
        weights=best.weights,
        thresholds=dict(found.thresholds),
        samples=found.samples,
        held_out=found.held_out,
        calibrated=evidence(found.calibrated),
        regular=evidence(found.regular),
        fewer_steps=evidence(found.fewer_steps),
        margins={str(n): margin for n, margin in found.margins.items()},
    )


def check_full_steps(full_steps: int, steps: int) -> None:
    """Refuse a budget that leaves nothing to forecast or nothing to forecast from, with a `ConfigError`."""
    if not 1 <= full_steps < steps:
        raise ConfigError(
            f"full steps are {full_steps}, expected 1 to {steps - 1} in a loop of {steps} (steps); change "
            "--full-steps, --speedup or --steps"
        )
