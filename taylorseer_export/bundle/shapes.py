"""Symbolic shapes: what `"frames*(height//2)*(width//2)"` in a manifest means.

An entry of a shape is a number, the name of a size, or an expression over sizes with `+ - * //` and
parentheses. Entries are parsed with `ast` and walked by hand; nothing is ever evaluated as code.
"""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import add, floordiv, mul, sub
from typing import Any

from taylorseer_export.errors import ConfigError, StepError

Entry = int | str

_LONGEST = 200  # characters; keeps a hostile manifest from nesting deep enough to hurt the parser
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.FloorDiv: floordiv,
}


def evaluate(expression: Entry, sizes: Mapping[str, int]) -> int:
    """The number that one shape entry stands for.

        evaluate("frames*(height//2)", {"frames": 3, "height": 8})  =  12

    Args:
        expression: A number, the name of a size, or names and numbers joined by `+ - * // ( )`.
        sizes: The known sizes by name. Unit: elements.

    Returns:
        The size, at least 0. Unit: elements.

    Raises:
        ConfigError: Anything else is written there, a name is not in `sizes`, a division is by
            zero, or the result is negative.
    """
    if isinstance(expression, int):
        value = expression
    else:
        try:
            value = compute(expression, sizes)
        except KeyError as missing:
            raise ConfigError(
                f"size `{missing.args[0]}` of shape entry `{expression}` is unknown, "
                f"expected one of {_listed(sizes)}; give its value or declare it in `dimensions`"
            ) from None
        except ZeroDivisionError:
            raise ConfigError(
                f"shape entry `{expression}` is divided by 0 elements, "
                f"expected a divisor of at least 1 element; correct the sizes {dict(sizes)}"
            ) from None
    if value < 0:
        raise ConfigError(
            f"shape entry `{expression}` is {value} elements, expected at least 0 elements; "
            f"correct the sizes {dict(sizes)}"
        )
    return value


def compute(expression: Entry, sizes: Mapping[str, Any]) -> Any:
    """The value of one shape entry over anything that knows `+ - * //`, such as the nodes of a graph.

    Raises:
        ConfigError: The entry is not an expression that `evaluate` accepts.
        KeyError: A name is not in `sizes`.
    """
    return expression if isinstance(expression, int) else _value(_parse(expression), sizes)


def names(expression: Entry) -> frozenset[str]:
    """The sizes that one shape entry mentions; empty for a number.

    Raises:
        ConfigError: The entry is not an expression that `evaluate` accepts.
    """
    if isinstance(expression, int):
        return frozenset()
    nodes = ast.walk(_parse(expression))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name))


def is_linear(expression: Entry) -> bool:
    """Whether `linear` takes the entry: a name, or a multiple of one."""
    if len(names(expression)) != 1:
        return False
    factor, _ = _line(_parse(str(expression))) or (0, 0)
    return factor > 0


def is_multiple(expression: Entry) -> bool:
    """Whether the entry is a name, or so many times one."""
    return is_linear(expression) and linear(expression)[2] == 0


def is_single(expression: Entry) -> bool:
    """Whether the entry is a number, or a sum of multiples of names: no product of two sizes."""
    return isinstance(expression, int) or _degree(_parse(expression)) <= 1


def in_products(shapes: Iterable[Sequence[Entry]]) -> set[str]:
    """The sizes that stand in a product somewhere: no shape tells them."""
    return {name for shape in shapes for entry in shape if not is_single(entry) for name in names(entry)}


def _degree(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        both = _degree(node.left), _degree(node.right)
        return sum(both) if isinstance(node.op, ast.Mult) else max(both)
    return int(isinstance(node, ast.Name))


def linear(expression: Entry) -> tuple[str, int, int]:
    """(name, factor, offset) of an entry that says `factor*name + offset`, with a factor above 0.

    Raises:
        ConfigError: The entry says anything else.
    """
    if is_linear(expression):
        (name,) = names(expression)
        factor, offset = _line(_parse(str(expression))) or (0, 0)
        return name, factor, offset
    raise ConfigError(f"shape entry is `{expression}`, expected a multiple of one name, like `2*rows`; write it so")


def resolve(shape: Sequence[Entry], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with every entry evaluated; raises what `evaluate` raises."""
    return tuple(evaluate(entry, sizes) for entry in shape)


def match(shape: Sequence[Entry], actual: Sequence[int], sizes: Mapping[str, int], name: str) -> dict[str, int]:
    """Bind the sizes that a real tensor shows, and check everything else about its shape.

    1. An entry of one name that is not yet in `sizes` gives that name its value.
    2. Every entry is then evaluated and compared, so a name used twice must agree with itself.

    Sizes are read off names and off multiples such as `2*rows`; a product of names is only checked.

    Args:
        shape: The symbolic shape of the tensor.
        actual: The shape it came with. Unit: elements.
        sizes: The sizes known so far; left as they are.
        name: The tensor, for the error.

    Returns:
        `sizes` with the newly bound ones added. Unit: elements.

    Raises:
        StepError: The number of dimensions or the extent of one differs.
        ConfigError: An expression mentions a size that is neither known nor bound here.
    """
    if len(shape) != len(actual):
        raise StepError(
            f"`{name}` is {_bracketed(actual)}, {len(actual)} dimensions, expected "
            f"{len(shape)}: {_bracketed(shape)}; pass `{name}` with these dimensions"
        )
    bound = dict(sizes)
    for entry, extent in zip(shape, actual, strict=True):
        if isinstance(entry, str) and entry.isidentifier():
            bound.setdefault(entry, extent)
    for dimension, (entry, extent) in enumerate(zip(shape, actual, strict=True)):
        if isinstance(entry, str) and len(unknown := names(entry) - bound.keys()) == len(names(entry)) == 1:
            factor, offset = _line(_parse(entry)) or (0, 0)
            if factor > 0:
                bound[min(unknown)] = _solved(name, dimension, entry, extent, factor, offset)
    for dimension, (entry, extent) in enumerate(zip(shape, actual, strict=True)):
        expected = evaluate(entry, bound)
        if extent != expected:
            raise StepError(
                f"`{name}` dimension {dimension} (`{entry}`) is {extent} elements, expected "
                f"{expected} elements; pass `{name}` as {_bracketed(shape)}, or begin a new "
                "request for another size"
            )
    return bound


def _solved(name: str, dimension: int, entry: str, extent: int, factor: int, offset: int) -> int:
    value, rest = divmod(extent - offset, factor)
    if rest or value < 0:
        beyond = f" and {offset}" if offset else ""
        raise StepError(
            f"`{name}` dimension {dimension} (`{entry}`) is {extent} elements, expected a multiple of {factor}{beyond} "
            f"elements; pad or crop `{name}`"
        )
    return value


def _line(node: ast.expr) -> tuple[int, int] | None:
    """(factor, offset) of an expression of one name, if it is a straight line."""
    match node:
        case ast.Name():
            return 1, 0
        case ast.Constant(value=int(value)):
            return 0, value
        case ast.BinOp(left=left, op=operator, right=right):
            one, other = _line(left), _line(right)
            if one is None or other is None or isinstance(operator, ast.FloorDiv):
                return None
            if isinstance(operator, ast.Mult):
                scale, line = (one, other) if one[0] == 0 else (other, one)
                return (scale[1] * line[0], scale[1] * line[1]) if scale[0] == 0 else None
            apply = _OPERATORS[type(operator)]
            return apply(one[0], other[0]), apply(one[1], other[1])
    return None


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    try:
        if len(expression) > _LONGEST or not expression.isascii():  # Python takes a full-width `a` for an `a`
            raise SyntaxError
        tree = ast.parse(expression, mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError):
        shown = expression[:40] + ("…" if len(expression) > 40 else "")
        raise ConfigError(
            f"shape entry is `{shown}`, expected names and whole numbers joined by + - * // ( ), "
            f"at most {_LONGEST} characters; write it with these alone"
        ) from None
    return tree


def _check(node: ast.expr) -> None:
    match node:
        case ast.Name():
            return
        case ast.Constant(value=value) if type(value) is int:
            return
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            _check(left)
            _check(right)
        case _:
            raise SyntaxError


def _value(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](_value(left, sizes), _value(right, sizes))
    raise AssertionError(f"bug in taylorseer-export: {ast.dump(node)} passed the check")


def _bracketed(shape: Sequence[Entry]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(sizes)) or "none"
