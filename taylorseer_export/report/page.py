"""The page of an evaluation: one HTML file that needs nothing else, neither network nor library."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from taylorseer_export.bundle.quantised import UNQUANTISED
from taylorseer_export.embedded.picture import png
from taylorseer_export.report.evaluate import Row, number

_COLOURS = (
    "#1b6ca8",
    "#c1440e",
    "#2f7d32",
    "#7b3fa0",
    "#b8860b",
    "#00838f",
    "#ad1457",
    "#5d4037",
    "#455a64",
    "#827717",
)
_DASHES = ("", "7 3", "2 3")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ddd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a0a0a0; --line: #444; --paper: #161616; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { color: var(--soft); margin: .4rem 0; max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .axis { stroke: var(--line); } svg .soft { fill: var(--soft); }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .4rem; }
.key1, .key2 { border-radius: 0; } .key2 { transform: rotate(45deg) scale(.85); }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .5rem 0; }
.decisions { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .35rem .75rem; align-items: center;
  font-size: .85rem; }
.steps { display: grid; grid-template-columns: repeat(var(--steps), 1fr); gap: 1px; }
.steps b { aspect-ratio: 1; max-height: 1.1rem; width: 100%; border-radius: 1px; }
.steps .full { background: #1b6ca8; } .steps .forecast { background: var(--line); }
.steps .added { background: #e0712f; }
code { white-space: nowrap; }
.pictures { display: grid; gap: .4rem 2px; align-items: center; }
.pictures img { width: 100%; max-width: 9rem; image-rendering: pixelated; display: block; cursor: pointer; }
.pictures span { font-size: .85rem; position: sticky; left: 0; background: var(--paper); align-self: stretch;
  display: flex; align-items: center; padding-right: .4rem; }
@media (prefers-color-scheme: dark) { .key, svg circle, svg rect, svg polyline { filter: brightness(1.6); } }
@media (max-width: 40rem) {
  table { font-size: .85rem; } th, td { padding: .3rem .4rem; }
  td:first-child { white-space: normal; min-width: 9rem; }
  svg { font-size: 17px; }
  .decisions { grid-template-columns: 1fr; gap: .15rem; } .decisions span:not(:empty) { margin-top: .5rem; }
}
"""
_SCRIPT = """
document.querySelectorAll('.pictures img[data-other]').forEach(img => img.addEventListener('click', () => {
  [img.src, img.dataset.other] = [img.dataset.other, img.src];
}));
"""


@dataclass(frozen=True)
class _Mark:
    """What tells a way apart in plots and keys: a colour, and a shape where there are more ways than colours."""

    colour: str
    shape: int

    @classmethod
    def of(cls, number: int) -> _Mark:
        return cls(_COLOURS[number % len(_COLOURS)], number // len(_COLOURS) % len(_DASHES))

    def key(self, name: str) -> str:
        """The mark and the name beside it."""
        return f'<i class="key key{self.shape}" style="background:{self.colour}"></i>{escape(name)}'

    def dot(self, x: float, y: float, name: str) -> str:
        """A circle, a square or a diamond."""
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{self.colour}">'
        if self.shape:
            turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if self.shape > 1 else ""
            shape = f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{self.colour}"{turn}>'
        return f"{shape}<title>{escape(name)}</title></{'rect' if self.shape else 'circle'}>"

    def line(self, points: str, name: str) -> str:
        """Solid, dashed or dotted."""
        dash = f' stroke-dasharray="{_DASHES[self.shape]}"' if self.shape else ""
        return (
            f'<polyline points="{points}" fill="none" stroke-width="2" stroke="{self.colour}"{dash}>'
            f"<title>{escape(name)}</title></polyline>"
        )


def page(
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    unmeasured: Mapping[str, str],
    against: str = UNQUANTISED,
) -> str:
    """The whole page.

    Args:
        title: Its heading.
        facts: What the measurement depended on, by name.
        rows: The first is all-full.
        unmeasured: Metric -> the weights it would need.
        against: The unquantised model of the rows, as `Quantised.compared_with` has it.
    """
    marks = {row.name: _Mark.of(k) for k, row in enumerate(rows)}
    compared = [row for row in rows[1:] if row.psnr is not None]
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>" + " · ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items()) + "</p>",
        "<h2>Ways to sample</h2>",
        "<p>PSNR, SSIM and latent error against all steps full, on the same noise and conditioning.</p>",
        _table(rows, marks),
    ]
    if rows[0].unquantised:
        alone = "" if against == UNQUANTISED else " of activations alone"
        parts += [
            f"<h2>Against {escape(against)}</h2><p>The same samples against that model with all its steps full: "
            f"{escape(rows[0].name)} is the quantisation error{alone}, every other way both errors together.</p>",
            _table_of_errors(rows, marks),
        ]
    if unmeasured:
        missing = "; ".join(f"{escape(name)} (needs {escape(what)})" for name, what in unmeasured.items())
        options = re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", missing)
        parts.append(f"<p>Not measured: {options}.</p>")
    if compared:
        by_steps = [(row.full_steps, row.psnr, row.name) for row in compared]
        by_time = [(row.loop_ms, row.psnr, row.name) for row in compared]
        parts += [
            "<h2>Quality against cost</h2><p>The line joins ways that no other beats at no more cost.</p>"
            "<div class=plots>",
            _points(by_steps, "full steps", "PSNR dB", marks),
            _points(by_time, "loop, ms", "PSNR dB", marks),
            "</div>",
            _key([row.name for row in compared], marks),
        ]
    curves = {row.name: row.step_errors for row in compared if row.step_errors}
    if curves:
        dashed = " Ways with a square have a dashed line." if any(marks[name].shape for name in curves) else ""
        parts += [
            f"<h2>Error after each step</h2><p>Latent error on a logarithmic scale.{dashed}</p><div class=plots>",
            _curves(curves, marks),
            "</div>",
            _key(list(curves), marks),
        ]
    parts += ["<h2>Full and forecast steps</h2>", _decisions(rows)]
    if len(rows[0].shown):
        parts += [
            "<h2>Pictures</h2><p>Click a picture for its difference from all full, four times enlarged in value.</p>"
        ]
        parts.append(_pictures(rows))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(rows: Sequence[Row], marks: Mapping[str, _Mark]) -> str:
    metrics = list(rows[0].metrics)
    head = ("way", "full steps", "PSNR dB", "loop ms", "worst", "SSIM", "latent error", *map(escape, metrics))
    lines = ["<tr>" + "".join(f"<th>{name}" for name in head)]
    for row in rows:
        ssim = "" if row.ssim is None else f"{row.ssim:.3f}"
        cells = (
            marks[row.name].key(row.name), f"{round(row.full_steps, 1):g} of {len(row.plan)}",
            number(row.psnr, 1), f"{row.loop_ms:.1f}", number(row.psnr_worst, 1), ssim, f"{row.latent_error:.4f}",
            *(f"{row.metrics[m]:.3f}" for m in metrics),
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _table_of_errors(rows: Sequence[Row], marks: Mapping[str, _Mark]) -> str:
    lines = ["<tr>" + "".join(f"<th>{name}" for name in ("way", "PSNR dB", "worst", "SSIM", "latent error"))]
    for row in rows:
        if (off := row.unquantised) is not None:
            ssim = "" if off.ssim is None else f"{off.ssim:.3f}"
            cells = (
                marks[row.name].key(row.name), number(off.psnr, 1), number(off.psnr_worst, 1), ssim,
                f"{off.latent_error:.4f}",
            )  # fmt: skip
            lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _key(names: Sequence[str], marks: Mapping[str, _Mark]) -> str:
    """Which mark is which way."""
    items = (f"<span>{marks[name].key(name)}</span>" for name in names)
    return f"<div class=keys>{''.join(items)}</div>"


def _decisions(rows: Sequence[Row]) -> str:
    """A line per way and per group that ran otherwise: dark squares are full steps, the orange ones not planned so."""
    steps = max(len(row.plan) for row in rows)
    lines = []
    for row in rows:
        for number_, executed in enumerate(dict.fromkeys(row.executed)):
            squares = "".join(
                f'<b class="{"full" if ran == "F" else "forecast"}{" added" if ran != kind else ""}" '
                f'title="step {step}"></b>'
                for step, (kind, ran) in enumerate(zip(row.plan, executed, strict=True))
            )
            name = escape(row.name) if number_ == 0 else ""
            lines.append(f'<span>{name}</span><div class=steps style="--steps:{steps}">{squares}</div>')
    added = any(ran != row.plan for row in rows for ran in row.executed)
    note = "Dark: full. Light: forecast." + (" Orange: full, decided at run time." if added else "")
    return f"<p>{note}</p><div class=decisions>{''.join(lines)}</div>"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _EDGE = 480, 310, 58, 44, 26, 16


class _Axes:
    """Maps values to places on a plot, and draws the frame."""

    def __init__(self, x: Sequence[float], y: Sequence[float], names: tuple[str, str], log: bool = False) -> None:
        self.log, self.names = log, names
        self.x = (min(x), max(x)) if log else _padded(x)
        self.y = _padded([self._scaled(v) for v in y])

    def _scaled(self, value: float) -> float:
        return float(np.log10(value)) if self.log else value

    def point(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (self._scaled(y) - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _EDGE), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    def frame(self) -> str:
        base, end = _HEIGHT - _BOTTOM, _WIDTH - _EDGE
        parts = [f'<line class=axis x1="{_LEFT}" x2="{end}" y1="{base}" y2="{base}"/>']
        for y in _decades(*self.y) if self.log else _round_numbers(*self.y):
            _, place = self.point(self.x[0], 10**y if self.log else y)
            label = f"{10**y:.0e}" if self.log else f"{y:.6g}"
            parts.append(f'<line class=axis x1="{_LEFT}" x2="{end}" y1="{place:.1f}" y2="{place:.1f}"/>')
            parts.append(f'<text class=soft x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
        for x in _round_numbers(*self.x):
            place, _ = self.point(x, 10 ** self.y[0] if self.log else self.y[0])
            parts.append(f'<text class=soft x="{place:.1f}" y="{base + 18}" text-anchor="middle">{x:.6g}</text>')
        across, up = self.names
        parts.append(f'<text x="{end}" y="{_HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
        parts.append(f'<text x="{_LEFT}" y="16" text-anchor="start">{escape(up)}</text>')
        return "".join(parts)


def _round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in a range, at most eight."""
    base = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(base * times for times in (1, 2, 5, 10) if (high - low) / (base * times) <= 7)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Exponents of the powers of ten in a range of exponents, at most seven; in a short range also of 2 and 5 times."""
    within = range(math.floor(low), math.ceil(high) + 1)
    found = [k for k in within if low <= k <= high]
    if len(found) > 2:
        return [float(k) for k in found[:: -(-len(found) // 7)]]
    return [e for e in (k + math.log10(times) for k in within for times in (1, 2, 5)) if low <= e <= high]


def _points(points: Sequence[tuple[float, float | None, str]], across: str, up: str, marks: Mapping[str, _Mark]) -> str:
    known = [(x, y, name) for x, y, name in points if y is not None]
    axes = _Axes([x for x, _, _ in known], [y for _, y, _ in known], (across, up))
    best = [p for p in known if not any(x <= p[0] and y > p[1] for x, y, _ in known)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in sorted(axes.point(x, y) for x, y, _ in best))
    dots = [marks[name].dot(*axes.point(x, y), name) for x, y, name in known]
    front = f'<polyline points="{line}" fill="none" stroke="var(--soft)" stroke-dasharray="4 4"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img>{axes.frame()}{front}{"".join(dots)}</svg>'


def _curves(curves: Mapping[str, Sequence[float]], marks: Mapping[str, _Mark]) -> str:
    values = [v for curve in curves.values() for v in curve if v > 0]
    if not values:
        return "<p>No step differs.</p>"
    axes = _Axes([1, max(map(len, curves.values()))], values, ("step", "latent error"), log=True)
    lines = []
    for name, curve in curves.items():
        points = " ".join("{:.1f},{:.1f}".format(*axes.point(step, v)) for step, v in enumerate(curve, 1) if v > 0)
        lines.append(marks[name].line(points, name))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img>{axes.frame()}{"".join(lines)}</svg>'


def _pictures(rows: Sequence[Row]) -> str:
    columns = len(rows[0].shown)
    cells = []
    for row in rows:
        cells.append(f"<span>{escape(row.name)}</span>")
        for made, exact in zip(row.shown, rows[0].shown, strict=True):
            difference = np.clip(128 + 4 * (made.astype(int) - exact), 0, 255).astype(np.uint8)
            label = f'alt="{escape(row.name)}"'
            cells.append(f'<img {label} src="{_png(made)}" data-other="{_png(difference)}">')
    style = f"grid-template-columns: 7rem repeat({columns}, minmax(4.5rem, 9rem))"
    return f'<div class=wide><div class=pictures style="{style}">{"".join(cells)}</div></div>'


def _png(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a tenth of it on either side; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) / 10 or max(abs(low), 1.0) / 10
    return low - margin, high + margin
