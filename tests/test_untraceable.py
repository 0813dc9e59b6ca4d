"""What `torch.export` does not take in a model's code, in a form that it takes: each equal to what it stands for."""

import functools
import math

import pytest
import torch
from oracle import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex

from taylorseer_export.errors import ExportError
from taylorseer_export.graph import fakes, inputs
from taylorseer_export.graph.untraceable import EveryTokenCounts, dense_attention, unchanged

HEADS, TOKENS, WIDTH, BLOCK = 2, 24, 16, 8


class Attending(nn.Module):
    def forward(self, rows, mask):
        return flex.flex_attention(*rows, block_mask=mask())


def causal_in_frames(b, h, query, key):
    return (query // 3 >= key // 3) & (key < TOKENS - h)


def of_frames(b, h, query, key):
    return query // 3 >= key // 3


def by_rule():
    return flex.create_block_mask(causal_in_frames, None, HEADS, TOKENS, TOKENS, "cpu", BLOCK)


def by_blocks(rule=None):
    """A block in part and two whole ones for some queries, none in part for others."""
    counts = torch.tensor([[[1, 0, 1]]], dtype=torch.int32)
    numbers = torch.tensor([[[[0, 1, 2], [0, 1, 2], [2, 1, 0]]]], dtype=torch.int32)
    whole = torch.tensor([[[2, 1, 1]]], dtype=torch.int32)
    numbers_of_whole = torch.tensor([[[[1, 2, 0], [1, 0, 2], [0, 1, 2]]]], dtype=torch.int32)
    return flex.BlockMask.from_kv_blocks(counts, numbers, whole, numbers_of_whole, BLOCK, rule)


def rule_of(mask):
    """The same mask by a rule alone: the blocks as torch spreads them, for torch looks at no list unless compiled."""
    if mask.full_kv_num_blocks is None or mask.kv_indices.shape[1] != 1:
        return mask
    part, whole = (
        flex.BlockMask.from_kv_blocks(counts, numbers, BLOCK_SIZE=BLOCK).to_dense().bool()
        for counts, numbers in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )

    def rule(b, h, query, key):
        at = (0, 0, query // BLOCK, key // BLOCK)
        return whole[at] | (part[at] & mask.mask_mod(b, h, query, key))

    return flex.create_block_mask(rule, None, HEADS, TOKENS, TOKENS, "cpu", BLOCK)


@pytest.mark.parametrize("mask", [by_rule, by_blocks, functools.partial(by_blocks, of_frames)])
def test_masks_of_blocks_are_masks(mask):
    """Dense attention equals torch's own, and nothing of torch is changed afterwards."""
    rows = torch.randn(3, 1, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    model = Attending()
    before = (flex.flex_attention, flex.create_block_mask, vars(flex.BlockMask)["from_kv_blocks"])
    expected = model(rows, lambda: rule_of(mask()))
    with dense_attention(model):
        seen = model(rows, mask)
    bound = math.sqrt(WIDTH + TOKENS) * 2.0**-23 * expected.abs().max()  # sums of as many terms, in float32
    assert_close("attention", seen, expected, bound)
    assert before == (flex.flex_attention, flex.create_block_mask, vars(flex.BlockMask)["from_kv_blocks"])


def test_changed_scores_are_refused():
    rows = torch.zeros(3, 1, HEADS, TOKENS, WIDTH)
    with dense_attention(nn.Linear(1, 1)), pytest.raises(ExportError, match="a change of its scores"):
        flex.flex_attention(*rows, score_mod=lambda score, *place: score * 2)


def looked_at(mask, rows):
    """What models ask of a mask of a text."""
    count = mask.sum(dim=1).tolist()
    places = torch.nonzero(mask[0].flatten(), as_tuple=False).flatten()
    seen = [row[one] for row, one in zip(rows, mask.bool().unbind(0), strict=True)]
    left = rows[0][~mask.bool()[0]]
    longest = mask.sum(dim=1).max().item()
    return count, places.shape, [tuple(row.shape) for row in seen], tuple(left.shape), longest, bool(mask.all())


def test_a_mask_of_ones_needs_no_look():
    """On tensors without numbers the answers are those of a mask of ones, which has them."""
    known = looked_at(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, 3))
    with FakeTensorMode(), EveryTokenCounts() as counts:
        assert looked_at(counts.ones(2, 5, dtype=torch.int64, device="cpu"), torch.ones(2, 5, 3)) == known


def test_what_is_changed_is_known_no_longer():
    with EveryTokenCounts() as counts:
        mask = counts.ones(2, 5, dtype=torch.int64, device="cpu")
        mask[:, 3:] = 0
        assert mask.sum(dim=1).tolist() == [3, 3]


class Keeping(nn.Module):
    """It keeps a table for its next call, in itself, in an object of its own and in a cached function."""

    def __init__(self):
        super().__init__()
        self.table, self.places = None, Places()

    def forward(self):
        if self.table is None:
            self.table = torch.arange(3)
        return self.table + self.places.of(3) + counted(3)


class Places:
    kept = None

    def of(self, count):
        self.kept = torch.arange(count) if self.kept is None else self.kept
        return self.kept


@functools.cache
def counted(count):
    return torch.arange(count)


def test_tables_of_a_run_without_numbers_are_forgotten():
    model = Keeping()
    with unchanged(model), FakeTensorMode():
        model()
    assert model.table is None
    assert model().tolist() == [0, 3, 6]


# Inputs that are told with these -------------------------------------------------------------------------------------


class Sampled(nn.Module):
    """It takes a list of samples and words, counts its words, is told the sides of its picture, and answers a list."""

    def __init__(self):
        super().__init__()
        self.config = {"in_channels": 4, "patch_size": 2}
        self.embedder, self.words = nn.Linear(16, 8), nn.Linear(12, 8)

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        cap_feats: list[torch.Tensor],
        cap_mask: torch.Tensor,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        dict(**cross_attention_kwargs)
        count = cap_mask.sum(dim=1).tolist()
        answers = []
        for picture, words, length in zip(x, cap_feats, count, strict=True):
            channels, rows, columns = picture.shape
            cut = picture.view(channels, rows // 2, 2, columns // 2, 2).permute(1, 3, 0, 2, 4).flatten(2)
            moved = self.embedder(cut).sum() + self.words(words[:length]).sum()
            answers.append(picture * (moved + t[0]))
        return (answers,)


def test_lists_of_samples_are_told():
    model = Sampled()
    found = inputs.find(model)
    assert found.trouble == ""
    assert {spec.name: spec.shape for spec in found.inputs} == {
        "x": ("batch", 4, "2*rows", "2*columns"),
        "t": ("batch",),
        "cap_feats": ("batch", "text_tokens", 12),
    }
    assert set(found.made) == {"cap_mask", "cross_attention_kwargs"}
    given = {"x": torch.randn(2, 4, 6, 8), "t": torch.ones(2), "cap_feats": torch.randn(2, 5, 12)}
    seen = fakes.call(model, given, found.inputs, found.made)
    expected = model(list(given["x"]), given["t"], list(given["cap_feats"]), torch.ones(2, 5, dtype=torch.int64), {})
    assert torch.equal(seen, torch.stack(expected[0]))


class Turned(nn.Module):
    """It is documented: places of a text and a picture in one row, a clock for each frame, turns as complex numbers."""

    def __init__(self):
        super().__init__()
        self.config = {"in_channels": 4, "text_dim": 12, "vocab_size": 30}
        self.embedder, self.words, self.ids = nn.Conv3d(4, 8, 1), nn.Linear(12, 8), nn.Embedding(30, 8)

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, token_ids, encoder_attention_mask, return_dict=True
    ):
        """As documented.

        Args:
            hidden_states: ``(B, C, T, H, W)`` latents.
            timestep: ``(B, 1, T)``, of each frame.
            encoder_hidden_states: ``(B, 1, L, D)`` words.
            token_ids: of the words.
            encoder_attention_mask (`torch.Tensor`): Boolean mask.
        """
        assert encoder_attention_mask.dtype == torch.bool
        batch, one, tokens, _ = encoder_hidden_states.shape
        assert timestep.shape == (batch, one, hidden_states.shape[2])
        assert token_ids.shape == encoder_attention_mask.shape == (batch, tokens)
        moved = self.words(encoder_hidden_states).sum() + self.ids(token_ids).sum() + self.embedder(hidden_states).sum()
        return (hidden_states * moved * timestep[..., None, None],)


def test_what_the_documentation_says_is_told():
    found = inputs.find(Turned())
    assert found.trouble == ""
    told = {spec.name: spec for spec in found.inputs}
    assert told["encoder_hidden_states"].shape == ("batch", 1, "text_tokens", 12)
    assert told["encoder_attention_mask"].dtype == "bool"
    assert told["token_ids"].values == (0, 29)
    assert found.made == (fakes.PER_FRAME_OF_ONE,)
