"""Rewrites: each write in place that the models make, as a new tensor; every other one is refused."""

import pytest
import torch
from harness import toy_inputs, toy_trace
from oracle import assert_close

from taylorseer_export.errors import ExportError
from taylorseer_export.graph.rewrite import mutates
from taylorseer_export.graph.trace import drop_noise
from taylorseer_export.graph.writes import out_of_place

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


def part_of_a_part(m, h, t, text, label):
    """As the samples of Lumina 2, put one by one into a row of zeros."""
    places = torch.zeros(2, h.shape[1], 3, dtype=torch.int32)
    for sample in range(2):
        places[sample, :3, 0] = torch.arange(3) * (sample + 1)
        places[sample, 1:, -2] = 7
    return m.site(h) + places.sum((0, 2))[:, None]


def chosen_rows(m, h, t, text, label):
    """As the tokens that GLM-Image drops."""
    x = h * 2
    x[h.sum(-1) > 0] *= 0.5
    return m.site(x)


def read_before(m, h, t, text, label):
    x = h * 2
    y = x + 1
    x[:, :, 0] = 0.0
    return m.site(y + x)


def through_a_view(m, h, t, text, label):
    x = (h * 2).transpose(1, 2)
    x[:, :, 0] = 0.0
    return m.site(x.transpose(1, 2))


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
        (part_of_a_part, (aten.copy_.default, aten.fill_.Tensor)),
        (chosen_rows, (aten.index_put_.default, aten.index.Tensor)),
        (read_before, (aten.fill_.Tensor,)),
        (through_a_view, (aten.fill_.Tensor,)),
        (halved, (aten.div_.Tensor,)),
        (without_gradients, (aten.squeeze.dim,)),
    ],
    ids=(
        "interleaved first inner masked_true masked_false turned_rows numbered part chosen read_before through_a_view "
        "halved without_gradients"
    ).split(),
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


def turned(m, h, t, text, label):
    """As rotary embeddings by complex numbers: tables cut and joined, some in a region without autocast."""
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.1]))
    table = torch.polar(torch.ones_like(angles), angles)[: h.shape[1]]
    table = torch.cat([table[:, 1:], table[:, :1].conj()], 1)
    with torch.amp.autocast("cuda", enabled=False):
        z = torch.view_as_complex(h.float().reshape(*h.shape[:2], -1, 2))
        rows = torch.view_as_real(z * table).flatten(2).type_as(h)
    scaled = torch.complex(h[..., :1], h[..., 1:2]) * h[..., 2:3]
    return m.site(rows + torch.cat([scaled.real, scaled.imag, h[..., 2:]], -1))


def test_complex_numbers_become_real_ones():
    """Torch may fuse a product with a sum, so each rotated number may err by a rounding of both."""
    toy, traced = toy_trace(turned)
    inputs = toy_inputs(seed=3)
    with torch.no_grad():
        seen, (expected,) = traced.module(**inputs), toy(**inputs)
    assert_close("turned", seen, expected, 8 * 2.0**-24 * expected.abs().max().item())
    for node in traced.module.graph.nodes:
        value = node.meta.get("val")
        assert not (isinstance(value, torch.Tensor) and value.is_complex()), node
        assert not isinstance(node.target, torch._ops.HigherOrderOperator)
    cosines = [n for n in traced.module.graph.nodes if n.target in (aten.cos.default, aten.polar.default)]
    assert not cosines, "the table depends on nothing and is folded"


def roots(m, h, t, text, label):
    return m.site(torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))).sqrt()).flatten(-2))


def under_autocast(m, h, t, text, label):
    with torch.autocast("cpu", torch.bfloat16):
        return m.site(h)


@pytest.mark.parametrize(
    ("compute", "sentence"),
    [
        (roots, r"operator `aten.sqrt.default` at .* takes complex numbers, expected a rotation by them, or a move; "),
        (under_autocast, r"turns autocast on at .*, expected casts that it makes itself; "),
    ],
)
def test_what_has_no_such_form_is_refused(compute, sentence):
    with pytest.raises(ExportError, match=sentence):
        toy_trace(compute)


def overlapping(m, h, t, text, label):
    out = torch.empty_like(h)
    out[..., 0::2] = m.site(h)[..., 0::2]
    return out


def of_what_is_read(m, h, t, text, label):
    x = h * 2
    x.transpose(1, 2)[:, :, 0] = 0.0
    return m.site(x)


def read_through_a_part(m, h, t, text, label):
    x = h * 2
    first = x[:, :1]
    x[:, :, 0] = 0.0
    return m.site(x + first)


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


def test_rows_that_are_none_leave_nothing_behind():
    def alone(m, h, t, text, label):
        joined = torch.cat([text[:, :0].sin(), h], 1)
        _, rows = joined.split_with_sizes([0, joined.shape[1]], 1)
        scales = torch.cat([label.exp(), label.cos()], -1).chunk(2, -1)
        return m.site(rows) * scales[1][:, None]

    toy, trace = toy_trace(alone)
    left = [n.target for n in trace.module.graph.nodes if n.op == "call_function"]
    assert not {aten.cat.default, aten.split_with_sizes.default, aten.chunk.default, aten.exp.default} & set(left)
    given = toy_inputs()
    assert torch.equal(trace.module(**given), toy(**given)[0])


class Called(torch.nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x, y):
        return self.compute(x, y)


@pytest.mark.parametrize("compute", [overlapping, of_what_is_read, read_through_a_part])
def test_any_other_write_is_refused(compute):
    """A part is left as it was, memory of another tensor is read after, a part was taken before and is read after."""
    with pytest.raises(ExportError, match=r"is in place, expected a functional graph; run the model's part out of"):
        toy_trace(compute)
