"""Engines of TensorRT-RTX, built for GPUs that are not there: which layers each of them runs.

    python tools/inspect_rtx.py                                            every family's tiny model, for all GPUs
    python tools/inspect_rtx.py --model flux.1-dev --graph forecast --file   a published model, filed
    python tools/inspect_rtx.py --model flux.1-dev --layers 1 --graph full   one block of each kind at full width

Needs `tensorrt_rtx` and no GPU. Its engine inspector reads a loaded engine, and none loads without a driver; but the
builder's own log ends with the same layers, in detail where that is asked for: type, kernel, tensors, the ONNX nodes
that went into it. Weights are random. Exits with 1 where a graph does not build or a goal is missed:

- Attention is one kernel: every softmax that a matrix product reads is in a layer whose kernel is of that kind, and no
  layer next to it does nothing but cast.
- The weighted sum is one kernel: each Taylor buffer, of which a model with two latents has two, is read by one layer,
  which reads the weights as well, or what another one took from them.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import RESULTS, circumstances, write_record
from weightless import add_choices, depth, draft_of, together

from taylorseer_export.families import FAMILIES

GPUS = ("8.0", "8.9", "12.0")  # of those that we compile for, the ones that this library builds for
OF_EACH = ("plan_bytes", "seconds")  # what differs from GPU to GPU where all else is the same
FUSED = "mha"  # in the name of a kernel that is a whole attention
MOVES = {"Move", "Resh", "Tran", "Slic", "Cast"}  # parts of a kernel that compute nothing
IDLE = ("signal", "wait")  # layers that order two streams

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>.*?), (?:Constants: .*?, )?"
    r"Outputs: (?P<outputs>.*?), TacticName: .*?Metadata: ?(?P<nodes>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: .*?Datatype: (\w+)")
_PARTS = re.compile(r"[A-Z][a-z]+")


@dataclass(frozen=True)
class Layer:
    """A layer as the builder names it.

    Attributes:
        name: Its kernel's, most often made of what was fused.
        type: `gemm`, `kgen` for a generated kernel, and others.
        inputs, outputs: Tensor name -> its type.
        nodes: The ONNX nodes that went into it.
    """

    name: str
    type: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    nodes: str

    @property
    def parts(self) -> set[str]:
        """What was fused, of a generated kernel."""
        return set(_PARTS.findall(self.name.split("_myl_")[1].split("_")[0])) if "_myl_" in self.name else set()


def layers(text: str) -> list[Layer]:
    """The layers that a builder's log ends with; those that only order streams are left out."""
    found = [
        Layer(m["name"], m["type"], dict(_TENSOR.findall(m["inputs"])), dict(_TENSOR.findall(m["outputs"])), m["nodes"])
        for m in _LAYER.finditer(text)
    ]
    if not found:
        raise SystemExit("the log names no layer, expected lines of `Name: ..., LayerType: ...`; mend `layers`")
    return [layer for layer in found if layer.type not in IDLE]


def read(found: Sequence[Layer], softmaxes: Sequence[str], buffers: Sequence[str]) -> dict[str, Any]:
    """What the layers of one engine say.

    Args:
        found: They.
        softmaxes: What the network says of the origin of each softmax.
        buffers: Names of the Taylor buffers that the graph reads.
    """
    attention = [layer for layer in found if any(node in layer.nodes for node in softmaxes)]
    fused = [layer for layer in attention if FUSED in layer.name]
    beside = [
        layer
        for layer in found
        if layer.parts
        and layer.parts <= MOVES
        and any(layer.outputs.keys() & a.inputs.keys() or layer.inputs.keys() & a.outputs.keys() for a in fused)
    ]
    sums = [layer for layer in found if layer.inputs.keys() & set(buffers)]
    weights = {"weights"}.union(*(layer.outputs for layer in found if "weights" in layer.inputs))
    return {
        "layers": len(found),
        "of_type": dict(sorted(Counter(layer.type for layer in found).items())),
        "attention": len(softmaxes),
        "attention_fused": sum(any(node in layer.nodes for layer in fused) for node in softmaxes),
        "attention_types": sorted({t for layer in fused for t in (*layer.inputs.values(), *layer.outputs.values())}),
        "casts_beside_attention": sum("Cast" in layer.parts for layer in beside),
        "moves_beside_attention": len(beside),
        "reads_of_buffers": len(sums),
        "weighted_sum_fused": buffers != []
        and all(layer.inputs.keys() & weights for layer in sums)
        and all(sum(buffer in layer.inputs for layer in sums) == 1 for buffer in buffers),
        "kernels": [layer.name for layer in found] if buffers else [],
    }


def faults(record: Mapping[str, Any]) -> list[str]:
    """What an engine misses of the goals; empty where all is well."""
    where = f"{record['model']} {record['granularity']} {record['graph']} for {record['capability']}"
    if "error" in record:
        return [f"{where}: {record['error']}"]
    found = []
    if record["graph"] == "full" and not record["attention"]:
        found.append(f"{where}: no attention is seen, expected that of every block; mend `attentions`")
    if record["attention_fused"] < record["attention"]:
        found.append(f"{where}: {record['attention_fused']} of {record['attention']} attentions are one kernel")
    if record["casts_beside_attention"]:
        found.append(f"{where}: {record['casts_beside_attention']} casts beside attention")
    if record["reads_of_buffers"] and not record["weighted_sum_fused"]:
        found.append(f"{where}: {record['reads_of_buffers']} layers read the Taylor buffers, expected the sum alone")
    return found


def listening(trt: Any) -> Any:
    """A log that keeps its errors, as the package's own does, and the layers that builds end with."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            if message.startswith("Layers:"):
                self.layers += message

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gives no reason"

    return Log()


def attentions(trt: Any, network: Any) -> list[str]:
    """What the network says of the origin of each softmax whose values weight others: one that routes does not."""
    every = [network.get_layer(k) for k in range(network.num_layers)]
    readers: dict[str, list[Any]] = {}
    for layer in every:
        for k in range(layer.num_inputs):
            if layer.get_input(k) is not None:
                readers.setdefault(layer.get_input(k).name, []).append(layer)

    def weights(layer: Any) -> bool:
        # A mask brings a choice between values and zeros for rows that it leaves nothing of.
        passing = (trt.LayerType.SHUFFLE, trt.LayerType.CAST, trt.LayerType.IDENTITY, trt.LayerType.SELECT)
        return any(
            reader.type == trt.LayerType.MATRIX_MULTIPLY or (reader.type in passing and weights(reader))
            for reader in readers.get(layer.get_output(0).name, [])
        )

    return [layer.metadata for layer in every if layer.type == trt.LayerType.SOFTMAX and weights(layer)]


def built(trt: Any, log: Any, made: Any, cut: Any, path: Path) -> dict[str, Any]:
    """What came of one graph, by the package's own way to the builder."""
    from taylorseer_export.compile.tensorrt import add_profile, check_network, configure, parse
    from taylorseer_export.errors import BuildError

    builder, log.layers = trt.Builder(log), ""
    network, parser = parse(trt, builder, log, path)
    check_network(trt, made, cut, network)
    softmaxes = attentions(trt, network)
    config = configure(trt, builder, made.options)
    add_profile(builder, config, cut, made.dimensions())
    plan = builder.build_serialized_network(network, config)
    del parser  # it holds the weights that the network reads
    if plan is None:
        raise BuildError(f"graph `{cut.name}` was not built ({log.last()}), expected a plan; report it")
    buffers = [tensor.name for tensor in cut.inputs if tensor.role == "taylor_in"]
    return {**read(layers(log.layers), softmaxes, buffers), "plan_bytes": plan.nbytes}


def one_model(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one model's graphs: each is exported once, and built for one GPU after the other."""
    import torch

    from taylorseer_export.bundle.tensorrt import library
    from taylorseer_export.compile.onnx import write_onnx
    from taylorseer_export.compile.weights import WEIGHTS, write_weights
    from taylorseer_export.errors import BuildError, TaylorSeerError, first_line

    trt = library("tensorrt-rtx", BuildError)
    log = listening(trt)
    made = draft_of(model, given.layers, engine="tensorrt-rtx", granularity=given.granularity, **_sizes(model))
    random = torch.Generator().manual_seed(0)
    found = []

    def weight(name: str) -> torch.Tensor:
        if name in made.buffers:
            return made.buffers[name]
        return torch.randn(made.stored[name][1], generator=random) / 16

    for cut in made.split.graphs:
        if cut.name not in given.graph:
            continue
        name = {"model": model, **depth(model, given.layers), "granularity": given.granularity, "graph": cut.name}
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, f"{cut.name}.onnx")
            stored = {n: made.stored[n] for n in cut.parameters()}
            write_onnx(made, cut, write_weights(Path(scratch, WEIGHTS), stored, weight), path)
            for capability in given.gpu:
                began = time.perf_counter()
                of_this = {"gpu-arch": capability, "profiling-verbosity": "detailed"}
                this = replace(made, options=replace(made.options, engine_options=of_this))
                try:
                    record = {**name, "capability": capability, **built(trt, log, this, cut, path)}
                except TaylorSeerError as error:
                    record = {**name, "capability": capability, "error": first_line(error)}
                found.append({**record, "seconds": round(time.perf_counter() - began, 1)})
                print(line(found[-1]), flush=True)
    return found


def _sizes(model: str) -> dict[str, Any]:
    """A batch and a latent of one size that a tiny model takes, which builds faster; the text stays a range."""
    if model not in FAMILIES:
        return {}
    small = {"latent_size": (16, 16) if len(FAMILIES[model].latent_size) == 2 else (5, 16, 16)}
    return {"batch": 2, **({} if model == "dit" else small)}  # the DiT knows no other size than its own


def line(record: Mapping[str, Any]) -> str:
    """A record for a reader."""
    head = f"{record['model']:14} {record['capability']:>4} {record['graph']:9}"
    if "error" in record:
        return f"{head} FAILED: {record['error']}"
    summed = ", weighted sum fused" if record["weighted_sum_fused"] else ""
    return (
        f"{head} {record['layers']:4} layers, {record['attention_fused']} of {record['attention']} attentions fused, "
        f"{record['casts_beside_attention']} casts and {record['moves_beside_attention']} moves beside them, "
        f"{record['reads_of_buffers']} read the buffers{summed}, {record['seconds']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choices(parser, GPUS, "rtx-layers")
    given = parser.parse_args()
    record = circumstances(RESULTS if given.file else None, given.allow_dirty)
    found: list[dict[str, Any]] = []
    missed: list[str] = []
    for model in given.model:
        found += one_model(model, given)
        missed = [fault for entry in found for fault in faults(entry)]
        if given.file:
            write_record(
                given.file, {**record, "faults": missed, "graphs": together(found, OF_EACH)}, RESULTS, given.allow_dirty
            )
    print("\n".join(missed) or "every goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
