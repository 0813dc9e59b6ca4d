"""Generated cards of the published models: `graphs/<model>.md`, made from their configs alone, without weights.

    python tools/cards.py                       all cards (about a minute each and 1 GB, most of it torch.export)
    python tools/cards.py --model dit-xl-2-256  one
    python tools/cards.py --check               exit 1 if a card is stale
    python tools/cards.py --record              the numbers of FLUX.1-dev and DiT-XL/2 as a record, against the claims

A card says what an export would build in bfloat16: it traces and splits the real configuration on fake tensors. To know
cheaply whether it is stale, each card ends with the digest of its twin, the card of the same configuration with two
layers of each kind, which takes seconds: whatever changes in the trace, the cut, the sites, the sizes or in this file
changes the twin as well, and a comment changes neither. Only a fault of deeper models alone would escape it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import weight_formats
from record import ROOT, circumstances, record_options, write_record
from tqdm import tqdm

from taylorseer_export.bundle.memory import role_bytes, size
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.checkpoint.files import PUBLISHED
from taylorseer_export.compile.export import Draft, Options, Traced, draft, trace_model
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.cut import Cut
from taylorseer_export.method import Forecasts
from taylorseer_export.report.card import highest_gain
from taylorseer_export.report.memory_table import GRANULARITIES

GRAPHS = ROOT / "graphs"
ORDERS = range(5)
PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm", "conv2d", "conv3d", "convolution")
TWIN_LAYERS = 2
RECORDED, RECORDED_ORDERS = ("flux.1-dev", "dit-xl-2-256"), range(3)
# What the design promises of a model at order 2: bytes of the state of a granularity, and of any forecast's weights.
CLAIMS = {"flux.1-dev": {"module": 5.8e9, "residual": 80e6, "forecast": 5e6}}


@dataclass(frozen=True)
class Model:
    """A published model: its family and its hub id, and whether its card compares formats of weights."""

    family: str
    reference: str
    formats: bool = False


# Its transformer's config.json lies in taylorseer_export/families/configs/.
MODELS = {
    "chroma1-hd": Model("chroma", "lodestones/Chroma1-HD"),
    "krea-2-raw": Model("krea-2", "krea/Krea-2-Raw"),
    "longcat-image": Model("longcat-image", "meituan-longcat/LongCat-Image"),
    "ltx-2": Model("ltx-2", "Lightricks/LTX-2"),
    "ltx-2-first-frame": Model("ltx-2-image", "Lightricks/LTX-2"),
    "ovis-image-7b": Model("ovis-image", "AIDC-AI/Ovis-Image-7B"),
    "z-image": Model("z-image", "Tongyi-MAI/Z-Image"),
    "dit-xl-2-256": Model("dit", "facebook/DiT-XL-2-256"),
    "dit-xl-2-512": Model("dit", "facebook/DiT-XL-2-512"),
    "flux.1-dev": Model("flux", "black-forest-labs/FLUX.1-dev", formats=True),
    "flux.1-schnell": Model("flux", "black-forest-labs/FLUX.1-schnell"),
    "flux.1-kontext-dev": Model("flux-kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
    "flux.2-dev": Model("flux2", "black-forest-labs/FLUX.2-dev"),
    "flux.2-dev-edit": Model("flux2-edit", "black-forest-labs/FLUX.2-dev"),
    "flux.2-klein-base-4b": Model("flux2", "black-forest-labs/FLUX.2-klein-base-4B"),
    "flux.2-klein-9b-kv": Model("flux2-kv", "black-forest-labs/FLUX.2-klein-9b-kv"),
    "flux.3-dev": Model("flux3", "black-forest-labs/FLUX.3-dev"),
    "hunyuanvideo": Model("hunyuan-video", "hunyuanvideo-community/HunyuanVideo"),
    "hunyuanvideo-i2v": Model("hunyuan-video", "hunyuanvideo-community/HunyuanVideo-I2V-33ch"),
    "hunyuanvideo-i2v-token-replace": Model("hunyuan-video", "hunyuanvideo-community/HunyuanVideo-I2V"),
    "hunyuanvideo-1.5-480p-t2v": Model(
        "hunyuan-video-1.5", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
    ),
    "hunyuanvideo-1.5-720p-i2v": Model(
        "hunyuan-video-1.5", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v"
    ),
    "kandinsky-5.0-t2v-lite-5s": Model("kandinsky-5", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"),
    "cogvideox-2b": Model("cogvideox", "zai-org/CogVideoX-2b"),
    "cogvideox-5b": Model("cogvideox", "zai-org/CogVideoX-5b"),
    "cogvideox1.5-5b-i2v": Model("cogvideox", "zai-org/CogVideoX1.5-5B-I2V"),
    "wan2.1-t2v-1.3b": Model("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "wan2.1-t2v-14b": Model("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "wan2.1-i2v-14b-480p": Model("wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    "wan2.2-t2v-a14b": Model("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    "wan2.2-i2v-a14b": Model("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "wan2.2-ti2v-5b": Model("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "wan2.2-ti2v-5b-first-frame": Model("wan-5b-image", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "wan2.2-animate-14b": Model("wan-animate", "Wan-AI/Wan2.2-Animate-14B-Diffusers"),
    "wan2.1-vace-14b": Model("wan-vace", "Wan-AI/Wan2.1-VACE-14B-diffusers"),
    "hidream-i1-full": Model("hidream", "HiDream-ai/HiDream-I1-Full"),
    "qwen-image": Model("qwen-image", "Qwen/Qwen-Image"),
    "qwen-image-edit": Model("qwen-image-edit", "Qwen/Qwen-Image-Edit"),
    "qwen-image-edit-2511": Model("qwen-image-edit", "Qwen/Qwen-Image-Edit-2511"),
    "qwen-image-2.1": Model("qwen-image-2.1", "Qwen/Qwen-Image-2.1"),
    "pixart-sigma-xl-2-1024": Model("pixart", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "sana-1600m-1024": Model("sana", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    "stable-diffusion-3.5-medium": Model("sd3", "stabilityai/stable-diffusion-3.5-medium"),
    "stable-diffusion-3.5-large": Model("sd3", "stabilityai/stable-diffusion-3.5-large"),
}


def path(name: str) -> Path:
    """Where the card of a model lies."""
    return GRAPHS / f"{name}.md"


def card(name: str) -> str:
    """The whole text of a card, with the digest of its twin."""
    return f"{text(name, config(name))}\n<!-- twin {digest(name)} -->\n"


def digest(name: str) -> str:
    """SHA-256 of the card of the same model with few layers."""
    twin = shallow(config(name), TWIN_LAYERS)
    # The card quotes the config in full, so that every entry of the real one counts.
    return hashlib.sha256((text(name, twin) + json.dumps(config(name), sort_keys=True)).encode()).hexdigest()


def shallow(entries: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config with at most so many layers of each kind."""
    kind = re.compile(r"(num|n)_(.*_)?(layers|blocks)")
    twin = {k: min(v, layers) if kind.fullmatch(k) else v for k, v in entries.items()}
    if "llama_layers" in twin:  # HiDream: one entry for each block, of both kinds
        twin["llama_layers"] = twin["llama_layers"][: 2 * layers]
    if "vace_layers" in twin:  # the blocks that are given hints
        twin["vace_layers"] = [layer for layer in twin["vace_layers"] if layer < layers]
    if "inject_face_latents_blocks" in twin:  # every such block looks at a face, the first one too
        twin["inject_face_latents_blocks"] = min(twin["inject_face_latents_blocks"], layers)
    return twin


def stale(name: str) -> bool:
    """Whether the card on disk is missing, or is not the one that would be written."""
    return not path(name).is_file() or f"<!-- twin {digest(name)} -->" not in path(name).read_text(encoding="utf-8")


def config(name: str) -> dict[str, Any]:
    """The published config of the transformer."""
    found: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if not key.startswith("_")}


def text(name: str, entries: Mapping[str, Any]) -> str:
    """The card of a model with these config entries, in bfloat16 at the size its family quotes."""
    model, (traced, options) = MODELS[name], traced_model(name, entries)
    family = traced.checkpoint.family
    drafts = {g: draft(traced, replace(options, granularity=g)) for g in GRANULARITIES}
    made, plan = drafts["module"], options.plan()
    sizes = made.typical
    lines = [
        f"# {name}",
        "",
        f"`{family.model_class}` of `{model.reference}`, family `{family.name}`, {_parameters(traced) / 1e9:.3f} B "
        f"parameters; bfloat16, granularity `module`, layout `snapshots`, order {options.order}.",
        f"Sizes at {', '.join(f'{k} {v}' for k, v in sizes.items())}. Generated by `python tools/cards.py`.",
        "",
        f"    {plan}",
        "",
        f"{len(plan)} steps, {len(plan.full_steps)} full (interval {options.interval}, warmup {options.warmup}): "
        f"speed-up at most {plan.ceiling:.2f}, gain up to {highest_gain(Forecasts(plan, options.order)):.1f}. "
        f"Guidance: {family.guidance}.",
        "",
        *_picture(made),
        "",
        "## Graphs",
        "",
        *_table(
            ("graph", "weights", "operators", "matrix products", "attention", "inputs", "outputs"),
            (_counts(made, cut) for cut in made.split.graphs),
        ),
        "",
        "## Taylor buffers of one slot",
        "",
        *_table(
            ("granularity", "sites", *(f"order {k}" for k in ORDERS), "weights of forecast"),
            (_buffers(g, d) for g, d in drafts.items()),
        ),
        "",
        f"Derivatives take twice as much. Step tables of a request: "
        f"{size(role_bytes(made.split.prepare.outputs, 'step', sizes))}; its constants: "
        f"{size(role_bytes(made.split.prepare.outputs, 'constant', sizes))}.",
        "",
        *((*weight_formats.lines(traced, options), "") if model.formats else ()),
        "## Sites",
        "",
        *_table(("sites", "count", "one snapshot"), _sites(made)),
    ]
    for cut in made.split.graphs:
        lines += ["", f"## {cut.name}: inputs and outputs", ""]
        lines += _table(("", "name", "count", "dtype", "shape", "role"), _contract(cut))
        lines += ["", f"Operators: {', '.join(f'{op} {n}' for op, n in sorted(cut.operators().items()))}."]
    return "\n".join(lines) + "\n"


def traced_model(name: str, entries: Mapping[str, Any]) -> tuple[Traced, Options]:
    """A model with these config entries, traced in bfloat16 on fake tensors, and its family's options."""
    model = MODELS[name]
    family = FAMILIES[model.family].variant(model.reference)
    family = replace(family, **family.by_config(entries))
    default = family.defaults
    options = Options(
        order=default.order,
        interval=default.interval,
        warmup=default.warmup,
        steps=default.steps,
        engine="inductor",  # one that takes bfloat16; none is built
        precision="bf16",
    )
    checkpoint = Checkpoint(model.reference, family, Path(name), dict(entries), {}, weightless=True)
    return trace_model(checkpoint, options), options


# The record -----------------------------------------------------------------------------------------------------------


def numbers(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says and more, as numbers: bytes and operators of every granularity, counted from its graphs."""
    began = time.perf_counter()
    traced, options = traced_model(name, entries)
    traced_at = time.perf_counter()
    drafts = {
        g: [draft(traced, replace(options, granularity=g, order=k)) for k in RECORDED_ORDERS] for g in GRANULARITIES
    }
    found = {granularity: _numbers(of_orders) for granularity, of_orders in drafts.items()}
    return {
        "family": traced.checkpoint.family.name,
        "precision": options.precision,
        "sizes": drafts["module"][-1].typical,
        "config": dict(entries),
        "parameters": _parameters(traced),
        "weights_bytes": 2 * _parameters(traced),
        "trace_seconds": round(traced_at - began, 2),
        "split_seconds": round(time.perf_counter() - traced_at, 2),
        "granularities": found,
        "claims": _claims(CLAIMS.get(name, {}), found),
    }


def _numbers(of_orders: list[Draft]) -> dict[str, Any]:
    """Of one granularity; graphs are described at the highest order, and lower ones differ in the buffers alone."""
    best = of_orders[-1]
    sizes, prepare = best.typical, best.split.prepare
    states = {f"order {d.options.order}": role_bytes(d.split.forecast.inputs, "taylor_in", sizes) for d in of_orders}
    return {
        "sites": len(best.split.sites),
        "state_bytes": states,
        "table_bytes": role_bytes(prepare.outputs, "step", sizes),
        "request_bytes": role_bytes(prepare.outputs, "constant", sizes),
        "graphs": {cut.name: _graph(best, cut) for cut in best.split.graphs},
    }


def _graph(made: Draft, cut: Cut) -> dict[str, Any]:
    found = cut.operators()
    return {
        "weights_bytes": made.weights_bytes(cut),
        "inputs": len(cut.inputs),
        "outputs": len(cut.outputs),
        "operators": sum(found.values()),
        "attention": sum(n for op, n in found.items() if "attention" in op),
        "matrix_products": sum(found[op] for op in PRODUCTS),
        "by_operator": dict(found.most_common()),
    }


def _claims(claims: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Claim -> limit, what was counted, whether it holds."""
    top = f"order {max(RECORDED_ORDERS)}"
    seen = {f"state {g}, {top}": (claims[g], found[g]["state_bytes"][top]) for g in GRANULARITIES if g in claims}
    if "forecast" in claims:
        for g in GRANULARITIES:
            seen[f"forecast weights, {g}"] = (claims["forecast"], found[g]["graphs"]["forecast"]["weights_bytes"])
    return {k: {"limit": int(limit), "bytes": n, "holds": n <= limit} for k, (limit, n) in seen.items()}


def record(names: Iterable[str], out: Path, allow_dirty: bool) -> bool:
    """Write the record of some models, each counted in a process of its own, whose peak is then the model's.

    Returns:
        Whether every claim holds.
    """
    models, where = {}, circumstances(out, allow_dirty)
    for name in names:
        command = [sys.executable, __file__, "--numbers", "--model", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        models[name] = json.loads(done.stdout.splitlines()[-1])
        for claim, c in models[name]["claims"].items():
            print(f"{'holds' if c['holds'] else 'BROKEN'}: {claim}: {size(c['bytes'])} of {size(c['limit'])}")
    print(write_record("full-size", where | {"models": models}, out, allow_dirty))
    return all(c["holds"] for model in models.values() for c in model["claims"].values())


def _parameters(traced: Traced) -> int:
    return sum(p.numel() for p in traced.trace.module.parameters())


def _picture(made: Draft) -> list[str]:
    """The split as a flow chart, which GitHub draws."""
    prepare, full, forecast = (size(made.weights_bytes(cut)) for cut in made.split.graphs)
    plan = made.options.plan()
    state = size(role_bytes(made.split.forecast.inputs, "taylor_in", made.typical))
    return [
        "```mermaid",
        "flowchart LR",
        f'  request(["request, all timesteps"]) --> prepare["prepare<br/>{prepare}, once"]',
        f'  prepare -- "constants, table rows" --> full["full<br/>{full}, {len(plan.full_steps)} steps"]',
        f'  prepare -- "table rows" --> forecast["forecast<br/>{forecast}, {len(plan) - len(plan.full_steps)} steps"]',
        '  latent(["latent"]) --> full & forecast',
        f'  full -- "{len(made.split.sites)} sites" --> buffers[("Taylor buffers<br/>{state}")] --> forecast',
        '  full & forecast --> prediction(["noise_pred"])',
        "```",
    ]


def _counts(made: Draft, cut: Cut) -> tuple[str, ...]:
    found = cut.operators()
    attention = sum(n for op, n in found.items() if "attention" in op)
    numbers = (sum(found.values()), sum(found[op] for op in PRODUCTS), attention, len(cut.inputs), len(cut.outputs))
    return (cut.name, size(made.weights_bytes(cut)), *map(str, numbers))


def _buffers(granularity: str, made: Draft) -> tuple[str, ...]:
    entry = role_bytes(made.split.forecast.inputs, "taylor_in", made.typical) // (made.options.order + 1)
    return (
        granularity,
        str(len(made.split.sites)),
        *(size(entry * (k + 1)) for k in ORDERS),
        size(made.weights_bytes(made.split.forecast)),
    )


def _sites(made: Draft) -> Iterable[tuple[str, ...]]:
    """Sites that differ in the number of their block alone, and share a shape, as one line."""
    groups = Counter((_numberless(site), shape) for site, shape in made.split.sites.items())
    for (site, shape), count in groups.items():
        # The buffers hold what the shape says, in bfloat16.
        held = 2 * math.prod(resolve(shape, made.typical))
        yield f"`{site}`", str(count), f"{_shape(shape)}, {size(held)}"


def _contract(cut: Cut) -> Iterable[tuple[str, ...]]:
    """Inputs and outputs; those that differ in numbers within their names alone are one line."""
    for label, tensors in (("in", cut.inputs), ("out", cut.outputs)):
        groups: Counter[tuple[Any, ...]] = Counter((_numberless(t.name), t.dtype, t.shape, t.role) for t in tensors)
        for (name, dtype, shape, role), count in groups.items():
            yield label, f"`{name}`", str(count), dtype, _shape(shape), role


def _numberless(name: str) -> str:
    """The name without the number of its block and without the one that tells nodes of a graph apart."""
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=_)\d+$", "*", name)


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    cells = [[cell.replace("*", r"\*") if "`" not in cell else cell for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", help="(default: all; of a record, two)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a card is stale")
    parser.add_argument("--record", action="store_true", help="write a record; exit 1 if a claim is broken")
    parser.add_argument("--numbers", action="store_true", help="print the numbers of one model as JSON; write nothing")
    record_options(parser)
    args = parser.parse_args()
    if args.numbers:
        found = numbers(args.model[0], config(args.model[0]))
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return 0
    if args.record:
        return 0 if record(args.model or RECORDED, args.out, args.allow_dirty) else 1
    args.model = args.model or list(MODELS)
    if args.check:
        found = [name for name in tqdm(args.model, unit="card", leave=False) if stale(name)]
        for name in found:
            print(f"{path(name).relative_to(ROOT)} is stale; run python tools/cards.py --model {name}")
        return 1 if found else 0
    for name in tqdm(args.model, unit="card", leave=False):
        path(name).write_text(card(name), encoding="utf-8")
        tqdm.write(str(path(name).relative_to(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
