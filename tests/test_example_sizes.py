"""Sizes at which graphs are traced: each from the range that the family declares for the config at hand."""

import pytest
import tiny_models as tm
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Options, draft
from taylorseer_export.compile.program import exported_program
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.sizes import example_sizes
from taylorseer_export.graph.trace import _EXAMPLE_SIZES

# What bounds a table of the model, and with it a range.
LIMITS = {"hidream": "max_resolution", "sd3": "pos_embed_max_size", "wan": "rope_max_seq_len"}
ranges = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda span: (span[0], span[0] + span[1])),
)


@given(ranges)
def test_every_size_is_of_its_range(spans):
    sizes = example_sizes(spans, dict(zip(spans, _EXAMPLE_SIZES, strict=False)))
    assert sizes.keys() == spans.keys()
    assert all(low <= sizes[name] <= high for name, (low, high) in spans.items())
    assert all(sizes[name] > 1 for name, (_, high) in spans.items() if high > 1)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(20, 40).map(lambda high: (1, high))))
def test_sizes_differ_where_they_can(spans):
    sizes = example_sizes(spans, dict(zip(spans, _EXAMPLE_SIZES, strict=False)))
    assert len(set(sizes.values())) == len(sizes)


def test_wanted_sizes_are_taken_where_they_are_allowed():
    assert example_sizes({"a": (1, 9), "b": (2, 64)}, {"a": 2, "b": 24}) == {"a": 2, "b": 24}
    assert example_sizes({"a": (1, 9), "b": (2, 16)}, {"a": 2, "b": 24}) == {"a": 2, "b": 3}
    assert example_sizes({"a": (5, 5), "b": (1, 1)}, {"a": 2, "b": 24}) == {"a": 5, "b": 1}


@pytest.mark.parametrize("family", LIMITS)
@given(limit=st.integers(2, 300))
def test_every_range_follows_the_config(family, limit):
    """Whatever the table of a config: the declared range, and so the sizes of a trace, lie within it."""
    config = dict(CONFIGS[family])
    patch = config["patch_size"] if isinstance(config["patch_size"], int) else config["patch_size"][-1]
    config[LIMITS[family]] = [limit * patch] * 2 if family == "hidream" else limit
    spans = FAMILIES[family].dimensions(config)
    sizes = example_sizes(spans, dict(zip(spans, _EXAMPLE_SIZES, strict=False)))
    sides = {"side", "rows", "columns", "frames"} & sizes.keys()
    assert sides and all(1 <= sizes[side] <= limit for side in sides)


CONFIGS = {
    "hidream": {"patch_size": 2, "max_resolution": [128, 128]},
    "sd3": {"patch_size": 2, "pos_embed_max_size": 192},
    "wan": {"patch_size": [1, 2, 2], "rope_max_seq_len": 1024, "image_dim": None},
}
BUILD = {"hidream": tm.tiny_hidream, "sd3": tm.tiny_sd3, "wan": tm.tiny_wan}


# Of a range of 1 and 2 torch makes no symbol, so Wan's frames need one more.
@pytest.mark.parametrize(("family", "limit"), [("hidream", 2), ("sd3", 7), ("wan", 3)])
def test_a_small_table_exports(family, limit, tmp_path):
    """Smaller than any of the usual sizes, and of one size alone: traced, split and exported again."""
    model = BUILD[family]()
    bound = [2 * limit] * 2 if family == "hidream" else limit
    type(model).from_config({**model.config, LIMITS[family]: bound}).save_pretrained(tmp_path)
    made = draft(open_checkpoint(str(tmp_path), FAMILIES[family]), Options(order=1, interval=4, warmup=2))
    for cut in made.split.graphs:
        exported_program(cut, made.graph_sizes, made.ranges())
    sides = {"side", "rows", "columns"} & made.ranges().keys()
    assert sides and all(made.ranges()[side] == (2, limit) for side in sides)
