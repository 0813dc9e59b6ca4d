"""What a source text imports, read and not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def imports(source: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, at import time) of every import; `from a import b` gives `a.b`, a relative one a leading dot.

    An import is at import time unless a function or `if TYPE_CHECKING:` holds it.
    """

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                yield from ((f"{base}.{alias.name}", child.lineno, now) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in {
                "import_module",
                "importlib.import_module",
            }:
                if child.args and isinstance(child.args[0], ast.Constant) and isinstance(child.args[0].value, str):
                    yield child.args[0].value, child.lineno, now
                yield from walk(child, now)
            elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), False)
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), now)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, False)
            else:
                yield from walk(child, now)

    yield from walk(ast.parse(source), True)
