"""Bundles for ONNX Runtime: one ONNX file per graph, which its session compiles when it loads."""

from __future__ import annotations

from pathlib import Path

from taylorseer_export.bundle.manifest import Engine
from taylorseer_export.compile.draft import BaseDraft, Options
from taylorseer_export.compile.engines import Progress, library_versions
from taylorseer_export.compile.onnx import OPSET, write_graphs
from taylorseer_export.errors import ConfigError


def check(options: Options) -> None:
    """Its CPU kernels have matrix products of float32 alone; on a GPU every precision runs.

    Raises:
        ConfigError: The precision or the provider needs a GPU, and the bundle is not made for one.
    """
    if options.device == "cpu" and "provider" in options.engine_options:
        raise ConfigError(
            f"--provider is {options.engine_options['provider']} with --device cpu, expected it with --device cuda; "
            "leave one out"
        )
    if options.precision != "fp32" and options.device != "cuda":
        raise ConfigError(
            f"--precision is {options.precision}, expected fp32 for --engine onnxruntime, whose CPU kernels have no "
            "other matrix product; leave --precision out, or add --device cuda"
        )


def engine(options: Options) -> Engine:
    """What the graphs were made with; in float32 they run on the CPU and on a GPU."""
    return Engine(
        kind="onnxruntime",
        versions=library_versions("onnxruntime", "onnxruntime", "onnx", "torch", "diffusers"),
        device={"devices": options.device or "cpu cuda", "opset": str(OPSET)},
    )


def graph_file(graph: str) -> str:
    """File name of a graph in its bundle."""
    return f"{graph}.onnx"


def build(draft: BaseDraft, folder: Path, progress: Progress) -> None:
    """Write the weights, then each graph as ONNX that points into them.

    Raises:
        BuildError: An operator has no ONNX form.
    """
    write_graphs(draft, folder, progress)
