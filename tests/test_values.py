"""Values from outside: what a conversion keeps exactly is converted, everything else is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.values import array_for, number_for


def contract(dtype, **options):
    return Tensor(name="x", dtype=dtype, shape=("batch",), role="constant", **options)


@pytest.mark.parametrize("seen", ["bool", "int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16", "float64"])
def test_a_mask_of_any_kind_is_what_the_contract_asks_for(seen, wanted):
    array = array_for(contract(wanted), np.array([1, 0, 1], seen))
    assert array.tolist() == [1.0, 0.0, 1.0]
    assert array.dtype == ("float32" if wanted == "bfloat16" else wanted)


@pytest.mark.parametrize("wanted", ["int32", "int64", "bool"])
@pytest.mark.parametrize("seen", ["bool", "int8", "uint8", "int32", "int64", "uint64"])
def test_whole_numbers_of_any_width_are_taken(seen, wanted):
    array = array_for(contract(wanted), np.array([1, 0, 1], seen))
    assert array.tolist() == [1, 0, 1] and array.dtype == wanted


@given(st.sampled_from(["float16", "float32", "bfloat16", "float64", "int64"]), st.floats(width=64) | st.integers())
def test_one_number_is_taken_and_refused_as_many_are(wanted, number):
    answers = []
    for taken in (lambda: number_for(contract(wanted), number), lambda: array_for(contract(wanted), [number])):
        try:
            array = taken()
            answers.append((array.tolist(), array.dtype))
        except StepError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


INTEGERS = [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]
WANTED = ["float16", "float32", "bfloat16", "float64", "int32", "int64", "bool"]


@given(st.sampled_from(INTEGERS), st.sampled_from(WANTED), st.data())
def test_a_whole_number_comes_through_exactly_or_not_at_all(seen, wanted, data):
    """Against Python's own whole numbers, which have no width."""
    span = np.iinfo(seen)
    edges = st.sampled_from(
        [n for n in (0, 1, -1, 2049, 2**24 + 1, 2**31, 2**53 + 1, 2**63) if span.min <= n <= span.max]
    )
    number = data.draw(st.integers(int(span.min), int(span.max)) | edges)
    try:
        (made,) = array_for(contract(wanted), np.array([number], seen)).tolist()
    except StepError as error:
        assert "holds exactly; correct the values" in str(error)
        dtype = np.dtype("float32" if wanted == "bfloat16" else wanted)
        assert not _exact(number, dtype)
    else:
        assert int(made) == number


def _exact(number, dtype):
    if dtype.kind == "f":
        bits, largest = np.finfo(dtype).nmant + 1, float(np.finfo(dtype).max)
        odd = abs(number) // (abs(number) & -abs(number)) if number else 0
        return odd.bit_length() <= bits and abs(number) <= largest
    return number in (0, 1) if dtype.kind == "b" else np.iinfo(dtype).min <= number <= np.iinfo(dtype).max


@pytest.mark.parametrize(
    ("wanted", "values", "sentence"),
    [
        ("int64", [1.0, 2.0], r"`x` is float64, expected int64; convert it before the call"),
        ("bool", [1.0], r"`x` is float64, expected bool; convert"),
        ("float32", [1j], r"`x` is complex128, expected float32; convert"),
        ("float32", ["1"], r"`x` is <U1, expected float32; convert"),
        (
            "float32",
            [2**24 + 1],
            r"`x` is int64 from 16777217 to 16777217, expected numbers that float32 holds exactly",
        ),
        ("float16", [70000], r"`x` is int64 from 70000 to 70000, expected numbers that float16 holds"),
        ("int32", [2**31], r"`x` is int64 from 2147483648 to 2147483648, expected numbers that int32 holds"),
        ("bool", [2], r"expected numbers that bool holds"),
        ("float32", [1e39], r"`x` has 1 values that are NaN or infinite"),
    ],
)
def test_what_would_change_is_refused(wanted, values, sentence):
    with pytest.raises(StepError, match=sentence):
        array_for(contract(wanted), values)


def test_floats_are_rounded_to_the_precision_of_the_contract():
    assert array_for(contract("float32"), np.array([0.1])).tolist() == [np.float32(0.1)]


def test_a_truth_value_is_an_index_where_the_table_has_it():
    assert array_for(contract("int64", values=(0, 1)), np.array([True])).tolist() == [1]
    with pytest.raises(StepError, match=r"holds 1 to 1, expected 2 to 9"):
        array_for(contract("int64", values=(2, 9)), np.array([True]))
