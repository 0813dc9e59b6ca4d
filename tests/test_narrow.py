"""Narrowing: slices stand on the taps afterwards, and every number stays what it was."""

import pytest
import torch
from harness import TOY, toy_inputs, toy_trace
from oracle import assert_close

from taylorseer_export.graph.narrow import narrow, readers
from taylorseer_export.graph.taps import FIRST_INPUT
from taylorseer_export.graph.trace import is_tap

aten = torch.ops.aten
NOTHING = 1e-30  # the same elementwise operations on fewer rows: not one bit may change


def joint(text, hidden_states):
    return torch.cat([text, hidden_states], 1)


def image_rows(x, text):
    return x[:, text.shape[1] :]


def block(m, h, t, text, label):
    """FLUX's single block: residual over text and image rows, of which the image rows leave."""
    x = joint(text, h)
    return image_rows(x + label[:, None] * m.site(x), text)


def text_rows(m, h, t, text, label):
    x = joint(text, h)
    return (x + m.site(x))[:, : text.shape[1]]


def through_every_operator(m, h, t, text, label):
    x = joint(text, h)
    return image_rows((x - 2 * m.site(x)).to(torch.float64).clamp(-1.5, 1.5).to(torch.float32), text)


def scaled_sum(m, h, t, text, label):
    x = joint(text, h)
    return image_rows(torch.add(x, m.site(x), alpha=2), text)


def one_sided_clamp(m, h, t, text, label):
    x = joint(text, h)
    return image_rows((x + m.site(x)).clamp(max=0.1), text)


def broadcast_operands(m, h, t, text, label):
    """A bias without rows, one of a single row, one of fewer dimensions: only what has the rows is sliced."""
    x = joint(text, h)
    return image_rows(x + m.site(x) + m.bias + m.row[None] + m.channel, text)


def rows_of_lower_rank(m, h, t, text, label):
    x = joint(text, h)
    return image_rows(m.site(x) + x[0], text)


def last_dimension(m, h, t, text, label):
    x = joint(text, h)
    return (x + m.site(x))[..., 1:3]


def counted_from_the_end(m, h, t, text, label):
    x = joint(text, h)
    return (x + m.site(x))[:, -4:-1]


def negative_dimension(m, h, t, text, label):
    x = joint(text, h)
    return aten.slice(x + m.site(x) + m.channel, -2, 1, 4)


def across_the_seam(m, h, t, text, label):
    """A window over parts of both: the concatenation must stay."""
    x = joint(text, h)
    return (x + m.site(x))[:, 1:6]


def part_of_a_part(m, h, t, text, label):
    x = joint(text, h)
    return (x + m.site(x))[:, :2]


def text_behind(m, h, t, text, label):
    """HunyuanVideo's single block: the text follows, and the bound counts from the end."""
    x = torch.cat([h, text], 1)
    return (x + label[:, None] * m.site(x))[:, : -text.shape[1]]


def gated_apart(m, h, t, text, label):
    """HunyuanVideo's replaced first frame: two gates, so two slices of one tap."""
    x = torch.cat([h.reshape(-1, h.shape[1], 4), text], 1)
    y = m.site(x)
    y = torch.cat([y[:, :3] * 2, y[:, 3:] * label[:, None]], 1)
    return (x + y)[:, : -text.shape[1]]


def every_second_row(m, h, t, text, label):
    x = joint(text, h)
    return (x + m.site(x))[:, ::2]


def behind_a_mixing_operator(m, h, t, text, label):
    """Rows of a softmax over rows need all rows."""
    x = joint(text, h)
    return image_rows((x + m.site(x)).softmax(1), text)


def cat_of_other_dimension(m, h, t, text, label):
    x = torch.cat([h, m.site(h)], 2)
    return (x * 2)[:, 1:3, :4]


PARAMETERS = {
    "bias": torch.tensor(0.5),
    "row": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    "channel": torch.tensor([4.0, 3.0, 2.0, 1.0]),
}
MOVES = (
    block,
    text_rows,
    through_every_operator,
    scaled_sum,
    one_sided_clamp,
    broadcast_operands,
    rows_of_lower_rank,
    last_dimension,
    counted_from_the_end,
    negative_dimension,
    across_the_seam,
    part_of_a_part,
    text_behind,
)
STAYS = (every_second_row, behind_a_mixing_operator)


def narrowed(compute):
    toy, trace = toy_trace(compute, **PARAMETERS)
    narrow(trace)
    trace.module.recompile()
    return toy, trace


def slices(trace):
    return [n for n in trace.module.graph.nodes if n.target is aten.slice.Tensor]


@pytest.mark.parametrize("compute", [*MOVES, *STAYS, cat_of_other_dimension, gated_apart], ids=lambda f: f.__name__)
def test_numbers_stay_the_same(compute):
    toy, trace = narrowed(compute)
    for sizes in ({}, {"batch": 1, "image_tokens": 4, "text_tokens": 4}):
        inputs = toy_inputs(**sizes)
        seen = trace.module(**inputs)
        assert_close(compute.__name__, seen, toy(**inputs)[0], NOTHING)


@pytest.mark.parametrize("compute", MOVES, ids=lambda f: f.__name__)
def test_slices_stand_on_the_tap(compute):
    trace = narrowed(compute)[1]
    tap = trace.taps()["site"]
    assert any(s.args[0] is tap for s in slices(trace))
    arithmetic = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.clamp.default)
    assert not any(s.args[0].target in arithmetic for s in slices(trace))


@pytest.mark.parametrize("compute", STAYS, ids=lambda f: f.__name__)
def test_slices_that_must_not_move(compute):
    trace = narrowed(compute)[1]
    assert not any(is_tap(s.args[0]) for s in slices(trace))
    assert len(slices(trace)) == 1


@pytest.mark.parametrize("compute", [block, text_rows], ids=lambda f: f.__name__)
def test_a_slice_of_one_part_is_that_part(compute):
    """Behind the tap nothing reads the concatenation: `image + gate * slice(tap)`."""
    trace = narrowed(compute)[1]
    (cat,) = (n for n in trace.module.graph.nodes if n.target is aten.cat.default)
    assert list(cat.users) == [trace.taps()[FIRST_INPUT]]  # the mark on what the site reads


def test_neighbouring_slices_become_one():
    """Then a forecast provides that one: the rows of the image, all of them and none of the text."""
    trace = narrowed(gated_apart)[1]
    tap = trace.taps()["site"]
    (rows,) = readers(trace, [tap])[tap]
    assert rows.args[0] is tap and rows.meta["val"].shape[1] == tap.meta["val"].shape[1] - size(trace, "text")
    assert size(trace, "hidden_states") == rows.meta["val"].shape[1]


def size(trace, name):
    return next(n for n in trace.module.graph.nodes if n.target == name).meta["val"].shape[1]


def test_two_blocks():
    """The second block reads text rows of the first; only its own output is narrowed to image rows."""

    def two_blocks(m, h, t, text, label):
        x = joint(text, h)
        x = x + label[:, None] * m.site(x).tanh()
        return image_rows(x + label[:, None] * m.first(x), text)

    toy, trace = narrowed(two_blocks)
    assert_close("two blocks", trace.module(**toy_inputs()), toy(**toy_inputs())[0], NOTHING)


def test_narrowing_twice_changes_nothing():
    trace = narrowed(block)[1]
    once = [(n.name, n.target, n.args) for n in trace.module.graph.nodes]
    narrow(trace)
    assert [(n.name, n.target, n.args) for n in trace.module.graph.nodes] == once
    assert len(slices(trace)) == 1


def test_the_comparison_can_fail():
    seen = toy_inputs()["text"]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close("text", seen, seen + 1e-6, NOTHING)
    assert TOY.sites == ("site",)
