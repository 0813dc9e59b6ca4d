"""Families: what the tests showed of each, counted from their own report.

    .venv/bin/python -m pytest --junitxml=report.xml         any run of the tests that writes a JUnit report
    python tools/families.py report.xml --file             files the counts; `tools/readme.py` makes the table

A cell is the number of tests that passed for a model; one that failed shows as such, and nothing run leaves it empty.
Reports name the commit that they are of: one of another commit, or of a tree with other changes, is not filed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from record import RESULTS, circumstances, dirty_option, write_record

# Column -> (test module, pattern of test names) whose cases count in it.
COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "oracle": (
        ("test_families", r"(?!.*(onnx|can_fail|check_at_load)).*"),
        ("test_runtime", r".*oracle.*"),
        ("test_split", r".*"),
    ),
    "onnxruntime": (("test_families", r".*onnx.*"), ("test_onnx", r".*")),
    "pipeline": (("test_dropin_families", r".*"), ("test_dropin", r"test_(flux|dit)_.*")),
    "tensorrt-rtx": (("test_tensorrt", r".*family_builds.*"),),
}
MODELS = {
    "plain": "flux (schnell)",
    "flux": "flux (dev)",
    "kontext": "flux-kontext",
    "flux2": "flux2 (dev)",
    "flux2-base": "flux2 (klein base)",
    "flux2-edit": "flux2-edit",
    "flux2-kv": "flux2-kv",
    "flux3": "flux3",
    "chroma": "chroma",
    "krea-2": "krea-2",
    "longcat-image": "longcat-image",
    "ovis-image": "ovis-image",
    "z-image": "z-image",
    "dit": "dit",
    "hidream": "hidream",
    "hunyuan": "hunyuan-video",
    "hunyuan-channels": "hunyuan-video (image to video, channels)",
    "hunyuan-replace": "hunyuan-video (image to video, first frame)",
    "hunyuan-1.5": "hunyuan-video-1.5 (text to video)",
    "hunyuan-1.5-i2v": "hunyuan-video-1.5 (image to video)",
    "framepack": "framepack",
    "kandinsky-5": "kandinsky-5",
    "cogvideox": "cogvideox",
    "cogvideox-table": "cogvideox (2B)",
    "cogvideox-image": "cogvideox (1.5, image to video)",
    "ltx-2": "ltx-2",
    "ltx-2-image": "ltx-2-image",
    "wan": "wan (text to video)",
    "wan-image": "wan (image to video)",
    "wan-5b-image": "wan-5b-image",
    "wan-vace": "wan-vace",
    "wan-animate": "wan-animate",
    "qwen-image": "qwen-image",
    "qwen-image-edit": "qwen-image-edit",
    "qwen-image-edit-2511": "qwen-image-edit (2511)",
    "qwen-image-2.1": "qwen-image-2.1",
    "pixart": "pixart",
    "sana": "sana",
    "sd3": "sd3",
}


def counts(reports: Sequence[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """Model -> column -> outcome -> number of tests; a later report has the last word on a test."""
    outcomes = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = re.sub(r"@[^]@]*$", "", case.get("name", ""))  # without the group that pytest-xdist ran it in
            outcomes[case.get("classname", "").split(".")[-1], name] = _outcome(case)
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for (module, name), outcome in outcomes.items():
        model = _model(name)
        for column, sources in COLUMNS.items():
            if model and any(module == file and re.fullmatch(pattern, name) for file, pattern in sources):
                found[model][column][outcome] += 1
    return {model: {c: dict(n) for c, n in columns.items()} for model, columns in sorted(found.items())}


def refuse_other(report: Path, commit: str, allow_dirty: bool) -> None:
    """Refuse a report whose tests were not of this commit, by what `tests/conftest.py` writes into it.

    Raises:
        SystemExit: The report names no commit, another one, or one with uncommitted changes.
    """
    said = {p.get("name"): p.get("value") for p in ElementTree.parse(report).iter("property")}
    if "commit" not in said:
        raise SystemExit(f"{report} names no commit, expected {commit[:12]}; run the tests again with --junitxml")
    if said["commit"] != commit:
        raise SystemExit(
            f"{report} is of commit {said['commit'][:12]}, expected {commit[:12]}, which is checked out; "
            "run the tests again"
        )
    if said["uncommitted_changes"] != "False" and not allow_dirty:
        raise SystemExit(
            f"{report} is of {commit[:12]} with uncommitted changes, expected the commit alone; commit or stash them "
            "and run the tests again, or pass --allow-dirty, which the record will say"
        )


def _model(name: str) -> str | None:
    """The model that a test's parameters name; the longest one, since `wan-image` begins with `wan`."""
    parameters = name.partition("[")[2].rstrip("]")
    named = re.match(r"test_(flux|dit)_", name)
    words = [m for m in MODELS if re.search(rf"(^|-){re.escape(m)}($|-)", parameters)]
    return max(words, key=len) if words else named[1] if named else None


def _outcome(case: Any) -> str:
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            return "failed" if kind != "skipped" else kind
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what the tests showed of each family.")
    parser.add_argument("reports", type=Path, nargs="+", help="JUnit reports of runs of the tests")
    parser.add_argument("--file", action="store_true", help="file the record in tools/results")
    dirty_option(parser)
    given = parser.parse_args()
    where = circumstances(RESULTS if given.file else None, given.allow_dirty)
    for report in given.reports if given.file else ():
        refuse_other(report, where["commit"], given.allow_dirty)
    record = {**where, "models": counts(given.reports)}
    print(json.dumps(record["models"], indent=1))
    if given.file:
        print(write_record("families", record, allow_dirty=given.allow_dirty))
    return 0


if __name__ == "__main__":
    sys.exit(main())
