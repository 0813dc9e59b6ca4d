"""Planning: where a number of full steps does most good, by dynamic programming over products of reuse errors.

The steps between two full steps are a segment. Its cost is the squared distance by which its forecasts together move
the latents wrong, each with the weights that suit it best:

    cost = |Σ_s Σᵢ w_s[i] · d(tᵢ, s)|²         coherent: errors of one segment point the same way and add up
    cost = Σ_s |Σᵢ w_s[i] · d(tᵢ, s)|²         independent

Segments are taken as independent of each other. The history of a forecast reaches back over several segments; a state
holds the last two full steps and keeps the whole path of the cheapest way to them.
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
        coherent: Which of the two costs.
    """

    def __init__(self, errors: ReuseErrors, order: int, coherent: bool) -> None:
        self.errors, self.order, self.coherent = errors, order, coherent
        self._known: dict[tuple[int, ...], list[float]] = {}

    def best(self, full_steps: int) -> Plan:
        """The plan of the least cost with this many full steps."""
        steps = self.errors.steps
        layer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, -1): (0.0, (0,))}
        for _ in range(full_steps - 1):
            following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for cost, path in layer.values():
                for gap, segment in enumerate(self._segments(path), 1):
                    state, total = (path[-1] + gap, path[-1]), cost + segment
                    if state[0] < steps and (state not in following or total < following[state][0]):
                        following[state] = total, (*path, state[0])
            layer = following
        ends = []
        for cost, path in layer.values():
            segments = self._segments(path)
            trailing = steps - 1 - path[-1]
            # Where no segment reaches the end of the loop, the window was too short: such a path is a last resort.
            ends.append((trailing >= len(segments), cost + segments[min(trailing, len(segments) - 1)], path))
        path = min(ends)[2]
        return Plan("".join("F" if step in path else "." for step in range(steps)))

    def _segments(self, path: tuple[int, ...]) -> list[float]:
        """Costs of 0, 1, 2 … forecast steps after the last full step of `path`."""
        begun = Plan("".join("F" if step in path else "." for step in range(path[-1] + 1)) + ".")
        history = begun.history(path[-1] + 1, self.order)
        if history not in self._known:
            self._known[history] = self._measured(history)
        return self._known[history]

    def _measured(self, history: tuple[int, ...]) -> list[float]:
        products, index = self.errors.products, self.errors.index
        costs, total = [0.0], 0.0
        rows: list[int] = []
        values: list[float] = []
        for step in range(history[-1] + 1, self.errors.steps):
            sources = [t for t in history if (t, step) in index]
            if not sources:
                break
            own = [index[t, step] for t in sources]
            weights = best_weights(products[np.ix_(own, own)], forecast_weights(sources, step, self.order))
            square = float(weights @ products[np.ix_(own, own)] @ weights)
            cross = float(np.array(values) @ products[np.ix_(rows, own)] @ weights) if rows else 0.0
            total += square + (2 * cross if self.coherent else 0.0)
            rows, values = rows + own, [*values, *weights]
            costs.append(total)
        return costs


def best_weights(products: np.ndarray, start: tuple[float, ...]) -> np.ndarray:
    """The weights of sum 1 with the least wᵀ products w, held near `start` by a ridge: `[n]`."""
    weights, count = np.array(start), len(start)
    if count == 1:
        return weights
    free = directions(count)
    ridged = products + RIDGE * np.trace(products) / count * np.eye(count)
    return weights - free @ np.linalg.solve(free.T @ ridged @ free, free.T @ products @ weights)


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
