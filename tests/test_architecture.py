"""The arrows between the parts, and the habits that keep them: read from the source text, nothing is imported here.

Every check is a function from source text to a list of complaints, so that each one has a test that it can complain.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from sources import (
    PACKAGE,
    circles,
    declared,
    families_named,
    imported_parts,
    imports,
    loose_requests,
    modules,
    part_of,
)

ROOT = Path(__file__).resolve().parents[1]

# Part -> the parts that it may import besides itself. A part is a folder or a file directly in the package.
ARROWS: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "values": frozenset(),
    "method": frozenset({"errors"}),
    "bundle": frozenset({"method", "errors"}),
    "families": frozenset({"errors"}),
    "checkpoint": frozenset({"families", "errors"}),
    "graph": frozenset({"bundle", "checkpoint", "families", "method", "errors"}),
    "compile": frozenset({"graph", "checkpoint", "bundle", "families", "method", "values", "errors"}),
    "runtime": frozenset({"bundle", "method", "errors"}),
    "embedded": frozenset({"bundle", "method", "runtime", "errors"}),
    "report": frozenset(
        {"runtime", "embedded", "compile", "graph", "checkpoint", "bundle", "families", "method", "errors"}
    ),
    "serve": frozenset({"runtime", "embedded", "bundle", "method", "errors"}),
    "comfy": frozenset({"runtime", "bundle", "method", "errors"}),
    "commands": frozenset(
        {
            "comfy",
            "serve",
            "report",
            "runtime",
            "embedded",
            "compile",
            "graph",
            "checkpoint",
            "bundle",
            "families",
            "method",
        }
        | {"values", "errors"}
    ),
    "cli": frozenset({"commands", "families", "errors"}),
    "__init__": frozenset({"runtime", "compile", "bundle", "method", "errors"}),
    "__main__": frozenset({"cli"}),
}

# These run where nothing but Python is installed.
STANDARD_LIBRARY_ONLY = frozenset({"errors", "method"})

# Heavy library -> the only files of the package that import it. A new entry here is a decision, not a formality.
HEAVY: dict[str, frozenset[str]] = {
    "diffusers": frozenset(
        {
            "checkpoint/checkpoint.py",
            "checkpoint/lora_names.py",
            "checkpoint/original.py",
            "checkpoint/weights.py",
            "compile/components.py",
            "runtime/dropin.py",
            "runtime/guiders.py",
            "runtime/modules.py",
            "runtime/schedulers.py",
        }
    ),
    "accelerate": frozenset({"checkpoint/weights.py"}),
    "gguf": frozenset({"checkpoint/gguf.py"}),
    # Its modules, inside ComfyUI's own process.
    "comfy": frozenset({"comfy/network.py", "comfy/loop.py", "comfy/nodes.py"}),
    "comfy_api": frozenset({"comfy/nodes.py"}),
    "folder_paths": frozenset({"comfy/nodes.py"}),
    "onnx": frozenset({"compile/onnx.py"}),
    "onnx_ir": frozenset({"compile/onnx.py"}),
    "onnxscript": frozenset({"compile/exporter.py", "compile/onnx.py"}),
    "onnxruntime": frozenset({"runtime/onnxruntime.py"}),
    "polygraphy": frozenset({"compile/polygraphy.py", "report/polygraphy.py"}),
    "tensorrt": frozenset({"bundle/tensorrt.py"}),
    "tensorrt_rtx": frozenset({"bundle/tensorrt.py"}),
    "torch_tensorrt": frozenset({"compile/torch_tensorrt.py"}),
    "transformers": frozenset({"compile/components.py", "report/metrics.py"}),
    "tokenizers": frozenset({"compile/components.py", "runtime/parts.py"}),
    "PIL": frozenset({"report/metrics.py", "embedded/picture.py", "embedded/video.py", "serve/api/formats.py"}),
    "av": frozenset({"embedded/video.py"}),
    "tqdm": frozenset({"commands/terminal.py"}),
    "tritonclient": frozenset({"serve/repository.py", "serve/client.py", "serve/fleet.py"}),
    # The images API: routes and forms, and for its handlers the type of a request; the rest of it is plain ASGI.
    "starlette": frozenset({"serve/api/app.py", "serve/api/bodies.py", "serve/api/images.py", "serve/api/videos.py"}),
    "python_multipart": frozenset({"serve/api/app.py"}),
    "uvicorn": frozenset({"serve/api/process.py"}),
    "prometheus_client": frozenset({"serve/api/metrics.py"}),
    "opentelemetry": frozenset({"serve/api/traces.py"}),
}

# Libraries that those who may import them import at the top: small, or loaded already where the file is.
AT_THE_TOP = frozenset({"tqdm", "comfy", "comfy_api", "folder_paths"})

# Where torch may be imported at the top of a file; on the run side it is imported inside the function that needs it.
TORCH_AT_THE_TOP = frozenset(
    {
        "checkpoint",
        "graph",
        "compile",
        "report/proposal.py",
        "report/verify.py",
        "report/polygraphy.py",
        "report/quantised.py",
        "runtime/dropin.py",
        "runtime/engine_module.py",
        "comfy/network.py",
        "comfy/loop.py",
    }
)

FORBIDDEN_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "registry"})
LONGEST = 450  # lines of one module

# Names at the top of the repository; everything else there starts with a dot.
TOP = frozenset(
    "taylorseer_export graphs engines tests tools pyproject.toml README.md Makefile LICENSE CHANGELOG.md"
    " CONTRIBUTING.md".split()
)
LEFTOVERS = frozenset({"demo", "build", "dist"})  # ignored outputs, seen only where git is not there to say so


# Checks: source -> complaints -----------------------------------------------------------------------------------------


def broken_arrows(files: Mapping[str, str]) -> list[str]:
    """Imports between parts that ARROWS does not allow, and parts that it does not know."""
    found = []
    for path, source in files.items():
        part = part_of(path)
        if part not in ARROWS:
            found.append(f"{path}: part `{part}` is not in ARROWS")
            continue
        for target, name, line in imported_parts(source, ARROWS):
            # The public names are for the top alone.
            if target != part and target not in ARROWS[part] and not (target == "__init__" and part == "cli"):
                found.append(f"{path}:{line} imports {name}")
        for name, line, _ in imports(source) if part in STANDARD_LIBRARY_ONLY else ():
            root = name.split(".")[0]
            if root != PACKAGE and root not in sys.stdlib_module_names:
                found.append(f"{path}:{line} imports {name}, expected the standard library only")
    return found


def misplaced_libraries(files: Mapping[str, str]) -> list[str]:
    """Heavy libraries imported in a file that HEAVY does not list, or at the top of a file that need not have them."""
    found = []
    for path, source in files.items():
        for name, line, now in imports(source):
            root = name.split(".")[0]
            if root in HEAVY and path not in HEAVY[root]:
                found.append(f"{path}:{line} imports {root}, expected in {', '.join(sorted(HEAVY[root])) or 'no file'}")
            elif root in HEAVY and now and root not in AT_THE_TOP:
                found.append(f"{path}:{line} imports {root} at the top, expected inside the function that needs it")
            elif root == "torch" and now and not {part_of(path), path} & TORCH_AT_THE_TOP:
                found.append(f"{path}:{line} imports torch at the top, expected inside the function that needs it")
    return found


def bad_names(files: Mapping[str, str]) -> list[str]:
    """Modules and folders named for nothing in particular."""
    return [path for path in files if FORBIDDEN_NAMES & set(path.removesuffix(".py").split("/"))]


def relative_imports(files: Mapping[str, str]) -> list[str]:
    """`from . import x`."""
    return [
        f"{path}:{line}" for path, source in files.items() for name, line, _ in imports(source) if name.startswith(".")
    ]


def module_state(files: Mapping[str, str]) -> list[str]:
    """Names of a module that are rebound (`global`), filled by a function, or start as an empty container."""
    found = []
    for path, source in files.items():
        tree = ast.parse(source)
        names = set()
        for statement in tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
                if ast.unparse(statement.value) in {"[]", "{}", "set()", "dict()", "list()"}:
                    found.append(f"{path}:{statement.lineno} starts an empty container, expected no module state")
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            own = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and _is_store(node)}
            own |= {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
            for node in ast.walk(function):
                if isinstance(node, ast.Global):
                    found.append(f"{path}:{node.lineno} rebinds {', '.join(node.names)}")
                elif isinstance(node, ast.Subscript) and _is_store(node) and _name(node.value) in names - own:
                    found.append(f"{path}:{node.lineno} fills {_name(node.value)}")
                elif (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in {"append", "add", "update", "setdefault", "extend", "insert", "pop", "clear"}
                    and _name(node.func.value) in names - own
                ):
                    found.append(f"{path}:{node.lineno} changes {_name(node.func.value)}")
    return found


def _is_store(node: ast.Name | ast.Subscript) -> bool:
    return isinstance(node.ctx, ast.Store | ast.Del)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def too_long(files: Mapping[str, str]) -> list[str]:
    """Modules over LONGEST lines."""
    lengths = {path: len(source.splitlines()) for path, source in files.items()}
    return [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > LONGEST]


def idle_tests(files: Mapping[str, str]) -> list[str]:
    """Test functions that can only fail by an accident."""
    found = []
    for path, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                if not any(_asserts(inner) for inner in ast.walk(node)):
                    found.append(f"{path}:{node.lineno} {node.name}")
    return found


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in {"pytest.raises", "pytest.warns", "pytest.fail"} or called.split(".")[-1].startswith(
        ("assert_", "check_")
    )


def skips_without_reason(files: Mapping[str, str]) -> list[str]:
    """`skip`, `skipif` and `xfail` that do not say why. `importorskip` names the missing library by itself."""
    found = []
    for path, source in files.items():
        tree = ast.parse(source)
        with_reason = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _skips(node.func):
                reasons = [keyword.value for keyword in node.keywords if keyword.arg in {"reason", "msg"}]
                # `pytest.skip("why")` and `mark.skip("why")` take it first; `mark.skipif` needs the keyword.
                if not ast.unparse(node.func).endswith("skipif") and "mark.xfail" not in ast.unparse(node.func):
                    reasons += node.args[:1]
                if any(not (isinstance(reason, ast.Constant) and not reason.value) for reason in reasons):
                    with_reason.add(node.func)
        found += [
            f"{path}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and _skips(node) and node not in with_reason
        ]
    return found


def _skips(node: ast.expr) -> bool:
    return ast.unparse(node) in {
        f"pytest.{name}" for name in ("skip", "xfail", "mark.skip", "mark.skipif", "mark.xfail")
    }


def strangers(entries: set[str]) -> set[str]:
    """Top-level entries that were not agreed on."""
    return {entry for entry in entries if entry not in TOP and not entry.startswith(".")}


def top_level_entries(root: Path) -> set[str]:
    """What git tracks or would track at the top of `root`; without git, what lies there less the ignored outputs."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    if listed:
        return {name.split("/")[0] for name in listed.split("\0") if name and (root / name).exists()}
    entries = {path.name for path in root.iterdir()}
    return {name for name in entries - LEFTOVERS if not name.endswith((".egg-info", "__pycache__"))}


# The repository -------------------------------------------------------------------------------------------------------

OURS = modules(ROOT / PACKAGE)
TESTS = modules(ROOT / "tests")
TOOLS = modules(ROOT / "tools")


def test_the_source_was_found() -> None:
    assert {"errors.py", "method/plan.py", "graph/trace.py", "runtime/denoiser.py"} <= OURS.keys()
    assert "test_architecture.py" in TESTS


def test_imports_point_one_way() -> None:
    assert broken_arrows(OURS) == []


def test_arrows_themselves_make_no_circle() -> None:
    seen: set[str] = set()
    while rest := ARROWS.keys() - seen:
        ready = {part for part in rest if ARROWS[part] <= seen}
        assert ready, f"a circle among {sorted(rest)}"
        seen |= ready


def test_files_make_no_circle() -> None:
    """But for two: a manifest is asked what it says of itself, and the maker of drafts which builders there are."""
    known = [
        [f"bundle/{name}.py" for name in ("agreement", "command", "latents", "manifest", "part_agreement")],
        ["compile/draft.py", "compile/engines.py"],
    ]
    assert [circle for circle in circles(OURS) if circle not in known] == []


def test_a_request_s_forecasts_are_one_value() -> None:
    """But at the drop-in and a node of ComfyUI, doors that collect options under names of their own."""
    doors = ("runtime/dropin.py", "comfy/nodes.py")
    assert loose_requests({path: source for path, source in OURS.items() if path not in doors}) == []


def test_a_loose_request_is_seen() -> None:
    assert len(loose_requests({"runtime/a.py": "def sample(request, plan, *, order=None): ..."})) == 1
    assert loose_requests({"runtime/a.py": "def sample(request, forecasts): ...\ndef fits(plan): ..."}) == []


def test_make_and_run_never_meet() -> None:
    make, run = {"families", "checkpoint", "graph", "compile"}, {"runtime", "embedded"}
    assert all(not ARROWS[part] & run for part in make)
    assert all(not ARROWS[part] & make for part in run)


def test_only_the_families_know_a_model() -> None:
    assert families_named(OURS, declared(OURS, "name"), declared(OURS, "model_class")) == []


def test_the_families_were_found() -> None:
    assert {"dit", "flux", "flux-kontext", "hunyuan-video", "wan"} <= declared(OURS, "name")
    assert {"FluxTransformer2DModel", "WanTransformer3DModel"} <= declared(OURS, "model_class")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('if family == "wan":\n    pass', "x.py:1 names wan"),
        ('_FACTS = {"hunyuan-video": 1.0}', "x.py:1 names hunyuan"),
        ('help = "captions to draw (embedded FLUX)"', "x.py:1 names flux"),
        ('print(f"a bundle of {x}-flux")', "x.py:1 names flux"),
        ('table = "WanTransformer3DModel"', "x.py:1 names WanTransformer3DModel"),
        ("from diffusers import WanTransformer3DModel", "x.py:1 names WanTransformer3DModel"),
        ("from a.b import flux_request", "x.py:1 names flux"),
        ("def wan(): pass", "x.py:1 names wan"),
        ("def f(flux=1): pass", "x.py:1 names flux"),
        ("made = flux.make()", "x.py:1 names flux"),
        ("f(wan=1)", "x.py:1 names wan"),
        ('def f():\n    """Of FLUX."""\n    "of FLUX"', "x.py:3 names flux"),
    ],
)
def test_the_name_of_a_family_is_found(source: str, complaint: str) -> None:
    assert complaint in families_named({"x.py": source}, {"wan", "flux", "hunyuan-video"}, {"WanTransformer3DModel"})


def test_docstrings_comments_and_other_words_may_stand_anywhere() -> None:
    source = '"""Of FLUX and Wan."""\nwanted = "video influx"  # as FLUX\nclass A:\n    """Of wan."""\n'
    assert (
        families_named({"x.py": source, "families/wan.py": 'NAME = "wan"'}, {"wan", "flux", "some-video"}, {"X"}) == []
    )


def test_heavy_libraries_are_imported_in_few_places() -> None:
    assert misplaced_libraries(OURS) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (PACKAGE, "torch numpy diffusers onnxruntime transformers onnx PIL"),
        (f"{PACKAGE}.method", "torch numpy pydantic"),
        (f"{PACKAGE}.families", "torch numpy diffusers"),
        (f"{PACKAGE}.runtime.denoiser", "torch diffusers transformers onnx onnxscript accelerate PIL"),
        (f"{PACKAGE}.serve.api.fleet", "torch diffusers transformers onnxruntime tokenizers tritonclient grpc PIL"),
        (f"{PACKAGE}.serve.api.process", "torch diffusers transformers onnx accelerate PIL starlette uvicorn"),
    ],
)
def test_importing_stays_light(module: str, absent: str) -> None:
    assert loaded_by(f"import {module}") & set(absent.split()) == set()


def loaded_by(statement: str) -> set[str]:
    """Top-level names in `sys.modules` after `statement` in a fresh interpreter at the root of the repository."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_modules_have_a_subject() -> None:
    assert bad_names(OURS) + bad_names(TOOLS) + bad_names(TESTS) == []


def test_imports_are_absolute() -> None:
    assert relative_imports(OURS) + relative_imports(TOOLS) + relative_imports(TESTS) == []


def test_modules_hold_no_state() -> None:
    assert module_state(OURS) == []


def test_modules_fit_in_a_head() -> None:
    assert too_long(OURS) == []


def test_every_test_asserts() -> None:
    assert idle_tests(TESTS) == []


def test_every_skip_says_why() -> None:
    assert skips_without_reason(TESTS) == []


def test_top_level_is_the_agreed_one() -> None:
    assert strangers(top_level_entries(ROOT)) == set()


# The checks can complain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("method/plan.py", "import numpy"),
        ("method/plan.py", "from taylorseer_export.bundle import store"),
        ("errors.py", "from taylorseer_export.method import Plan"),
        ("bundle/store.py", "from taylorseer_export.runtime.runner import Runner"),
        ("families/flux.py", "from taylorseer_export.graph import trace"),
        ("runtime/denoiser.py", "def f():\n    from taylorseer_export.graph.trace import trace"),
        (
            "runtime/denoiser.py",
            "from importlib import import_module as f\nimport_module('taylorseer_export.compile.a')",
        ),
        ("runtime/denoiser.py", "import taylorseer_export.compile.export"),
        ("runtime/denoiser.py", "from taylorseer_export import load"),
        ("compile/export.py", "from taylorseer_export.runtime.runner import Runner"),
        ("graph/trace.py", "from taylorseer_export.cli import main"),
        ("elsewhere/new.py", "import json"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str) -> None:
    assert len(broken_arrows({path: source})) == 1


def test_a_circle_is_seen() -> None:
    files = {
        "runtime/a.py": "from taylorseer_export.runtime.b import c",
        "runtime/b.py": "if TYPE_CHECKING:\n    from taylorseer_export.runtime import d",
        "runtime/d.py": "def f():\n    from taylorseer_export.runtime.a import e",
        "runtime/e.py": "from taylorseer_export.runtime.a import e",
    }
    assert circles(files) == [["runtime/a.py", "runtime/b.py", "runtime/d.py"]]
    assert circles({**files, "runtime/d.py": ""}) == []


def test_a_right_arrow_is_let_through() -> None:
    good = {
        "method/plan.py": "import math\nfrom taylorseer_export.errors import ConfigError",
        "runtime/denoiser.py": "import numpy\nfrom taylorseer_export.bundle.store import open_bundle",
        "cli.py": "import taylorseer_export\nfrom taylorseer_export import load",
    }
    assert broken_arrows(good) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("graph/trace.py", "def f():\n    import diffusers"),
        ("checkpoint/checkpoint.py", "import diffusers"),
        ("runtime/onnxruntime.py", "try:\n    import onnxruntime\nexcept ImportError:\n    pass"),
        ("runtime/denoiser.py", "import torch"),
        ("report/bench.py", "from torch import nn"),
        ("families/flux.py", "class A:\n    import torch"),
        ("runtime/denoiser.py", "def f():\n    from PIL import Image"),
        ("bundle/store.py", "from tqdm import tqdm"),
    ],
)
def test_a_misplaced_library_is_seen(path: str, source: str) -> None:
    assert len(misplaced_libraries({path: source})) == 1


def test_a_lazy_or_typing_import_is_let_through() -> None:
    good = {
        "checkpoint/checkpoint.py": "def f():\n    import diffusers",
        "embedded/picture.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL import Image",
        "runtime/eager.py": "class R:\n    def f(self):\n        import torch",
        "commands/terminal.py": "from tqdm import tqdm",
    }
    assert misplaced_libraries(good) == []


def test_a_heavy_import_is_seen_in_a_fresh_interpreter() -> None:
    assert "decimal" in loaded_by("import decimal")


@pytest.mark.parametrize("path", ["utils.py", "graph/utils.py", "common/x.py", "runtime/helpers.py"])
def test_a_name_for_nothing_is_seen(path: str) -> None:
    assert bad_names({path: "", "graph/taps.py": ""}) == [path]


@pytest.mark.parametrize("source", ["from . import x", "from .x import y", "def f():\n    from ..x import y"])
def test_a_relative_import_is_seen(source: str) -> None:
    assert len(relative_imports({"a.py": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "REGISTRY = {}",
        "SEEN: list[int] = []",
        "COUNT = 0\ndef f():\n    global COUNT",
        "TABLE = {1: 2}\ndef add(name, thing):\n    TABLE[name] = thing",
        "TABLE = [1]\ndef add(thing):\n    TABLE.append(thing)",
    ],
)
def test_module_state_is_seen(source: str) -> None:
    assert len(module_state({"a.py": source})) == 1


def test_a_constant_table_and_local_names_are_let_through() -> None:
    source = "TABLE = {1: 2}\nX = [1]\ndef f(X):\n    X.append(1)\n    found = []\n    found.append(TABLE[1])\n"
    assert module_state({"a.py": source}) == []


def test_a_long_module_is_seen() -> None:
    assert too_long({"a.py": "x = 1\n" * (LONGEST + 1), "b.py": "x = 1\n" * LONGEST}) == [
        f"a.py has {LONGEST + 1} lines"
    ]


@pytest.mark.parametrize(
    "body", ["print(1)", "run()", "x = 'assert'", "with contextlib.suppress(ValueError):\n        run()"]
)
def test_an_idle_test_is_seen(body: str) -> None:
    assert len(idle_tests({"a.py": f"def test_it():\n    {body}"})) == 1


@pytest.mark.parametrize(
    "body", ["assert 1", "with pytest.raises(ValueError):\n        run()", "assert_close(1, 1)", "oracle.check_it()"]
)
def test_a_working_test_is_let_through(body: str) -> None:
    assert idle_tests({"a.py": f"def test_it():\n    {body}"}) == []


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.skip\ndef f(): ...",
        "@pytest.mark.skip()\ndef f(): ...",
        "@pytest.mark.skipif(True)\ndef f(): ...",
        "@pytest.mark.skipif(True, reason='')\ndef f(): ...",
        "@pytest.mark.xfail(strict=True)\ndef f(): ...",
        "pytest.skip()",
    ],
)
def test_a_silent_skip_is_seen(source: str) -> None:
    assert len(skips_without_reason({"a.py": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.skip('why')\ndef f(): ...",
        "@pytest.mark.skipif(True, reason='why')\ndef f(): ...",
        "@pytest.mark.xfail(reason='why')\ndef f(): ...",
        "pytest.skip(f'why {1}')",
        "torch = pytest.importorskip('torch')",
    ],
)
def test_a_skip_with_a_reason_is_let_through(source: str) -> None:
    assert skips_without_reason({"a.py": source}) == []


def test_a_stranger_at_the_top_is_seen(tmp_path: Path) -> None:
    assert strangers({"README.md", ".ci", "notes.txt"}) == {"notes.txt"}
    for name in ("README.md", "notes.txt", ".venv", "demo", "x.egg-info"):
        (tmp_path / name).mkdir()
    assert strangers(top_level_entries(tmp_path)) == {"notes.txt"}


def test_the_command_line_starts_without_numpy() -> None:
    """`--help` and what is mistyped are answered at once: numpy alone takes longer than all of the rest."""
    code = "import sys, taylorseer_export.cli; print(*(n for n in ('numpy', 'torch', 'PIL') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
