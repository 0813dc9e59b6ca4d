"""Sizes: symbolic expressions of a trace, in a form that contracts and engines can use.

Tracing leaves `(side**2)//side` where a square picture is cut into rows; a contract knows `+ - * //` and no powers. It
leaves `(-rows)//2` where a table is cropped to its middle; Python rounds that down and ONNX rounds it up.
"""

from __future__ import annotations

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter


def simplified(expression: sympy.Expr) -> sympy.Expr:
    """The same size: a division that always leaves nothing carried out, one of a negative number turned around.

    Floor of -n / d is -((n + d - 1) // d).
    """
    return expression.replace(lambda e: type(e).__name__ == "FloorDiv", _quotient)


def _quotient(division: sympy.Expr) -> sympy.Expr:
    above, below = division.args
    quotient = sympy.cancel(above / below)
    if sympy.denom(quotient) == 1:
        return quotient
    if above.could_extract_minus_sign() and below.is_Integer and below > 0:
        return -type(division)(below - 1 - above, below)
    return division


class _Written(StrPrinter):
    def _print_Pow(self, power: sympy.Expr, rational: bool = False) -> str:
        base, exponent = power.args
        return "*".join([self.parenthesize(base, PRECEDENCE["Mul"])] * int(exponent))


def written(expression: sympy.Expr) -> str:
    """The size as an entry of a shape: powers as products."""
    return str(_Written().doprint(expression))
