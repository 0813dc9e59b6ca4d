"""TensorRT plans through Torch-TensorRT: the same files with the same tensors, converted from torch's own graphs.

Where its converters do better than the ONNX parser, or a model has an operator without an ONNX form. What ranks send
each other stays torch's collectives: the converter fuses each with its wait into one layer of TensorRT's (its pass
`fuse_distributed_ops`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.bundle.manifest import Engine
from taylorseer_export.bundle.parallel import Parallel
from taylorseer_export.bundle.tensorrt import extents
from taylorseer_export.compile.draft import BaseDraft, Options
from taylorseer_export.compile.eager import weighted
from taylorseer_export.compile.engines import Progress, library_versions
from taylorseer_export.compile.parallel import named_group
from taylorseer_export.compile.program import exported_program
from taylorseer_export.compile.tensorrt import engine as tensorrt_engine
from taylorseer_export.compile.tensorrt import graph_file as graph_file
from taylorseer_export.compile.tensorrt import refuse_cpu, this_gpu
from taylorseer_export.errors import BuildError, first_line
from taylorseer_export.graph.cut import Cut

DEVICE = "cuda"  # it converts on the GPU that the plans are for
# Option -> the converter's name for it.
_SETTINGS = {
    "workspace": "workspace_size",
    "builder-optimization-level": "optimization_level",
    "max-aux-streams": "max_aux_streams",
    "version-compatible": "version_compatible",
    "weight-streaming": "enable_weight_streaming",
    "timing-cache": "timing_cache_path",
}


def check(options: Options) -> None:
    """Refuse a device that is no GPU, and a machine that cannot build.

    Raises:
        ConfigError: The device is none that TensorRT has.
        BuildError: The library is not installed, or has no collectives for `--parallel`; or there is no GPU.
    """
    refuse_cpu(options)
    library = _library()
    if options.parallel is not None and not library.ENABLED_FEATURES.native_trt_collectives:
        raise BuildError(
            f"torch-tensorrt {library.__version__} has no collectives of TensorRT's, expected a build with NCCL on "
            "TensorRT 10.16 or newer for --parallel; install one, or use --engine tensorrt"
        )
    this_gpu(options.engine)


def engine(options: Options) -> Engine:
    """What the plans are tied to: the same as any plan of TensorRT, and the converter."""
    tied = tensorrt_engine(options)
    return tied.model_copy(update={"versions": {**tied.versions, **library_versions(options.engine, "torch-tensorrt")}})


def build(draft: BaseDraft, folder: Path, progress: Progress) -> None:
    """Convert each graph, whole or not at all, into a plan whose tensors have the contract's names.

    Raises:
        BuildError: An operator has no converter.
    """
    library = _library()
    weights = {name: draft.read(name).to(DEVICE, dtype) for name, (dtype, _) in draft.stored.items()}
    cuts = draft.graphs
    for k, cut in enumerate(cuts):
        progress("graphs", k, len(cuts))
        try:
            with _one_of_ranks(draft.parallel), named_group(draft.parallel):
                plan = _converted(library, draft, cut, weights)
        except BuildError:
            raise
        except Exception as error:
            raise BuildError(
                f"graph `{cut.name}` is not converted by torch-tensorrt ({first_line(error)}), "
                "expected one plan; use --engine tensorrt"
            ) from error
        (folder / graph_file(cut.name)).write_bytes(plan)
    progress("graphs", len(cuts), len(cuts))


def _converted(library: Any, draft: BaseDraft, cut: Cut, weights: dict[str, torch.Tensor]) -> bytes:
    given = draft.options.engine_options
    own = replace(cut, module=weighted(cut, weights, DEVICE))
    program = exported_program(own, draft.graph_sizes, draft.ranges(), device=DEVICE)
    ranges = [
        dict(zip(("min_shape", "opt_shape", "max_shape"), extents(t, draft.dimensions()), strict=True))
        for t in cut.inputs
    ]
    inputs = [
        library.Input(**shapes, dtype=getattr(torch, tensor.dtype), name=tensor.name)
        for shapes, tensor in zip(ranges, cut.inputs, strict=True)
    ]
    plan: bytes = library.dynamo.convert_exported_program_to_serialized_trt_engine(
        program,
        arg_inputs=tuple(inputs),
        arg_input_binding_names=tuple(t.name for t in cut.inputs),
        output_binding_names=tuple(t.name for t in cut.outputs),
        require_full_compilation=True,
        min_block_size=1,
        disable_tf32="tf32" not in given,
        use_distributed_mode_trace=draft.parallel is not None,
        **{_SETTINGS[name]: value for name, value in given.items() if name in _SETTINGS},
    )
    return plan


@contextmanager
def _one_of_ranks(parallel: Parallel | None) -> Iterator[None]:
    """The converter of a collective asks the environment, as torchrun sets it, how many ranks there are.

    A plan serves all of them: nothing in it is of one rank.
    """
    if parallel is None:
        yield
        return
    told = {"WORLD_SIZE": str(parallel.degree), "RANK": "0"}
    before = {name: os.environ[name] for name in told if name in os.environ}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]
        os.environ.update(before)


def _library() -> Any:
    try:
        import torch_tensorrt
    except (ImportError, OSError) as error:
        raise BuildError(
            f"torch-tensorrt is not installed ({error}), expected it for --engine torch-tensorrt; "
            "pip install 'taylorseer-export[torch-tensorrt]'"
        ) from error
    return torch_tensorrt
