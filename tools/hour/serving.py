"""Serving: many requests at once over one loaded bundle, each answer as alone, and what sharing calls is worth."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import flux_inputs, mid_flux, tiny_flux

from hour.goals import Goal, at_least, at_most
from hour.report import Report
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft, trace_model, write_bundle
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.sampling import Loop, Request, sample
from taylorseer_export.serve.service import Limits, Service

SLOTS, REQUESTS, WORKERS = 4, 12, 2


class Caller:
    """Waits for one answer."""

    def __init__(self) -> None:
        self.latents: np.ndarray | None = None
        self.error: Exception | None = None
        self._done = threading.Event()

    def cancelled(self) -> bool:
        return False

    def advanced(self, loop: Loop) -> None:
        pass

    def finished(self, loop: Loop, executed: str) -> None:
        self.latents = loop.latents
        self._done.set()

    def failed(self, error: Exception) -> None:
        self.error = error
        self._done.set()

    def wait(self, seconds: float) -> None:
        if not self._done.wait(seconds):
            self.error = TimeoutError(f"no answer within {seconds:.0f} s")


def run(args: Any, report: Report) -> None:
    """Build an AOTInductor bundle of a FLUX-shaped model, and send it requests one by one and all at once."""
    with tempfile.TemporaryDirectory() as folder:
        denoiser, inputs = loaded(args, Path(folder))
        try:
            served(denoiser, inputs, args, report)
        finally:
            denoiser.close()


def loaded(args: Any, folder: Path) -> tuple[Denoiser, Any]:
    """The bundle, and what makes the inputs of a request from its seed."""
    model = tiny_flux() if args.tiny else mid_flux()
    side, text = (4, 6) if args.tiny else (32, 64)
    model.save_pretrained(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"), FAMILIES["flux"])
    precision = "fp32" if args.device == "cpu" else "bf16"
    options = Options(order=1, interval=4, warmup=2, steps=args.steps or 20, granularity="residual", engine="inductor",
                      device=args.device, precision=precision, latent_size=(2 * side, 2 * side))  # fmt: skip
    bundle = write_bundle(draft(trace_model(checkpoint, options), options), folder, "hour")
    denoiser = load(bundle, args.device)
    return denoiser, lambda seed: flux_inputs(model, 1, 1, side, side, text, seed)


def requests_of(inputs: Any, steps: int) -> list[tuple[Request, Forecasts]]:
    """Requests that differ in noise, text, plan and order."""
    plans = [Plan.regular(steps, 4, 2), Plan.all_full(steps), Plan.regular(steps, 3, 1)]
    made = []
    for k in range(REQUESTS):
        latents, _, conditioning = inputs(k)
        arrays = {name: value.numpy() for name, value in conditioning.items()}
        made.append((Request(latents[0].numpy(), arrays, False, 1.0, 0, 0), Forecasts(plans[k % 3], k % 2)))
    return made


def served(denoiser: Denoiser, inputs: Any, args: Any, report: Report) -> None:
    """Alone first, then together; the goals are equality, no failure and no call without its CUDA graph."""
    asked = requests_of(inputs, args.steps or 20)
    sample(denoiser, *asked[0])  # warm
    began = time.perf_counter()
    alone = [sample(denoiser, request, forecasts).latents for request, forecasts in asked]
    one_by_one = time.perf_counter() - began
    service = Service(denoiser, Limits(slots=SLOTS, batch=SLOTS, workers=WORKERS))
    try:
        service.warm_up()
        waves = []
        for _ in range(2):  # the first wave compares shared calls with calls alone
            callers = [Caller() for _ in asked]
            began = time.perf_counter()
            for (request, forecasts), caller in zip(asked, callers, strict=True):
                service.submit(request, forecasts, caller)
            for caller in callers:
                caller.wait(max(1.0, report.left()))
            waves.append((time.perf_counter() - began, callers))
        counts = service.snapshot()
        unequal = sorted(map(str, service.unequal))
    finally:
        service.close()
    answers = [caller for _, callers in waves for caller in callers]
    errors = sorted({str(caller.error) for caller in answers if caller.error is not None})
    same = sum(
        caller.latents is not None and caller.latents.tobytes() == latents.tobytes()
        for caller, latents in zip(answers, 2 * alone, strict=True)
    )
    calls = counts.get("calls.full", 0) + counts.get("calls.forecast", 0)
    found = {
        "model": f"{'tiny' if args.tiny else 'mid'} FLUX, residual, order 1",
        "requests": REQUESTS, "slots": SLOTS, "workers": WORKERS, "one_by_one_s": one_by_one,
        "together_s": [seconds for seconds, _ in waves], "throughput": one_by_one / waves[-1][0],
        "steps_per_call": (counts.get("steps.full", 0) + counts.get("steps.forecast", 0)) / calls if calls else 0.0,
        "unequal": unequal, "errors": errors, "counts": counts, "torch": torch.__version__,
    }  # fmt: skip
    goals: list[Goal] = [
        at_least("serving: answers that are bit for bit those alone", len(answers), same),
        at_most("serving: requests that failed", 0, counts.get("requests.failed", 0) + len(errors)),
        at_most("serving: calls without a CUDA graph", 0, counts["fallbacks.cuda_graph"]),
    ]
    report.write(found, goals)
    print(found, flush=True)
