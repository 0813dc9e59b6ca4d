"""Planning: where a number of full steps does most good, by dynamic programming over products of reuse errors.

The steps between two full steps are a segment. Its cost is the squared distance by which its forecasts together move
the latents wrong, each with the weights that suit it best:

    cost = |Σ_s Σᵢ w_s[i] · d(tᵢ, s)|²         coherent: errors of one segment point the same way and add up
    cost = Σ_s |Σᵢ w_s[i] · d(tᵢ, s)|²         independent

and shares of both. What a wrong move of the latents early in the loop means at its end, the errors do not say; a tilt
weighs late steps more than early ones, or less. Segments are taken as independent of each other. The history of a
forecast reaches back over several segments; a state holds the last two full steps and keeps the whole path of the
cheapest way to them.
"""

from __future__ import annotations

import numpy as np

from taylorseer_export.method import Plan, forecast_weights
from taylorseer_export.report.reuse import ReuseErrors

RIDGE = 1e-2  # of the mean inner product; what the errors do not tell apart stays as the paper weights it


class Planner:
    """Finds plans for one model.

    Args:
        errors: Measured on the model.
        order: Order of the forecasts.
        tilt: Natural logarithm of what the square of an error at the last step weighs, over the same at the first.
    """

    def __init__(self, errors: ReuseErrors, order: int, tilt: float = 0.0) -> None:
        self.errors, self.order = errors, order
        scales = np.exp(tilt / 2 * np.array([step / errors.steps for _, step in errors.index]))
        self._products = errors.products * np.outer(scales, scales)
        self._places = np.full((errors.steps, errors.steps), -1)
        for (source, step), place in errors.index.items():
            self._places[source, step] = place
        self._known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._paper: dict[tuple[int, ...], tuple[float, ...]] = {}

    def best(self, full_steps: int, coherent: float) -> Plan:
        """The plan of the least cost with this many full steps.

        Args:
            full_steps: At least 1.
            coherent: Share of the coherent cost, 0 to 1; the rest is the independent one.
        """
        steps = self.errors.steps
        layer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, -1): (0.0, (0,))}
        for _ in range(full_steps - 1):
            following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for cost, path in layer.values():
                for gap, segment in enumerate(self._segments(path, coherent), 1):
                    state, total = (path[-1] + gap, path[-1]), cost + segment
                    if state[0] < steps and (state not in following or total < following[state][0]):
                        following[state] = total, (*path, state[0])
            layer = following
        ends = []
        for cost, path in layer.values():
            segments = self._segments(path, coherent)
            trailing = steps - 1 - path[-1]
            # Where no segment reaches the end of the loop, the window was too short: such a path is a last resort.
            ends.append((trailing >= len(segments), cost + segments[min(trailing, len(segments) - 1)], path))
        path = min(ends)[2]
        return Plan("".join("F" if step in path else "." for step in range(steps)))

    def _segments(self, path: tuple[int, ...], coherent: float) -> list[float]:
        """Costs of 0, 1, 2 … forecast steps after the last full step of `path`."""
        begun = Plan("".join("F" if step in path else "." for step in range(path[-1] + 1)) + ".")
        history = begun.history(path[-1] + 1, self.order)
        if history not in self._known:
            self._known[history] = self._measured(history)
        together, apart = self._known[history]
        return list(coherent * together + (1 - coherent) * apart)

    def _measured(self, history: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The coherent and the independent cost of 0, 1, 2 … forecast steps after `history`."""
        products, last = self._products, history[-1]
        after = np.arange(last + 1, self.errors.steps)
        known = (self._places[np.array(history)][:, after] >= 0).sum(0)  # the window lets go of the oldest first
        rows, values, squares = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(1)]
        for count in range(len(history), 0, -1):
            sources, steps = history[-count:], after[known == count]
            own = self._places[np.array(sources)][:, steps].T
            start = np.array([self._taylor(sources, int(step)) for step in steps]).reshape(-1, count)
            blocks = products[own[:, :, None], own[:, None, :]]
            weights = best_weights(blocks, start)
            squares.append(np.einsum("si,sij,sj->s", weights, blocks, weights))
            rows.append(own.ravel())
            values.append(weights.ravel())
        places, mixed = np.concatenate(rows), np.concatenate(values)
        ends = np.concatenate([[0], np.cumsum(known[known > 0])])
        sums = np.zeros((len(places) + 1, len(places) + 1))
        sums[1:, 1:] = (products[np.ix_(places, places)] * np.outer(mixed, mixed)).cumsum(0).cumsum(1)
        return sums[ends, ends], np.concatenate(squares).cumsum()

    def _taylor(self, sources: tuple[int, ...], step: int) -> tuple[float, ...]:
        """The paper's weights, which know nothing but distances."""
        distances = tuple(step - source for source in sources)
        if distances not in self._paper:
            self._paper[distances] = forecast_weights(sources, step, self.order)
        return self._paper[distances]


def best_weights(products: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The weights of sum 1 with the least wᵀ products w, held near `start` by a ridge.

    Args:
        products: `[..., n, n]`.
        start: `[..., n]`.
    """
    count = start.shape[-1]
    if count == 1:
        return start
    free = directions(count)
    ridge = RIDGE * np.trace(products, axis1=-2, axis2=-1)[..., None, None] / count * np.eye(count)
    slope = free.T @ products @ start[..., None]
    return start - (free @ np.linalg.solve(free.T @ (products + ridge) @ free, slope))[..., 0]


def directions(count: int) -> np.ndarray:
    """A basis of the changes that leave the sum of `count` weights as it is: `[count, count - 1]`."""
    return np.eye(count)[:, 1:] - np.eye(count)[:, :1]


def regular_plan(steps: int, full_steps: int, warmup: int) -> Plan:
    """The regular plan with the most full steps up to `full_steps`, its warm-up as near to `warmup` as that allows."""
    plans = [
        (full_steps - len(plan.full_steps), abs(w - warmup), str(plan))
        for w in range(1, min(full_steps, warmup + 1) + 1)
        for interval in range(1, steps + 1)
        for plan in [Plan.regular(steps, interval, w)]
        if len(plan.full_steps) <= full_steps
    ]
    return Plan(min(plans)[2])


def neighbours(plan: Plan) -> list[Plan]:
    """The plans that differ by one full step, moved by one or two steps."""
    full = set(plan.full_steps)
    moved = [
        full - {step} | {step + by}
        for step in plan.full_steps[1:]
        for by in (-2, -1, 1, 2)
        if 0 < step + by < len(plan) and step + by not in full
    ]
    return [Plan("".join("F" if step in steps else "." for step in range(len(plan)))) for steps in moved]
