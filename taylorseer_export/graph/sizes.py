"""Sizes: symbolic expressions of a trace, in a form that contracts and engines can use.

Tracing leaves `(side**2)//side` where a square picture is cut into rows; a contract knows `+ - * //` and no powers. It
leaves `(-rows)//2` where a table is cropped to its middle; Python rounds that down and ONNX rounds it up.

And the sizes at which symbolic graphs are traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch import fx


def simplified(expression: sympy.Expr) -> sympy.Expr:
    """The same size: divisions carried out as far as they always leave nothing, one of a negative number turned around.

    Floor of (d m + n) / d is m + n // d, and of -n / d it is -((n + d - 1) // d).
    """
    return expression.replace(lambda e: type(e).__name__ == "FloorDiv", _quotient)


def _quotient(division: sympy.Expr) -> sympy.Expr:
    above, below = division.args
    quotient = sympy.cancel(above / below)
    if is_whole(quotient):
        return quotient
    if below.is_Integer and (parts := [term for term in sympy.Add.make_args(above) if is_whole(term / below)]):
        rest = type(division)(sympy.Add(above, *(-term for term in parts)), below)
        return sympy.Add(*(term / below for term in parts), simplified(rest))
    negative = all(term.could_extract_minus_sign() for term in sympy.Add.make_args(above))
    if negative and below.is_Integer and below > 0:
        return -type(division)(below - 1 - above, below)
    return division


def is_whole(quotient: sympy.Expr) -> bool:
    """Whether it is a whole number whatever the sizes are."""
    return bool(sympy.together(quotient).as_numer_denom()[1] == 1)


def equal(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every admissible shape (not only for the traced one)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))


class _Written(StrPrinter):
    def _print_Pow(self, power: sympy.Expr, rational: bool = False) -> str:
        base, exponent = power.args
        return "*".join([self.parenthesize(base, PRECEDENCE["Mul"])] * int(exponent))


def shape_entry_from_expression(expression: sympy.Expr) -> str:
    """The size as an entry of a shape: powers as products."""
    return str(_Written().doprint(expression))


def example_sizes(ranges: Mapping[str, tuple[int, int]], wanted: Mapping[str, int]) -> dict[str, int]:
    """One size for every dimension, drawn from its own range: tables of a model end where its range does.

    That which is wanted, where it is in range; else one that is wanted of another dimension, or any. They differ as far
    as the ranges allow, and are 0 or 1, which export would specialise, only where nothing else is allowed.

    Args:
        ranges: Dimension -> (smallest, largest).
        wanted: The same dimensions -> the preferred size.
    """
    sizes: dict[str, int] = {}
    for name, (low, high) in ranges.items():
        least = min(max(low, 2), high)
        others = range(least, min(high, least + len(ranges)) + 1)
        choices = [size for size in (wanted[name], *wanted.values(), *others) if least <= size <= high]
        sizes[name] = next((size for size in choices if size not in sizes.values()), choices[0])
    return sizes


def is_size(node: fx.Node) -> bool:
    """Whether the node is a shape query or arithmetic on shapes."""
    return not isinstance(node.meta.get("val"), torch.Tensor | tuple | list) and node.op == "call_function"
