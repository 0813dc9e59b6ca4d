"""What source text says, read and not run: imports, parts, circles, names of families, loose parameters of a request.

The tests of the architecture hold these, and `structure.py` files them for two revisions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

PACKAGE = "taylorseer_export"

# The folders that may name a model family or its class: everywhere else what is so of a family is data.
NAMES_FAMILIES = frozenset({"families", "embedded"})

REQUEST = frozenset({"plan", "order", "form", "weights", "guard"})  # what `Forecasts` holds


def modules(folder: Path) -> dict[str, str]:
    """Relative path -> source text of every Python file in `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))}


def part_of(path: str) -> str:
    """`graph/trace.py` -> `graph`, `cli.py` -> `cli`."""
    return path.split("/")[0].removesuffix(".py")


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


def imported_parts(source: str, parts: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """(part, dotted name, line) of every import from our own package.

    `from taylorseer_export import x` reaches the public names, which are of `__init__`.
    """
    for name, line, _ in imports(source):
        root, _, rest = name.partition(".")
        if root == PACKAGE:
            target = rest.split(".")[0]
            yield target if target in parts else "__init__", name, line


def arrows(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """(part, part that it imports), lazily and for types as well."""
    parts = {part_of(path) for path in files}
    found = {
        (part_of(path), target) for path, source in files.items() for target, _, _ in imported_parts(source, parts)
    }
    return {(part, target) for part, target in found if part != target}


def circles(files: Mapping[str, str], lazy: bool = True) -> list[list[str]]:
    """Files that import each other, straight or through others; where `lazy`, in functions and for types as well."""
    ahead: dict[str, set[str]] = {}
    for path, source in files.items():
        named = (
            name.split(".")[1:] for name, _, now in imports(source) if (now or lazy) and name.startswith(f"{PACKAGE}.")
        )
        ahead[path] = {f"{'/'.join(parts[:end])}.py" for parts in named for end in (len(parts), len(parts) - 1)}
        ahead[path] &= files.keys() - {path}

    def reached(path: str) -> set[str]:
        seen: set[str] = set()
        waiting = set(ahead[path])
        while waiting:
            seen.add(following := waiting.pop())
            waiting |= ahead[following] - seen
        return seen

    reach = {path: reached(path) for path in files}
    found = {tuple(sorted(other for other in reach[path] if path in reach[other])) for path in files}
    return sorted(list(circle) for circle in found if circle)


def loose_requests(files: Mapping[str, str]) -> list[str]:
    """Functions outside of `method/` that take two or more of what `Forecasts` holds as parameters of their own."""
    found = []
    for path, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and part_of(path) != "method":
                taken = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} & REQUEST
                found += [f"{path}:{node.lineno} {node.name} takes {sorted(taken)}"] * (len(taken) > 1)
    return found


def families_named(files: Mapping[str, str], names: Collection[str], classes: Collection[str]) -> list[str]:
    """Families and model classes named outside of the folders that may: in a text that is no docstring, or in a name.

    Args:
        files: Path -> source.
        names: Of the families; each of their words counts where it stands alone, `flux` in `flux-tiny` and in
            `flux_request`.
        classes: Of models in diffusers.
    """
    every = {word for name in names for word in name.split("-") if not word.isdigit()}
    words = every - {"image", "video", "edit", "animate", "kv", "z"}
    found = []
    for path, source in files.items():
        if part_of(path) in NAMES_FAMILIES:
            continue
        tree = ast.parse(source)
        documents = {id(_document(node)) for node in ast.walk(tree)}
        for node in ast.walk(tree):
            if id(node) in documents:
                continue
            fields = [value for _, value in ast.iter_fields(node)]
            texts = [text for field in fields for text in (field if isinstance(field, list) else [field])]
            text = " ".join(text for text in texts if isinstance(text, str))
            seen = set(re.findall("[a-z0-9]+", text.lower())) & words | {name for name in classes if name in text}
            found += [f"{path}:{getattr(node, 'lineno', 0)} names {name}" for name in sorted(seen)]
    return found


def _document(node: ast.AST) -> ast.expr | None:
    """The docstring of a module, class or function."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return None
    first = node.body[0]
    return first.value if isinstance(first, ast.Expr) else None


def declared(files: Mapping[str, str], argument: str) -> set[str]:
    """What the families' declarations give for an argument of `Family(...)`."""
    given = {
        keyword.value.value
        for path, source in files.items()
        if part_of(path) == "families"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Family", "replace")
        for keyword in node.keywords
        if keyword.arg == argument and isinstance(keyword.value, ast.Constant)
    }
    return {name for name in given if isinstance(name, str)} - {"unknown"}
