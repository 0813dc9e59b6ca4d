"""The README tells the truth: its commands run, its outputs are what they print, its tables come from filed results."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import triton_server

from taylorseer_export.families import FAMILIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
PAGES = [ROOT / "README.md", ROOT / "tools/README.md", *sorted((ROOT / "taylorseer_export").glob("*/README.md"))]


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if line.startswith("taylorseer-export ")]


def spoken(line):
    """A line without what differs from run to run: times, and the folder sizes that they come with."""
    return re.sub(r"\d+(\.\d+)?( ms| MB\))", r"# \2", line.strip())


@pytest.fixture(scope="module")
def transcript(tmp_path_factory):
    """Every shell block run in order in one empty folder; returns (command, output) pairs."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "taylorseer_export").symlink_to(ROOT / "taylorseer_export")  # as in a checkout, but for what is written
    done = []
    for kind, text in BLOCKS:
        for command in commands(text) if kind == "sh" else []:
            call = [sys.executable, "-m", "taylorseer_export.cli", *command[1:]]
            result = subprocess.run(call, cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, f"{command}: {result.stderr}"
            done.append((command, result.stdout))
    return folder, done


def test_the_status_counts_the_families():
    assert len(FAMILIES) == 30 and "| thirty model families;" in README


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
    """Of the README, and of the page on running a bundle, whose bundle is exported first."""
    folder, _ = transcript
    page = (ROOT / "taylorseer_export/runtime/README.md").read_text(encoding="utf-8")
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    others = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert blocks and others
    dit = [sys.executable, "-m", "taylorseer_export", "dit", "--out", "engines"]
    assert subprocess.run(dit, cwd=folder, capture_output=True).returncode == 0
    for text in (*blocks, *others):
        result = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_serving_as_the_page_says(transcript):
    """What `make triton` runs is started, and the client draws the picture; only the port is the server's own."""
    if reason := triton_server.missing():
        pytest.skip(reason)
    folder, _ = transcript
    assert (
        "make triton" in README
        and "\ntriton: $(DONE)\n\t@$(RUN) tools/triton_server.py" in (ROOT / "Makefile").read_text()
    )
    (line,) = re.findall(r"^taylorseer-export client .*$", README, re.M)
    command = shlex.split(line)[1:]
    server = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "tools/triton_server.py")], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = next(found[1] for text in server.stdout if (found := re.search(r"grpc://(\S+?),", text)))
        command[command.index("--url") + 1] = url
        done = subprocess.run(
            [sys.executable, "-m", "taylorseer_export", *command], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (folder / command[command.index("--out") + 1]).read_bytes().startswith(b"\x89PNG")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


def test_tables_come_from_the_filed_results():
    result = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"a table is stale; run python tools/readme.py {result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    words = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # code indexes and calls
    targets = re.findall(r"\]\(([^)#]+)\)", words)
    local = [t for t in targets if not t.startswith("http")]
    assert [t for t in local if not (page.parent / t).exists()] == []


def test_every_folder_of_the_package_is_on_the_map():
    folders = {path.parent.name for path in (ROOT / "taylorseer_export").glob("*/__init__.py")}
    assert folders == {name for name in folders if f"[{name}/](taylorseer_export/{name}" in README}
