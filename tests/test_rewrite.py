"""Rewrites: each write in place that the models make, as a new tensor; every other one is refused."""

import pytest
import torch
from harness import toy_inputs, toy_trace

from taylorseer_export.errors import ExportError
from taylorseer_export.graph.rewrite import mutates, out_of_place
from taylorseer_export.graph.trace import drop_noise

aten = torch.ops.aten


def interleaved(m, h, t, text, label):
    """As Wan's rotary embedding."""
    first, second = h.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(h)
    out[..., 0::2] = first * 2
    out[..., 1::2] = second - first
    return m.site(out.type_as(h))


def first_column(m, h, t, text, label):
    """As the mask of Hunyuan's token refiner."""
    mask = (text.sum(-1) > 0) & (text.sum(-1) < 9)
    mask[:, 0] = True
    return m.site(h) + mask.to(h.dtype).sum(1)[:, None, None]


def inner_column(m, h, t, text, label):
    x = text * 2
    x[:, :, 2] = 5.0
    return m.site(h) + x.sum((1, 2))[:, None, None]


def masked(fill):
    def compute(m, h, t, text, label):
        mask = (text.sum(-1) > 0).masked_fill(text.sum(-1) > 1, fill)
        return m.site(h) + mask.to(h.dtype).sum(1)[:, None, None]

    return compute


def turned_rows(m, h, t, text, label):
    """As the rows of a picture that CogView4 turns in place, behind those of the text."""
    x = torch.cat([text, h], 1) * 2
    count = text.shape[1]
    x[:, count:] = x[:, count:] * 3
    return m.site(x[:, count:]) + x[:, :count].sum(1, keepdim=True)


def numbered(m, h, t, text, label):
    """As places of tokens, one number after the other."""
    places = torch.zeros(h.shape[1], 2)
    places[..., 0] = torch.arange(h.shape[1])
    places[..., 1] = torch.arange(h.shape[1])[:] * 2
    return m.site(h) + places.sum(-1)[:, None]


def halved(m, h, t, text, label):
    x = text * 2
    x /= 4
    return m.site(h) + x.sum((1, 2))[:, None, None]


def without_gradients(m, h, t, text, label):
    """A region of its own in the trace, and a squeeze of a size that is not 1."""

    @torch.no_grad()
    def made():
        return torch.arange(4) * 2.0

    with torch.autocast("cuda", enabled=False), torch.enable_grad():
        scale = made()
    return m.site(h).squeeze(-1) * scale


@pytest.mark.parametrize(
    ("compute", "gone"),
    [
        (interleaved, (aten.copy_.default, aten.empty_like.default, aten.type_as.default, aten.to.dtype)),
        (first_column, (aten.fill_.Tensor,)),
        (inner_column, (aten.fill_.Tensor,)),
        (masked(True), (aten.masked_fill.Scalar,)),
        (masked(False), (aten.masked_fill.Scalar,)),
        (turned_rows, (aten.copy_.default,)),
        (numbered, (aten.copy_.default,)),
        (halved, (aten.div_.Tensor,)),
        (without_gradients, (aten.squeeze.dim,)),
    ],
    ids="interleaved first inner masked_true masked_false turned_rows numbered halved without_gradients".split(),
)
def test_equals_the_model(compute, gone):
    toy, traced = toy_trace(compute)
    inputs = toy_inputs(seed=3)
    with torch.no_grad():
        seen = traced.module(**inputs)
        (expected,) = toy(**inputs)
    assert torch.equal(seen, expected)
    targets = {n.target for n in traced.module.graph.nodes}
    assert not targets & set(gone)
    assert not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def overlapping(m, h, t, text, label):
    out = torch.empty_like(h)
    out[..., 0::2] = m.site(h)[..., 0::2]
    return out


def read_before(m, h, t, text, label):
    x = h * 2
    y = x + 1
    x[:, :, 0] = 0.0
    return m.site(y + x)


def through_a_view(m, h, t, text, label):
    x = (h * 2).transpose(1, 2)
    x[:, :, 0] = 0.0
    return m.site(x.transpose(1, 2))


def fresh(x, y):
    scores = x @ y
    scores += y
    return scores * 2


def twice(x, y):
    total = x * y
    total += x
    total += 3 * y
    return total


def of_another_type(x, y):
    count = torch.ones_like(x, dtype=torch.int32)
    count += (y > 0).long()
    return count


def detached(x, y):
    return x.clone().detach_() + y


def seen_before(x, y):
    scores = x @ y
    seen = scores.T
    scores += y
    return seen


def of_an_input(x, y):
    x += y
    return x


@pytest.mark.parametrize("compute", [fresh, twice, of_another_type, detached, seen_before, of_an_input])
def test_a_sum_in_place_is_written_as_a_new_tensor(compute):
    """Where it is one; memory that others see is left as it was."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, 4, generator=generator) for _ in "xy"]
    module = torch.export.export(Called(compute), tuple(x.clone() for x in given)).module()
    drop_noise(module.graph)
    before = sum(map(mutates, module.graph.nodes))
    out_of_place(module.graph)
    after = sum(map(mutates, module.graph.nodes))
    left = compute in (seen_before, of_an_input)
    assert before and after == (before if left else 0)
    module.recompile()
    assert torch.equal(module(*(x.clone() for x in given)), compute(*(x.clone() for x in given)))


class Called(torch.nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x, y):
        return self.compute(x, y)


@pytest.mark.parametrize("compute", [overlapping, read_before, through_a_view])
def test_any_other_write_is_refused(compute):
    """A part that is left as it was, a tensor somebody read already, memory that another tensor owns."""
    with pytest.raises(ExportError, match=r"is in place, expected a functional graph; run the model's part out of"):
        toy_trace(compute)
