"""Structure: what a reader of the package has before him, measured at two revisions and filed side by side.

    python tools/structure.py --before 85c6dad          this checkout against that revision, filed in tools/results/
    python tools/structure.py --before 85c6dad --skip-walk

From source text alone, by the definitions of `sources.py` that the tests hold: lines per folder, folders that import
each other, files that import each other in a circle, files that name a model family, functions that take a request's
forecasts one by one.

The walk is run, at either revision in a process of its own: the embedded DiT is exported and `taylorseer-export run`
draws four steps with it. At the last of them, a forecast step, it is seen which functions of the package stand on the
stack where ONNX Runtime is called, from the command line down, and which were entered since the step before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from record import ROOT, circumstances, record_options, write_record
from sources import PACKAGE, arrows, circles, declared, families_named, loose_requests, modules, part_of

WALKED = "FFF."  # the plan that is run


def structure_of(files: dict[str, str]) -> dict[str, Any]:
    """Counts of a package's source text, by path."""
    lines: dict[str, int] = {}
    for path, source in files.items():
        part = part_of(path)
        lines[part] = lines.get(part, 0) + len(source.splitlines())
    drawn = arrows(files)
    named = families_named(files, declared(files, "name"), declared(files, "model_class"))
    return {
        "lines": lines,
        "arrows": len(drawn),
        "arrows_back": sum(1 for part, target in drawn if (target, part) in drawn) // 2,
        "circles": circles(files),
        "circles_at_import": circles(files, lazy=False),
        "names_a_family": sorted({line.split(":")[0] for line in named}),
        "loose_requests": loose_requests(files),
    }


def walk_of(root: Path) -> dict[str, Any]:
    """What `walk` sees of the package in `root`, in a process of its own: two revisions do not fit into one."""
    command = [sys.executable, str(Path(__file__).resolve()), "--walk", str(root)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def walk(bundle: Path) -> dict[str, Any]:
    """The way from the command line to the engine call of a step, in this process: `run` of a bundle, observed.

    Returns:
        `stack`, file and function of each frame of the package above the call, outermost first; `entered`, the
        functions that were entered between the call before and this one.
    """
    import onnxruntime

    from taylorseer_export import cli

    package = Path(cli.__file__).parent
    seen: list[dict[str, Any]] = []
    entered: set[str] = set()
    call = onnxruntime.InferenceSession.run_with_iobinding

    def place(frame: FrameType) -> str:
        code = frame.f_code
        name = code.co_filename.removeprefix(f"{package}{os.sep}")
        return "" if name == code.co_filename else f"{name}:{code.co_qualname}"

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(place(frame))

    def observed(*given: Any, **named: Any) -> Any:
        stack, frame = [], sys._getframe(1)
        while frame is not None:
            stack.append(place(frame))
            frame = frame.f_back  # type: ignore[assignment]
        seen.append({"stack": [name for name in reversed(stack) if name], "entered": sorted(entered - {""})})
        entered.clear()
        return call(*given, **named)

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        before = sys.getprofile()
        with patch.object(onnxruntime.InferenceSession, "run_with_iobinding", observed):
            sys.setprofile(on_event)
            try:
                code = cli.main(["run", str(bundle), "--plan", WALKED, "--out", f"{folder}/latents.safetensors"])
            finally:
                sys.setprofile(before)
    if code or len(seen) < len(WALKED):
        raise SystemExit(f"run ended with {code} after {len(seen)} engine calls, expected 0 after {len(WALKED)}")
    return seen[-1]


def walk_in(root: Path) -> dict[str, Any]:
    """`walk` by the package in `root`, which exports the embedded DiT first."""
    from taylorseer_export import cli

    package = Path(cli.__file__).parent
    if package.parent != root.resolve():
        raise SystemExit(f"the package is {package}, expected the one in {root}; set PYTHONPATH to it")
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            if cli.main(["dit", "--out", folder]):
                raise SystemExit("the embedded DiT was not exported")
        return walk(Path(folder) / "dit-tiny")


def commit_named(revision: str) -> str:
    """The full name of a commit of this repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def extracted(revision: str, folder: Path) -> Path:
    """The tree of a revision of this repository, in `folder`."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return folder


def measured(root: Path, walked: bool = True) -> dict[str, Any]:
    """Everything about the checkout in `root`."""
    found = structure_of(modules(root / PACKAGE))
    return found | ({"walk": walk_of(root)} if walked else {})


def rows(record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, before, after) of the table; None where a revision has no such folder."""
    both = [record["before"], record["after"]]

    def row(what: str, of: Callable[[dict[str, Any]], Any]) -> tuple[str, Any, Any]:
        first, second = (of(side) for side in both)
        return what, first, second

    def lines_of(part: str) -> Callable[[dict[str, Any]], Any]:
        return lambda side: side["lines"].get(part)

    parts = sorted({part for side in both for part in side["lines"]}, key=lambda part: (part.startswith("__"), part))
    found = [row(f"lines of `{part}`", lines_of(part)) for part in parts]
    found += [
        row("lines in all", lambda side: sum(side["lines"].values())),
        row("arrows: pairs of the above of which one imports the other", lambda side: side["arrows"]),
        row("pairs of which each imports the other", lambda side: side["arrows_back"]),
        row("circles of files that import each other", lambda side: len(side["circles_at_import"])),
        row("the same where imports in functions and for types count", lambda side: len(side["circles"])),
        row("files in those", lambda side: sum(map(len, side["circles"]))),
        row("files that name a family, outside `families` and `embedded`", lambda side: len(side["names_a_family"])),
        row("functions that take a request's forecasts one by one", lambda side: len(side["loose_requests"])),
    ]
    if all("walk" in side for side in both):
        found += [
            row("functions from the command line to the engine call", lambda side: len(side["walk"]["stack"])),
            row("files that they are in", lambda side: len({at.split(":")[0] for at in side["walk"]["stack"]})),
            row("functions entered in one forecast step", lambda side: len(side["walk"]["entered"])),
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--before", default="85c6dad", help="revision to compare with (default: %(default)s)")
    parser.add_argument("--walk", action="store_true", help="print what is seen of the walk in this checkout, as JSON")
    parser.add_argument("--skip-walk", action="store_true", help="measure the source text alone, and file nothing")
    record_options(parser)
    given = parser.parse_args()
    if given.walk:
        print(json.dumps(walk_in(given.root)))
        return 0
    record = circumstances(None if given.skip_walk else given.out, given.allow_dirty)
    with tempfile.TemporaryDirectory() as folder:
        before = extracted(given.before, Path(folder))
        record |= {"commit_before": commit_named(given.before), "before": measured(before, not given.skip_walk)}
    record["after"] = measured(given.root, not given.skip_walk)
    for what, first, second in rows(record):
        print(f"{what:<64}{'-' if first is None else first:>8}{'-' if second is None else second:>8}")
    if not given.skip_walk:
        print(write_record("structure", record, given.out, given.allow_dirty))
    return 0


if __name__ == "__main__":
    sys.exit(main())
