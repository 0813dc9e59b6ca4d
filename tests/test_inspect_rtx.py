"""Layers of TensorRT-RTX: how a builder's log is read, and what it says of a real engine."""

import subprocess
import sys
from pathlib import Path

import pytest
from inspect_rtx import faults, layers, read
from weightless import MODELS, depth, together

from taylorseer_export.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
LOG = """Layers:
Name: entry^wait^1, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, Metadata: 
Name: {before}, LayerType: kgen, Inputs: [ {{ Name: x, Dimensions: [2,4], Datatype: BFloat16, Format: (Linear) Row }}], Constants: [], Outputs: [ {{ Name: q, Dimensions: [2,4], Datatype: {type}, Format: (Linear) Row }}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_mul]
Name: {attention}, LayerType: kgen, Inputs: [ {{ Name: q, Dimensions: [2,4], Datatype: {type}, Format: (Linear) Row }}], Constants: [], Outputs: [ {{ Name: o, Dimensions: [2,4], Datatype: BFloat16, Format: (Linear) Row }}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_Softmax_1][ONNX Layer: node_MatMul_2]
Name: {sum}, LayerType: kgen, Inputs: [ {{ Name: {weights}, Dimensions: [1,3], Datatype: Float, Format: (Linear) Row }}, {{ Name: taylor_in.residual, Dimensions: [3,4], Datatype: BFloat16, Format: (Linear) Row }}], Outputs: [ {{ Name: y, Dimensions: [4], Datatype: BFloat16, Format: (Linear) Row }}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_matmul]

I/O Tensors:
 Name: x, IOMode: Input
"""  # noqa: E501
GOOD = {
    "before": "__myl_MulAddResh_myl0_0",
    "attention": "_gemm_mha_v2_myl0_1",
    "type": "BFloat16",
    "sum": "__myl_CastMulMulMulAddAdd_myl0_2",
    "weights": "weights",
}
RECORD = {"model": "flux", "granularity": "residual", "graph": "any", "capability": "8.9"}


def found(**changes):
    return read(layers(LOG.format(**GOOD | changes)), ["[ONNX Layer: node_Softmax_1]"], ["taylor_in.residual"])


def test_a_log_is_read():
    it = found()
    assert (it["layers"], it["of_type"], it["attention"], it["attention_fused"]) == (3, {"kgen": 3}, 1, 1)
    assert (it["reads_of_buffers"], it["weighted_sum_fused"], it["moves_beside_attention"]) == (1, True, 0)
    assert it["attention_types"] == ["BFloat16"] and it["kernels"] == [GOOD[k] for k in ("before", "attention", "sum")]
    assert faults({**RECORD, **it}) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attention": "__myl_MaxSubExpSum_myl0_1"}, "0 of 1 attentions are one kernel"),
        ({"before": "__myl_CastMove_myl0_0", "type": "Float"}, "1 casts beside attention"),
        ({"weights": "other"}, "1 layers read the Taylor buffers, expected the sum alone"),
    ],
)
def test_a_missed_goal_is_a_fault(changes, fault):
    assert faults({**RECORD, **found(**changes)}) == [f"flux residual any for 8.9: {fault}"]


def test_a_buffer_that_nothing_reads_or_two_layers_read_has_no_sum():
    """Two buffers are those of two latents, with a sum each."""
    one = layers(LOG.format(**GOOD))
    for buffers, of, expected in ((1, one, True), (2, one, False), (1, [*one, one[-1]], False)):
        names = ["taylor_in.residual", "taylor_in.other"][:buffers]
        assert read(of, [], names)["weighted_sum_fused"] == expected


def test_a_full_graph_without_attention_is_a_fault():
    it = read(layers(LOG.format(**GOOD)), [], [])
    assert faults({**RECORD, **it, "graph": "full"}) == [
        "flux residual full for 8.9: no attention is seen, expected that of every block; mend `attentions`"
    ]


def test_a_move_beside_attention_is_counted_and_no_fault():
    it = found(before="__myl_ReshMove_myl0_0")
    assert (it["moves_beside_attention"], it["casts_beside_attention"]) == (1, 0)


def test_a_log_without_layers_is_refused():
    with pytest.raises(SystemExit, match="mend `layers`"):
        layers("Layers:\n")


def test_records_that_say_the_same_are_one():
    one, other, third = (
        {"n": n, "capability": c, "seconds": s} for n, c, s in ((1, "8.0", 3), (1, "8.9", 4), (2, "9.0", 5))
    )
    assert together([one, other, third], ("seconds",)) == [
        {"n": 1, "capabilities": {"8.0": {"seconds": 3}, "8.9": {"seconds": 4}}},
        {"n": 2, "capabilities": {"9.0": {"seconds": 5}}},
    ]


def test_a_shallow_model_says_how_shallow():
    assert set(FAMILIES) < set(MODELS)
    assert depth("flux.1-dev", None) == depth("flux", 2) == {}
    assert depth("flux.1-dev", 2) == {"num_layers": "2 of 19", "num_single_layers": "2 of 38"}


@pytest.mark.slow
def test_the_layers_of_an_engine_are_what_we_promise():
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, "tools/inspect_rtx.py", "--model", "dit", "--graph", "full", "forecast", "--gpu", "8.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "3 of 3 attentions fused" in done.stdout and "weighted sum fused" in done.stdout
