"""How long the stages of one request took, as whoever waits for it is told: the same by every door."""

from __future__ import annotations

import statistics
import time

STAGES = ("read", "queue", "prepare", "full_step", "forecast_step", "loop")


class Times:
    """The clock of one request; it runs from now on.

    The service asks whether the sender of a request has left as it gives it a slot, and before every step: those are
    its turns. All times are in milliseconds.
    """

    def __init__(self) -> None:
        self._received = self._read = time.perf_counter()
        self._turns: list[float] = []
        self._steps: list[float] = []

    def read(self) -> None:
        """It was read; next it is given to the service."""
        self._read = time.perf_counter()

    def turn(self) -> None:
        """The service asks whether its sender has left."""
        self._turns.append(time.perf_counter())

    def step(self) -> float:
        """A step is done: what it took, with the wait of those that it shared a call with."""
        self._steps.append(1e3 * (time.perf_counter() - self._turns[-1]))
        return self._steps[-1]

    def stages(self, executed: str) -> dict[str, float | None]:
        """Those of `STAGES`, now that the loop has ended.

        Args:
            executed: The plan as run; of its two kinds of step the medians are told, None where there was none.
        """
        seated, first, *_ = self._turns
        by_kind = {kind: [t for t, k in zip(self._steps, executed, strict=True) if k == kind] for kind in "F."}
        times = {
            "read": 1e3 * (self._read - self._received),
            "queue": 1e3 * (seated - self._read),
            "prepare": 1e3 * (first - seated),
            "full_step": statistics.median(by_kind["F"]) if by_kind["F"] else None,
            "forecast_step": statistics.median(by_kind["."]) if by_kind["."] else None,
            "loop": 1e3 * (time.perf_counter() - first),
        }
        return {name: None if value is None else round(value, 3) for name, value in times.items()}
