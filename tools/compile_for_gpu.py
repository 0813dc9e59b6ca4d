"""Graphs compiled for GPUs that are not there: what each of them would launch, allocate, copy and spill.

    python tools/compile_for_gpu.py                                      every family's tiny model, for all GPUs
    python tools/compile_for_gpu.py --gpu 9.0 --model flux --link        one, down to the library that is loaded
    python tools/compile_for_gpu.py --gpu 9.0 --model flux.1-dev --graph forecast --file   a published model, filed

Needs torch's CUDA build and no GPU: `make gpu-compiler` makes such an environment. AOTInductor takes every graph from
our own export down to machine code, see `pretended_gpu.py`; nothing runs, so no time is measured, and of several forms
of a kernel the one that spills least is taken, where a GPU would take the fastest. The wrapper that AOTInductor writes
is then read: its launches, where a call of a library counts as one, its allocations, and what it does on the host.

The bytes of a graph are those that its scheduled kernels read and write; the floor is its weights, inputs and outputs,
each once. A tiny model keeps its sizes symbolic, and its bytes are those of the sizes that it is exported with; a
published one has its family's usual size. Exits with 1 where a graph does not compile or a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pretended_gpu import GPUS, Seen, pretend, why_not
from record import RESULTS, circumstances, dirty_option, write_record

# Family -> the function of `tiny_models` that makes its model.
TINY = {
    "dit": "tiny_dit",
    "flux": "tiny_flux",
    "flux-kontext": "tiny_flux",
    "framepack": "tiny_framepack",
    "hidream": "tiny_hidream",
    "hunyuan-video": "tiny_hunyuan",
    "qwen-image": "tiny_qwen_image",
    "sd3": "tiny_sd3",
    "wan": "tiny_wan",
}
PUBLISHED = ("flux.1-dev", "wan2.1-t2v-14b", "hunyuanvideo")  # of `cards.py`
ON_THE_WAY = ("full", "forecast")  # the graphs of every step: nothing there may wait for the host
MOST_LAUNCHES = {("flux", "residual", "forecast"): 6, ("flux.1-dev", "residual", "forecast"): 6}
GRAPHS = ("prepare", "full", "forecast", "probe", "rest")

# What a wrapper says. A library is one of torch's own kernels: cuBLAS, attention, whatever has no Triton form.
_BODY = re.compile(r"inputs\.clear\(\);(.*)\} // AOTInductorModel::run_impl", re.DOTALL)
_TRITON = re.compile(r"^\s*call_(triton_\w+)\(", re.MULTILINE)
_LIBRARY = re.compile(r"\baoti_torch_cuda_(\w+)\(")
_DISPATCHED = re.compile(r"\baoti_torch_(?:proxy_executor_call_function|call_dispatcher)\(")
_ALLOCATED = re.compile(r"\baoti_torch_(?:empty_strided|empty_strided_pinned|clone)\(.*")
_ON_THE_HOST = re.compile(r"\baoti_torch_cpu_\w+\(|\bcpp_fused_\w+\(|cached_torch_device_type_cpu|_pinned\(")
_WAITS = re.compile(r"\baoti_torch_item_\w+\(|\b\w*[sS]ynchronize\(|_local_scalar_dense\(")


def read(wrapper: str) -> dict[str, Any]:
    """What the C++ source of a wrapper does in one call."""
    found = _BODY.search(wrapper)
    if found is None:
        raise SystemExit("the wrapper has no run_impl, expected the source that AOTInductor writes; mend `read`")
    body = found[1]
    libraries = Counter(_LIBRARY.findall(body)) + Counter(dispatched=len(_DISPATCHED.findall(body)))
    triton = _TRITON.findall(body)
    return {
        "kernels": len(set(triton)),
        "launches": len(triton) + libraries.total(),
        "launches_triton": len(triton),
        "launches_libraries": dict(sorted(libraries.items())),
        "allocations": len(_ALLOCATED.findall(body)),
        "host_copies": len(_ON_THE_HOST.findall(body)),
        "synchronisations": len(_WAITS.findall(body)),
    }


def faults(record: Mapping[str, Any]) -> list[str]:
    """What a compilation misses of the goals; empty where all is well."""
    where = f"{record['model']} {record['granularity']} {record['graph']} for {record['capability']}"
    if "error" in record:
        return [f"{where}: {record['error']}"]
    found = []
    if record["graph"] in ON_THE_WAY:
        found += [f"{where}: {record[it]} {it}" for it in ("host_copies", "synchronisations") if record[it]]
    most = MOST_LAUNCHES.get((record["model"], record["granularity"], record["graph"]))
    if most is not None and record["launches"] > most:
        found.append(f"{where}: {record['launches']} launches, expected at most {most}")
    return found


def draft_of(model: str, granularity: str) -> Any:
    """The draft of a tiny or a published model for a GPU, in bfloat16 and with a guard, which brings probe and rest."""
    from dataclasses import replace

    from cards import config, traced_model

    from taylorseer_export.checkpoint.checkpoint import Checkpoint
    from taylorseer_export.compile.export import Options, draft, trace_model
    from taylorseer_export.families import FAMILIES

    how: dict[str, Any] = {"engine": "inductor", "device": "cuda", "granularity": granularity, "guards": ("cg",)}
    if model in TINY:
        import tiny_models

        entries = {k: v for k, v in dict(getattr(tiny_models, TINY[model])().config).items() if not k.startswith("_")}
        checkpoint = Checkpoint(model, FAMILIES[model], Path(model), entries, {}, weightless=True)
        options = Options(order=2, interval=5, warmup=3, precision="bf16", **how)
        return draft(trace_model(checkpoint, options), options)
    traced, options = traced_model(model, config(model))
    batch = draft(traced, replace(options, **how)).typical["batch"]
    return draft(traced, replace(options, latent_size=traced.checkpoint.latent_size, batch=batch, **how))


def compiled(made: Any, cut: Any, seen: Seen, place: Path) -> dict[str, Any]:
    """What came of one graph, by the package's own way to AOTInductor; its weights and inputs are fake."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from taylorseer_export.compile.inductor import compile_graph
    from taylorseer_export.compile.program import example_inputs

    seen.kernels.clear()
    seen.bytes = 0
    place.mkdir()
    with FakeTensorMode():
        weights = {n: torch.empty(shape, dtype=dtype, device="cuda") for n, (dtype, shape) in made.stored.items()}
        tensors = example_inputs((*cut.inputs, *cut.outputs), {**made.sizes, "steps": None}, made.ranges(), "cuda")
        floor = sum(t.numel() * t.itemsize for t in tensors) + made.weights_bytes(cut)
        compile_graph(made, cut, weights, "cuda", place)
    (wrapper,) = place.glob("*.wrapper.cpp")
    return {
        **read(wrapper.read_text(encoding="utf-8")),
        "spilled_words": {name: kernel.spilled for name, kernel in seen.kernels.items() if kernel.spilled},
        "most_registers": max((kernel.registers for kernel in seen.kernels.values()), default=0),
        "bytes": seen.bytes,
        "floor_bytes": floor,
    }


def one_model(model: str, capability: str, granularity: str, graphs: Sequence[str], link: bool) -> list[dict[str, Any]]:
    """The records of one model's graphs for one GPU, in a process of its own."""
    from taylorseer_export.errors import TaylorSeerError, first_line

    with tempfile.TemporaryDirectory() as scratch:
        seen = pretend(GPUS[capability], Path(scratch), link)
        made = draft_of(model, granularity)
        found = []
        for cut in made.split.graphs:
            if cut.name not in graphs:
                continue
            began = time.perf_counter()
            record = {"model": model, "capability": capability, "granularity": granularity, "graph": cut.name}
            try:
                record |= compiled(made, cut, seen, Path(scratch, cut.name))
            except TaylorSeerError as error:
                record["error"] = first_line(error)
            found.append(record | {"linked": link, "seconds": round(time.perf_counter() - began, 1)})
            print(json.dumps(found[-1]), flush=True)
    return found


def in_a_process(model: str, capability: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """`one_model` in a process that believes in one GPU; one that ends early has an error in place of what it lacks."""
    command = [sys.executable, __file__, "--here", "--model", model, "--gpu", capability]
    command += ["--granularity", given.granularity, "--graph", *given.graph, *(["--link"] if given.link else [])]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        name = {"model": model, "capability": capability, "granularity": given.granularity}
        found.append({**name, "graph": "all others", "error": said[-1] if said else f"exit {done.returncode}"})
    for record in found:
        print(line(record), flush=True)
    return found


def line(record: Mapping[str, Any]) -> str:
    """A record for a reader."""
    head = f"{record['model']:14} {record['capability']:>4} {record['graph']:9}"
    if "error" in record:
        return f"{head} FAILED: {record['error']}"
    return (
        f"{head} {record['launches']:4} launches ({record['kernels']} kernels), {record['allocations']} allocations, "
        f"{record['host_copies']} host copies, {record['synchronisations']} waits, "
        f"{sum(record['spilled_words'].values())} spilled, {record['bytes'] / max(record['floor_bytes'], 1):.2f} of "
        f"the floor of {record['floor_bytes'] / 1e6:.3f} MB, {record['seconds']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=[*TINY, *PUBLISHED], default=list(TINY), metavar="NAME")
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS), metavar="CAPABILITY")
    parser.add_argument("--graph", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--granularity", choices=["module", "residual", "last"], default="residual")
    parser.add_argument("--link", action="store_true", help="compile the C++ of the wrapper too, a quarter minute each")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, 3 GB each (default: 2)")
    parser.add_argument("--file", metavar="NAME", nargs="?", const="gpu-compiler", help="write a record of this name")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    dirty_option(parser)
    given = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    if given.here:
        one_model(given.model[0], given.gpu[0], given.granularity, given.graph, given.link)
        return 0
    record = circumstances(RESULTS if given.file else None, given.allow_dirty)
    record["gpus"] = {capability: GPUS[capability].name for capability in given.gpu}
    cases = [(model, capability) for model in given.model for capability in given.gpu]
    found: list[dict[str, Any]] = []
    missed: list[str] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for many in pool.map(lambda case: in_a_process(*case, given), cases):
            found += many
            missed += [fault for entry in many for fault in faults(entry)]
            if given.file:  # hours of work: what is there is filed
                write_record(given.file, {**record, "faults": missed, "graphs": found}, RESULTS, given.allow_dirty)
    print("\n".join(missed) or "every goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
