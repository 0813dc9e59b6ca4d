"""Write the reference of the Python API from its docstrings: `make docs`, or `python tools/reference.py --out FOLDER`.

One page per public module, by pdoc. A warning is an error: a name that is promised and not there, a docstring or an
annotation that cannot be read.
"""

from __future__ import annotations

import argparse
import linecache
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, get_type_hints
from unittest.mock import patch

import pdoc.render
from pdoc.doc import Class, Doc, Function, Module, Variable
from pdoc.doc_types import empty
from pydantic_core import PydanticUndefined

import taylorseer_export

OUT = Path(__file__).resolve().parent.parent / "build" / "reference"
# What README and the pages of the folders call the API; first comes the package, which has the names that most need.
PUBLIC = (
    "taylorseer_export",
    *(
        f"taylorseer_export.{module}"
        for module in (
            "compile.api",
            "compile.export",
            "runtime.denoiser",
            "runtime.slot",
            "runtime.dropin",
            "runtime.sampling",
            "method",
            "families.family",
            "bundle.manifest",
            "bundle.profile",
            "report.evaluate",
            "serve.client",
            "errors",
        )
    ),
)


def write_reference(out: Path, modules: Sequence[str] = PUBLIC) -> dict[str, Module]:
    """Write the pages of `modules` into `out`, and return what is on them; whatever pdoc warns of is raised.

    What others warn of is not: to find a source, every module that is loaded is asked for its file, and lazy ones warn.
    """
    imported = [import_module(name) for name in modules]  # what libraries say at their import is not ours
    linecache.clearcache()  # sources are those on the disk, whatever ran in this process before
    # Names are looked up when they are first used, and pdoc reads what is there.
    lazy = {name: getattr(taylorseer_export, name) for name in taylorseer_export.__all__}
    version = taylorseer_export.__version__
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"taylorseer-export {version}")
    with patch.dict(vars(taylorseer_export), lazy), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="pdoc")
        pages = {module.__name__: Module(module) for module in imported}
        for name, page in pages.items():
            page.name = name.removeprefix("taylorseer_export.")
            for documented in page.members.values():
                _mend(documented)
        first, *others = pages.values()
        first.submodules = others  # `__all__` names none
        made = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(page, pages) for name, page in pages.items()}
        made["index.html"] = pdoc.render.html_index(pages)
        made["search.js"] = pdoc.render.search_index(pages)
    for name, text in made.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return pages


def _mend(documented: Doc[Any]) -> None:
    """Take away what says nothing to a reader: the validators of a field, defaults that are none, and what a base class
    of another package says of its own constructor."""
    if isinstance(documented, Class):
        for member in documented.members.values():
            _mend(member)
    elif isinstance(documented, Function) and documented.name == "__init__" and not documented.obj.__doc__:
        documented.docstring = ""
    elif isinstance(documented, Variable):
        documented.annotation = _plain(documented.annotation)
        if "Annotated[" in repr(documented.default_value):
            documented.default_value, documented.annotation = _plain(documented.default_value), TypeAlias
        elif documented.default_value is PydanticUndefined:
            documented.default_value = empty


def _plain(annotation: Any) -> Any:
    """A type without what `Annotated` adds to it, at any depth."""
    return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}))["it"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the reference of the Python API.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pages (default: build/reference)")
    given = parser.parse_args()
    write_reference(given.out)
    print(f"wrote {given.out}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
