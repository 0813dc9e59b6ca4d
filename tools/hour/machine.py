"""The device of a bench: its clock, its ceilings, and how compiled code is made and captured on it."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

BF16 = torch.bfloat16


class Machine:
    """A GPU, or a CPU in its place for a trial.

    Args:
        device: `cuda` or `cpu`.
        compiles: Whether `torch.compile` is used.
    """

    def __init__(self, device: str, compiles: bool) -> None:
        self.device, self.cuda, self.compiles = device, device == "cuda", compiles

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def compiled(self, function: Any, fullgraph: bool = True) -> Any:
        return torch.compile(function, fullgraph=fullgraph, dynamic=False) if self.compiles else function

    def milliseconds(self, call: Callable[[], object], repeats: int) -> float:
        """Median over three of the mean time of `repeats` calls; one call warms up."""
        means = []
        call()
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            self.wait()
            means.append(1e3 * (time.perf_counter() - began) / repeats)
        return statistics.median(means)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def peak(self, into: dict[str, Any]) -> Iterator[None]:
        """Largest memory in use inside the block, in bytes; None on the CPU."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        into["peak_bytes"] = torch.cuda.max_memory_allocated() if self.cuda else None

    def bandwidth(self) -> float:
        """Bytes read and written per second by a large copy."""
        count = (1 << 30) if self.cuda else (1 << 24)
        source, target = (torch.zeros(count, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * count / (1e-3 * self.milliseconds(lambda: target.copy_(source), 10))

    def product_rate(self) -> float:
        """FLOPs per second of a large square matrix product in bfloat16."""
        side = 8192 if self.cuda else 256
        a, b = (torch.randn(side, side, dtype=BF16, device=self.device) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / (1e-3 * self.milliseconds(lambda: torch.mm(a, b, out=out), 10))

    def floor(self) -> dict[str, float]:
        """Both ceilings, which the floor of a step is worked out from."""
        return {"bytes_per_s": self.bandwidth(), "flops_per_s": self.product_rate()}


def short(error: BaseException) -> str:
    """An error in one line; torch's own begin with what failed and go on with why."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block when its time is up; compiling may take any time at all."""

    def stop(*_: Any) -> None:
        raise TimeoutError("stopped when the budget was used up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
