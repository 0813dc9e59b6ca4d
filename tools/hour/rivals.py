"""What ours is put beside: the plain model, eager and compiled, diffusers' hook, cache-dit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from contestants import HOOKS, CacheDit, hook_schedule

from hour.machine import BF16
from hour.subjects import Case
from taylorseer_export.bundle.device import Device
from taylorseer_export.method import Plan
from taylorseer_export.runtime.torch_runner import Recorder


def eager(case: Case) -> dict[str, Any]:
    """The plain model, operator by operator, and what one step of it costs."""
    from torch.utils.flop_counter import FlopCounterMode

    result: dict[str, Any] = {}
    inputs = case.inputs(0)
    with torch.no_grad(), case.machine.peak(result):
        with FlopCounterMode(display=False) as counter:
            case.forward(**inputs)
        result["flops"] = counter.get_total_flops()
        result["step_ms"] = case.machine.milliseconds(lambda: case.forward(**inputs), repeats_of(case))
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
        result["step_ms"] = machine.milliseconds(replay, repeats_of(case))
    torch.compiler.reset()
    return result


def repeats_of(case: Case) -> int:
    """Calls of a timing of a full step."""
    repeats: int = case.args.repeats or case.subject.repeats
    return repeats


def hook(case: Case, compiles: bool, order: int) -> dict[str, Any]:
    """diffusers' TaylorSeer hook on a plan with as many full steps as ours."""
    args, machine = case.args, case.machine
    plan = Plan.regular(case.steps, args.interval, args.warmup)
    interval, before, other = hook_schedule(plan, args.interval, args.warmup)
    config = diffusers.TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=before,
                                             max_order=order, taylor_factors_dtype=BF16, **HOOKS["tuned"])  # fmt: skip
    case.model.enable_cache(config)
    computed: list[int] = []
    inside = case.model.transformer_blocks[0].ff.net[0]  # of a site: runs if that is computed
    handle = None if compiles else inside.register_forward_hook(lambda *_: computed.append(0))
    forward = machine.compiled(case.model, fullgraph=False) if compiles else case.model

    def begin() -> None:
        case.model._reset_stateful_cache()
        computed.clear()

    def step(k: int) -> None:
        with case.model.cache_context("cond"):
            forward(**case.inputs(k), return_dict=False)

    try:
        result = timed(case, other, order, begin, step)
        if handle and len(computed) != len(other.full_steps):
            raise RuntimeError(f"the hook computed {len(computed)} steps, expected {len(other.full_steps)}")
        return result
    finally:
        if handle:
            handle.remove()
        case.model.disable_cache()
        torch.compiler.reset()


def cache_dit(case: Case, compiles: bool, order: int) -> dict[str, Any]:
    """cache-dit on our own plan, the most that it can save; that it ran the plan's steps is seen where it is eager."""
    plan = Plan.regular(case.steps, case.args.interval, case.args.warmup)
    cached = CacheDit(case.model, plan, order, counts=not compiles)
    forward = case.machine.compiled(case.model, fullgraph=False) if compiles else case.model
    try:
        return timed(case, plan, order, cached.begin,
                     lambda k: cached.step(k, lambda: forward(**case.inputs(k), return_dict=False)))  # fmt: skip
    finally:
        cached.close()
        torch.compiler.reset()


def timed(
    case: Case, plan: Plan, order: int, begin: Callable[[], object], step: Callable[[int], object]
) -> dict[str, Any]:
    """The second of two loops, step by step, waiting for the device after each as a sampler that looks at it does."""
    result: dict[str, Any] = {"plan": str(plan), "order": order}
    with torch.no_grad(), case.machine.peak(result):
        for _ in range(2):
            begin()
            times = []
            for k in range(case.steps):
                began = time.perf_counter()
                step(k)
                case.machine.wait()
                times.append(1e3 * (time.perf_counter() - began))
    kinds = str(plan)
    result["loop_ms"] = sum(times)
    result["full_ms"] = statistics.median(t for t, kind in zip(times, kinds, strict=True) if kind == "F")
    result["forecast_ms"] = statistics.median(t for t, kind in zip(times, kinds, strict=True) if kind == ".")
    return result
