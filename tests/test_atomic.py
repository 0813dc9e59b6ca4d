"""Whole or not at all: what interrupted, ended and killed writers leave, and what a later one sweeps.

Writers are real processes. They say by a file that they are where a test wants them, and are waited for by that file.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from taylorseer_export import cli
from taylorseer_export.bundle.atomic import aside, replacing, sweep
from taylorseer_export.bundle.store import writing
from taylorseer_export.errors import ConfigError, first_line

pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders are not locked on Windows, and nothing is swept")

PATIENCE = 120  # seconds, after which a process that says nothing is a failure
AT_WORK = """
import signal, sys, time
from pathlib import Path
from taylorseer_export import cli
from taylorseer_export.bundle import store
from taylorseer_export.bundle.atomic import replacing
from taylorseer_export.commands import export
# As from a terminal: what nohup or a background job ignores, a child would go on ignoring.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
target, ready, go = map(Path, sys.argv[1:4])
def pause():
    ready.touch()
    while not go.exists():
        time.sleep(0.01)
"""
BUNDLE = "with store.writing(target) as partial:\n    (partial / 'full.onnx').write_bytes(b'half')\n    pause()\n"
FILE = "with replacing(target) as partial:\n    partial.write_bytes(b'half')\n    pause()\n"
BETWEEN_RENAMES = """
rename = Path.rename
def stop(path, to):
    if '.partial-' in path.name:
        pause()
    return rename(path, to)
Path.rename = stop
with store.writing(target) as partial:
    (partial / 'manifest.json').write_bytes(b'new')
"""
COMMAND = """
def work(*arguments):
    with store.writing(target) as partial:
        (partial / 'full.onnx').write_bytes(b'half')
        pause()
    return 0
export.run = work
sys.exit(cli.main(['dit']))
"""

IN_A_CALLBACK = """
import weakref
def work(*arguments):
    class Thing:
        pass
    with store.writing(target) as partial:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: pause())
        del thing  # the callback runs now, and what is raised in it goes no further
        while True:
            time.sleep(0.01)
export.run = work
sys.exit(cli.main(['dit']))
"""


@contextmanager
def at_work(tmp_path: Path, target: Path, work: str):
    """A process that is in the middle of `work` on `target`, and the file that lets it go on."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK + work, target, ready, go], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(ready.exists, process)
        yield process, go
    finally:
        process.kill()
        process.communicate()
        ready.unlink(missing_ok=True)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the process does not get there"
        time.sleep(0.01)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# Killed, and swept


@pytest.mark.parametrize("work", [BUNDLE, FILE])
def test_what_a_killed_process_left_is_swept_by_the_next_one(tmp_path, out, work):
    with at_work(tmp_path, out / "first", work) as (process, _):
        process.kill()
        process.wait()
        (left,) = names(out)
        assert left.startswith(".first.partial-")
        with replacing(out / "second") as partial:
            partial.write_bytes(b"whole")
    assert names(out) == ["second"]


@pytest.mark.parametrize("work", [BUNDLE, FILE])
def test_what_a_live_process_writes_is_not_swept(tmp_path, out, work):
    with at_work(tmp_path, out / "first", work) as (process, go):
        with writing(out / "second") as partial:
            (partial / "x").write_bytes(b"")
        with replacing(out / "third") as partial:
            partial.write_bytes(b"")
        go.touch()
        assert process.wait(PATIENCE) == 0
    assert names(out) == ["first", "second", "third"]
    written = out / "first" / "full.onnx" if (out / "first").is_dir() else out / "first"
    assert written.read_bytes() == b"half"


def test_a_bundle_whose_successor_was_killed_between_two_renames_is_put_back(tmp_path, out):
    target = out / "bundle"
    with writing(target) as partial:
        (partial / "manifest.json").write_bytes(b"old")
    with at_work(tmp_path, target, BETWEEN_RENAMES) as (process, _):
        assert not target.exists()
        process.kill()
        process.wait()
    sweep(out)
    assert names(out) == ["bundle"]
    assert (target / "manifest.json").read_bytes() == b"old"


def test_a_live_process_between_two_renames_is_left_alone(tmp_path, out):
    target = out / "bundle"
    with writing(target) as partial:
        (partial / "manifest.json").write_bytes(b"old")
    with at_work(tmp_path, target, BETWEEN_RENAMES) as (process, go):
        sweep(out)
        assert not target.exists()
        go.touch()
        assert process.wait(PATIENCE) == 0
    assert names(out) == ["bundle"]
    assert (target / "manifest.json").read_bytes() == b"new"


def test_what_only_looks_alike_is_not_swept(out):
    alike = [".a.partial-0123", "a.partial-0123456789ab", ".a.partial-0123456789ag", ".a.old-0123456789ab"]
    for name in alike:
        (out / name).mkdir()
    (out / ".file.partial-0123456789ab").write_bytes(b"precious")
    (out / ".link.partial-0123456789ab").symlink_to(out / ".a.partial-0123")
    (out / ".b.partial-0123456789ab").mkdir()  # this one has the name, no owner, and goes
    before = names(out)
    sweep(out)
    assert names(out) == sorted(set(before) - {".b.partial-0123456789ab"})


def test_nothing_is_swept_where_folders_cannot_be_locked(out, monkeypatch):
    import fcntl

    def refuse(handle, how):
        raise OSError("no locks")

    (out / ".a.partial-0123456789ab").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with replacing(out / "file") as partial:
        partial.write_bytes(b"")
    assert names(out) == [".a.partial-0123456789ab", "file"]


def test_a_folder_that_was_swept_before_its_lock_was_taken_is_made_anew(out, monkeypatch):
    made = Path.mkdir
    lost = []

    def mkdir(path, *arguments, **options):
        made(path, *arguments, **options)
        if not lost:
            lost.append(path)
            sweep(out)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with aside(out / "a") as folder:
        assert names(out) == [folder.name]
        assert folder != lost[0]
    assert names(out) == []


# Ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing_and_says_so(tmp_path, out, number):
    with at_work(tmp_path, out / "first", COMMAND) as (process, _):
        assert len(names(out)) == 1
        process.send_signal(number)
        if number != signal.SIGINT:
            process.send_signal(number)  # as `timeout` does
        _, said = process.communicate(timeout=PATIENCE)
    assert names(out) == []
    if number != signal.SIGINT:
        assert process.returncode == 128 + number
        assert said == (
            f"taylorseer-export: the command was ended by {number.name}; nothing half-written was left, run it again\n"
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_drops_ends_the_command_all_the_same(tmp_path, out, number):
    """An export runs callbacks of weak references nearly all the time, and what a handler raises in one is lost."""
    with at_work(tmp_path, out / "first", IN_A_CALLBACK) as (process, _):
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
    assert names(out) == []
    assert process.returncode == (2 if number == signal.SIGINT else 128 + number)
    assert said.count("\n") == 1 and "nothing half-written was left, run it again" in said


@pytest.mark.slow
def test_an_export_that_is_ended_leaves_nothing(tmp_path, out):
    command = [sys.executable, "-m", "taylorseer_export.cli", "dit", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            wait_for(lambda: any(out.glob(".dit-tiny.partial-*/*.onnx")), process)
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 143
    assert "ended by SIGTERM; nothing half-written was left" in said
    assert names(out) == []


def test_signals_are_handled_by_the_command_alone(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) == before == signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert cli.main(["--version"]) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# Files


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_file_leaves_the_old_one(out, error):
    (out / "file").write_bytes(b"old")
    with pytest.raises(error), replacing(out / "file") as partial:
        partial.write_bytes(b"half")
        raise error
    assert names(out) == ["file"]
    assert (out / "file").read_bytes() == b"old"


def test_a_file_is_replaced_at_the_end(out):
    (out / "file").write_bytes(b"old")
    with replacing(out / "file") as partial:
        partial.write_bytes(b"new")
        assert (out / "file").read_bytes() == b"old"
    assert names(out) == ["file"]
    assert (out / "file").read_bytes() == b"new"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_replaced(out, make):
    make(out / "place")
    with pytest.raises(ConfigError, match="place is no regular file, expected one or nothing there; choose another"):
        with replacing(out / "place"):
            raise AssertionError("began to write")
    assert names(out) == ["place"]


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
    assert first_line("one\r\ntwo") == "one"
