"""Ranks on TensorRT: the sharded full graph as ONNX gives what the model gives, and builds into one plan for all ranks.

There is no GPU: the graph is run by ONNX's own reference implementation, whose `DistCollective` sends over gloo, and
built by the parser and the builder of `tensorrt_rtx`.
"""

import numpy as np
import oracle
import pytest
import torch
from harness import allowed
from kill_ranks import begun
from onnx import load
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from oracle import assert_close
from ranks import on_ranks
from tiny_bundles import options_of, trace_of

from taylorseer_export.bundle.tensorrt import logger
from taylorseer_export.compile import tensorrt as plans
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import describe, draft
from taylorseer_export.compile.onnx import write_onnx
from taylorseer_export.graph.shard import counted
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner

trt = pytest.importorskip("tensorrt_rtx")

PLAN, ORDER, RANKS = "FF.F", 1, 2
SIZES = {"flux": {"height": 2, "width": 5}, "wan": {"height": 4}}
BUILD = {"gpu-arch": "8.9", "builder-optimization-level": 0}
COLLECTIVE = {"gather": b"all_gather", "ulysses": b"all_to_all"}


@pytest.fixture(scope="module", params=[("flux", "gather"), ("wan", "ulysses")], ids=lambda p: "-".join(p))
def made(request, tiny, tmp_path_factory):
    """(model, mode, draft of what one rank runs, its full graph as ONNX)."""
    name, mode = request.param
    options = options_of("residual", order=ORDER, engine="tensorrt-rtx", engine_options=BUILD, parallel=mode, degree=2)
    one = draft(trace_of(name, tiny(name).folder, options), options)
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(one, one.split.full, one.write_weights(folder, lambda *_: None), folder / "full.onnx")
    return name, mode, one, folder / "full.onnx"


class Evaluated:
    """A graph that ONNX's reference implementation runs as one rank."""

    def __init__(self, path, cut, group):
        class DistCollective(OpRun):
            """As the documentation of TensorRT's operator has it, over the group's own connection."""

            op_domain = ""

            def _run(self, x, collective_operation, reduce_op, root, group_size, nb_rank):
                assert (reduce_op, root, group_size, nb_rank) == ("none", -1, 0, group.size)
                parts = group.gathered(x)
                mine = [part[group.rank][None] for part in parts] if collective_operation == "all_to_all" else parts
                return (np.concatenate(mine),)

        self.names = [tensor.name for tensor in cut.inputs]
        self.evaluator = ReferenceEvaluator(load(path), new_ops=[DistCollective])

    def __call__(self, *tensors):
        given = {name: value.numpy() for name, value in zip(self.names, tensors, strict=True)}
        return [torch.from_numpy(np.array(value)) for value in self.evaluator.run(None, given)]


def test_ranks_give_as_onnx_what_the_model_gives(made, tiny):
    name, mode, one, path = made
    model, inputs = tiny(name).model, tiny(name).inputs(len(PLAN), batch=2, **SIZES[name])
    manifest, modules = describe(one, "eager"), eager_modules(one)

    def run(group):
        graphs = {**modules, "full": Evaluated(path, one.split.full, group)}
        denoiser = Denoiser(manifest, EagerRunner(graphs, manifest.graphs), group=group)
        slot, latents = begun(denoiser, inputs, PLAN, ORDER)
        return torch.from_numpy(denoiser.share.joined(np.stack([slot.step(latent) for latent in latents])))

    reference = oracle.replay(model, *inputs, PLAN, ORDER, "residual")
    for seen in on_ranks(RANKS, run):
        assert_close(f"{mode} as ONNX", seen, reference, allowed(model, reference, PLAN, ORDER))


def test_a_plan_for_all_ranks_is_built_for_a_gpu_that_is_not_there(made):
    """For 8.9, with as many collective layers as the graph makes, of as many ranks."""
    _, mode, one, path = made
    full = one.split.full
    log = logger(trt)
    builder = trt.Builder(log)
    network, parser = plans.parse(trt, builder, log, path)
    plans.check_network(trt, one, full, network)
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    sending = [layer for layer in layers if layer.type == trt.LayerType.DIST_COLLECTIVE]
    assert len(sending) == counted({"full": full.module.graph})["full"] > 0
    nodes = [node for node in load(path, load_external_data=False).graph.node if node.op_type == "DistCollective"]
    assert {node.domain for node in nodes} == {""} and len(nodes) == len(sending)
    assert {a.s for node in nodes for a in node.attribute if a.name == "collective_operation"} == {COLLECTIVE[mode]}
    config = plans.configure(trt, builder, one.options)
    plans.add_profile(builder, config, full, one.dimensions())
    assert builder.build_serialized_network(network, config) is not None, log.last()
    del parser
