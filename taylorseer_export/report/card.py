"""The card: a bundle on one screen, printed before it is built and by `inspect`."""

from __future__ import annotations

import textwrap

from taylorseer_export.bundle.manifest import GraphName, Manifest, PartName, PipelinePart, Tensor
from taylorseer_export.bundle.memory import lora_bytes, probe_bytes, size, state_bytes, table_bytes, video_bytes
from taylorseer_export.method import Forecasts, Plan, forecast_weights, gain
from taylorseer_export.method.plan import FEW_STEPS

_WIDTH = 118  # columns
_MANY = ("taylor", "cache")  # how roles begin of which a graph has one tensor for each site or layer
_WHEN: dict[GraphName, str] = {
    "prepare": "once per request",
    "full": "full steps",
    "forecast": "forecast steps",
    "probe": "every step under a guard",
    "rest": "full steps under a guard, after the probe",
}

_WHEN_PART: dict[PartName, str] = {
    "text": "once per prompt",
    "encode": "once per picture given",
    "decode": "once per picture",
}


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
        f" {manifest.plan.dialect} dialect, gain up to {highest_gain(Forecasts(plan, manifest.plan.order)):.1f})",
        *_few_steps(plan),
    ]
    for name, when in _WHEN.items():
        if name not in manifest.graphs:
            continue
        graph = manifest.graphs[name]
        lines.append(f"  {name:<10} {size(graph.weights_bytes):>9} of weights, {when}")
        for kind, tensors in (("reads", graph.inputs), ("writes", graph.outputs)):
            lines += _wrapped(kind, tensors)
    if (quantised := manifest.quantised) is not None:
        reads = f", {quantised.reads}" if quantised.reads else ""
        lines.append(
            f"  quantised  {size(quantised.bytes)} of weights in {quantised.weights}, {len(quantised.layers)} layers"
            f"{reads}; {size(quantised.unquantised_bytes)} in {manifest.precision}"
        )
    for part, described in manifest.parts.items():
        lines += _of_part(part, described)
    state, kept = manifest.state, size(probe_bytes(manifest, sizes))
    guards = [f"  guards     {', '.join(state.guards)}: {kept} per slot"] if state.guards else []
    lines += [
        f"  state      {size(state_bytes(manifest, sizes))} per slot: {len(manifest.sites)} x {state.order + 1} "
        f"{state.layout} at granularity {state.granularity}, {state.dtype}",
        f"  tables     {size(table_bytes(manifest, sizes))} per request",
        *guards,
        *_lora(manifest),
        "  sizes      " + ", ".join(_range(n, d.minimum, d.maximum) for n, d in manifest.dimensions.items()),
        "             quoted at " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
    ]
    return "\n".join(lines)


def _lora(manifest: Manifest) -> list[str]:
    """What a request may bring, where it may."""
    if (lora := manifest.lora) is None:
        return []
    taken = size(lora_bytes(manifest))
    return [f"  lora       {taken} per slot: rank {lora.rank} at most, in {len(lora.layers)} layers"]


def _few_steps(plan: Plan) -> list[str]:
    """What forecasting can gain in a loop of a distilled model; no line for longer loops."""
    steps, full = len(plan), len(plan.full_steps)
    if steps > FEW_STEPS:
        return []
    if full == steps:
        return [" " * 13 + f"few steps: all {steps} are full, so nothing is gained; lower --warmup or --interval"]
    said = f"few steps: ceiling {steps} / {full} = {plan.ceiling:.2f}x; a loop of {full} steps, all full, gains as much"
    return [f"{' ' * 13}{said}: `calibrate` compares"]


def _of_part(name: PartName, described: PipelinePart) -> list[str]:
    """Lines of a part: each graph, and of a video what its buffers take, however long it is."""
    video, tiles = described.later is not None, described.tiles
    rate = "" if described.frame_rate is None else f"; {described.frame_rate} frames per second"
    rate += f", the first {described.dropped} left out" if described.dropped else ""
    when = "once per video, its first latent frame" if video else "once per tile" if tiles else _WHEN_PART[name]
    rate += f", {described.skipped} latent frames ahead of them not decoded" if described.skipped else ""
    lines = []
    for label, graph, often in ((name, described.graph, when), ("later", described.later, "every later latent frame")):
        if graph is None:
            continue
        lines.append(f"  {label:<10} {size(graph.weights_bytes):>9} of weights, {often}")
        for kind, tensors in (("reads", graph.inputs), ("writes", graph.outputs)):
            lines += _wrapped(kind, tensors)
    if video:
        sizes = {key: dimension.typical for key, dimension in described.dimensions.items()}
        taken, quoted = size(video_bytes(described, sizes)), ", ".join(f"{k} {extent}" for k, extent in sizes.items())
        lines.append(f"{' ' * 13}{taken} of buffers for a video of any length, quoted at {quoted}{rate}")
    if tiles:
        lines.append(f"{' ' * 13}tiles of {tiles.frames + 1} latent frames, {tiles.side} latent pixels a side{rate}")
    if (sections := described.sections) is not None:
        when = "first" if sections.direction == "forward" else "last"
        lines.append(f"{' ' * 13}a video is several loops, its {when} frames first; {sections.usual} of them as a rule")
    if described.driven is not None:
        lines.append(f"{' ' * 13}videos of a pose and a face drive it; each loop begins with the last frame before it")
    return lines


def orders(manifest: Manifest) -> str:
    """State per slot and highest gain of the default plan, for every order that this model could be exported with."""
    sizes = {name: d.typical for name, d in manifest.dimensions.items()}
    entry, plan = state_bytes(manifest, sizes) // (manifest.state.order + 1), Plan.parse(manifest.plan.text)
    cells = [f"{k}: {size(entry * (k + 1))}, gain {highest_gain(Forecasts(plan, k)):.1f}" for k in range(5)]
    return f"  orders     {'; '.join(cells[:3])};\n             {'; '.join(cells[3:])} (state per slot if exported so)"


def highest_gain(forecasts: Forecasts) -> float:
    """Largest noise amplification of the forecast steps, in the paper's form, dimensionless; 1 without any."""
    plan, order = forecasts.plan, forecasts.order
    steps = (step for step in range(len(plan)) if not plan.is_full(step))
    return max((gain(forecast_weights(plan.history(step, order), step, order)) for step in steps), default=1.0)


def _wrapped(kind: str, tensors: tuple[Tensor, ...]) -> list[str]:
    """What a graph reads or writes, as lines."""
    text = f"{kind:<7}{', '.join(_grouped(tensors))}"
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * 13,
        subsequent_indent=" " * 20,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _grouped(tensors: tuple[Tensor, ...]) -> list[str]:
    """Names with shapes; Taylor buffers and caches, which share one shape or few, as a count."""
    shown = [f"{t.name} [{', '.join(map(str, t.shape))}]" for t in tensors if not t.role.startswith(_MANY)]
    buffers = [t for t in tensors if t.role.startswith(_MANY)]
    for shape in dict.fromkeys(t.shape for t in buffers):
        count = sum(t.shape == shape for t in buffers)
        role = buffers[0].role
        shown.append(f"{count} x {role} [{', '.join(map(str, shape))}]")
    return shown


def _range(name: str, low: int, high: int) -> str:
    return f"{name} {low}" if low == high else f"{name} {low} to {high}"
