"""Filed records name the commit that made them: other changes and older reports are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import families
import make_asset
import pytest
import record
from sources import imports

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {"date": "2026-01-02T03:04:05+00:00", "commit": "a" * 40, "uncommitted_changes": False}
DIRTY = CLEAN | {"uncommitted_changes": True}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder that stands for tools/results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def test_a_record_of_a_commit_is_filed(results):
    path = record.write_record("x", CLEAN, results)
    assert path == results / "2026-01-02-x.json" and json.loads(path.read_text()) == CLEAN


def test_a_record_of_a_dirty_tree_is_refused_and_nothing_is_written(results):
    with pytest.raises(SystemExit, match=r"aaaaaaaaaaaa with uncommitted changes, expected a commit .*--allow-dirty"):
        record.write_record("x", DIRTY, results)
    assert list(results.iterdir()) == []


def test_one_that_is_allowed_says_that_it_is_dirty(results):
    path = record.write_record("x", DIRTY, results, allow_dirty=True)
    assert json.loads(path.read_text())["uncommitted_changes"] is True


def test_a_record_that_is_not_filed_may_be_of_any_tree(results, tmp_path_factory):
    assert record.write_record("x", DIRTY, tmp_path_factory.mktemp("elsewhere")).is_file()


def test_a_dirty_tree_is_refused_before_the_work_starts(results, monkeypatch):
    monkeypatch.setattr(record, "commit_of", lambda: ("a" * 40, True))
    with pytest.raises(SystemExit, match="with uncommitted changes"):
        record.circumstances(results)
    assert record.circumstances(results, allow_dirty=True)["uncommitted_changes"] is True
    assert record.circumstances()["commit"] == "a" * 40


def git(folder, *words):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_change_is_seen_and_a_filed_result_is_none(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert record.commit_of(tmp_path) == (commit, False)
    (tmp_path / "tools/results").mkdir(parents=True)
    (tmp_path / "tools/results/x.json").write_text("{}")
    assert record.commit_of(tmp_path) == (commit, False)
    (tmp_path / "new").touch()
    assert record.commit_of(tmp_path) == (commit, True)
    (tmp_path / "new").unlink()
    (tmp_path / "file").write_text("b")
    assert record.commit_of(tmp_path) == (commit, True)


# The report of the tests


def report(folder, **properties):
    path = folder / "report.xml"
    said = "".join(f'<property name="{name}" value="{value}"/>' for name, value in properties.items())
    path.write_text(f'<testsuites><testsuite name="pytest"><properties>{said}</properties></testsuite></testsuites>')
    return path


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({}, "names no commit, expected aaaaaaaaaaaa"),
        ({"commit": "b" * 40, "uncommitted_changes": "False"}, "is of commit bbbbbbbbbbbb, expected aaaaaaaaaaaa"),
        ({"commit": "a" * 40, "uncommitted_changes": "True"}, "with uncommitted changes, expected the commit alone"),
    ],
)
def test_a_report_of_another_tree_is_refused(tmp_path, properties, message):
    with pytest.raises(SystemExit, match=message):
        families.refuse_other(report(tmp_path, **properties), "a" * 40, allow_dirty=False)


def test_a_report_of_this_commit_is_taken(tmp_path):
    families.refuse_other(report(tmp_path, commit="a" * 40, uncommitted_changes="False"), "a" * 40, False)
    dirty = report(tmp_path, commit="a" * 40, uncommitted_changes="True")
    families.refuse_other(dirty, "a" * 40, allow_dirty=True)
    assert families.counts([dirty]) == {}


def test_a_report_of_workers_counts_as_one_of_one_process(tmp_path):
    case = '<testcase classname="tests.test_families" name="test_all_full_is_the_untouched_model[wan]{}"/>'
    counted = []
    for k, group in enumerate(("", "@wan", "@test_families")):
        path = tmp_path / f"{k}.xml"
        path.write_text(f"<testsuites><testsuite>{case.format(group)}</testsuite></testsuites>")
        counted.append(families.counts([path]))
    assert counted[0] and counted[1] == counted[2] == counted[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "workers"])
def test_our_own_reports_name_the_commit(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    path = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={path}", f"--basetemp={tmp_path / 'base'}", *workers]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_plan.py"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    commit, changed = record.commit_of()
    families.refuse_other(path, commit, allow_dirty=changed)


# The index


def test_the_index_names_every_tool():
    tools, text = ROOT / "tools", (ROOT / "tools/README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in tools.glob("*.py")}
    named = set(re.findall(r"python tools/(\w+\.py)", text)) | set(re.findall(r"`(\w+\.py)`", text))
    made = {"triton_server.py"}  # `make triton`
    assert named | made == scripts
    assert set(re.findall(r"make_asset\.py ([\w-]+)", text)) == set(make_asset.MAKERS)
    makers = [path for path in (tools / "assets").glob("*.py") if "def main(" in path.read_text(encoding="utf-8")]
    assert {path.stem.replace("_", "-") for path in makers} == set(make_asset.MAKERS)


def test_no_tool_imports_from_the_tests_or_edits_the_path():
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in (ROOT / "tools").rglob("*.py"):
        source = path.read_text("utf-8")
        assert not {name.split(".")[0] for name, _, _ in imports(source)} & tests, path
        assert "sys.path." not in source and "sys.path[" not in source, path
