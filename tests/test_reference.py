"""The reference of the Python API: built from the docstrings without a warning, whole, and its references resolve.

What is looked for is a function from pages or texts to a list of complaints, each with a test that it can complain.
"""

from __future__ import annotations

import ast
import builtins
import html
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest
from pdoc.doc import Class, Doc, Function, Module
from reference import PUBLIC, write_reference
from sources import PACKAGE, modules

import taylorseer_export

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
OURS = modules(ROOT / PACKAGE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Module], dict[str, str]]:
    """(what is documented, path -> text of every page); whatever warns while they are made is an error."""
    out = tmp_path_factory.mktemp("reference")
    documented = write_reference(out)
    return documented, {path.relative_to(out).as_posix(): path.read_text("utf-8") for path in out.rglob("*.*")}


# Readings -------------------------------------------------------------------------------------------------------------


def page_of(module: str) -> str:
    return f"{module.replace('.', '/')}.html"


def text_of(page: str) -> str:
    """Words of a page, without markup."""
    return words(html.unescape(re.sub("<[^>]+>", "", re.sub(r"(?s)<(script|style|svg).*?</\1>", "", page))))


def words(text: str) -> str:
    """A text without what Markdown takes for marks, and with single spaces."""
    return " ".join(re.sub("[`*]", "", text).split())


def members(documented: Doc) -> Iterator[Doc]:
    """What stands on a page: the public members of our own, those of classes among them."""
    for member in getattr(documented, "members", {}).values():
        ours = not documented.modulename or member.taken_from[0].startswith((PACKAGE, "fake"))
        if ours and not member.name.startswith("_"):
            yield member
            if isinstance(member, Class):
                yield from members(member)


def undocumented(module: Module) -> list[str]:
    """Public functions, methods and classes without a docstring."""
    found = [member for member in members(module) if isinstance(member, Function | Class)]
    return [member.fullname for member in found if not member.docstring.strip()]


def broken_links(pages: Mapping[str, str]) -> list[str]:
    """Links within the reference whose page or place is not there."""
    found = []
    for path, page in pages.items():
        for link in re.findall(r'<a[^>]* href="([^"]*)"', re.sub("(?s)<script.*?</script>", "", page)):
            target, _, place = link.partition("#")
            if re.match("[a-z]+:", target):
                continue
            there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else path
            if there not in pages or (place and f'id="{html.unescape(place)}"' not in pages[there]):
                found.append(f"{path}: {link}")
    return found


def machine_traces(pages: Mapping[str, str]) -> list[str]:
    """Paths of this machine, and addresses of objects."""
    traces = "|".join(
        [re.escape(str(ROOT)), re.escape(str(Path.home())) + r"\b/", r"\b0x[0-9a-f]{6,}", "site-packages"]
    )
    return [f"{path}: {trace}" for path, page in pages.items() for trace in re.findall(traces, page)]


def lost_references(text: str) -> list[str]:
    """Names in backticks that look like ours and are not: modules, files, classes and their members."""
    found = []
    for name in re.findall("`([^`\n]+)`", text):
        if re.fullmatch(rf"({PACKAGE}|tse)(\.\w+)+", name):
            there = is_there(name.replace("tse.", f"{PACKAGE}.", 1))
        elif re.fullmatch(r"[\w/]+\.py", name):
            there = any(f"/{path}".endswith(f"/{name}") for path in OURS)
        elif match := re.fullmatch(r"([A-Z]\w*[a-z]\w*)\.(\w+)(\(.*\))?", name):
            there = match[2] in CLASSES.get(match[1], ())
        elif re.fullmatch(r"([A-Z][a-z0-9]+){2,}", name):
            there = name in CLASSES or hasattr(builtins, name)
        else:
            there = True
        found += [] if there else [name]
    return found


def is_there(name: str) -> bool:
    """Whether a dotted name of the package is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        return hasattr(import_module(module), last) or bool(import_module(name))
    except ImportError:
        return False


def classes(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Class -> its methods, fields and the attributes that it sets on itself, by name alone."""
    found: dict[str, set[str]] = {}
    for source in files.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                own = found.setdefault(node.name, set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        own.add(inner.name)
                    elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                        own.add(inner.target.id)
                    elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                        own.add(inner.attr)
    return found


CLASSES = classes(OURS)


# The reference --------------------------------------------------------------------------------------------------------


def test_every_public_name_and_module_has_its_docstring_on_a_page(built):
    _, pages = built
    first = pages[page_of(PACKAGE)]
    for name in taylorseer_export.__all__:
        assert f'id="{name}"' in first
        assert words(getattr(taylorseer_export, name).__doc__.split("\n\n")[0]) in text_of(first), name
    for module in PUBLIC:
        assert words(import_module(module).__doc__.split("\n\n")[0]) in text_of(pages[page_of(module)]), module


def test_the_first_page_leads_to_all_others(built):
    _, pages = built
    assert page_of(PACKAGE) in pages["index.html"]
    assert [module for module in PUBLIC[1:] if f'href="{page_of(module)}"' not in pages[page_of(PACKAGE)]] == []


def test_sections_of_docstrings_are_headings_and_formulas_are_blocks(built):
    page = built[1][page_of(f"{PACKAGE}.method")]
    for heading in ("Arguments", "Returns", "Raises", "Source", "Attributes"):
        assert re.search(rf"<h6[^>]*>{heading}:</h6>", page), heading
    assert not re.search(r"(?m)^\s*(<p>)?(Args|Raises|Returns|Attributes|Source):\s*$", page)
    assert re.search(r"<pre><code>[^<]*D₀ = y,", page)


def test_every_public_function_and_class_has_a_docstring(built):
    assert [name for module in built[0].values() for name in undocumented(module)] == []


def test_links_lead_somewhere(built):
    assert broken_links(built[1]) == []


def test_names_in_backticks_are_those_of_the_package(built):
    texts = {member.fullname: member.docstring for module in built[0].values() for member in (module, *members(module))}
    assert {name: lost for name, text in texts.items() if (lost := lost_references(text))} == {}


def test_no_trace_of_the_machine(built):
    assert machine_traces(built[1]) == []


def test_what_says_nothing_is_left_out(built):
    pages = built[1].values()
    for noise in ("PydanticUndefined", "FieldInfo", "nn.Module and ScriptModule", "Alias for field number"):
        assert all(noise not in page for page in pages), noise


def test_the_public_names_stand_in_three_lists_that_agree():
    """What is looked up, what `*` and the reference take, and what editors see."""
    tree = ast.parse(OURS["__init__.py"])
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == taylorseer_export._PUBLIC
    assert sorted(seen) == sorted(taylorseer_export.__all__)


# The readings can complain --------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write a module that can be imported as `fake`."""
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "fake.py").write_text
    del sys.modules["fake"]


def test_a_promised_name_that_is_not_there_is_an_error(fake, tmp_path):
    fake('"""Doc."""\n__all__ = ["missing"]\n')
    with pytest.raises(UserWarning, match=r"'missing' in fake\.__all__"):
        write_reference(tmp_path / "out", ["fake"])
    assert not (tmp_path / "out").exists()


def test_an_annotation_that_cannot_be_read_is_an_error(fake, tmp_path):
    fake('"""Doc."""\nfrom __future__ import annotations\ndef f(x: Missing):\n    """Doc."""\n')
    with pytest.raises(UserWarning, match="Missing"):
        write_reference(tmp_path / "out", ["fake"])


def test_a_function_without_a_docstring_is_seen(fake, tmp_path):
    fake('"""Doc."""\ndef f(): ...\nclass A:\n    """Doc."""\n    def g(self): ...\n    def _h(self): ...\n')
    assert undocumented(write_reference(tmp_path / "out", ["fake"])["fake"]) == ["fake.f", "fake.A.g"]


def test_a_broken_link_is_seen():
    pages = {"a/b.html": '<a href="../c.html#x">, <a href="#y"> <p id="z">', "c.html": '<p id="x"> <a href="d.html">'}
    assert broken_links(pages) == ["a/b.html: #y", "c.html: d.html"]
    assert broken_links({"a.html": '<a class="f" href="https://example.org/#x"> <a href="#y"> <p id="y">'}) == []


def test_a_trace_of_the_machine_is_seen():
    assert len(machine_traces({"a": f"at {ROOT}/x, <f at 0x7f00aa00bb00>"})) == 2
    assert machine_traces({"a": "0x10 and engines/flux-tiny"}) == []


@pytest.mark.parametrize(
    "name",
    ["taylorseer_export.method.plans", "tse.open", "runtime/loop.py", "Slot.halt", "Slot.halt()", "PlanMaker"],
)
def test_a_lost_reference_is_seen(name):
    assert lost_references(f"As `{name}` does.") == [name]


@pytest.mark.parametrize(
    "name",
    (
        "taylorseer_export.method.plan tse.load runtime/slot.py slot.py Slot.step Plan.parse(text) Slot.memory DropIn"
        " ValueError F FFF..F manifest.json a.b"
    ).split(),
)
def test_a_reference_that_resolves_is_let_through(name):
    assert lost_references(f"As `{name}` does.") == []
