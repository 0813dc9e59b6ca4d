"""Write the README's tables from the newest filed results: `python tools/readme.py`, or `--check` to compare only.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; everything else is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
README = ROOT / "README.md"


def rendered(text: str, results: Path = RESULTS) -> str:
    """The README with every table made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        path = newest(name, results)
        body = TABLES[name](json.loads(path.read_text(encoding="utf-8")))
        source = f"From [{path.name}](tools/results/{path.name})."
        return f"<!-- table:{name} -->\n{body}\n\n{source}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w[\w-]*) -->\n.*?<!-- end -->", block, text, flags=re.S)


def newest(name: str, results: Path = RESULTS) -> Path:
    """The newest record of that name."""
    paths = sorted(results.glob(f"????-??-??-{name}.json"))
    if not paths:
        raise SystemExit(f"results of {name} are missing in {results}, expected one; run the tool that files them")
    return paths[-1]


def demo_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/demo.py`."""
    lines = [
        "| model | sampled with | full steps | full ms | forecast ms | loop ms | speed-up | PSNR dB | SSIM |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for family, rows in record["models"].items():
        for row in rows:
            forecast = "" if row["forecast_ms"] is None else f"{row['forecast_ms']:.2f}"
            lines.append(
                f"| {family} | {row['label']} | {row['full_steps']} of {len(row['plan'])} | {row['full_ms']:.2f} | "
                f"{forecast} | {row['latency_ms']:.0f} | {row['speedup']:.2f}x | "
                f"{'same' if row['psnr'] is None else format(row['psnr'], '.1f')} | {row['ssim']:.3f} |"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {"demo": demo_table}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the README's tables from tools/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    given = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = rendered(before)
    if given.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
