"""Calibration: the plan and the forecast weights that suit one model, found on its own engines.

1. All-full loops of the samples, and the inner products of their reuse errors (`reuse`).
2. Candidate plans with the number of full steps that the budget allows (`planning`), and the regular one.
3. For each, the weights, fitted where they act: the loop runs with the plan, and on each forecast step the weights are
   chosen that bring its latents nearest to those of the all-full loop. What earlier forecasts left wrong is thereby
   corrected as far as a forecast can. With r the way from the paper's forecast to the all-full latents, J how that
   forecast moves with the weights (their sum kept at 1), and the sums over all samples so far:

       change of the weights = (Σ Jᵀ J + ridge)⁻¹ Σ Jᵀ r

4. The candidate nearest to all-full on the fitted samples, tried on samples that took no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.profile import Evidence, Profile
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Plan, forecast_weights
from taylorseer_export.report.planning import RIDGE, Planner, directions, regular_plan
from taylorseer_export.report.reuse import ReuseErrors, Trajectory, all_full
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Loop, Request, sample
from taylorseer_export.runtime.slot import Slot

_LEAST = 1e-20  # mean square over peak square that still counts as a difference: 200 dB
_KEPT = 0.5  # share of the gain over the regular plan, in dB, that must remain on held-out samples

Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Way:
    """One way to sample and how near it comes to all-full on fitted and on held-out samples: mean PSNR, in dB."""

    plan: Plan
    order: int
    weights: Weights | None
    fitted: float
    held_out: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, beside what it has to beat."""

    calibrated: Way
    regular: Way
    fewer_steps: Way
    samples: int
    held_out: int


class Calibrator:
    """Calibrates one model on the samples of `requests`, for loops of one length.

    Args:
        denoiser: The loaded bundle.
        requests: Groups of samples that are fitted to; all of one size.
        held_out: Groups that are not.
        steps: Length of the loop.
        window: Largest distance from a full step to a forecast that draws on it.
        on_step: Called after every step of every loop.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        requests: Sequence[Request],
        held_out: Sequence[Request],
        steps: int,
        window: int,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.denoiser, self.steps, self._on_step = denoiser, steps, on_step
        self._slots: dict[tuple[int, ...], Slot] = {}
        self.errors = ReuseErrors(steps, window)
        self.fitted: list[Trajectory] = []
        for request in requests:
            trajectory = all_full(denoiser, self._slot(request), request, steps, on_step)
            self.errors.add(denoiser, self._slot(request), trajectory, on_step)
            self.fitted.append(trajectory)
        self.held_out = [all_full(denoiser, self._slot(r), r, steps, on_step) for r in held_out]

    def calibrate(self, full_steps: int, order: int) -> Calibration:
        """The best plan and weights found with `full_steps` full steps.

        Raises:
            ConfigError: What was gained on the fitted samples is not there on the others.
        """
        check_full_steps(full_steps, self.steps)
        regular = regular_plan(self.steps, full_steps, self.denoiser.manifest.plan.warmup)
        plans = {Planner(self.errors, order, coherent).best(full_steps) for coherent in (True, False)}
        if len(regular.full_steps) == full_steps:
            plans.add(regular)
        ways = []
        for plan in sorted(plans, key=str):
            weights = self._fit(plan, order)
            ways.append(self._way(plan, order, weights))
        best = max(ways, key=lambda way: way.fitted)
        paper = self._way(regular, order, None)
        fewer = self._way(Plan("F" * full_steps), 0, None)
        gain, kept = best.fitted - paper.fitted, best.held_out - paper.held_out
        if kept < _KEPT * gain:
            raise ConfigError(
                f"calibration gains {gain:.1f} dB over the regular plan on its {self._count(self.fitted)} samples and "
                f"{kept:.1f} dB on {self._count(self.held_out)} others, expected at least half as much; raise --samples"
            )
        return Calibration(best, paper, fewer, self._count(self.fitted), self._count(self.held_out))

    def calibrate_to(self, psnr: float, order: int) -> Calibration:
        """The same with the fewest full steps that reach `psnr` on held-out samples, found by bisection.

        Raises:
            ConfigError: No plan with a forecast step reaches it.
        """
        low, high = 1, self.steps
        found: Calibration | None = None
        reached = 0.0
        while high - low > 1:
            middle = (low + high) // 2
            tried = self.calibrate(middle, order)
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

    def _fit(self, plan: Plan, order: int) -> Weights:
        """The weights of each step of `plan`, fitted in the loop, group after group."""
        changes: dict[int, Any] = defaultdict(lambda: [0.0, 0.0])  # step -> [sum of J'J, sum of J'r]
        weights: list[tuple[float, ...]] = [()] * len(plan)
        for trajectory in self.fitted:
            loop, slot = Loop(self.denoiser, trajectory.request, plan, order), self._slot(trajectory.request)
            loop.start(slot)
            for step in range(len(plan)):
                model_input = loop.model_input()
                if not plan.is_full(step):
                    aim = trajectory.latents[step + 1].astype(np.float64)
                    start = np.array(forecast_weights(plan.history(step, order), step, order))

                    def landing(tried: np.ndarray) -> np.ndarray:
                        prediction = loop.prediction(slot.try_weights(model_input, tried))  # noqa: B023
                        return loop.preview(prediction).ravel().astype(np.float64)  # noqa: B023

                    free = directions(len(start))
                    base = landing(start)
                    if free.size:
                        moves = np.stack([landing(start + column) - base for column in free.T], 1)
                        sums = changes[step]
                        sums[0] = sums[0] + moves.T @ moves
                        sums[1] = sums[1] + moves.T @ (aim.ravel() - base)
                        ridge = RIDGE * np.trace(sums[0]) / free.shape[1] * np.eye(free.shape[1])
                        start = start + free @ np.linalg.solve(sums[0] + ridge, sums[1])
                    weights[step] = tuple(float(w) for w in start)
                    slot.try_weights(model_input, weights[step])
                loop.accept(slot.step(model_input))
                self._on_step()
        return tuple(weights)

    def _way(self, plan: Plan, order: int, weights: Weights | None) -> Way:
        fitted, held_out = (self._psnr(group, plan, order, weights) for group in (self.fitted, self.held_out))
        return Way(plan, order, weights, fitted, held_out)

    def _psnr(self, trajectories: Sequence[Trajectory], plan: Plan, order: int, weights: Weights | None) -> float:
        """PSNR of the latents against all-full, with their range as the peak: the mean over samples, in dB."""
        found: list[float] = []
        for trajectory in trajectories:
            slot = self._slot(trajectory.request)
            result = sample(
                self.denoiser, trajectory.request, plan, order, slot=slot, weights=weights,
                on_step=lambda step: self._on_step(),
            )  # fmt: skip
            exact = trajectory.latents[-1].astype(np.float64)
            squares = np.square(result.latents - exact).reshape(len(exact), -1).mean(1) / np.ptp(exact) ** 2
            found += list(-10 * np.log10(np.maximum(squares, _LEAST)))
        return float(np.mean(found)) if found else float("nan")

    def _slot(self, request: Request) -> Slot:
        """One slot for all groups of one size."""
        if request.latents.shape not in self._slots:
            loop = Loop(self.denoiser, request, Plan("F"))
            self._slots[request.latents.shape] = self.denoiser.slot(loop.sizes)
        return self._slots[request.latents.shape]

    def _count(self, trajectories: Sequence[Trajectory]) -> int:
        return sum(len(t.request.latents) for t in trajectories)


def profile_of(manifest: Manifest, name: str, found: Calibration) -> Profile:
    """The profile that keeps a calibration of the model of `manifest`."""
    best = found.calibrated
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
        thresholds={},
        samples=found.samples,
        held_out=found.held_out,
        calibrated=evidence(best),
        regular=evidence(found.regular),
        fewer_steps=evidence(found.fewer_steps),
    )


def check_full_steps(full_steps: int, steps: int) -> None:
    """Refuse a budget that leaves nothing to forecast or nothing to forecast from, with a `ConfigError`."""
    if not 1 <= full_steps < steps:
        raise ConfigError(
            f"full steps are {full_steps}, expected 1 to {steps - 1} in a loop of {steps} (steps); change "
            "--full-steps, --speedup or --steps"
        )
