"""What an export to ONNX leaves out changes nothing in what it writes."""

from contextlib import nullcontext

import pytest
import torch
from onnxscript.rewriter.pattern import RewriteRule

from taylorseer_export.compile import exporter
from taylorseer_export.compile import onnx as writer
from taylorseer_export.compile.program import quiet_libraries
from taylorseer_export.compile.weights import WEIGHTS, write_weights


def test_a_graph_is_the_same_to_the_byte(drafts, tmp_path, monkeypatch):
    draft, written, tried = drafts("plain"), [], []
    cut = draft.split.full
    places = write_weights(tmp_path / WEIGHTS, {n: draft.stored[n] for n in cut.parameters()}, draft.read)
    rewrite = RewriteRule.try_rewrite

    def counted(*args, **how):
        tried.append(args)
        return rewrite(*args, **how)

    monkeypatch.setattr(RewriteRule, "try_rewrite", counted)
    for way in (exporter.done_once, nullcontext):
        tried.clear()
        monkeypatch.setattr(writer, "done_once", way)
        writer.write_onnx(draft, cut, places, tmp_path / "full.onnx")
        written.append(((tmp_path / "full.onnx").read_bytes(), len(tried)))
    (leaving_out, few), (whole, all_of_them) = written
    assert leaving_out == whole
    assert 0 < 10 * few < all_of_them


class Mixed(torch.nn.Module):
    def forward(self, x, k):
        shifted = x.reshape(-1, 2, 2) + k
        doubled = (x * 2).reshape(-1, 4)
        return torch.cat([shifted.flatten(1).softmax(-1), doubled], 1), k / 3, shifted.transpose(1, 2) - k


def test_types_that_the_exporter_changes_are_followed():
    """Whole numbers and fractions in one operator: what is run again, and what follows it."""
    given = torch.zeros(3, 4), torch.ones((), dtype=torch.int64)
    with quiet_libraries():
        program = torch.export.export(Mixed(), given, dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, {}))
        made = []
        for way in (exporter.done_once, nullcontext):
            with way():
                exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            made.append(exported.model_proto.SerializeToString(deterministic=True))
    assert made[0] == made[1]
    kinds = [node.op_type for node in exported.model_proto.graph.node]
    assert "Cast" in kinds and "Reshape" in kinds


@pytest.mark.parametrize("find", [exporter._functions, exporter._types, exporter._rules])
def test_the_libraries_at_hand_have_it(find):
    owner, name = find()
    original = getattr(owner, name)
    with exporter.done_once():
        assert getattr(owner, name) is not original
    assert getattr(owner, name) is original
