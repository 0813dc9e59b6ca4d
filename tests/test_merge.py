"""Equal nodes become one: which are, and that no number changes."""

from dataclasses import replace

import pytest
import torch
from harness import eager_denoiser, run, toy_trace
from tiny_bundles import trace_of

from taylorseer_export.compile import export
from taylorseer_export.graph import split as splitting
from taylorseer_export.graph import trace as tracing
from taylorseer_export.graph.merge import merge_equal

aten = torch.ops.aten


def merged(compute, **parameters):
    """How often each operator is left of a toy."""
    _, trace = toy_trace(compute, **parameters)
    merge_equal(trace.module.graph)
    trace.module.graph.lint()
    found = [n.target for n in trace.module.graph.nodes if n.op in ("call_function", "get_attr")]
    return {target: found.count(target) for target in found}


def test_what_follows_from_equal_values_is_equal():
    def twice(m, h, t, text, label):
        one, other = ((label * m.weight).sin().chunk(2, -1) for _ in range(2))
        return m.site(h) + torch.cat([one[0], other[1]], -1)[:, None] + torch.cat([one[0], other[1]], -1)[:, None]

    found = merged(twice, weight=torch.ones(4))
    once = (aten.mul.Tensor, aten.sin.default, aten.chunk.default, aten.cat.default, aten.unsqueeze.default, "weight")
    assert {target: found[target] for target in once} == dict.fromkeys(once, 1)
    assert found[aten.add.Tensor] == 2


def test_equal_sizes_make_equal_values_whatever_they_were_read_from():
    def grown(m, h, t, text, label):
        one, other = (label[:, None].expand(-1, rows, -1) for rows in (h.shape[1], (h + 1).shape[1]))
        return m.site(h) + one + other

    assert merged(grown)[aten.expand.default] == 1


@pytest.mark.parametrize(
    "pair",
    [(1, 1.0), (1, True), (0.0, -0.0), ((1, 2), (2, 1))],
    ids=str,
)
def test_unlike_arguments_are_not_equal(pair):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(aten.add.Tensor, (x, argument)) for argument in pair]
    graph.output(tuple(nodes))
    merge_equal(graph)
    assert len(graph.nodes) == 4


def test_what_is_random_or_writes_is_left_alone():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    calls = ((aten.rand_like.default, (x,)), (aten.add_.Tensor, (x, 1)), (aten.tanh.default, (x,)))
    graph.output(tuple(graph.call_function(target, args) for target, args in calls for _ in range(2)))
    merge_equal(graph)
    assert [n.target for n in graph.nodes].count(aten.tanh.default) == 1
    assert len(graph.nodes) == 2 + 5


def test_one_modulation_is_one_table_entry_and_no_number_changes(tiny, monkeypatch):
    """FLUX.2 cuts one modulation anew in every block; each shift, scale and gate is a column of the tables once."""
    options = export.Options(order=1, interval=4, warmup=2)
    coarse = replace(options, granularity="residual")  # modules with one gate are summed, in an order of its own
    for module in (tracing, splitting):
        monkeypatch.setattr(module, "merge_equal", lambda graph: None)
    fresh = trace_of("flux2", tiny("flux2").folder, options)  # one that no other test has split
    apart = export.draft(fresh, options)
    inputs = tiny("flux2").inputs(4, batch=2)
    expected = run(eager_denoiser(export.draft(fresh, coarse)), inputs, "FF.F")
    monkeypatch.undo()
    together = export.draft(fresh, options)
    assert torch.equal(run(eager_denoiser(export.draft(fresh, coarse)), inputs, "FF.F"), expected)
    model = tiny("flux2").model
    width = model.config.num_attention_heads * model.config.attention_head_dim
    columns = {t.name: t.shape[-1] // width for t in together.split.prepare.outputs if t.role == "step"}
    # Shift and scale twice for the picture and once for single blocks; those of the text, and its gates; three gates of
    # the picture and of single blocks, and the final norm's shift and scale.
    assert columns == {"step.full": 4 + 2 + 6, "step.shared": 3 + 2}
    before = sum(t.shape[-1] // width for t in apart.split.prepare.outputs if t.role == "step")
    blocks, singles = model.config.num_layers, model.config.num_single_layers
    assert before == 12 * blocks + 3 * singles + 2
