"""The page of an evaluation: one HTML file that needs nothing else, neither network nor library."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from taylorseer_export.report.evaluate import Row, number
from taylorseer_export.runtime.picture import png

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
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .axis { stroke: var(--line); } svg .soft { fill: var(--soft); }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .4rem; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .5rem 0; }
.decisions { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .35rem .75rem; align-items: center;
  font-size: .85rem; }
.steps { display: grid; grid-template-columns: repeat(var(--steps), 1fr); gap: 1px; }
.steps b { aspect-ratio: 1; max-height: 1.1rem; width: 100%; border-radius: 1px; }
.steps .full { background: #1b6ca8; } .steps .forecast { background: var(--line); }
.steps .added { outline: 1px solid #c1440e; }
.pictures { display: grid; gap: .4rem 2px; align-items: center; min-width: 34rem; }
.pictures img { width: 100%; max-width: 9rem; image-rendering: pixelated; display: block; cursor: pointer; }
.pictures span { font-size: .85rem; }
"""
_SCRIPT = """
document.querySelectorAll('.pictures img[data-other]').forEach(img => img.addEventListener('click', () => {
  [img.src, img.dataset.other] = [img.dataset.other, img.src];
}));
"""


def page(title: str, facts: Mapping[str, str], rows: Sequence[Row], unmeasured: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        title: Its heading.
        facts: What the measurement depended on, by name.
        rows: The first is all-full.
        unmeasured: Metric -> the weights it would need.
    """
    colours = {row.name: _COLOURS[k % len(_COLOURS)] for k, row in enumerate(rows)}
    compared = [row for row in rows[1:] if row.psnr is not None]
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>" + " · ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items()) + "</p>",
        "<h2>Ways to sample</h2>",
        "<p>PSNR, SSIM and latent error against all steps full, on the same noise and conditioning.</p>",
        _table(rows, colours),
    ]
    if unmeasured:
        missing = "; ".join(f"{escape(name)} (needs {escape(what)})" for name, what in unmeasured.items())
        parts.append(f"<p>Not measured: {missing}.</p>")
    if compared:
        by_steps = [(row.full_steps, row.psnr, row.name) for row in compared]
        by_time = [(row.loop_ms, row.psnr, row.name) for row in compared]
        parts += [
            "<h2>Quality against cost</h2><p>The line joins ways that no other beats at no more cost.</p>"
            "<div class=plots>",
            _points(by_steps, "full steps", "PSNR dB", colours),
            _points(by_time, "loop, ms", "PSNR dB", colours),
            "</div>",
            _key([row.name for row in compared], colours),
        ]
    curves = {row.name: row.step_errors for row in compared if row.step_errors}
    if curves:
        parts += [
            "<h2>Error after each step</h2><p>Latent error on a logarithmic scale.</p><div class=plots>",
            _curves(curves, colours),
            "</div>",
            _key(list(curves), colours),
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


def _table(rows: Sequence[Row], colours: Mapping[str, str]) -> str:
    metrics = list(rows[0].metrics)
    head = ("way", "full steps", "loop ms", "latent error", "PSNR dB", "worst", "SSIM", *map(escape, metrics))
    lines = ["<tr>" + "".join(f"<th>{name}" for name in head)]
    for row in rows:
        key = f'<i class=key style="background:{colours[row.name]}"></i>{escape(row.name)}'
        ssim = "" if row.ssim is None else f"{row.ssim:.3f}"
        cells = (
            key, f"{row.full_steps:g} of {len(row.plan)}", f"{row.loop_ms:.1f}", f"{row.latent_error:.4f}",
            number(row.psnr, 1), number(row.psnr_worst, 1), ssim, *(f"{row.metrics[m]:.3f}" for m in metrics),
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _key(names: Sequence[str], colours: Mapping[str, str]) -> str:
    """Which colour is which way."""
    items = (f'<span><i class=key style="background:{colours[name]}"></i>{escape(name)}</span>' for name in names)
    return f"<div class=keys>{''.join(items)}</div>"


def _decisions(rows: Sequence[Row]) -> str:
    """A line per way and per group that ran otherwise: dark squares are full steps, the ringed ones not planned so."""
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
    note = "Dark: full. Light: forecast." + (" Ringed: decided at run time." if added else "")
    return f"<p>{note}</p><div class=decisions>{''.join(lines)}</div>"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 480, 300, 52, 40, 14


class _Axes:
    """Maps values to places on a plot, and draws the frame."""

    def __init__(self, x: Sequence[float], y: Sequence[float], names: tuple[str, str], log: bool = False) -> None:
        self.log, self.names = log, names
        self.x = (min(x), max(x)) if log else _padded(x)
        self.y = _padded([self._scaled(v) for v in y])

    def _scaled(self, value: float) -> float:
        return float(np.log10(value)) if self.log else value

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (self._scaled(y) - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _EDGE), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _EDGE)

    def frame(self) -> str:
        parts = []
        digits = int(self.x[1] - self.x[0] < 20)
        for k in range(5):
            x, y = (low + k / 4 * (high - low) for low, high in (self.x, self.y))
            px, py = self.place(x, 10**y if self.log else y)
            label = f"{10**y:.1e}" if self.log else f"{y:.1f}"
            parts.append(f'<line class=axis x1="{_LEFT}" x2="{_WIDTH - _EDGE}" y1="{py:.1f}" y2="{py:.1f}"/>')
            parts.append(f'<text class=soft x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{label}</text>')
            parts.append(f'<text class=soft x="{px:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{x:.{digits}f}</text>')
        across, up = self.names
        parts.append(f'<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
        parts.append(f'<text x="{_LEFT}" y="11" text-anchor="start">{escape(up)}</text>')
        return "".join(parts)


def _points(points: Sequence[tuple[float, float | None, str]], across: str, up: str, colours: Mapping[str, str]) -> str:
    known = [(x, y, name) for x, y, name in points if y is not None]
    axes = _Axes([x for x, _, _ in known], [y for _, y, _ in known], (across, up))
    best = [p for p in known if not any(x <= p[0] and y > p[1] for x, y, _ in known)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in sorted(axes.place(x, y) for x, y, _ in best))
    dots = []
    for x, y, name in known:
        a, b = axes.place(x, y)
        dots.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="6" fill="{colours[name]}"><title>{escape(name)}</title></circle>'
        )
    front = f'<polyline points="{line}" fill="none" stroke="var(--soft)" stroke-dasharray="4 4"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img>{axes.frame()}{front}{"".join(dots)}</svg>'


def _curves(curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> str:
    values = [v for curve in curves.values() for v in curve if v > 0]
    if not values:
        return "<p>No step differs.</p>"
    axes = _Axes([1, max(map(len, curves.values()))], values, ("step", "latent error"), log=True)
    lines = []
    for name, curve in curves.items():
        line = " ".join("{:.1f},{:.1f}".format(*axes.place(step, v)) for step, v in enumerate(curve, 1) if v > 0)
        lines.append(
            f'<polyline points="{line}" fill="none" stroke-width="2" stroke="{colours[name]}">'
            f"<title>{escape(name)}</title></polyline>"
        )
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
    style = f"grid-template-columns: 7rem repeat({columns}, 1fr)"
    return f'<div class=wide><div class=pictures style="{style}">{"".join(cells)}</div></div>'


def _png(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a tenth of it on either side; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) / 10 or max(abs(low), 1.0) / 10
    return low - margin, high + margin
