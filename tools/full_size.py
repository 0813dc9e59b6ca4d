"""Full-size numbers without weights: graphs, weights and Taylor buffers of the published models, from their configs.

    python tools/full_size.py                  FLUX.1-dev at 1024 pixels and DiT-XL/2 at 256 pixels, in bf16

Traces and splits the real configuration on fake tensors, so what is printed is counted from the graphs an export would
build, and costs neither the 24 GB of weights nor the memory for them. Bytes are those of the asked precision.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from record import ROOT, circumstances, record_options, write_record
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.export import PRECISIONS
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.split import Split, split
from taylorseer_export.graph.trace import Trace, trace

GRANULARITIES = ("module", "residual", "last")
ORDERS = (0, 1, 2)
STEPS = 50
# The transformer/config.json that each is published with.
MODELS: dict[str, dict[str, Any]] = {
    "FLUX.1-dev": {
        "family": "flux",
        "sizes": {"batch": 1, "image_tokens": 4096, "text_tokens": 512, "steps": STEPS},
        "config": {
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "out_channels": None,
            "patch_size": 1,
            "pooled_projection_dim": 768,
        },
        # Claims of the design at order 2 in bf16: state of `module` and `residual`, weights of any forecast graph.
        "claims": {"module": 5.8e9, "residual": 80e6, "forecast": 5e6},
    },
    "DiT-XL-2-256": {
        "family": "dit",
        "sizes": {"batch": 2, "steps": STEPS},
        "config": {
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": 72,
            "in_channels": 4,
            "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": 16,
            "num_embeds_ada_norm": 1000,
            "num_layers": 28,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": 32,
        },
        "claims": {},
    },
}


def describe(name: str, precision: str, on_split: Any) -> dict[str, Any]:
    """Every number of one model; `on_split` is called after each trace or split."""
    model = MODELS[name]
    family, sizes, dtype = FAMILIES[model["family"]], model["sizes"], PRECISIONS[precision]
    began = time.perf_counter()
    skeleton = Checkpoint(name, family, Path(name), dict(model["config"]), {}, weightless=True).skeleton(dtype)
    parameters = sum(p.numel() for p in skeleton.parameters())
    traced = trace(skeleton, family, dtype)
    trace_s = time.perf_counter() - began
    on_split()
    began = time.perf_counter()
    granularities = {}
    for granularity in GRANULARITIES:
        orders = {}
        for order in ORDERS:
            pieces = split(traced, granularity, "snapshots", order)  # type: ignore[arg-type]
            orders[order] = pieces
            on_split()
        granularities[granularity] = _numbers(orders, traced, sizes)
    return {
        "family": family.name,
        "precision": precision,
        "sizes": sizes,
        "config": model["config"],
        "parameters": parameters,
        "weights_bytes": parameters * dtype.itemsize,
        "trace_seconds": round(trace_s, 2),
        "split_seconds": round(time.perf_counter() - began, 2),
        "granularities": granularities,
        "claims": _claims(model["claims"], granularities),
    }


def _numbers(orders: Mapping[int, Split], traced: Trace, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of one granularity; graphs are described at the highest order, and lower ones differ in the buffers alone."""
    best = orders[max(orders)]
    return {
        "sites": len(best.sites),
        "state_bytes": {
            f"order {k}": _bytes((t for t in s.forecast.inputs if t.role == "taylor_in"), sizes)
            for k, s in orders.items()
        },
        "table_bytes": _bytes((t for t in best.prepare.outputs if t.role == "step"), sizes),
        "request_bytes": _bytes((t for t in best.prepare.outputs if t.role == "constant"), sizes),
        "graphs": {cut.name: _graph(cut, traced) for cut in best.graphs},
    }


def _graph(cut: Cut, traced: Trace) -> dict[str, Any]:
    operators = cut.operators()
    return {
        "weights_bytes": sum(_size(_weight(traced, name)) for name in cut.parameters()),
        "inputs": len(cut.inputs),
        "outputs": len(cut.outputs),
        "operators": sum(operators.values()),
        "attention": sum(n for name, n in operators.items() if "attention" in name),
        "matrix_products": sum(operators[name] for name in ("linear", "addmm", "mm", "matmul", "bmm", "convolution")),
        "by_operator": dict(operators.most_common()),
    }


def _weight(traced: Trace, name: str) -> torch.Tensor:
    """A parameter, or a buffer that the model or the trace computed."""
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(traced.module.get_submodule(owner), leaf)
    return value


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> int:
    return sum(math.prod(resolve(t.shape, sizes)) * getattr(torch, t.dtype).itemsize for t in tensors)


def _claims(claims: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Claim -> limit, what was counted, whether it holds."""
    top = f"order {max(ORDERS)}"
    seen = {f"state {g}, {top}": (claims[g], found[g]["state_bytes"][top]) for g in GRANULARITIES if g in claims}
    if "forecast" in claims:
        seen |= {
            f"forecast weights, {g}": (claims["forecast"], found[g]["graphs"]["forecast"]["weights_bytes"])
            for g in GRANULARITIES
        }
    return {k: {"limit": int(limit), "bytes": n, "holds": n <= limit} for k, (limit, n) in seen.items()}


def table(name: str, found: Mapping[str, Any]) -> str:
    rows = [
        f"{name}: {found['parameters'] / 1e9:.3f} B parameters, {_text(found['weights_bytes'])} in {found['precision']}"
        f"; at {', '.join(f'{k} {v}' for k, v in found['sizes'].items())}",
        f"  traced in {found['trace_seconds']} s, split {len(GRANULARITIES) * len(ORDERS)} times in "
        f"{found['split_seconds']} s, {_text(found['peak_rss_bytes'])} resident at most",
        f"  {'':<10}{'sites':>6}"
        + "".join(f"{f'state, order {k}':>16}" for k in ORDERS)
        + f"{'tables':>12}{'request':>12}",
    ]
    for g, n in found["granularities"].items():
        states = "".join(f"{_text(b):>16}" for b in n["state_bytes"].values())
        rows.append(f"  {g:<10}{n['sites']:>6}{states}{_text(n['table_bytes']):>12}{_text(n['request_bytes']):>12}")
    rows.append(
        f"  {'':<10}{'graph':<10}{'weights':>12}{'operators':>11}{'products':>10}{'attention':>11}{'inputs':>8}"
    )
    for g, n in found["granularities"].items():
        for graph, x in n["graphs"].items():
            rows.append(f"  {g:<10}{graph:<10}{_text(x['weights_bytes']):>12}{x['operators']:>11}"
                        f"{x['matrix_products']:>10}{x['attention']:>11}{x['inputs']:>8}")  # fmt: skip
    for claim, c in found["claims"].items():
        rows.append(f"  {'holds' if c['holds'] else 'BROKEN'}: {claim}: {_text(c['bytes'])} of {_text(c['limit'])}")
    return "\n".join(rows)


def _text(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=list(MODELS), help="(default: both)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="(default: %(default)s)")
    record_options(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers of one model as JSON and write nothing")
    args = parser.parse_args()
    if args.json:
        with tqdm(total=1 + len(GRANULARITIES) * len(ORDERS), desc=args.model[0], unit="graph set", leave=False) as bar:
            found = describe(args.model[0], args.precision, bar.update)
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return 0
    record = circumstances(args.out, args.allow_dirty) | {"models": {}}
    for name in args.model:  # a process each, so that the peak is this model's own
        command = [sys.executable, __file__, "--json", "--model", name, "--precision", args.precision]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record["models"][name] = json.loads(done.stdout.splitlines()[-1])
        print(table(name, record["models"][name]))
    path = write_record("full-size", record, args.out, args.allow_dirty)
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0 if all(c["holds"] for m in record["models"].values() for c in m["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
