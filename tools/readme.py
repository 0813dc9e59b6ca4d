"""Write the tables of the pages from the newest filed results: `python tools/readme.py`, or `--check` to compare only.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; everything else is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structure
from families import MODELS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
PAGES = [
    *(ROOT / page for page in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "taylorseer_export" / part / "README.md" for part in ("compile", "report", "families", "serve")),
]


def rendered(text: str, results: Path = RESULTS, folder: Path = ROOT) -> str:
    """The page in `folder` with every table made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        path = newest(name, results)
        body = TABLES[name](json.loads(path.read_text(encoding="utf-8")))
        source = f"From [{path.name}]({os.path.relpath(RESULTS / path.name, folder)})."
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


def quality_table(record: Mapping[str, Any]) -> str:
    """PSNR of `tools/quality.py` at order 2 and 0, and the state that each granularity keeps per picture."""
    columns = [("module", 0), ("module", 2), ("residual", 2), ("last", 2)]
    heads = [f"{granularity}, order {order}" for granularity, order in columns]
    lines = [
        f"| model | full steps | fewer steps | {' | '.join(heads)} |",
        f"|---|--:|--:|{'--:|' * len(columns)}",
    ]
    for family, model in record["models"].items():
        found = {(r["granularity"], r["order"], r["full_steps"]): r for r in model["rows"]}
        for full in sorted({r["full_steps"] for r in model["rows"] if r["granularity"]}, reverse=True):
            cells = [f"{found[granularity, order, full]['psnr']:.1f}" for granularity, order in columns]
            baseline = found[None, None, full]["psnr"]
            lines.append(f"| {family} | {full} of 50 | {baseline:.1f} | {' | '.join(cells)} |")
        state = [f"{found[g, o, 10]['state_bytes'] / 1e3:.0f} KB" for g, o in columns]
        lines.append(f"| {family} | state per picture | | {' | '.join(state)} |")
    return "\n".join(lines)


def bench_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/bench.py`: our engines, then what they are compared with."""
    lines = [
        "| 50-step loop | full ms | forecast ms | loop s | of its own all-full loop | efficiency | state MB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for e in record["engines"]:
        forecast = e["forecast_ms"]["p50"]
        lines.append(
            f"| {e['granularity']}, order {e['order']} | {e['full_ms']['p50']:.0f} | {forecast:.1f} | "
            f"{e['loop_ms'] / 1e3:.1f} | {e['speedup']:.2f}x of {e['ideal_speedup']:.2f}x | {e['efficiency']:.3f} | "
            f"{e['state_bytes'] / 1e6:.0f} |"
        )
    for name, title in _OTHERS.items():
        if name in record["others"]:
            other = record["others"][name]
            step = "" if name.startswith(("hook", "cache-dit")) else f"{other['step_ms']['p50']:.0f}"
            lines.append(f"| {title} | {step} | | {other['loop_ms'] / 1e3:.1f} | | | |")
    return "\n".join(lines)


def calibration_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/calibration.py`: mean and spread over the samples; of a guard also the full steps that ran."""
    ways = list(dict.fromkeys(row["way"] for model in record["models"].values() for row in model["rows"]))
    lines = [f"| model | full steps | {' | '.join(ways)} |", f"|---|--:|{'--:|' * len(ways)}"]
    for family, model in record["models"].items():
        found = {(row["steps"], row["full_steps"], row["way"]): row for row in model["rows"]}
        for steps, full in dict.fromkeys((row["steps"], row["full_steps"]) for row in model["rows"]):
            cells = []
            for way in ways:
                row = found.get((steps, full, way))
                shown = "" if row is None else f"{row['psnr_mean']:.1f} ± {row['psnr_std']:.1f}"
                cells.append(f"{shown} ({row['executed']:.1f})" if row and row.get("threshold") else shown)
            lines.append(f"| {family} | {full} of {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def families_table(record: Mapping[str, Any]) -> str:
    """Counts of `tools/families.py`: tests passed for each model."""
    columns = {
        "oracle": "each step equals the float64 oracle",
        "onnxruntime": "the same in ONNX Runtime",
        "pipeline": "diffusers pipeline with the drop-in",
        "tensorrt-rtx": "TensorRT-RTX builds, bf16 and fp16",
    }
    lines = [f"| family | {' | '.join(columns.values())} |", f"|---|{'--:|' * len(columns)}"]
    for name, title in MODELS.items():
        cells = [record["models"].get(name, {}).get(column, {}) for column in columns]
        shown = [f"{c['failed']} failed" if c.get("failed") else str(c.get("passed", "")) for c in cells]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines)


_OTHERS = {
    "untapped": "plain model exported the same way, all full",
    "fewer steps": "the same engine, 10 full steps",
    "eager": "diffusers, eager, no cache",
    "hook sites": "diffusers' TaylorSeer hook on our sites, 10 full steps",
    "hook tuned": "the same hook, told to skip all it can",
    "cache-dit": "cache-dit, TaylorSeer after one first block, the same 10 full steps",
}


def guard_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/bench_guard.py`."""
    lines = [
        "| guard | share of the FLOPs | probe / full step | (probe + rest) / full step | kept per slot |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['rule']} | {row['share']:.3f} | {row['probe_over_full']:.3f} | "
            f"{row['probe_and_rest_over_full']:.3f} | {row['probe_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def structure_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/structure.py`."""
    lines = [f"| | {record['commit_before'][:7]} | {record['commit'][:7]} |", "|---|--:|--:|"]
    for what, *counts in structure.rows(record):
        lines.append(f"| {what} | {' | '.join('' if count is None else str(count) for count in counts)} |")
    return "\n".join(lines)


def run_side_table(record: Mapping[str, Any]) -> str:
    """Numbers of `tools/run_side.py`: medians and 90th percentiles of its starts, and the first one."""
    largest = ", ".join(f"{name} {size:.0f}" for name, size in list(record["sizes_mb"].items())[:3])
    lines = ["| serving alone | first | median | p90 |", "|---|--:|--:|--:|"]
    titles = {
        "cold_start_s": ("start of the process to `/health` 200", "s", 1),
        "first_answer_s": ("first answer after it", "s", 2),
        "later_answer_s": ("next answer", "s", 2),
        "resident_mb": ("memory of the process", "MB", 0),
    }
    for name, (title, unit, digits) in titles.items():
        values = (record["first"][name], record["summary"][name]["p50"], record["summary"][name]["p90"])
        lines.append(f"| {title} | {' | '.join(f'{value:.{digits}f} {unit}' for value in values)} |")
    return (
        f"{len(record['packages'])} packages of {record['size_mb']:.0f} MB ({largest}, ...), and a bundle of "
        f"{record['bundle_mb']:.0f} MB. {record['pictures']} pictures over HTTP, each bit for bit that of the full "
        f"environment; {len(record['again'])} starts after the first.\n\n" + "\n".join(lines)
    )


def faster(record: Mapping[str, Any]) -> list[str]:
    """The ways of `tools/quantised.py --table cost` whose full step is faster than float32's by more than chance."""
    return [row["weights"] for row in record["cost"] if row["full_to_fp32"] < _FASTER]


def quantised_cost_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/quantised.py --table cost`, the first of them float32, and what they say of time."""
    won = faster(record)
    lost = ", ".join(f"`{row['weights']}`" for row in record["cost"][1:] if row["weights"] not in won)
    said = f"Faster than float32 is {' and '.join(f'`{way}`' for way in won)} alone." if won else "None is faster."
    said += f" What saves bytes and no time, and is not recommended for speed on this engine: {lost}." if lost else ""
    lines = [
        "| weights | on disk | resident | full step | of float32's |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in record["cost"]:
        lines.append(
            f"| {row['weights']} | {row['disk_bytes'] / 1e6:.1f} MB | {row['resident_bytes'] / 1e6:.0f} MB | "
            f"{row['full_ms']:.0f} ms | {row['full_to_fp32']:.2f} |"
        )
    return "\n".join([*lines, "", said])


def quantised_fidelity_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/quantised.py --table fidelity`, the first of them float32."""
    lines = ["| weights | quantisation error | forecast error | both |", "|---|--:|--:|--:|"]
    for row in record["fidelity"]:
        cells = (row["quantisation_psnr"], row["forecast_psnr"], row["both_psnr"])
        shown = ("none" if psnr is None else f"{psnr:.1f} dB" for psnr in cells)
        lines.append(f"| {row['weights']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def quantised_calibrated_table(record: Mapping[str, Any]) -> str:
    """Rows of `tools/quantised.py --table calibrated`: one line for each format."""
    ways = list(dict.fromkeys(row["way"] for row in record["calibrated"]))
    lines = [f"| weights | full steps | {' | '.join(ways)} |", f"|---|--:|{'--:|' * len(ways)}"]
    found = {(row["weights"], row["way"]): row for row in record["calibrated"]}
    for weights in dict.fromkeys(row["weights"] for row in record["calibrated"]):
        rows = [found[weights, way] for way in ways]
        steps, full = len(rows[0]["plan"]), rows[0]["full_steps"]
        cells = " | ".join(f"{row['held_out_psnr']:.1f} dB" for row in rows)
        lines.append(f"| {weights} | {full} of {steps} | {cells} |")
    return "\n".join(lines)


_FASTER = 0.95  # of float32's time: what is above that may be chance

TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": demo_table,
    "quality": quality_table,
    "bench-mid-flux": bench_table,
    "calibration-flux": calibration_table,
    "calibration-dit": calibration_table,
    "families": families_table,
    "guard": guard_table,
    "quantised-cost": quantised_cost_table,
    "quantised-cost-inductor": quantised_cost_table,
    "quantised-fidelity": quantised_fidelity_table,
    "quantised-fidelity-dit": quantised_fidelity_table,
    "quantised-calibrated": quantised_calibrated_table,
    "run-side": run_side_table,
    "structure": structure_table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the pages from tools/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    given = parser.parse_args()
    stale = [page for page in PAGES if rendered(text := page.read_text(encoding="utf-8"), folder=page.parent) != text]
    for page in stale if not given.check else ():
        page.write_text(rendered(page.read_text(encoding="utf-8"), folder=page.parent), encoding="utf-8")
    if given.check and stale:
        print(f"{', '.join(page.relative_to(ROOT).as_posix() for page in stale)} has a stale table", file=sys.stderr)
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
