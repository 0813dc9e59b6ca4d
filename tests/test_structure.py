"""The table of the structure: its counts are those of small sources, and the walk is the one that `run` takes."""

from pathlib import Path

import structure
from sources import arrows, circles

FILES = {
    "cli.py": "from taylorseer_export.run import loop\n",
    "run/loop.py": "from taylorseer_export.run import step\n\ndef sample(denoiser, plan, order): ...\n",
    "run/step.py": "def f():\n    from taylorseer_export.run import loop\n",
    "run/wan.py": "from taylorseer_export import load\nNAME = 'wan'\n",
    "families/wan.py": "WAN = Family(name='wan', model_class='WanModel')\n",
}


def test_counts_are_those_of_the_sources():
    assert structure.structure_of(FILES) == {
        "lines": {"cli": 1, "run": 7, "families": 1},
        "arrows": 2,
        "arrows_back": 0,
        "circles": [["run/loop.py", "run/step.py"]],
        "circles_at_import": [],
        "names_a_family": ["run/wan.py"],
        "loose_requests": ["run/loop.py:3 sample takes ['order', 'plan']"],
    }


def test_arrows_are_between_parts_and_go_both_ways_where_they_do():
    assert arrows(FILES) == {("cli", "run"), ("run", "__init__")}
    back = FILES | {"run/back.py": "from taylorseer_export import cli"}
    assert structure.structure_of(back)["arrows_back"] == 1


def test_a_circle_at_import_is_told_from_one_in_a_function():
    straight = {path: source.replace("def f():\n    ", "") for path, source in FILES.items()}
    assert circles(FILES, lazy=False) == [] and circles(straight, lazy=False) == [["run/loop.py", "run/step.py"]]


def test_the_table_has_both_revisions_and_a_gap_where_one_has_no_such_folder():
    after = {path.replace("run/", "runtime/"): source for path, source in FILES.items()}
    record = {"before": structure.structure_of(FILES), "after": structure.structure_of(after)}
    rows = structure.rows(record)
    assert ("lines of `run`", 7, None) in rows and ("lines of `runtime`", None, 7) in rows
    assert ("lines in all", 9, 9) in rows
    walks = {"stack": ["cli.py:main", "run/loop.py:a", "run/loop.py:b"], "entered": ["run/step.py:f"]}
    walked = structure.rows({side: counts | {"walk": walks} for side, counts in record.items()})
    assert [counts for _, *counts in walked[len(rows) :]] == [[3, 3], [2, 2], [1, 1]]


def test_the_walk_begins_at_the_command_line_and_ends_at_the_engine(residual_digits: Path):
    seen = structure.walk(residual_digits)
    assert seen["stack"][0].startswith("cli.py:") and seen["stack"][-1].startswith("runtime/onnxruntime.py:")
    assert any(place.startswith("runtime/slot.py:") for place in seen["stack"])
    assert len(seen["entered"]) >= len({place for place in seen["stack"] if place.startswith("runtime/onnx")})
