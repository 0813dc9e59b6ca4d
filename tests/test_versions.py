"""Lower bounds: those that the package states are those that `make oldest` runs, and an older library is refused."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from taylorseer_export.commands.terminal import require_extra
from taylorseer_export.errors import ConfigError

ROOT = Path(__file__).parent.parent
EXTRAS = ("onnxruntime", "export", "sample")  # what `make oldest` installs
HIGHER = {"safetensors"}  # diffusers asks for a newer one than the run side does


def bounds():
    """Name -> lower bound, of all that the package asks for with those extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)


def test_the_oldest_suite_runs_the_lower_bounds():
    text = (ROOT / "tools" / "constraints-oldest.txt").read_text()
    pinned = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    for name, least in bounds().items():
        assert name in HIGHER or re.fullmatch(rf"{re.escape(least)}(\.0)*", pinned[name]), name


@pytest.mark.parametrize(("seen", "refused"), [("2.10.9+cpu", True), ("2.11.0", False), ("2.13.0+cpu", False)])
def test_an_older_library_is_refused_before_work(monkeypatch, seen, refused):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ['torch>=2.11; extra == "export"', "numpy>=9"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": seen}[name])
    if not refused:
        return require_extra("export", "torch")
    text = r"torch is 2\.10\.9\+cpu, expected at least 2\.11; pip install --upgrade 'taylorseer-export\[export\]'"
    with pytest.raises(ConfigError, match=text):
        require_extra("export", "torch")
    return require_extra("sample", "torch")  # whose bound is not stated here
