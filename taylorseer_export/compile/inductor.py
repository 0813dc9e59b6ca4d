"""Bundles for torch: one AOTInductor package with all graphs, over weights that they share and that are stored once.

The package holds machine code only. Its constants stay in `weights.safetensors`; the runner maps that file and hands
every graph the same tensors. Graphs write into buffers they are given and return nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from taylorseer_export.bundle.contract import NOTE, signature
from taylorseer_export.bundle.manifest import Engine
from taylorseer_export.compile.draft import BaseDraft, Options
from taylorseer_export.compile.eager import pointwise_sums, weighted, writing
from taylorseer_export.compile.engines import Progress, library_versions
from taylorseer_export.compile.parallel import named_group
from taylorseer_export.compile.products import in_few_bits
from taylorseer_export.compile.program import example_inputs, exported_program, quiet_libraries
from taylorseer_export.compile.weights import WEIGHTS
from taylorseer_export.errors import BuildError, first_line
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.quantise import lowered

PACKAGE = "graphs.pt2"
# Sources stay behind. The wrapper's name does not: from it torch 2.11 works out where a graph's metadata lies.
EMPTIED = "// the library beside this file was built from it\n"


def check(options: Options) -> None:
    """Refuse to start without the compiler, or for a GPU that is not there: kernels are tuned on the machine itself.

    Raises:
        BuildError: Something that builds is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(
            f"the C++ compiler `{compiler}` is not installed, expected it for --engine inductor; install it (on "
            "Debian: apt install g++), or name another in CXX"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BuildError(
            "--device is cuda, expected a GPU that torch can use here, because --engine inductor builds for the "
            "machine it runs on; build on the machine that serves, or use --device cpu"
        )


def engine(options: Options) -> Engine:
    """Machine code is tied to the exact torch, and to the instruction set or the GPU it was built on."""
    device = {"devices": options.device or "cpu", "machine": platform.machine()}
    if options.device == "cuda":
        device["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        device["gpu"] = torch.cuda.get_device_name()
        device["cuda"] = str(torch.version.cuda)
    else:
        device["instructions"] = torch.backends.cpu.get_cpu_capability()
        if options.weights in ("int8", "keep") and options.activations not in (None, "none"):
            device["int8"] = "vnni" if torch.cpu._is_vnni_supported() else "widened"
    # Of a wheel from the package index, pip's version leaves out the build (`+cu130`) that torch itself names at load.
    versions = {**library_versions("inductor", "torch", "diffusers"), "torch": str(torch.__version__)}
    return Engine(kind="inductor", versions=versions, device=device)


def graph_file(graph: str) -> str:
    """One package holds all graphs."""
    return PACKAGE


def build(draft: BaseDraft, folder: Path, progress: Progress) -> None:
    """Write the weights, compile each graph, and pack what came out.

    Raises:
        BuildError: A graph does not compile.
    """
    from safetensors.torch import load_file
    from torch._inductor.package import package_aoti

    draft.write_weights(folder, progress)
    device = draft.options.device or "cpu"
    weights = load_file(folder / WEIGHTS, device)
    cuts = draft.graphs
    with TemporaryDirectory() as scratch:
        files: dict[str, Any] = {}
        for k, cut in enumerate(cuts):
            progress("graphs", k, len(cuts))
            place = Path(scratch, cut.name)
            place.mkdir()
            files[cut.name] = compile_graph(draft, cut, weights, device, place)
            for source in files[cut.name]:
                if source.endswith(".cpp"):
                    Path(source).write_text(EMPTIED, encoding="utf-8")
        package_aoti(str(folder / PACKAGE), files)
    progress("graphs", len(cuts), len(cuts))


def compile_graph(draft: BaseDraft, cut: Cut, weights: dict[str, torch.Tensor], device: str, place: Path) -> list[str]:
    """The files of one graph in `place`: its library, what AOTInductor says of it, and the source of its wrapper.

    Raises:
        BuildError: It does not compile.
    """
    return compile_program(draft, cut, program_of(draft, cut, weights, device), device, place)


def program_of(
    draft: BaseDraft, cut: Cut, weights: dict[str, torch.Tensor], device: str
) -> torch.export.ExportedProgram:
    """One graph in the form that is compiled: it writes its outputs, and its forecasts are pointwise.

    Raises:
        BuildError: It does not export.
    """
    module = writing(pointwise_sums(weighted(lowered(in_few_bits(cut, device)), weights, device)), cut)
    return exported_program(cut, draft.graph_sizes, draft.ranges(), module, device)


def compile_program(
    draft: BaseDraft, cut: Cut, program: torch.export.ExportedProgram, device: str, place: Path
) -> list[str]:
    """The files of an exported graph in `place`, as `compile_graph` returns them.

    Raises:
        BuildError: It does not compile.
    """
    settings = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.output_path": str(place),
        "aot_inductor.metadata": {NOTE: signature(draft.contract(cut))},
        "max_autotune": bool(draft.options.engine_options.get("max-autotune")),
    }
    try:
        with torch.no_grad(), quiet_libraries(), named_group(draft.parallel):
            inputs = example_inputs((*cut.inputs, *cut.outputs), draft.graph_sizes, draft.ranges(), device)
            files = torch._inductor.aot_compile(program.module(check_guards=False), inputs, options=settings)
    except Exception as error:
        raise BuildError(
            f"graph `{cut.name}` does not compile, expected torch {torch.__version__} to build it; "
            f"torch says: {first_line(error)}"
        ) from error
    assert isinstance(files, list), "bug in taylorseer-export: AOTInductor was not asked for a package"
    return [str(file) for file in files if str(file).endswith(".wrapper.cpp") or not str(file).endswith(".cpp")]
