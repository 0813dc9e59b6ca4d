"""Bench on one GPU: FLUX.1-dev and DiT-XL/2 at full size, random bfloat16 weights, no downloads, under 8 minutes.

    python tools/bench_gpu.py                        both models on the GPU
    python tools/bench_gpu.py --device cpu --tiny    the same code on tiny models, to try the script itself

One process holds one copy of the weights; the contestants come one after the other and free what they took:

    eager        the diffusers model, operator by operator
    compiled     the same under `torch.compile(fullgraph=True)`, captured as one CUDA graph
    hook         diffusers' TaylorSeer hook, eager and compiled, on a plan with as many full steps as ours
    ours         full and forecast steps per granularity and order, compiled by the same torch and captured the same way

The floor of a step is the larger of its bytes over the copy bandwidth and its FLOPs over the bfloat16 matrix product
rate, both measured here. Loops are teacher-forced: the sampler is in no number. Times are milliseconds on the host's
clock between two synchronisations. What does not fit into `--budget` is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cards
import diffusers
import torch
from contestants import HOOKS, hook_schedule
from record import circumstances, record_options, write_record
from tiny_models import dit_inputs, flux_inputs, randomised, tiny_dit, tiny_flux

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.memory import role_bytes, state_bytes
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile import export
from taylorseer_export.compile.eager import pointwise_sums, weighted, writing
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.verify import compare
from taylorseer_export.runtime.denoiser import Denoiser, Slot
from taylorseer_export.runtime.torch_runner import Recorder, TorchRunner
from taylorseer_export.runtime.trajectory import Trajectory

BF16 = torch.bfloat16
GRACE = 30  # seconds past the budget after which a contestant under way is stopped
FULL_SIZE = {"flux": "flux.1-dev", "dit": "dit-xl-2-256"}


class Machine:
    """The device, its clock, and how compiled code is made and captured on it."""

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


class Case:
    """One model on the device, its inputs for every step, and its trace."""

    def __init__(self, name: str, args: argparse.Namespace, machine: Machine) -> None:
        self.name, self.args, self.machine, self.family = name, args, machine, FAMILIES[name]
        self.batch = 1 if name == "flux" else 2
        self.model = _model(name, args.tiny, machine.device)
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        if name == "flux":
            side, text = (4, 6) if args.tiny else (64, 512)
            inputs = flux_inputs(self.model, args.steps, self.batch, side, side, text)
            self.latent_size: tuple[int, int] | None = (2 * side, 2 * side)
        else:
            inputs = dit_inputs(self.model, args.steps, self.batch)
            self.latent_size = None
        latents, self.timesteps, conditioning = inputs
        self.arrays = {key: value.numpy() for key, value in conditioning.items()}
        self.data = Trajectory(latents.numpy(), self.timesteps.float().numpy(), self.arrays)
        self.latents = latents.to(machine.device, BF16)
        self.conditioning = {name: self._own(name, value) for name, value in conditioning.items()}
        checkpoint = Checkpoint(name, self.family, Path(name), config, {}, weightless=True)
        self.traced = export.trace_model(checkpoint, self.options("residual", 1))

    def _own(self, name: str, value: torch.Tensor) -> torch.Tensor:
        floats = value.is_floating_point() and not name.endswith("_ids")
        return value.to(self.machine.device, BF16 if floats else value.dtype)

    def options(self, granularity: Any, order: int) -> export.Options:
        a = self.args
        return export.Options(order=order, interval=a.interval, warmup=a.warmup, steps=a.steps, granularity=granularity,
                              engine="inductor", device=self.machine.device, precision="bf16",
                              latent_size=self.latent_size, batch=self.batch)  # fmt: skip

    def inputs(self, k: int) -> dict[str, torch.Tensor]:
        """Arguments of the diffusers model at step k."""
        timestep = self.timesteps[k].expand(self.batch).to(self.machine.device)
        timestep = timestep.to(BF16) if self.name == "flux" else timestep.float()
        return {"hidden_states": self.latents[k], "timestep": timestep, **self.conditioning}

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(**inputs, return_dict=False)[0]
        return result


def _model(name: str, tiny: bool, device: str) -> torch.nn.Module:
    """The diffusers model in bfloat16 with random weights, made on the device."""
    if tiny:
        model = tiny_flux() if name == "flux" else tiny_dit()
        return model.to(device, BF16)
    described = cards.config(FULL_SIZE[name])
    kind = getattr(diffusers, FAMILIES[name].model_class)
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            model = randomised(lambda: kind.from_config({k: v for k, v in described.items() if k[0] != "_"}), seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(BF16).requires_grad_(False)


# Contestants ----------------------------------------------------------------------------------------------------------


def eager(case: Case) -> dict[str, Any]:
    """The plain model, operator by operator, and what one step of it costs."""
    from torch.utils.flop_counter import FlopCounterMode

    result: dict[str, Any] = {}
    inputs = case.inputs(0)
    with torch.no_grad(), case.machine.peak(result):
        with FlopCounterMode(display=False) as counter:
            case.forward(**inputs)
        result["flops"] = counter.get_total_flops()
        result["step_ms"] = case.machine.milliseconds(lambda: case.forward(**inputs), case.args.repeats)
    return result


def compiled(case: Case) -> dict[str, Any]:
    """The plain model compiled and captured the way our graphs are."""
    machine, result = case.machine, {}
    inputs = case.inputs(0)
    with torch.no_grad(), machine.peak(result):
        out = torch.empty_like(case.forward(**inputs))
        function = machine.compiled(case.forward)

        def call() -> None:
            out.copy_(function(**inputs))

        replay = Recorder(Device("cuda")).record("plain", call) if machine.cuda else call
        result["step_ms"] = machine.milliseconds(replay, case.args.repeats)
    torch.compiler.reset()
    return result


def hook(case: Case, compiles: bool, order: int) -> dict[str, Any]:
    """diffusers' TaylorSeer hook on a plan with as many full steps as ours."""
    args, machine = case.args, case.machine
    plan = Plan.regular(args.steps, args.interval, args.warmup)
    interval, before, other = hook_schedule(plan, args.interval, args.warmup)
    config = diffusers.TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=before,
                                             max_order=order, taylor_factors_dtype=BF16, **HOOKS["tuned"])  # fmt: skip
    result: dict[str, Any] = {"plan": str(other), "order": order}
    case.model.enable_cache(config)
    computed: list[int] = []
    inside = case.model.transformer_blocks[0].ff.net[0]  # of a site: runs if that is computed
    handle = None if compiles else inside.register_forward_hook(lambda *_: computed.append(0))
    forward = machine.compiled(case.model, fullgraph=False) if compiles else case.model
    try:
        with torch.no_grad(), machine.peak(result):

            def loop() -> list[float]:
                case.model._reset_stateful_cache()
                times = []
                for k in range(args.steps):
                    began = time.perf_counter()
                    with case.model.cache_context("cond"):
                        forward(**case.inputs(k), return_dict=False)
                    machine.wait()
                    times.append(1e3 * (time.perf_counter() - began))
                return times

            loop()
            del computed[:]
            times = loop()
            if handle and len(computed) != len(other.full_steps):
                raise RuntimeError(f"computed {len(computed)} steps, expected {len(other.full_steps)}")
    finally:
        if handle:
            handle.remove()
        case.model.disable_cache()
        torch.compiler.reset()
    kinds = str(other)
    result["loop_ms"] = sum(times)
    result["full_ms"] = statistics.median(t for t, kind in zip(times, kinds, strict=True) if kind == "F")
    result["forecast_ms"] = statistics.median(t for t, kind in zip(times, kinds, strict=True) if kind == ".")
    return result


class Ours:
    """Our graphs of one granularity and one order, compiled in this process over the model's own weights."""

    def __init__(self, case: Case, granularity: str, order: int, shared: dict[str, Any]) -> None:
        draft = export.draft(case.traced, case.options(granularity, order))
        state = case.model.state_dict()
        device = case.machine.device
        weights = {
            name: (draft.buffers[name] if name in draft.buffers else state[name]).to(device, dtype)
            for name, (dtype, _) in draft.stored.items()
        }
        modules = {c.name: writing(pointwise_sums(weighted(c, weights, device)), c) for c in draft.split.graphs}
        # A full step writes one snapshot whatever the order, so one compiled graph serves all orders.
        full = shared.setdefault(granularity, case.machine.compiled(modules["full"]))
        functions = {**modules, "full": full, "forecast": case.machine.compiled(modules["forecast"])}
        manifest = export.describe(draft, f"{granularity}-{order}")
        self.case, self.order = case, order
        self.runner = TorchRunner(functions, manifest.graphs, Device(device))
        self.denoiser = Denoiser(manifest, self.runner)
        self.sizes = self.denoiser.sizes(case.data.latents.shape[1:], case.arrays)
        self.slot: Slot = self.denoiser.slot(self.sizes)

    def loop(self, plan: Plan) -> float:
        """Milliseconds of a whole request, `start` included."""
        machine, case = self.case.machine, self.case
        machine.wait()
        began = time.perf_counter()
        self.slot.start(case.arrays, Forecasts(plan, self.order), case.data.timesteps)
        for latents in case.latents:
            self.slot.advance(latents if machine.cuda else latents.float())
        machine.wait()
        return 1e3 * (time.perf_counter() - began)

    def bytes_of(self, graph: str) -> int:
        """Bytes that one call of a graph must move: its weights, inputs and outputs, each once."""
        found = self.denoiser.manifest.graphs[graph]
        roles = {t.role for t in (*found.inputs, *found.outputs)}
        tensors = sum(role_bytes((*found.inputs, *found.outputs), role, self.sizes) for role in roles)
        return found.weights_bytes + tensors

    def close(self) -> None:
        self.denoiser.close()
        del self.slot, self.denoiser, self.runner


def ours(case: Case, granularity: str, order: int, shared: dict[str, Any], floor: dict[str, float]) -> dict[str, Any]:
    """One configuration of ours: steps, loops, bytes, and how far from the floor."""
    args, machine = case.args, case.machine
    plan, all_full = Plan.regular(args.steps, args.interval, args.warmup), Plan.all_full(args.steps)
    result: dict[str, Any] = {"granularity": granularity, "order": order, "plan": str(plan)}
    began = time.perf_counter()
    with torch.no_grad(), machine.peak(result):
        engine = Ours(case, granularity, order, shared)
        slot = engine.slot
        slot.start(case.arrays, Forecasts(plan, order), case.data.timesteps)
        result["build_s"] = time.perf_counter() - began
        result["full_ms"] = machine.milliseconds(slot.memory.calls["full"][0], args.repeats)
        result["forecast_ms"] = machine.milliseconds(slot.memory.calls["forecast"][0], 10 * args.repeats)
        result["prepare_ms"] = machine.milliseconds(
            lambda: slot.start(case.arrays, Forecasts(plan, order), case.data.timesteps), args.repeats
        )
        loops = [(engine.loop(all_full), engine.loop(plan)) for _ in range(args.loops)]
    result["all_full_loop_ms"], result["loop_ms"] = (statistics.median(column) for column in zip(*loops, strict=True))
    result["speedup"] = statistics.median(whole / planned for whole, planned in loops)
    result["ideal_speedup"], result["efficiency"] = plan.ceiling, result["speedup"] / plan.ceiling
    result["state_bytes"] = state_bytes(engine.denoiser.manifest, engine.sizes)
    result["forecast_bytes"] = engine.bytes_of("forecast")
    result["forecast_floor_ms"] = 1e3 * result["forecast_bytes"] / floor["bytes_per_s"]
    result["forecast_over_floor"] = result["forecast_ms"] / result["forecast_floor_ms"]
    result["captures"], result["fallbacks"] = engine.runner.captures, engine.runner.fallbacks
    if args.parity and order == args.order[-1]:
        try:
            result["parity"] = parity(case, engine)
        except (RuntimeError, TimeoutError) as error:  # such as too little memory for the float32 model
            result["failed"] = f"parity: {_short(error)}"
    engine.close()
    return result


def parity(case: Case, engine: Ours) -> dict[str, Any]:
    """Against the float32 model with forward hooks, step by step; ratios to the derived bound, at most 1."""
    with torch.device(case.machine.device):
        reference = type(case.model).from_config(case.model.config).requires_grad_(False).eval()
    own = case.model.state_dict()
    for name, value in reference.state_dict().items():
        value.copy_(own[name])
    steps = min(case.args.steps, 7)
    data = Trajectory(case.data.latents[:steps], case.data.timesteps[:steps], case.arrays)
    found = {}
    for plan in (Plan.all_full(2), Plan.parse("FFF..F."[:steps])):
        part = Trajectory(data.latents[: len(plan)], data.timesteps[: len(plan)], data.conditioning)
        result = compare(reference, engine.denoiser, part, Forecasts(plan, engine.order))
        ratios = [seen / bound for seen, bound in zip(result.seen, result.bound, strict=True)]
        found[str(plan)] = {"over_bound": max(ratios), "over_bound_of_each_step": ratios}
    return found


def _short(error: BaseException) -> str:
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


# The run --------------------------------------------------------------------------------------------------------------


def bench(name: str, args: argparse.Namespace, machine: Machine, left: Callable[[], float]) -> dict[str, Any]:
    """Every contestant of one model, as far as time allows; a failure of one is recorded and the rest goes on."""
    case = Case(name, args, machine)
    floor = {"bytes_per_s": machine.bandwidth(), "flops_per_s": machine.product_rate()}
    results: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    contestants: dict[str, Callable[[], dict[str, Any]]] = {
        "eager": lambda: eager(case),
        "compiled": lambda: compiled(case),
    }
    for granularity in args.granularity:
        for order in args.order:
            contestants[f"ours {granularity} order {order}"] = (
                lambda g=granularity, o=order: ours(case, g, o, shared, floor)  # type: ignore[misc]
            )
    if name == "flux":  # diffusers' DiT has no cache
        contestants["hook eager"] = lambda: hook(case, False, args.order[0])
        contestants["hook compiled"] = lambda: hook(case, True, args.order[0])
    for label, run in contestants.items():
        if left() <= 0:
            results[label] = {"left_out": "no time left"}
            continue
        began = time.perf_counter()
        try:
            with limited(left() + GRACE):
                results[label] = run()
        except Exception as error:  # a peer that does not run here must not cost the numbers of the others
            results[label] = {"failed": _short(error)}
        machine.free()
        print(f"{name}: {label} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    weights = sum(p.nbytes for p in case.model.parameters())
    return {"model": name, "tiny": args.tiny, "weights_bytes": weights, "floor": floor, "results": results}


def finish(record: dict[str, Any]) -> None:
    """Ratios between contestants, where both ran."""
    results, floor = record["results"], record["floor"]
    flops = results["eager"].get("flops")
    plain = results["compiled"].get("step_ms")
    peak = results["compiled"].get("peak_bytes")
    for label, result in results.items():
        if not label.startswith("ours") or "full_ms" not in result:
            continue
        if plain:
            result["full_over_compiled"] = result["full_ms"] / plain
        if flops:
            result["full_over_floor"] = 1e-3 * result["full_ms"] * floor["flops_per_s"] / flops
        if peak:
            result["peak_over_compiled_bytes"] = result["peak_bytes"] - peak - result["state_bytes"]
        for other in ("hook eager", "hook compiled"):
            if "loop_ms" in results.get(other, {}) and results[other]["order"] == result["order"]:
                result[f"{other} over ours"] = results[other]["loop_ms"] / result["loop_ms"]


def table(record: dict[str, Any]) -> str:
    columns = ("step_ms", "full_ms", "forecast_ms", "prepare_ms", "loop_ms", "efficiency", "full_over_compiled",
               "forecast_over_floor", "state_bytes", "peak_bytes")  # fmt: skip
    heads = ("step", "full", "forecast", "prepare", "loop", "effic.", "/compiled", "/floor", "state MB", "peak MB")
    rows = [f"{record['model']:28}" + "".join(f"{head:>11}" for head in heads)]
    for label, result in record["results"].items():
        cells = []
        for column in columns:
            value = result.get(column)
            value = value / 1e6 if value is not None and column.endswith("bytes") else value
            cells.append(f"{value:11.3f}" if value is not None else f"{'':11}")
        note = result.get("failed") or result.get("left_out") or ""
        rows.append(f"{label:28}{''.join(cells)}  {note}")
        for plan, found in result.get("parity", {}).items():
            rows.append(f"{'':4}parity on {plan}: {found['over_bound']:.3f} of the derived bound")
    floor = record["floor"]
    rows.append(f"copies {floor['bytes_per_s'] / 1e9:.0f} GB/s, products {floor['flops_per_s'] / 1e12:.1f} TFLOP/s")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(FULL_SIZE), default=["dit", "flux"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, to try the script")
    parser.add_argument("--granularity", nargs="+", default=["residual", "module"])
    parser.add_argument("--order", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interval", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="calls per timing of a full step")
    parser.add_argument("--loops", type=int, default=2, help="pairs of whole loops")
    parser.add_argument("--no-parity", dest="parity", action="store_false", help="leave out the float32 comparison")
    parser.add_argument("--budget", type=float, default=440, help="seconds after which no contestant begins")
    record_options(parser)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, expected a GPU that torch can use; try the script with --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device is cpu without --tiny, expected a GPU for the full-size models; add --tiny")
    began = time.monotonic()
    machine = Machine(args.device, not args.no_compile)
    where = circumstances(args.out, args.allow_dirty)
    where |= {"torch_cuda": torch.version.cuda, "compiled": not args.no_compile}
    if machine.cuda:
        where |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    records = []
    for name in args.model:
        record = bench(name, args, machine, lambda: args.budget - (time.monotonic() - began))
        finish(record)
        records.append(record)
        print(table(record), flush=True)
        machine.free()
    whole = where | {"seconds": time.monotonic() - began, "models": records}
    print(write_record("bench-gpu" if machine.cuda else "bench-gpu-trial", whole, args.out, args.allow_dirty))
    print(json.dumps(whole))
    # The last line is the record; what failed is told apart from it.
    lost = [label for r in records for label, result in r["results"].items() if "ours" in label and "failed" in result]
    wrong = [
        label
        for r in records
        for label, result in r["results"].items()
        if any(not found["over_bound"] <= 1 for found in result.get("parity", {}).values())
    ]
    if lost or wrong:
        print(
            f"failed: {', '.join(lost) or 'none'}; beyond the parity bound: {', '.join(wrong) or 'none'}",
            file=sys.stderr,
        )
    return 1 if lost or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
