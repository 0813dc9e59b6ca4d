"""The card: a bundle on one screen, printed before it is built and by `inspect`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping

from taylorseer_export.bundle.manifest import GraphName, Manifest, Role, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.method import Plan, forecast_weights, gain

_WIDTH = 118  # columns
_WHEN: dict[GraphName, str] = {
    "prepare": "once per request",
    "full": "full steps",
    "forecast": "forecast steps",
    "probe": "every step under a guard",
    "rest": "full steps under a guard, after the probe",
}
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


def card(manifest: Manifest) -> str:
    """The bundle in about twenty lines: model, plan, graphs, state, sizes.

    Every number of bytes is quoted at the bundle's typical sizes, which the card states.
    """
    plan = Plan.parse(manifest.plan.text)
    sizes = {name: d.typical for name, d in manifest.dimensions.items()}
    model = manifest.model
    lines = [
        f"{manifest.family}-{manifest.name}",
        f"  model      {model.class_name} ({model.reference}), {manifest.precision}, engine {manifest.engine.kind}",
        f"  plan       {plan}",
        f"             {len(plan)} steps, {len(plan.full_steps)} full: speed-up at most {plan.ceiling:.2f}x"
        f" (interval {manifest.plan.interval}, warmup {manifest.plan.warmup}, order {manifest.plan.order},"
        f" {manifest.plan.dialect} dialect, gain up to {highest_gain(plan, manifest.plan.order):.1f})",
    ]
    for name, when in _WHEN.items():
        if name not in manifest.graphs:
            continue
        graph = manifest.graphs[name]
        lines.append(f"  {name:<10} {size(graph.weights_bytes):>9} of weights, {when}")
        for kind, tensors in (("reads", graph.inputs), ("writes", graph.outputs)):
            text = f"{kind:<7}{', '.join(_grouped(tensors))}"
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=" " * 13,
                subsequent_indent=" " * 20,
                break_long_words=False,
                break_on_hyphens=False,
            )
    state, kept = manifest.state, size(probe_bytes(manifest, sizes))
    guards = [f"  guards     {', '.join(state.guards)}: {kept} per slot"] if state.guards else []
    lines += [
        f"  state      {size(state_bytes(manifest, sizes))} per slot: {len(manifest.sites)} x {state.order + 1} "
        f"{state.layout} at granularity {state.granularity}, {state.dtype}",
        f"  tables     {size(table_bytes(manifest, sizes))} per request",
        *guards,
        "  sizes      " + ", ".join(_range(n, d.minimum, d.maximum) for n, d in manifest.dimensions.items()),
        "             quoted at " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
    ]
    return "\n".join(lines)


def state_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of the Taylor buffers of one slot; derivatives need two sets, one read while the other is written."""
    once = role_bytes(manifest.graphs["forecast"].inputs, "taylor_in", sizes)
    return once * (2 if manifest.state.layout == "derivatives" else 1)


def table_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of the step tables of one request."""
    return role_bytes(manifest.graphs["prepare"].outputs, "step", sizes)


def probe_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of what the probe of one slot keeps between steps and hands to the rest of a full step."""
    probe = manifest.graphs.get("probe")
    return kept_by_probe(probe.inputs, probe.outputs, sizes) if probe else 0


def kept_by_probe(inputs: Iterable[Tensor], outputs: Iterable[Tensor], sizes: Mapping[str, int]) -> int:
    """The same from the tensors of a probe graph."""
    handed = sum(role_bytes(outputs, role, sizes) for role in ("probe_out", "carried", "error"))
    return role_bytes(inputs, "probe_in", sizes) + handed


def request_bytes(manifest: Manifest, sizes: Mapping[str, int]) -> int:
    """Bytes of a request: Taylor buffers, step tables for `sizes["steps"]` steps, what a probe keeps."""
    return state_bytes(manifest, sizes) + table_bytes(manifest, sizes) + probe_bytes(manifest, sizes)


def role_bytes(tensors: Iterable[Tensor], role: Role, sizes: Mapping[str, int]) -> int:
    """Bytes of the tensors of one role."""
    return sum(math.prod(resolve(t.shape, sizes)) * _BYTES[t.dtype] for t in tensors if t.role == role)


def orders(manifest: Manifest) -> str:
    """State per slot and highest gain of the default plan, for every order that this model could be exported with."""
    sizes = {name: d.typical for name, d in manifest.dimensions.items()}
    entry, plan = state_bytes(manifest, sizes) // (manifest.state.order + 1), Plan.parse(manifest.plan.text)
    cells = [f"{k}: {size(entry * (k + 1))}, gain {highest_gain(plan, k):.1f}" for k in range(5)]
    return f"  orders     {'; '.join(cells[:3])};\n             {'; '.join(cells[3:])} (state per slot if exported so)"


def highest_gain(plan: Plan, order: int) -> float:
    """Largest noise amplification of the forecast steps of a plan, dimensionless; 1 without any."""
    steps = (step for step in range(len(plan)) if not plan.is_full(step))
    return max((gain(forecast_weights(plan.history(step, order), step, order)) for step in steps), default=1.0)


def size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _grouped(tensors: tuple[Tensor, ...]) -> list[str]:
    """Names with shapes; the Taylor buffers, which share one shape or few, as a count."""
    shown = [f"{t.name} [{', '.join(map(str, t.shape))}]" for t in tensors if not t.role.startswith("taylor")]
    buffers = [t for t in tensors if t.role.startswith("taylor")]
    for shape in dict.fromkeys(t.shape for t in buffers):
        count = sum(t.shape == shape for t in buffers)
        role = buffers[0].role
        shown.append(f"{count} x {role} [{', '.join(map(str, shape))}]")
    return shown


def _range(name: str, low: int, high: int) -> str:
    return f"{name} {low}" if low == high else f"{name} {low} to {high}"
