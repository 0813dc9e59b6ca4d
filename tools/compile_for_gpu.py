"""Graphs compiled for GPUs that are not there: what each of them would launch, allocate, copy and spill.

    python tools/compile_for_gpu.py                                      every family's tiny model, for all GPUs
    python tools/compile_for_gpu.py --gpu 9.0 --model flux --link        one, down to the library that is loaded
    python tools/compile_for_gpu.py --gpu 9.0 --model flux.1-dev --graph forecast --file   a published model, filed

Needs torch's CUDA build and no GPU: `make gpu-compiler` makes such an environment. AOTInductor takes every graph from
our own export down to machine code, see `pretended_gpu.py`; nothing runs, so no time is measured, and of several forms
of a kernel the one that spills least is taken, where a GPU would take the fastest. The wrapper that AOTInductor writes
is then read: its launches, where a call of a library counts as one, its allocations, and what it does on the host.

The bytes of a graph are those that its scheduled kernels read and write, with those of libraries apart; the floor is
its weights, inputs and outputs, each once. What passes from kernel to kernel is not in it, which is most of a tiny
model's full graph, whose weights weigh nothing beside it. A tiny model keeps its sizes symbolic, and its bytes are
those of the sizes that it is exported with; a published one has its family's usual size.

Most of the time is Inductor's own, which decides and writes the kernels; Triton and ptxas take a sixth. `--once` lets
it write them for the first GPU alone and compiles them for the others too: their registers and spills are their own,
their launches and bytes those of the first, as the record says (`lowered_for`). Where a GPU with more multiprocessors
would split a reduction, or another form of a kernel would spill less there, that is not seen.

Exits with 1 where a graph does not compile or a goal is missed. Families that the diffusers at hand has no class of
are left out, by name.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from pretended_gpu import GPUS, Kernel, Pretence, in_a_fork, pretend, why_not
from record import RESULTS, circumstances, write_record
from weightless import add_choices, depth, draft_of, together

from taylorseer_export.families import FAMILIES

OF_EACH = ("most_registers", "seconds")  # what differs from GPU to GPU where all else is the same
ON_THE_WAY = ("full", "forecast")  # the graphs of every step: nothing there may wait for the host
MOST_LAUNCHES = {("flux", "residual", "forecast"): 6, ("flux.1-dev", "residual", "forecast"): 6}

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


def compiled(made: Any, cut: Any, program: Any, pretence: Pretence, place: Path) -> dict[str, Any]:
    """What came of one graph, by the package's own way to AOTInductor; its weights and inputs are fake."""
    from taylorseer_export.compile.inductor import compile_program

    place.mkdir()
    compile_program(made, cut, program, "cuda", place)
    (wrapper,) = place.glob("*.wrapper.cpp")
    return {
        **read(wrapper.read_text(encoding="utf-8")),
        **_resources(pretence.kernels),
        "bytes": pretence.bytes.total(),
        "bytes_libraries": pretence.bytes["libraries"],
        "others": {gpu.name: _resources(pretence.kernels_of.get(gpu.name, {})) for gpu in pretence.others},
    }


def _resources(kernels: Mapping[str, Kernel]) -> dict[str, Any]:
    return {
        "spilled_words": {name: kernel.spilled for name, kernel in kernels.items() if kernel.spilled},
        "most_registers": max((kernel.registers for kernel in kernels.values()), default=0),
    }


def floor(made: Any, cut: Any) -> int:
    """Bytes of its weights, inputs and outputs, each once, at the sizes that it is exported with."""
    from taylorseer_export.compile.program import example_inputs

    tensors = example_inputs((*cut.inputs, *cut.outputs), made.graph_sizes, made.ranges(), "cuda")
    return sum(t.numel() * t.itemsize for t in tensors) + int(made.weights_bytes(cut))


def one_model(given: argparse.Namespace) -> None:
    """Print the records of one model's graphs: each is exported once, and compiled in a fork for one GPU after the
    other."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from taylorseer_export.compile.inductor import program_of
    from taylorseer_export.errors import TaylorSeerError, first_line

    gc.set_threshold(50_000, 20, 50)  # an export makes millions of small objects that live
    torch.set_num_threads(1)  # a fork of a process with threads may wait for those that it has not
    (model,) = given.model
    with tempfile.TemporaryDirectory() as scratch:
        pretence = pretend(GPUS[given.gpu[0]], Path(scratch), given.link)
        made = draft_of(model, given.layers, engine="inductor", device="cuda", granularity=given.granularity)
        for cut in made.split.graphs:
            if cut.name not in given.graph:
                continue
            name = {"model": model, **depth(model, given.layers), "granularity": given.granularity, "graph": cut.name}
            began = time.perf_counter()
            try:
                with FakeTensorMode():
                    weights = {
                        n: torch.empty(shape, dtype=dtype, device="cuda") for n, (dtype, shape) in made.stored.items()
                    }
                    program = program_of(made, cut, weights, "cuda")
                    known = {"floor_bytes": floor(made, cut)}
            except TaylorSeerError as error:
                for capability in given.gpu:
                    print(json.dumps({**name, "capability": capability, "error": first_line(error)}), flush=True)
                continue
            known["export_seconds"] = round(time.perf_counter() - began, 1)
            others = given.gpu[1:] if given.once else []
            pretence.others = tuple(GPUS[capability] for capability in others)
            if given.once:
                known["lowered_for"] = given.gpu[0]
            for capability in given.gpu[:1] if given.once else given.gpu:
                began = time.perf_counter()

                def work(capability: str = capability, cut: Any = cut, program: Any = program) -> dict[str, Any]:
                    pretence.gpu = GPUS[capability]
                    try:
                        with FakeTensorMode():
                            return compiled(made, cut, program, pretence, Path(scratch, f"{cut.name}-{capability}"))
                    except TaylorSeerError as error:
                        return {"error": first_line(error)}

                record = {**name, "capability": capability, **in_a_fork(work), **known, "linked": given.link}
                record["seconds"] = round(time.perf_counter() - began, 1)
                of_others = record.pop("others", {})
                print(json.dumps(record), flush=True)
                for other in others:
                    own = {"capability": other, **of_others.get(GPUS[other].name, {})}
                    print(json.dumps({**record, **own}), flush=True)


def absent(models: Iterable[str]) -> dict[str, str]:
    """Those that the diffusers at hand, which may be the oldest asked for, has no class of -> that class."""
    import diffusers  # it loads the compilers, and whoever compiles must pretend before that

    classes = {name: FAMILIES[name].model_class for name in models if name in FAMILIES}
    return {name: of for name, of in classes.items() if not hasattr(diffusers, of)}


def in_a_process(model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of `one_model` in a process of its own; one that ends early has an error for all that it lacks."""
    command = [sys.executable, __file__, "--here", "--model", model, "--gpu", *given.gpu]
    command += ["--granularity", given.granularity, "--graph", *given.graph, *(["--link"] if given.link else [])]
    command += ["--once"] if given.once else []
    command += [] if given.layers is None else ["--layers", str(given.layers)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for said in process.stdout:
                if said.startswith("{"):
                    yield json.loads(said)
        if process.returncode:
            errors.seek(0)
            reasons = [*filter(None, errors.read().strip().splitlines())]
            name = {"model": model, "capability": "any", "granularity": given.granularity, "graph": "all others"}
            yield {**name, "error": reasons[-1] if reasons else f"exit {process.returncode}"}


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
    add_choices(parser, list(GPUS), "gpu-compiler")
    parser.add_argument("--link", action="store_true", help="compile the C++ of the wrapper too, a quarter minute each")
    parser.add_argument("--once", action="store_true", help="lower for the first GPU alone, and compile for all")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, 3 GB each (default: 2)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    if given.here:
        one_model(given)
        return 0
    record = circumstances(RESULTS if given.file else None, given.allow_dirty)
    record["gpus"] = {capability: GPUS[capability].name for capability in given.gpu}
    record["left_out"] = absent(given.model)
    given.model = [model for model in given.model if model not in record["left_out"]]
    for model, needed in record["left_out"].items():
        print(f"{model:14} left out: {needed} is newer than the diffusers at hand", flush=True)
    found: list[dict[str, Any]] = []
    missed: list[str] = []
    filing = Lock()

    def one(model: str) -> None:
        for entry in in_a_process(model, given):
            with filing:
                print(line(entry), flush=True)
                found.append(entry)
                missed.extend(faults(entry))
                if given.file:  # hours of work: what is there is filed
                    write_record(
                        given.file,
                        {**record, "faults": missed, "graphs": together(found, OF_EACH)},
                        RESULTS,
                        given.allow_dirty,
                    )

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, given.model))
    print("\n".join(missed) or "every goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
