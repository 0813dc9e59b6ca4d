"""Rows alike: what is equal for tokens is computed once, and every number stays what it was."""

import pytest
import torch
from harness import TOY, Toy, toy_inputs
from oracle import assert_close

from taylorseer_export.graph.alike import rows_alike
from taylorseer_export.graph.trace import eliminate_dead, trace

aten = torch.ops.aten
# The same operators on fewer rows: a product of another size may sum its 8 terms in another order, on either side.
ORDER = 2 * 8 * torch.finfo(torch.float32).eps


def of_tokens(h, t):
    """A timestep for each token, 0 for the first two, as a model of a picture and a video is told."""
    first = h.new_zeros(1, 2)
    later = torch.cat([first, h.new_ones(1, h.shape[1] - 2)], 1) > 0
    return torch.where(later, t[:, None], torch.zeros_like(t)[:, None])


def told(m, times):
    """`[...]` of times to `[..., 8]`, as embedders do."""
    angles = times[..., None].float() * m.row
    return torch.cat([angles.sin(), angles.cos()], -1)


def modulation(m, h, t):
    """`[batch, tokens, 8]`, the tokens in one dimension with the batch on the way."""
    return torch.nn.functional.linear(told(m, of_tokens(h, t).flatten()), m.weight).view(h.shape[0], -1, 8)


def expanded(m, h, t, text, label):
    rows = told(m, t)[:, None].expand(-1, h.shape[1], -1)
    shift, scale = torch.nn.functional.linear(torch.nn.functional.silu(rows), m.weight).chunk(2, -1)
    return m.site(h) * (1 + scale) + shift


def two_kinds(m, h, t, text, label):
    rows = told(m, of_tokens(h, t).flatten()).unflatten(0, (-1, h.shape[1]))
    shift, scale = torch.nn.functional.linear(rows, m.weight).unflatten(2, (2, -1)).unbind(2)
    return m.site(h) * (1 + scale) + shift


def table_of_its_own(m, h, t, text, label):
    parts = (m.table[None] + modulation(m, h, t).unflatten(2, (2, -1))).chunk(2, dim=2)
    shift, scale = (part.squeeze(2) for part in parts)
    return m.site(h) * (1 + scale) + shift


def table_over_one_row(m, h, t, text, label):
    rows = modulation(m, h, t)[..., :4]
    values = m.table[None] + rows[:, :, None]
    shift, scale = values[:, :, 0], values.chunk(2, dim=2)[1].squeeze(2)
    return m.site(h) * (1 + scale) + shift


def mixed(m, h, t, text, label):
    """What looks along the tokens, or is of each token, keeps them."""
    rows = modulation(m, h, t)[..., :4]
    beside = torch.cat([rows[:, :2], h[:, 2:]], 1)
    return m.site(h) + rows.softmax(1) + rows.cumsum(1) + beside + rows.transpose(1, 2).sum(2)[:, None]


def of_samples(m, h, t, text, label):
    """Each sample has a mask of its own, which is not that of a part of the batch, of pairs, or of the batch twice."""
    rows = torch.where(h[..., :1] > 0, told(m, t)[:, None], told(m, -t)[:, None])
    rows = torch.nn.functional.linear(rows, m.weight)[..., :4]
    pairs = rows[None] + 2 * rows[:, None]
    return m.site(h) * rows[:1] + pairs[0] + torch.cat([rows, rows])[-h.shape[0] :]


PARAMETERS = {
    "row": torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
    "weight": torch.linspace(-1, 1, 64).reshape(8, 8),
    "table": torch.linspace(1, 2, 8).reshape(1, 2, 4),
}


def products(traced):
    """The sizes that the results of linear layers have."""
    shapes = [n.meta["val"].shape for n in traced.module.graph.nodes if n.target is aten.linear.default]
    sizes = [[size for size in shape if isinstance(size, torch.SymInt)] for shape in shapes]
    return [{traced.names[symbol] for size in those for symbol in size.node.expr.free_symbols} for those in sizes]


@pytest.mark.parametrize("compute", [expanded, two_kinds, table_of_its_own, table_over_one_row, mixed, of_samples])
def test_products_are_of_rows_and_no_number_changes(monkeypatch, compute):
    toy = Toy(compute, **PARAMETERS).eval()
    with monkeypatch.context() as without:
        without.setattr("taylorseer_export.graph.trace.rows_alike", lambda graph: None)
        traced = trace(toy, TOY, torch.float32)
    assert products(traced) == [{"batch", "image_tokens"}]
    rows_alike(traced.module.graph)
    eliminate_dead(traced.module.graph)
    traced.module.graph.lint()
    traced.module.recompile()
    if compute is not of_samples:
        assert products(traced) == [{"batch"}] * (1 if compute is expanded else 2)  # one for each kind of tokens
    for sizes in ({}, {"batch": 1, "image_tokens": 4}, {"batch": 3, "image_tokens": 7}):
        inputs = toy_inputs(**sizes)
        seen, (reference,) = traced.module(**inputs), toy(**inputs)
        assert_close(f"{compute.__name__} {sizes}", seen, reference, ORDER * reference.abs().max())
