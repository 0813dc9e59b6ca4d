"""Masks of attention: each as small as attention takes it, with the numbers that it had."""

# Shapes: B batch, H heads, T tokens, D of a head

import pytest
import torch
from harness import toy_inputs, toy_trace
from oracle import assert_close

HEADS = 2
attention = torch.nn.functional.scaled_dot_product_attention


def counted(h):
    """Some of the tokens of each sample, `[B, T]`."""
    return h[..., 0] >= h[..., 0].mean(1, keepdim=True)


def for_every_query(h):
    return counted(h)[:, None, None].expand(-1, HEADS, h.shape[1], -1)


def repeated(h):
    batch, count = h.shape[:2]
    return counted(h).view(batch, 1, 1, count).repeat(1, 1, count, 1)


def added(h):
    return (1 - repeated(h).float()) * -1e4


def of_both(h):
    """As HunyuanVideo 1.5's: queries that do not count see nothing."""
    keys = repeated(h)
    return (keys & keys.transpose(2, 3)).bool().expand(-1, HEADS, -1, -1)


def of_both_by_place(h):
    return counted(h)[:, None, None, :] & counted(h)[:, None, :, None]


def padded(h):
    more = torch.nn.functional.pad(counted(h)[:, 1:], (1, 0), value=True)
    return more[:, None, None].expand(-1, -1, h.shape[1], -1)


def of_ones(h):
    ones = torch.cat([torch.ones_like(h[:, :2, 0]), h.new_ones(h.shape[0], h.shape[1] - 2)], 1)
    return ones.bool()[:, None, None]


def of_no_bias(h):
    return (1 - torch.ones(h.shape[0], 1, 1, h.shape[1])) * -1e4


def of_the_past(h):
    place = torch.arange(h.shape[1])
    return (place <= place[:, None])[None, None].expand(h.shape[0], HEADS, -1, -1)


def of_others(h):
    """Its queries are not those of its keys."""
    return counted(h)[:, None, None, :] & counted(-h)[:, None, :, None] | (h[:, None, :, :1] > -99)


def traced_mask(mask_of):
    """The rows and heads of the traced graph's mask, None without one; what it and the model compute."""

    def compute(m, h, t, text, label):
        heads = h.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return m.site(attention(heads, heads, heads, attn_mask=mask_of(h)).transpose(1, 2).flatten(2))

    toy, traced = toy_trace(compute)
    inputs = toy_inputs(seed=3)
    with torch.no_grad():
        seen, (expected,) = traced.module(**inputs), toy(**inputs)
    (node,) = (n for n in traced.module.graph.nodes if "scaled_dot" in str(n.target))
    mask = node.args[3] if len(node.args) > 3 else None
    return None if mask is None else mask.meta["val"].shape[1:3], seen, expected, counted(inputs["hidden_states"])


@pytest.mark.parametrize(
    ("mask_of", "shape"),
    [
        (for_every_query, (1, 1)),
        (repeated, (1, 1)),
        (added, (1, 1)),
        (padded, (1, 1)),
        (of_both, (1, 1)),
        (of_both_by_place, (1, 1)),
        (of_ones, None),
        (of_no_bias, None),
        (of_the_past, (1, "rows")),
        (of_others, (1, "rows")),
    ],
)
def test_a_mask_is_as_small_as_it_can_be(mask_of, shape):
    seen_shape, seen, expected, rows = traced_mask(mask_of)
    if seen_shape is not None:
        seen_shape = tuple(size if isinstance(size, int) else "rows" for size in seen_shape)
    assert seen_shape == shape
    if mask_of in (of_both, of_both_by_place):  # all others see nothing, and have no value
        assert not rows.all() and not torch.equal(seen, expected)
        seen, expected = seen[rows], expected[rows]
    assert_close(mask_of.__name__, seen, expected, 8 * 2.0**-24 * expected.abs().max().item())
