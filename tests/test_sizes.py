"""Sizes: what a trace leaves, and the form that contracts and engines take; the value never changes."""

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv

from taylorseer_export.bundle.shapes import evaluate
from taylorseer_export.graph.sizes import shape_entry_from_expression, simplified

side, rows = sympy.symbols("side rows", integer=True, positive=True)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (FloorDiv(side**2, side), "side"),
        (2 * FloorDiv(6 * side**2, 3 * side), "4*side"),
        (side**2 + rows, "rows + side*side"),
        ((side + 1) ** 2, "(side + 1)*(side + 1)"),
        (14 + FloorDiv(-rows, 2), "14 - (((rows + 1)//2))"),
        (FloorDiv(rows, 2), "(rows//2)"),
        (FloorDiv(8 * rows - 1, 2) + 1, "4*rows"),
        (FloorDiv(FloorDiv(8 * rows - 1, 2), 2) + 1, "2*rows"),
        (FloorDiv(2 * side + rows, 2), "side + ((rows//2))"),
        (FloorDiv(side**2, rows), "((side*side)//rows)"),
        (sympy.Integer(3), "3"),
    ],
    ids=str,
)
def test_the_form_and_the_value(size, text):
    assert shape_entry_from_expression(simplified(size)) == text
    for sizes in ({"side": 6, "rows": 4}, {"side": 7, "rows": 3}, {"side": 1, "rows": 1}):
        assert evaluate(text, sizes) == size.subs({side: sizes["side"], rows: sizes["rows"]})


def test_a_quotient_that_may_leave_a_rest_stays():
    size = FloorDiv(side, 2) + FloorDiv(side, rows)
    assert simplified(size) == size
