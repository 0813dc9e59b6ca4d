"""Bench: what forecasting buys on this engine, against the same engine computing every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from taylorseer_export.bundle.memory import state_bytes
from taylorseer_export.errors import ParityError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.slot import Slot
from taylorseer_export.runtime.trajectory import Trajectory, random_trajectory


def bench(
    denoiser: Denoiser,
    forecasts: Forecasts,
    sizes: Mapping[str, int] | None = None,
    repeats: int = 3,
    on_loop: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Time the loop of a plan and the all-full loop, in turn, in one slot.

        speedup = all_full_loop / loop,   ideal_speedup = steps / full_steps,   efficiency = speedup / ideal_speedup

    Loops alternate, so that a slow moment of the machine hits both; speed-up is the median over pairs. The first loop
    of each kind warms up and is not counted. Inputs are random; time does not depend on their values.

    Args:
        denoiser: The loaded bundle.
        forecasts: The plan to time, and how it is forecast. Under a guard, which decides by errors of random inputs,
            full steps are those that ran.
        sizes: Dimension sizes; the bundle's typical ones where left out.
        repeats: Counted pairs of loops.
        on_loop: Called after each of the `2 (repeats + 1)` loops.

    Returns:
        One flat record, times in milliseconds and sizes in bytes.
    """
    plan, full_plan = forecasts.plan, Plan.all_full(len(forecasts))
    loops_of = {plan: forecasts, full_plan: Forecasts(full_plan, forecasts.order)}
    data = random_trajectory(denoiser, len(plan), sizes)
    found = denoiser.sizes(data.latents.shape[1:], data.conditioning)
    slot = denoiser.slot(found)
    kinds: dict[str, list[float]] = {"F": [], ".": []}
    loops: dict[Plan, list[float]] = {plan: [], full_plan: []}
    prepares: list[float] = []
    executed = ""
    for repeat in range(repeats + 1):
        for current in (plan, full_plan):
            began = time.perf_counter()
            slot.start(data.conditioning, loops_of[current], data.timesteps)
            prepared = time.perf_counter()
            times = _run(slot, data)
            total = 1e3 * (time.perf_counter() - began)
            if repeat:
                prepares.append(1e3 * (prepared - began))
                loops[current].append(total)
                for kind, value in zip(slot.executed, times, strict=True):
                    kinds[kind].append(value)
            executed = slot.executed if current is plan else executed
            if on_loop:
                on_loop()
    ideal = len(plan) / executed.count("F")
    speedup = float(np.median(np.array(loops[full_plan]) / np.array(loops[plan])))
    manifest = denoiser.manifest
    return {
        "bundle": f"{manifest.family}-{manifest.name}",
        "plan": str(plan),
        "executed": executed,
        "steps": len(plan),
        "full_steps": executed.count("F"),
        "order": forecasts.order,
        "form": forecasts.form,
        "calibrated": forecasts.weights is not None,
        "guard": str(forecasts.guard) if forecasts.guard else None,
        "granularity": manifest.state.granularity,
        "layout": manifest.state.layout,
        "sizes": found,
        "prepare_ms": float(np.median(prepares)),
        "full_ms": _percentiles(kinds["F"]),
        "forecast_ms": _percentiles(kinds["."]),
        "loop_ms": float(np.median(loops[plan])),
        "all_full_loop_ms": float(np.median(loops[full_plan])),
        "speedup": speedup,
        "ideal_speedup": ideal,
        "efficiency": speedup / ideal,
        "state_bytes": state_bytes(manifest, found),
        "weights_bytes": sum(f.size for name, f in manifest.files.items() if name.endswith(".safetensors")),
        "engine": manifest.engine.kind,
        "precision": manifest.precision,
        "device": str(denoiser.device),
        "fallbacks": denoiser.runner.fallbacks,
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as a short table for people."""
    full, forecast = record["full_ms"], record["forecast_ms"]
    rows = [
        ("plan", record["plan"]),
        ("full steps", f"{record['full_steps']} of {record['steps']}"),
        ("prepare", f"{record['prepare_ms']:.2f} ms per request"),
        ("full step", f"{full['p50']:.2f} ms (p90 {full['p90']:.2f})"),
        ("forecast step", f"{forecast['p50']:.3f} ms (p90 {forecast['p90']:.3f})" if forecast else "none in this plan"),
        ("loop", f"{record['loop_ms']:.1f} ms; all full {record['all_full_loop_ms']:.1f} ms"),
        (
            "speed-up",
            f"{record['speedup']:.2f}x of {record['ideal_speedup']:.2f}x: efficiency {record['efficiency']:.3f}",
        ),
        ("state", f"{record['state_bytes'] / 1e6:.2f} MB per slot"),
    ]
    if record["fallbacks"]:
        rows.append(("fallbacks", f"{record['fallbacks']} calls without a CUDA graph"))
    return "\n".join(f"  {name:<14}{value}" for name, value in rows)


def _run(slot: Slot, data: Trajectory) -> list[float]:
    times = []
    for step, latent in enumerate(data.latents):
        beside = data.beside(step)
        began = time.perf_counter()
        prediction = slot.step(latent, others=beside)
        times.append(1e3 * (time.perf_counter() - began))
        if not np.isfinite(prediction).all():
            raise ParityError(
                f"noise_pred is NaN or infinite in places at step {len(times) - 1} of plan {slot.plan}, expected "
                "finite numbers; export again with --precision bf16 or fp32, whose range is wider than that of fp16"
            )
    return times


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": float(np.percentile(values, 50)), "p90": float(np.percentile(values, 90))}
