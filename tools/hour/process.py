"""A stage in a process of its own with a hard end: a crash, a hang or lost memory costs that stage alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STACKS = 2.0  # seconds that a process which is out of time has to write down where it is


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        how: `done`, `failed` (it said so itself), `crashed` (a signal) or `timed out`.
        why: One line for a reader; empty where it is done.
        seconds: What it took.
    """

    how: str
    why: str
    seconds: float


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command with all that it starts, output into `log`, and end all of it when its time is up.

    Its stacks are asked for first, by SIGUSR1, which a stage answers with `faulthandler`; whoever does not know the
    signal ends by it.
    """
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            try:
                process.wait(STACKS)
            except subprocess.TimeoutExpired:
                pass
            code = None
        finally:
            _end_all(process)
    took = time.monotonic() - began
    if code is None:
        return Ended("timed out", f"stopped after {took:.0f} s, expected to end within {seconds:.0f} s", took)
    if code < 0:
        return Ended("crashed", f"ended by {signal.Signals(-code).name} after {took:.0f} s", took)
    return Ended("done", "", took) if code == 0 else Ended("failed", f"exit {code} after {took:.0f} s", took)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: compiler workers and tests outlive it otherwise, and hold the GPU."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def tail(log: Path, lines: int = 40, most: int = 8_000) -> list[str]:
    """The last lines of a log, without what would make a record long."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        return file.read().decode("utf-8", "replace").splitlines()[-lines:]
