"""The README tells the truth: its commands run, its outputs are what they print, its tables come from filed results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if line.startswith("taylorseer-export ")]


def spoken(line):
    """A line without what differs from run to run: times, and the folder sizes that they come with."""
    return re.sub(r"\d+(\.\d+)?( ms| MB\))", r"# \2", line.strip())


@pytest.fixture(scope="module")
def transcript(tmp_path_factory):
    """Every shell block run in order in one empty folder; returns (command, output) pairs."""
    folder = tmp_path_factory.mktemp("reader")
    done = []
    for kind, text in BLOCKS:
        for command in commands(text) if kind == "sh" else []:
            call = [sys.executable, "-m", "taylorseer_export.cli", *command[1:]]
            result = subprocess.run(call, cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, f"{command}: {result.stderr}"
            done.append((command, result.stdout))
    return folder, done


def test_there_is_something_to_run():
    assert sum(len(commands(text)) for kind, text in BLOCKS if kind == "sh") >= 5


def test_shown_output_is_the_true_output(transcript):
    """Each `text` block shows lines that the command above it prints."""
    _, done = transcript
    printed = iter(done)
    shown = 0
    for kind, text in BLOCKS:
        if kind == "sh":
            for _ in commands(text):
                latest = next(printed)
        elif kind == "text":
            lines = {spoken(line) for line in latest[1].splitlines()}
            missing = [line for line in text.splitlines() if spoken(line) not in lines]
            assert not missing, f"{latest[0]} does not print {missing[0]!r}"
            shown += 1
    assert shown >= 1


def test_python_blocks_run(transcript):
    folder, _ = transcript
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert blocks
    for text in blocks:
        result = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_tables_come_from_the_filed_results():
    result = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"a table is stale; run python tools/readme.py {result.stderr}"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [t for t in targets if not t.startswith("http")]
    assert local
    assert [t for t in local if not (ROOT / t).exists()] == []
