"""Host work of a step: what Python does around an engine call, measured with engines that do nothing.

    python tools/host_work.py                FLUX, granularity residual, 50 steps, interval 6

On a GPU a forecast step takes well under a millisecond, so the host must have launched the next one by then. Engines
and buffers here are empty, latents are few, and what is left is the runtime: µs of every step, and how often it copies
between host and device and within the device. A slot is given latents that are on the device; eight slots share the
calls that pay, as in a server; the drop-in is called as a pipeline calls its transformer. Then a whole loop over the
latent of a picture of 1024 x 1024 pixels: prediction and latents pass through the host, where the scheduler takes its
step, which is what a sampler on the device would save. The last way is the service with eight requests at a time, its
queue, locks and scheduler included: µs of processor time of all threads for a step of one request, of either kind.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Event
from typing import Any

import numpy as np
import torch
from record import RESULTS, circumstances, dirty_option, write_record

from taylorseer_export.bundle.device import CPU
from taylorseer_export.bundle.manifest import Graph, Manifest
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, describe, draft
from taylorseer_export.errors import TaylorSeerError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.batch import SharedCalls, ids_of
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.runner import Call
from taylorseer_export.runtime.sampling import Loop, denoise
from taylorseer_export.runtime.tensors import tensor_request
from taylorseer_export.runtime.trajectory import random_conditioning
from taylorseer_export.serve.service import Limits, Service

STEPS, INTERVAL, WARMUP, ORDER, SLOTS = 50, 6, 3, 2, 8
GOALS = {"slot": 60.0, "shared": 60.0, "drop-in": 150.0, "served": 300.0}  # µs of a step of one request
TOKENS, TOKENS_OF_A_PICTURE = 8, 4096


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, where its values cost a wait; it is on the CPU, where an operator does not."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True  # type: ignore[assignment]


class Nothing:
    """A buffer that holds nothing and counts the copies. Unit of its size: elements."""

    def __init__(self, shape: tuple[int, ...], address: int, nbytes: int, counts: Counter[str]) -> None:
        self.shape, self.address, self.nbytes, self._counts = shape, address, nbytes, counts

    @cached_property
    def tensor(self) -> torch.Tensor:
        """What the drop-in hands back."""
        return torch.zeros(self.shape).as_subclass(OnGpu)

    def entry(self, index: int) -> Nothing:
        size = self.nbytes // self.shape[0]
        return Nothing(self.shape[1:], self.address + index * size, size, self._counts)

    def write(self, values: Any) -> None:
        self._counts["to the device" if isinstance(values, np.ndarray) else "on the device"] += 1

    def copy(self, source: Any) -> None:
        self._counts["on the device"] += 1

    def clear(self) -> None:
        self._counts["clears"] += 1

    def read(self) -> np.ndarray:
        self._counts["to the host"] += 1
        return np.zeros(self.shape, np.float32)


class NothingRunner:
    """Engines of a manifest that do nothing."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self.graphs, self.device, self.fallbacks = graphs, CPU, 0
        self.counts: Counter[str] = Counter()
        self._free = 0

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Nothing:
        made = Nothing(shape, self._free, math.prod(shape), self.counts)
        self._free += made.nbytes
        return made

    def bind(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        def call() -> None:
            self.counts["launches"] += 1

        return call

    def close(self) -> None:
        pass


@dataclass
class Bench:
    """What the ways of running a step have in common."""

    denoiser: Denoiser
    sizes: dict[str, int]
    conditioning: dict[str, np.ndarray]
    forecasts: Forecasts
    times: dict[str, list[float]]
    counts: dict[str, Counter[str]]

    @property
    def timesteps(self) -> np.ndarray:
        return np.linspace(1.0, 1.0 / STEPS, STEPS, dtype=np.float32)

    def latents(self) -> torch.Tensor:
        """New ones, as every step of a loop has."""
        return torch.zeros(resolve(self.denoiser.latent.shape, self.sizes)).as_subclass(OnGpu)

    def timed(self, step: int, requests: int, work: Callable[[], object]) -> None:
        """Time the step of some requests; per request."""
        kind = "full" if self.forecasts.plan.is_full(step) else "forecast"
        runner = self.denoiser.runner
        assert isinstance(runner, NothingRunner)
        runner.counts.clear()
        began = time.perf_counter_ns()
        work()
        self.times[kind].append((time.perf_counter_ns() - began) / 1e3 / requests)
        self.counts[kind] = runner.counts.copy()


def alone(bench: Bench) -> None:
    """One request in a slot; latents come from the device and the prediction stays there."""
    slot = bench.denoiser.slot(bench.sizes)
    slot.start(bench.conditioning, bench.forecasts, bench.timesteps)
    for step in range(STEPS):
        latents = bench.latents()
        bench.timed(step, 1, lambda latents=latents: slot.advance(latents))  # type: ignore[misc]


def shared(bench: Bench) -> None:
    """Eight requests at the same step, as the service takes them: staged, run in one call if it pays, and counted."""
    slots = [bench.denoiser.slot(bench.sizes) for _ in range(SLOTS)]
    calls, ids = SharedCalls(bench.denoiser), ids_of(bench.denoiser, bench.conditioning)
    for slot in slots:
        slot.start(bench.conditioning, bench.forecasts, bench.timesteps)

    def together(latents: torch.Tensor) -> None:
        for slot in slots:
            slot.stage(latents)
        keys = {calls.key(slot, ids) for slot in slots}
        if None in keys or not calls.run(slots):
            for slot in slots:
                slot.run()
        for slot in slots:
            slot.finish()

    for step in range(STEPS):
        latents = bench.latents()
        bench.timed(step, SLOTS, lambda latents=latents: together(latents))  # type: ignore[misc]


def through_the_drop_in(bench: Bench) -> None:
    """As a pipeline calls it: the timestep a tensor of the batch, the conditioning the same tensors throughout."""
    transformer = bench.denoiser.as_transformer(plan=str(bench.forecasts.plan), order=ORDER)
    constants = {name: torch.from_numpy(value) for name, value in bench.conditioning.items()}
    clock, batch = bench.denoiser.timestep.name, bench.sizes["batch"]
    for step, timestep in enumerate(bench.timesteps):
        latents, now = bench.latents(), torch.full((batch,), float(timestep))

        def call(latents: torch.Tensor = latents, now: torch.Tensor = now) -> None:
            transformer(latents, **{clock: now}, **constants, return_dict=False)

        bench.timed(step, 1, call)
    transformer.reset()


def sampled(bench: Bench) -> None:
    """A loop from noise to latents, as `run` and a server have it."""
    _, *own = bench.denoiser.latent.shape
    known = bench.denoiser.manifest.dimensions
    sizes = bench.sizes | {n: min(known[n].maximum, TOKENS_OF_A_PICTURE) for n in own if isinstance(n, str)}
    conditioning = random_conditioning(bench.denoiser, sizes)
    loop = Loop(bench.denoiser, tensor_request(bench.denoiser, conditioning, sizes=sizes), bench.forecasts)
    branches = loop.open(bench.denoiser)
    loop.begin(branches)
    steps = denoise(loop, branches)
    for step in range(STEPS):
        bench.timed(step, 1, lambda: next(steps))


class Waiting:
    """The sender of a request, who waits for its answer."""

    def __init__(self) -> None:
        self._answered = Event()
        self._error: TaylorSeerError | None = None

    def cancelled(self) -> bool:
        return False

    def advanced(self, loop: Loop) -> None:
        pass

    def finished(self, loop: Loop, executed: str) -> None:
        self._answered.set()

    def failed(self, error: TaylorSeerError) -> None:
        self._error = error
        self._answered.set()

    def wait(self) -> None:
        self._answered.wait()
        if self._error is not None:
            raise self._error


def served(bench: Bench) -> None:
    """Twice as many requests as there are slots, sent to a service with one worker."""
    runner = bench.denoiser.runner
    assert isinstance(runner, NothingRunner)
    request = tensor_request(bench.denoiser, bench.conditioning, sizes=bench.sizes)
    service = Service(bench.denoiser, Limits(slots=SLOTS, batch=SLOTS, workers=1))
    runner.counts.clear()
    senders = [Waiting() for _ in range(2 * SLOTS)]
    began = time.process_time_ns()
    for sender in senders:
        service.submit(request, bench.forecasts, sender)
    for sender in senders:
        sender.wait()
    steps = len(senders) * STEPS
    bench.times["any"].append((time.process_time_ns() - began) / 1e3 / steps)
    bench.counts["any"] = Counter({what: n / steps for what, n in runner.counts.items()})  # type: ignore[misc]
    service.close()


WAYS = {"slot": alone, "shared": shared, "drop-in": through_the_drop_in, "sampled": sampled, "served": served}


def manifest_of(family: str) -> Manifest:
    """The manifest of the embedded model at granularity `residual`; nothing is built."""
    options = Options(order=ORDER, interval=INTERVAL, warmup=WARMUP, steps=STEPS, granularity="residual")
    return describe(draft(open_checkpoint(None, FAMILIES[family]), options), family)


def measure(manifest: Manifest, repeats: int) -> dict[str, Any]:
    """Way -> kind of step -> median µs of a request's step, and how often it copies and launches."""
    sizes = {name: max(d.minimum, min(d.typical, TOKENS)) for name, d in manifest.dimensions.items() if name != "steps"}
    forecasts = Forecasts(Plan.regular(STEPS, INTERVAL, WARMUP), ORDER)
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        times: dict[str, list[float]] = defaultdict(list)
        counts: dict[str, Counter[str]] = {}
        for _ in range(repeats):
            denoiser = Denoiser(manifest, NothingRunner(manifest.graphs))
            conditioning = random_conditioning(denoiser, sizes)
            way(Bench(denoiser, sizes, conditioning, forecasts, times, counts))
        share = SLOTS if way is shared else 1
        found[name] = {
            kind: {
                "microseconds": round(statistics.median(values), 1),
                "goal": GOALS.get(name),
                "per_step": {what: n / share for what, n in sorted(counts[kind].items())},
            }
            for kind, values in sorted(times.items())
        }
    return found


def without_the_host(ways: Mapping[str, Any], plan: Plan) -> dict[str, float]:
    """What it would save at most to launch the forecast steps between two full ones without coming back to the host:
    µs of a forecast step and of a loop, without the two transfers and the wait that a GPU adds."""
    saved = ways["sampled"]["forecast"]["microseconds"] - ways["slot"]["forecast"]["microseconds"]
    stretches = [len(stretch) for stretch in str(plan).split("F") if stretch]
    return {
        "longest_stretch": max(stretches),
        "microseconds_of_a_step": round(saved, 1),
        "microseconds_of_a_loop": round(saved * sum(stretches), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="flux", choices=["flux", "dit"])
    parser.add_argument("--repeats", type=int, default=40, help="requests of each kind (default: 40)")
    parser.add_argument("--file", action="store_true", help="write the record into tools/results")
    dirty_option(parser)
    given = parser.parse_args()
    record = circumstances(RESULTS if given.file else None, given.allow_dirty)
    torch.set_num_threads(1)
    found = measure(manifest_of(given.family), given.repeats)
    for name, kinds in found.items():
        for kind, it in kinds.items():
            per_step = ", ".join(f"{n:g} {what}" for what, n in it["per_step"].items())
            goal = "none" if it["goal"] is None else f"{it['goal']:.0f}"
            print(f"{name:8} {kind:9} {it['microseconds']:7.1f} µs (goal {goal}): {per_step}")
    saved = without_the_host(found, Plan.regular(STEPS, INTERVAL, WARMUP))
    print("stretches of forecast steps without the host would save at most {microseconds_of_a_step:.1f} µs of each, "
          "{microseconds_of_a_loop:.0f} of a loop".format(**saved))  # fmt: skip
    result = {**record, "family": given.family, "granularity": "residual", "steps": STEPS, "ways": found,
              "stretches_without_the_host": saved}  # fmt: skip
    if given.file:
        print(f"wrote {write_record('host-work', result, allow_dirty=given.allow_dirty)}")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
