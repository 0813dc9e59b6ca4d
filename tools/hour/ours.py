"""Our graphs as a contestant: compiled in this process over the model's own weights, timed, and held to the bound."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.numpy import save_file

from hour.machine import short
from hour.subjects import Case
from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.memory import role_bytes, state_bytes
from taylorseer_export.compile import export
from taylorseer_export.compile.eager import pointwise_sums, weighted, writing
from taylorseer_export.graph.quantise import lowered
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.quantised import hold_quantised
from taylorseer_export.report.verify import compare
from taylorseer_export.runtime.denoiser import Denoiser, Slot
from taylorseer_export.runtime.torch_runner import TorchRunner
from taylorseer_export.runtime.trajectory import Trajectory


class Ours:
    """Our graphs of one granularity and one order."""

    def __init__(
        self, case: Case, granularity: str, order: int, shared: dict[str, Any], form: str | None = None
    ) -> None:
        draft = export.draft(case.traced, case.options(granularity, order, form))
        state = case.model.state_dict()
        device = case.machine.device

        def weight(name: str) -> torch.Tensor:
            if part := draft.quantised.get(name):
                return part.of(state[part.weight])
            return draft.buffers[name] if name in draft.buffers else state[name]

        weights = {name: weight(name).to(device, dtype) for name, (dtype, _) in draft.stored.items()}
        cuts = map(lowered, draft.split.graphs)
        modules = {c.name: writing(pointwise_sums(weighted(c, weights, device)), c) for c in cuts}
        # A full step writes one snapshot whatever the order, so one compiled graph serves all orders.
        full = shared.setdefault((granularity, form), case.machine.compiled(modules["full"]))
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


def ours(
    case: Case,
    granularity: str,
    order: int,
    shared: dict[Any, Any],
    floor: dict[str, float],
    kept: Path,
    form: str | None = None,
) -> dict[str, Any]:
    """One configuration of ours: steps, loops, bytes, and how far from the floor.

    Args:
        case: The model.
        granularity, order: The configuration.
        shared: Compiled full graphs by granularity and format; filled here.
        floor: The ceilings of the machine.
        kept: Folder for what is needed to look into a broken bound.
        form: Of quantised weights; None leaves them in bfloat16.
    """
    args, machine = case.args, case.machine
    plan, all_full = Plan.regular(case.steps, args.interval, args.warmup), Plan.all_full(case.steps)
    repeats, pairs = args.repeats or case.subject.repeats, args.loops or case.subject.loops
    result: dict[str, Any] = {"granularity": granularity, "order": order, "plan": str(plan), "weights": form}
    began = time.perf_counter()
    with torch.no_grad(), machine.peak(result):
        engine = Ours(case, granularity, order, shared, form)
        slot = engine.slot
        slot.start(case.arrays, Forecasts(plan, order), case.data.timesteps)
        result["build_s"] = time.perf_counter() - began
        result["full_ms"] = machine.milliseconds(slot.memory.calls["full"][0], repeats)
        result["forecast_ms"] = machine.milliseconds(slot.memory.calls["forecast"][0], 10 * repeats)
        result["prepare_ms"] = machine.milliseconds(
            lambda: slot.start(case.arrays, Forecasts(plan, order), case.data.timesteps), repeats
        )
        loops = [(engine.loop(all_full), engine.loop(plan)) for _ in range(pairs)]
    result["all_full_loop_ms"], result["loop_ms"] = (statistics.median(column) for column in zip(*loops, strict=True))
    result["speedup"] = statistics.median(whole / planned for whole, planned in loops)
    result["ideal_speedup"], result["efficiency"] = plan.ceiling, result["speedup"] / plan.ceiling
    result["state_bytes"] = state_bytes(engine.denoiser.manifest, engine.sizes)
    result["weights_bytes"] = engine.denoiser.manifest.graphs["full"].weights_bytes
    result["forecast_bytes"] = engine.bytes_of("forecast")
    result["forecast_floor_ms"] = 1e3 * result["forecast_bytes"] / floor["bytes_per_s"]
    result["forecast_over_floor"] = result["forecast_ms"] / result["forecast_floor_ms"]
    result["captures"], result["fallbacks"] = engine.runner.captures, engine.runner.fallbacks
    if args.parity and case.subject.parity and order == args.order[0]:
        try:
            result["parity"] = parity(case, engine, kept / f"{granularity}-{order}{form or ''}")
        except (RuntimeError, TimeoutError) as error:  # such as too little memory for the float32 model
            result["parity_failed"] = short(error)
    engine.close()
    return result


def parity(case: Case, engine: Ours, kept: Path) -> dict[str, Any]:
    """Against the float32 model with forward hooks, which holds what quantised weights stand for; ratios of each
    step to the derived bound, at most 1."""
    with torch.device(case.machine.device):
        reference = type(case.model).from_config(case.model.config).requires_grad_(False).eval()
    own = case.model.state_dict()
    for name, value in reference.state_dict().items():
        value.copy_(own[name])
    hold_quantised(reference, SimpleNamespace(tensor=own.__getitem__), engine.denoiser.manifest)  # type: ignore[arg-type]
    steps = min(case.steps, 7)
    found = {}
    for plan in (Plan.all_full(2), Plan.parse("FFF..F."[:steps])):
        part = Trajectory(case.data.latents[: len(plan)], case.data.timesteps[: len(plan)], case.arrays)
        forecasts = Forecasts(plan, engine.order)
        result = compare(reference, engine.denoiser, part, forecasts)
        ratios = [seen / bound for seen, bound in zip(result.seen, result.bound, strict=True)]
        found[str(plan)] = {"over_bound": max(ratios), "over_bound_of_each_step": ratios}
        if not max(ratios) <= 1:
            _keep(engine, part, forecasts, ratios, kept)
    return found


def _keep(engine: Ours, part: Trajectory, forecasts: Forecasts, ratios: list[float], kept: Path) -> None:
    """Write the prediction of the first step over its bound. The inputs are not needed: a seed makes them anywhere."""
    slot = engine.denoiser.slot(engine.sizes)
    slot.start(part.conditioning, forecasts, part.timesteps)
    step = next(k for k, ratio in enumerate(ratios) if not ratio <= 1)
    predictions = [slot.step(latents) for latents in part.latents[: step + 1]]
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"noise_pred.{step}": predictions[step]}, f"{kept}-{forecasts.plan}.safetensors")
