"""What torch.export holds about sizes while it traces a model, and what of it is true at all of them.

torch 2.11 does not see that the lesser of n and 2 n is n. Where it guards by that, it refuses a model for which nothing
depends on the size. There such guards are put off into the graph, and held at the ends of all ranges here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

_PROVES = (2, 12)  # the version that sees it


def settled(export: Callable[..., ExportedProgram]) -> ExportedProgram:
    """What `export()` makes; of a torch that does not see what is true at every size, what it makes without.

    Args:
        export: `torch.export.export` with all but the option that puts guards off.

    Raises:
        UserError: The model is another one at some sizes, or this torch does not see that it is not.
    """
    from torch._dynamo.exc import UserError, UserErrorType  # with the compilers, which few traces need

    try:
        return export()
    except UserError as error:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _PROVES:
            raise
        program = export(prefer_deferred_runtime_asserts_over_guards=True)
        if not all(_holds(guard, program.range_constraints) for guard in guards_of(program)):
            raise UserError(
                UserErrorType.CONSTRAINT_VIOLATION,
                f"it depends on sizes as torch {torch.__version__} sees it, newer ones see more; upgrade torch",
            ) from error
        return program


def guards_of(program: ExportedProgram) -> list[sympy.Basic]:
    """What was put off into the graph."""
    asserts = [n for n in program.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    values = [getattr(node.args[0], "meta", {}).get("val") for node in asserts]
    return [value.node.expr for value in values if isinstance(value, torch.SymBool)]


def _holds(guard: sympy.Basic, ranges: Mapping[Any, Any]) -> bool:
    """Whether it is true at the two smallest and the two largest sizes of each symbol, in all combinations."""
    symbols: list[Any] = sorted(guard.free_symbols, key=str)
    ends = [{one.lower, one.lower + 1, one.upper - 1, one.upper} for one in map(ranges.__getitem__, symbols)]
    return all(sympy.true == guard.subs(list(zip(symbols, sizes, strict=True))) for sizes in product(*ends))
