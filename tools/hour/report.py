"""What a stage says of itself while it runs: on disk after each number, so that a sudden end costs none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hour.goals import Goal


class Report:
    """The file that a stage's process writes and that outlives it.

    Args:
        path: The file.
        seconds: Time of the stage, from now.

    Attributes:
        kept: A folder of the stage, for what is needed to mend a failure away from the machine.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.kept = path, path.parent / "kept"
        self._ends = time.monotonic() + seconds
        self._said: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds that the stage may still take."""
        return self._ends - time.monotonic()

    def write(self, found: Mapping[str, Any], goals: list[Goal]) -> None:
        """Put down all that was found so far, whole or not at all."""
        self._put({"found": found, "goals": goals})

    def not_run(self, why: str) -> None:
        """The stage cannot run here."""
        self._put({"not_run": why})

    def failed(self, why: str) -> None:
        """The stage ended early; what it found before stays."""
        self._put({"error": why})

    def _put(self, content: Mapping[str, Any]) -> None:
        self._said |= content
        half = self.path.with_suffix(".half")
        half.write_text(json.dumps(self._said, default=str), encoding="utf-8")
        os.replace(half, self.path)


def read(path: Path) -> dict[str, Any]:
    """What a stage put down; nothing where it did not come to it."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
