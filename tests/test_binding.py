"""Binding times: each node of a small graph by hand, and the rule itself on the real ones."""

import pytest
import torch
from harness import toy_trace

from taylorseer_export.graph.binding import Time, binding_times
from taylorseer_export.graph.sizes import is_size

aten = torch.ops.aten


def toy(m, h, t, text, label):
    known = m.weight * 2  # WEIGHT
    request = label * known  # REQUEST
    prompt = text.tanh()  # REQUEST
    row = torch.exp(t[:, None]) * request  # STEP: a row per sample
    tokens = row[:, None] - prompt  # a row per token and step: as good as LATENT
    return m.site(h) * row[:, None] + (tokens + t[:, None, None]).mean(1, keepdim=True)


@pytest.fixture(scope="module")
def times():
    trace = toy_trace(toy, weight=torch.ones(4))[1]
    return trace, binding_times(trace)


def of(times, target):
    trace, found = times
    return [found[n] for n in trace.module.graph.nodes if n.target is target]


def test_inputs_have_the_time_of_their_role(times):
    trace, found = times
    inputs = {n.target: found[n] for n in trace.module.graph.nodes if n.op == "placeholder"}
    assert inputs == {
        "hidden_states": Time.LATENT,
        "timestep": Time.STEP,
        "text": Time.REQUEST,
        "label": Time.REQUEST,
    }


def test_every_kind_of_node(times):
    trace, found = times
    weight = next(n for n in trace.module.graph.nodes if n.op == "get_attr")
    assert found[weight] is Time.WEIGHT
    known, request, row, result = of(times, aten.mul.Tensor)
    assert (known, request, row, result) == (Time.WEIGHT, Time.REQUEST, Time.STEP, Time.LATENT)
    assert of(times, aten.tanh.default) == [Time.REQUEST]
    assert of(times, aten.exp.default) == [Time.STEP]


def test_a_step_value_with_a_row_per_token_is_not_worth_a_table(times):
    assert of(times, aten.sub.Tensor) == [Time.LATENT]


def test_sizes_are_known_at_export():
    trace = toy_trace(lambda m, h, t, text, label: m.site(h) * h.shape[1] / text.shape[1])[1]
    found = binding_times(trace)
    sizes = [n for n in trace.module.graph.nodes if is_size(n)]
    assert sizes
    assert {found[n] for n in sizes} == {Time.WEIGHT}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "plain", "dit"])
def test_a_value_is_never_known_before_its_inputs(traces, name):
    found = binding_times(traces(name))
    late = [n.name for n in found if not is_size(n) and any(found[m] > found[n] for m in n.all_input_nodes)]
    assert late == []
    assert set(found.values()) == set(Time)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "plain", "dit"])
def test_step_values_are_rows_of_the_batch(traces, name):
    trace = traces(name)
    rows = [n for n, time in binding_times(trace).items() if time is Time.STEP]
    shapes = [v.shape for n in rows for v in (n.meta["val"] if isinstance(n.meta["val"], list) else [n.meta["val"]])]
    assert shapes
    assert {trace.names[s[0].node.expr] for s in shapes} == {"batch"}
    assert not any(isinstance(size, torch.SymInt) for s in shapes for size in s[1:])
