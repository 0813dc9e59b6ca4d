"""families/README.md, followed to the letter: its listing is a family of the package, and it names what there is."""

import re
from pathlib import Path

import taylorseer_export.families
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.family import Family, Pipeline

FOLDER = Path(taylorseer_export.families.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_listing_is_the_declaration():
    """Whose numbers `tests/test_families.py` compares with the oracle's."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (file,) = re.findall(r"^`families/(\w+\.py)`:$", PAGE, re.MULTILINE)
    assert source == (FOLDER / file).read_text(encoding="utf-8")
    space: dict = {}
    exec(source, space)
    (listed,) = (value for value in space.values() if isinstance(value, Family))
    declared = FAMILIES[listed.name]
    assert (listed.sites, listed.pipeline, listed.defaults) == (declared.sites, declared.pipeline, declared.defaults)
    assert len(re.findall(r"^PIXART = Family\(.*?^\)", PAGE, re.MULTILINE | re.DOTALL)[0].splitlines()) <= 40


def _is_entry(name: str) -> bool:
    return any(
        name in fields for fields in (Family.__dataclass_fields__, Pipeline.__dataclass_fields__, Manifest.model_fields)
    )


def test_the_page_names_what_there_is():
    """Entries, hooks and files that the page speaks of exist."""
    entries = set(re.findall(r"^\| `(\w+)`(?:, `\w+`)? \|", PAGE, re.MULTILINE))
    assert entries
    assert {name for name in entries if not _is_entry(name)} == set()
    assert Pipeline.__dataclass_fields__.keys() <= entries
    (table,) = re.findall(r"^\| in the manifest .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    travelling = {name for row in table.splitlines()[2:-1] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert (
        travelling == {"dimensions", "sites", "graphs", "plan", "sampling", "pipeline"} <= Manifest.model_fields.keys()
    )
    root = Path(__file__).resolve().parents[1]
    assert all((root / path).is_file() for path in re.findall(r"`(tests/\w+\.py)`", PAGE))
