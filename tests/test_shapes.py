"""Shape entries of a manifest: what they evaluate to, what they bind, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.bundle.shapes import evaluate, is_linear, linear, match, names, resolve
from taylorseer_export.errors import ConfigError, StepError

SIZES = {"batch": 2, "frames": 3, "height": 8, "width": 6}

literals = st.integers(0, 99).map(str)
expressions = st.recursive(
    literals | st.sampled_from(sorted(SIZES)),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "*"]), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (7, 7),
        ("7", 7),
        (0, 0),
        ("batch", 2),
        ("frames*(height//2)*(width//2)", 36),
        ("height - width + 1", 3),
        ("height - (width + 1)", 1),
        ("2*batch*frames", 12),
    ],
)
def test_evaluate(expression, expected):
    assert evaluate(expression, SIZES) == expected


@given(expressions)
def test_evaluate_is_python_arithmetic(expression):
    assert evaluate(expression, SIZES) == eval(expression, {}, SIZES)


def test_names_are_the_sizes_mentioned():
    assert names("frames*(height//2)*(height//4)") == {"frames", "height"}
    assert names(4) == names("4") == frozenset()


def test_resolve():
    assert resolve(("batch", "frames*height", 64), SIZES) == (2, 24, 64)
    assert resolve((), SIZES) == ()


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " batch",
        "batch;",
        "batch/2",
        "\uff42atch",  # what Python reads as `batch`
        "batch**9",
        "-batch",
        "batch % 2",
        "batch << 60",
        "1.5",
        "True",
        "None",
        "'batch'",
        "batch if 1 else 2",
        "batch[0]",
        "batch.real",
        "f(batch)",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[b for b in batch]",
        "(batch := 3)",
        "batch\x00",
        "batch\n+1\n1",
        "(" * 199,
        "+".join(["batch"] * 99),
    ],
)
def test_anything_else_is_refused(expression):
    for call in (lambda: evaluate(expression, SIZES), lambda: names(expression)):
        with pytest.raises(ConfigError, match="write it with these alone"):
            call()


@pytest.mark.parametrize(
    ("expression", "fix"),
    [
        ("depth", "declare it in `dimensions`"),
        ("batch*depth", "`depth` .* expected one of `batch`, `frames`"),
        ("height//(batch-2)", "divisor of at least 1 element; correct the sizes"),
        ("batch-3", "is -1 elements, expected at least 0 elements; correct the sizes"),
        (-1, "at least 0 elements"),
    ],
)
def test_entries_without_a_value_are_refused(expression, fix):
    with pytest.raises(ConfigError, match=fix):
        evaluate(expression, SIZES)


def test_match_binds_plain_names_and_leaves_its_input_alone():
    known = {"batch": 2}
    shape = ("batch", "text", "2*text", 64)
    assert match(shape, (2, 5, 10, 64), known, "prompt") == {"batch": 2, "text": 5}
    assert known == {"batch": 2}
    assert match((), (), known, "guidance") == known


def test_match_binds_before_it_checks():
    assert match(("2*text", "text"), (10, 5), {}, "x") == {"text": 5}


@given(st.lists(st.sampled_from(sorted(SIZES)) | expressions | st.integers(0, 9), max_size=5))
def test_match_accepts_what_resolve_gives(shape):
    assert match(shape, resolve(shape, SIZES), SIZES, "x") == SIZES


@pytest.mark.parametrize(
    ("shape", "actual", "text"),
    [
        (("batch", 64), (2,), r"`x` is \[2\], 1 dimensions, expected 2: \[batch, 64\]; pass `x`"),
        (("batch", 64), (2, 32), r"`x` dimension 1 \(`64`\) is 32 elements, expected 64 elements"),
        (("batch", 64), (3, 64), r"`x` dimension 0 \(`batch`\) is 3 elements, expected 2"),
        (("text", "text"), (4, 5), r"dimension 1 \(`text`\) is 5 elements, expected 4"),
        (("frames*height",), (25,), r"is 25 .*expected 24 .*; pass `x` as \[frames\*height\]"),
    ],
)
def test_match_names_tensor_dimension_seen_and_expected(shape, actual, text):
    with pytest.raises(StepError, match=text):
        match(shape, actual, SIZES, "x")


@pytest.mark.parametrize(
    ("entry", "extent", "size"), [("2*text", 10, 5), ("text*4+1", 9, 2), ("2*(text-1)", 6, 4), ("text+text", 6, 3)]
)
def test_match_solves_a_multiple_of_one_name(entry, extent, size):
    assert match((entry,), (extent,), {}, "x") == {"text": size}
    assert evaluate(entry, {"text": size}) == extent
    assert is_linear(entry)
    name, factor, offset = linear(entry)
    assert (name, factor * size + offset) == ("text", extent)


@pytest.mark.parametrize(
    ("entry", "extent", "text"),
    [
        ("2*text", 11, r"`x` dimension 0 \(`2\*text`\) is 11 .*, expected a multiple of 2 elements; pad or crop `x`"),
        ("4*text+1", 3, r"is 3 elements, expected a multiple of 4 and 1 elements"),
    ],
)
def test_match_refuses_what_is_no_multiple(entry, extent, text):
    with pytest.raises(StepError, match=text):
        match((entry,), (extent,), {}, "x")


@pytest.mark.parametrize("entry", ["text*text", "text//2", "5-text", "text-text", "text*frames"])
def test_match_solves_nothing_else(entry):
    with pytest.raises(ConfigError, match="declare it in `dimensions`"):
        match((entry,), (10,), {}, "x")
    with pytest.raises(ConfigError, match="expected a multiple of one name, like `2\\*rows`"):
        linear(entry)
    assert not is_linear(entry)
