"""Every graph of a bundle by itself, compared by Polygraphy's `Comparator`: our runner, the eager graph, and the ONNX
file in Polygraphy's own session where the bundle has one. `verify` compares whole runs; this says which graph is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import Options, draft
from taylorseer_export.compile.polygraphy import example_inputs
from taylorseer_export.errors import ParityError
from taylorseer_export.report.verify import roundoff_of
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.runner import Runner, host_dtype


def compare_graphs(denoiser: Denoiser, checkpoint: Checkpoint, on_graph: Callable[[str, float, float], object]) -> None:
    """Compare each graph on random inputs of the smallest sizes.

    Two computations of one graph may each be off by the bound of `verify`, so they may differ by twice that:

        bound = 2 sqrt(depth) (sqrt(32) u_store + sqrt(length) u_sum) max|output|

    Args:
        denoiser: The loaded bundle.
        checkpoint: What it was made from.
        on_graph: Called with graph, largest difference and its bound, both as shares of max|output|.

    Raises:
        ParityError: Names the graph, the output, and what was seen.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    manifest = denoiser.manifest
    modules = eager_modules(draft(checkpoint, _options(denoiser)))
    bound = 2 * roundoff_of(checkpoint.skeleton(torch.float32), manifest)
    for name, graph in manifest.graphs.items():
        sizes = {n: d.minimum for n, d in manifest.dimensions.items()}
        runners = [
            _runner("engine", graph, partial(_on_engine, denoiser.runner, name, sizes)),
            _runner("eager", graph, partial(_eagerly, modules[name], graph)),
        ]
        if manifest.engine.kind == "onnxruntime" and manifest.precision == "fp32" and denoiser.bundle is not None:
            runners.append(OnnxrtRunner(SessionFromOnnx(str(denoiser.bundle.path(graph.file))), name="onnxruntime"))
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=[example_inputs(graph, manifest.dimensions)])
            scale = {output: float(np.abs(value).max()) for output, value in results["eager"][0].items()}
            allowed = {output: bound * size for output, size in scale.items()}
            compare = SimpleCompareFunc(atol=allowed, rtol=0, check_error_stat="max")
            (verdict,) = Comparator.compare_accuracy(results, compare_func=compare)
        worst = 0.0
        for pair, (outputs,) in verdict.items():
            for output, seen in outputs.items():
                worst = max(worst, seen.max_absdiff / (scale[output] or 1.0))
                if not seen:
                    raise ParityError(
                        f"output `{output}` of graph `{name}` differs by {seen.max_absdiff:.3g} between "
                        f"{' and '.join(pair)}, expected at most {allowed[output]:.3g}; export again, and report it "
                        "if it stays"
                    )
        on_graph(name, worst, bound)


def _options(denoiser: Denoiser) -> Options:
    """The options that give a bundle's graphs again; sizes are left open."""
    manifest = denoiser.manifest
    quantised = manifest.quantised
    given: dict[str, Any] = {}
    if quantised is not None:
        given = {"weights": "keep" if quantised.kept else quantised.weights, "activations": quantised.activations}
        given |= {
            "input_scales": quantised.input_scales,
            "keep_precision": quantised.keep_precision,
            "engine": "inductor",
            "device": "cpu",
        }  # takes every format
    return Options(
        order=manifest.state.order,
        interval=manifest.plan.interval,
        warmup=manifest.plan.warmup,
        granularity=manifest.state.granularity,
        layout=manifest.state.layout,
        **{"device": "cuda", **given},  # where every precision is allowed; nothing is built
        precision=manifest.precision,
        guards=manifest.state.guards,
        state_dtype={"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[manifest.state.dtype],
    )


def _runner(label: str, graph: Graph, compute: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]) -> Any:
    """A function from inputs to outputs as one of Polygraphy's runners."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Function(BaseRunner):
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in graph.inputs:
                shape = tuple(entry if isinstance(entry, int) else None for entry in tensor.shape)
                metadata.add(tensor.name, getattr(torch, tensor.dtype), shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
            self.inference_time = 0.0  # how long it takes is what `bench` says
            return compute(feed_dict)

    return Function(name=label)


def _on_engine(runner: Runner, name: str, sizes: Mapping[str, int], feed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    graph = runner.graphs[name]
    inputs, outputs = (
        {t.name: runner.buffer(resolve(t.shape, sizes), t.dtype) for t in tensors}
        for tensors in (graph.inputs, graph.outputs)
    )
    call = runner.bind(name, inputs, outputs)
    for tensor in graph.inputs:
        inputs[tensor.name].write(torch.as_tensor(feed[tensor.name]).to(_host(tensor.dtype)).numpy())
    call()
    return {tensor: buffer.read() for tensor, buffer in outputs.items()}


def _eagerly(module: Callable[..., Any], graph: Graph, feed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        values = module(*[torch.as_tensor(feed[t.name]) for t in graph.inputs])
    return {t.name: value.to(_host(t.dtype)).numpy() for t, value in zip(graph.outputs, values, strict=True)}


def _host(dtype: str) -> torch.dtype:
    result: torch.dtype = getattr(torch, host_dtype(dtype).name)
    return result
