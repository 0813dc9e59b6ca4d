"""What a manifest must agree with itself about, beyond the type of each field.

The run side makes buffers, names and plans by the manifest alone. Wherever two of its fields could contradict each
other they are compared here, once, when it is read or written, so that nothing behind has to.

Each check returns the first contradiction as text, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from taylorseer_export.bundle.latents import NOISE_PRED, endings, latents_of
from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.part_agreement import listed, of_parts, repeated, shown
from taylorseer_export.bundle.shapes import in_products, match, names, resolve
from taylorseer_export.errors import ConfigError, StepError

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Graph, GraphName, Manifest, Tensor

STEPS = "steps"
_MOST_BYTES = 1 << 40  # of all tensors at the smallest sizes; what is checked at load must fit a machine
_LARGEST = (1 << 63) - 1  # bytes of one tensor at the largest sizes, as engines count them
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
_FLOATS = ("float32", "float16", "bfloat16")

# Graph -> (roles its inputs may have, roles its outputs may have).
_ROLES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "prepare": (frozenset({"step", "constant", "lora"}), frozenset({"step", "constant"})),
    "full": (
        frozenset({"latent", "step", "constant", "weights", "taylor_in", "lora"}),
        frozenset({"noise_pred", "taylor_out"}),
    ),
    "forecast": (frozenset({"latent", "step", "constant", "weights", "taylor_in", "lora"}), frozenset({"noise_pred"})),
    "probe": (
        frozenset({"latent", "step", "constant", "weights", "probe_in", "lora"}),
        frozenset({"error", "probe_out", "carried"}),
    ),
    "rest": (
        frozenset({"latent", "step", "constant", "weights", "taylor_in", "carried", "probe_out", "lora"}),
        frozenset({"noise_pred", "taylor_out"}),
    ),
}


def contradiction(manifest: Manifest) -> str | None:
    """The first thing that a manifest says twice and not alike, or that cannot be; None where it agrees with itself."""
    checks: tuple[Callable[[Manifest], str | None], ...] = (
        _of_files, _of_graphs, _of_roles, _of_dimensions, _of_one_name, _of_tables, _of_state, _of_guards, _of_sizes,
        _of_plan, _of_low_rank, of_parts,
    )  # fmt: skip
    try:
        return next((problem for check in checks if (problem := check(manifest))), None)
    except (ConfigError, StepError) as error:
        return str(error)


def _of_files(manifest: Manifest) -> str | None:
    for graph_name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            return f"file {graph.file} of graph {graph_name} is not listed in files"
    folded: dict[str, str] = {}
    for name in manifest.files:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            return f"files lists {other} and {name}, which are one file where case does not count"
    for name in folded:
        parts = name.split("/")
        for k in range(1, len(parts)):
            if (parent := "/".join(parts[:k])) in folded:
                return f"files lists {folded[parent]} as a file and as a folder"
    return None


def _of_graphs(manifest: Manifest) -> str | None:
    expected = {"prepare", "full", "forecast"} | ({"probe", "rest"} if manifest.state.guards else set())
    if (seen := set(manifest.graphs)) != expected:
        guards = f"guards {', '.join(manifest.state.guards)}" if manifest.state.guards else "no guards"
        return f"graphs are {', '.join(sorted(seen))}, those with {guards} are {', '.join(sorted(expected))}"
    for name, graph in manifest.graphs.items():
        for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            if twice := repeated(t.name for t in tensors):
                return f"{side} of graph {name} has `{twice}` twice"
        if both := {t.name for t in graph.inputs} & {t.name for t in graph.outputs}:
            return f"`{min(both)}` is an input and an output of graph {name}"
    return None


def _of_roles(manifest: Manifest) -> str | None:
    for graph_name, graph in manifest.graphs.items():
        for side, tensors, allowed in zip(
            ("input", "output"), (graph.inputs, graph.outputs), _ROLES[graph_name], strict=True
        ):
            for tensor in tensors:
                if tensor.role not in allowed:
                    where = f"{side} `{tensor.name}` of graph {graph_name}"
                    return f"{where} has role {tensor.role}, which it cannot have there"
                if tensor.role not in ("constant", "carried") and tensor.dtype not in _FLOATS:
                    return f"`{tensor.name}` of role {tensor.role} is {tensor.dtype}, which is no float"
    latents = latents_of(manifest.graphs["full"])
    many = max(len(latents), 1)
    counts: tuple[tuple[GraphName, str, str, int, int], ...] = (
        ("prepare", "inputs", "step", 1, 2),
        ("full", "inputs", "latent", 1, many),
        ("rest", "inputs", "latent", 0, many),
        ("probe", "inputs", "latent", 1, many),
        ("forecast", "inputs", "latent", 0, many),
        ("forecast", "inputs", "weights", 1, 1),
        ("full", "outputs", "noise_pred", many, many),
        ("forecast", "outputs", "noise_pred", many, many),
        ("rest", "outputs", "noise_pred", many, many),
    )
    for name, side, role, least, most in counts:
        if name in manifest.graphs:
            count = sum(t.role == role for t in getattr(manifest.graphs[name], side))
            if not least <= count <= most:
                return f"graph {name} has {count} {side} of role {role}, it takes {least if count < least else most}"
    called = [f"{NOISE_PRED}{end}" for end in endings(latents)]
    for place, tensor in _tensors(manifest):
        if tensor.role == "noise_pred" and tensor.name not in called:
            others = f", and with `.{latents[1]}` behind" if latents[1:] else ""
            return f"`{tensor.name}` has role noise_pred, which is called so{others}"
        if tensor.role == "latent" and tensor.name not in latents:
            return f"`{tensor.name}` of graph {place} has role latent, those of graph full are {listed(latents)}"
        if tensor.values is not None and (
            tensor.dtype not in ("int64", "int32") or tensor.values[0] > tensor.values[1]
        ):
            return f"values of `{tensor.name}` are {list(tensor.values)}, which is no range of {tensor.dtype}"
    return None


def _of_dimensions(manifest: Manifest) -> str | None:
    used: set[str] = set()
    for owner, shape in [
        *((site.name, site.shape) for site in manifest.sites),
        *((tensor.name, tensor.shape) for _, tensor in _tensors(manifest)),
    ]:
        mentioned = frozenset().union(*map(names, shape))
        used |= mentioned
        if unknown := mentioned - manifest.dimensions.keys():
            return f"shape of {owner} uses {sorted(unknown)}, not in dimensions"
    if unused := manifest.dimensions.keys() - used:
        return f"dimensions has {sorted(unused)}, which no shape uses"
    return None


def _of_one_name(manifest: Manifest) -> str | None:
    """One name is one buffer: of one dtype, shape and role in whatever graph, but for tables, of which steps read rows.

    Constants come from the request or from prepare, what the probe carries from the probe.
    """
    known: dict[str, Tensor] = {}
    for graph, tensor in _tensors(manifest):
        if graph == "prepare" and tensor.role == "step":
            continue
        first = known.setdefault(tensor.name, tensor)
        for field in ("dtype", "shape", "role"):
            seen, expected = getattr(tensor, field), getattr(first, field)
            if seen != expected:
                return f"{field} of `{tensor.name}` is {shown(seen)} in graph {graph} and {shown(expected)} elsewhere"
    probe = {t.name for t in manifest.graphs["probe"].outputs} if "probe" in manifest.graphs else set()
    for graph, tensor in _tensors(manifest):
        if tensor.role in ("carried", "probe_out") and tensor.name not in probe:
            return f"`{tensor.name}` is read by graph {graph}, and no probe writes it"
    made = {t.name for t in manifest.graphs["prepare"].outputs if t.role == "constant"}
    asked = {t.name for t in manifest.graphs["prepare"].inputs}
    read = {t.name for graph, t in _tensors(manifest) if graph != "prepare"}
    if unread := made - read - asked:
        return f"`{min(unread)}` is written by graph prepare, and no graph reads it"
    return None


def _of_tables(manifest: Manifest) -> str | None:
    """Graph prepare writes `[steps, ...]`, and a step reads `[...]`."""
    prepare = manifest.graphs["prepare"]
    clocks = [t for t in prepare.inputs if t.role == "step"]
    for clock in clocks:
        if clock.shape != (STEPS,):
            return f"shape of `{clock.name}` is {shown(clock.shape)}, one number for each step is [{STEPS}]"
    if (fills := sorted(str(clock.fill) for clock in clocks)) not in (["None"], ["None", "next"]):
        return f"graph prepare has step inputs of fill {', '.join(fills)}, it takes one of none, and one of next beside"
    tables = {t.name: t for t in prepare.outputs if t.role == "step"}
    read: set[str] = set()
    for graph, tensor in _tensors(manifest):
        if graph == "prepare" or tensor.role != "step":
            continue
        table = tables.get(tensor.name)
        if table is None:
            return f"`{tensor.name}` is read by graph {graph}, and no table of prepare is called so"
        if table.dtype != tensor.dtype or table.shape != (STEPS, *tensor.shape):
            return (
                f"table `{table.name}` is {table.dtype} {shown(table.shape)}, its rows in graph {graph} are "
                f"{tensor.dtype} {shown(tensor.shape)}"
            )
        read.add(tensor.name)
    if unread := tables.keys() - read:
        return f"table `{min(unread)}` is read by no graph"
    return None


def _of_state(manifest: Manifest) -> str | None:
    """Taylor buffers hold `order + 1` snapshots or derivatives of every site; `full` and `rest` write them alike."""
    state, sites = manifest.state, {site.name: site.shape for site in manifest.sites}
    if twice := repeated(site.name for site in manifest.sites):
        return f"sites has {twice} twice"
    if not sites:
        return "sites is empty, so nothing is forecast"
    if state.dtype not in _FLOATS:
        return f"dtype of the state is {state.dtype}, which is no float"
    derivatives = state.layout == "derivatives"
    for name, graph in manifest.graphs.items():
        for role, tensors, whole in (
            ("taylor_in", graph.inputs, True),
            ("taylor_out", graph.outputs, derivatives),
        ):
            found = {t.name.removeprefix(f"{role}."): t for t in tensors if t.role == role}
            for site, tensor in found.items():
                shape = sites.get(site)
                if tensor.name != f"{role}.{site}" or tensor.site != site or shape is None:
                    return f"`{tensor.name}` of graph {name} belongs to no site"
                expected = (state.order + 1, *shape) if whole else shape
                if (tensor.shape, tensor.dtype) != (expected, state.dtype):
                    return (
                        f"`{tensor.name}` is {tensor.dtype} {shown(tensor.shape)}, its site, layout {state.layout} and "
                        f"order {state.order} give {state.dtype} {shown(expected)}"
                    )
            needed = role == ("taylor_in" if name == "forecast" else "taylor_out") and name not in ("prepare", "probe")
            if needed and found.keys() != sites.keys():
                missing = min(sites.keys() - found.keys())
                return f"graph {name} has no `{role}.{missing}`, which is a site"
    return _of_weights(manifest)


def _of_weights(manifest: Manifest) -> str | None:
    order = manifest.state.order
    for graph, tensor in _tensors(manifest):
        if tensor.role != "weights":
            continue
        name, count = ("weights", order + 1) if graph == "forecast" else ("scales", order)
        if graph == "probe":
            rule = tensor.name.removeprefix("probe_weights.")
            name, count = f"probe_weights.{rule}", _kept(manifest, rule)
        if (tensor.name, tensor.dtype, tensor.shape) != (name, "float32", (count,)):
            return (
                f"`{tensor.name}` of graph {graph} is {tensor.dtype} {shown(tensor.shape)}, order {order} gives "
                f"`{name}` of float32 [{count}]"
            )
    return None


def _kept(manifest: Manifest, rule: str) -> int:
    """Snapshots that the probe keeps for a rule: as many as forecasts read, or the one before."""
    return manifest.state.order + 1 if rule == "cg" else 1


def _of_guards(manifest: Manifest) -> str | None:
    guards = manifest.state.guards
    if twice := repeated(guards):
        return f"guards has {twice} twice"
    if not guards:
        return None
    probe = manifest.graphs["probe"]
    for role, tensors in (("probe_in", probe.inputs), ("probe_out", probe.outputs), ("error", probe.outputs)):
        found, expected = {t.name for t in tensors if t.role == role}, {f"{role}.{rule}" for rule in guards}
        if found != expected:
            return f"graph probe has {listed(found)} of role {role}, guards {', '.join(guards)} give {listed(expected)}"
    for tensor in (*probe.inputs, *probe.outputs):
        own = tensor.role in ("probe_in", "probe_out", "error", "weights")
        if tensor.rule != (tensor.name.partition(".")[2] if own else None):
            return f"rule of `{tensor.name}` is {tensor.rule}, its name says another"
    weights = {t.name for t in probe.inputs if t.role == "weights"}
    if weights != (expected := {f"probe_weights.{rule}" for rule in guards}):
        return f"graph probe has {listed(weights)} of role weights, guards give {listed(expected)}"
    named = {t.name: t for t in (*probe.inputs, *probe.outputs)}
    for rule in guards:
        kept, out, error = (named[f"{role}.{rule}"] for role in ("probe_in", "probe_out", "error"))
        if (kept.dtype, kept.shape) != (out.dtype, (_kept(manifest, rule), *out.shape)):
            return (
                f"`{kept.name}` is {kept.dtype} {shown(kept.shape)}, {_kept(manifest, rule)} of `{out.name}` are "
                f"{out.dtype} {shown((_kept(manifest, rule), *out.shape))}"
            )
        if len(error.shape) != 2 or error.shape[1] != 2:
            return f"`{error.name}` is {shown(error.shape)}, two sums for each sample are [batch, 2]"
    return None


def _of_sizes(manifest: Manifest) -> str | None:
    """At the ends of the ranges every shape can be counted, and the shapes of a request tell all sizes."""
    made = {t.name for t in manifest.graphs["prepare"].outputs}
    asked = [t for t in manifest.graphs["full"].inputs if t.role == "latent"][:1]  # others tell nothing: see latents.py
    asked += [t for g in manifest.graphs.values() for t in g.inputs if t.role == "constant" and t.name not in made]
    for end in ("minimum", "typical", "maximum"):
        sizes = {name: getattr(d, end) for name, d in manifest.dimensions.items()}
        total = 0
        for _, tensor in _tensors(manifest):
            count = math.prod(resolve(tensor.shape, sizes)) * _BYTES[tensor.dtype]
            total += count
            if count > _LARGEST:
                return f"`{tensor.name}` takes more bytes than can be counted at the {end} of every dimension"
        if end == "minimum" and total > _MOST_BYTES:
            return f"tensors take {total} bytes at the minimum of every dimension, no machine takes {_MOST_BYTES}"
        one = {name for name, d in manifest.dimensions.items() if d.minimum == d.maximum}
        known = {name: sizes[name] for name in in_products(tensor.shape for tensor in asked) & one}
        for tensor in asked:
            known = match(tensor.shape, resolve(tensor.shape, sizes), known, tensor.name)
        if missing := sizes.keys() - known.keys() - {STEPS}:
            return f"dimensions has {sorted(missing)}, which no shape of a request tells"
    return None


def _of_plan(manifest: Manifest) -> str | None:
    plan, steps = manifest.plan, manifest.dimensions[STEPS]
    if plan.order > manifest.state.order:
        return f"plan order {plan.order} exceeds state order {manifest.state.order}"
    if not steps.minimum <= plan.steps <= steps.maximum:
        return f"plan has {plan.steps} steps, dimension `{STEPS}` is {steps.minimum} to {steps.maximum}"
    return None


def _of_low_rank(manifest: Manifest) -> str | None:
    """The graphs have the input that the layers and their rank give; whether all of them read it is the graphs' own."""
    tensor, low_rank = next((t for _, t in _tensors(manifest) if t.role == LORA), None), manifest.lora
    if tensor is None or low_rank is None:
        seen = "null, and the graphs have an" if low_rank is None else "given, and the graphs have no"
        return None if tensor is None and low_rank is None else f"lora is {seen} input of that role"
    if twice := repeated(layer.module for layer in low_rank.layers):
        return f"layers of lora has {twice} twice"
    if (tensor.name, tensor.shape) != (LORA, low_rank.shape):
        return f"`{tensor.name}` is {shown(tensor.shape)}, its layers and rank give `{LORA}` {shown(low_rank.shape)}"
    return None


def _tensors(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """(graph, tensor) of every input and output."""
    graphs: Iterable[tuple[str, Graph]] = manifest.graphs.items()
    for name, graph in graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            yield name, tensor
