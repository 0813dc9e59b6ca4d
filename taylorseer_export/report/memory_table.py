"""The memory planner: what every way of keeping Taylor buffers costs, and the best one that fits a budget.

    total = weights of the bundle + slots * (Taylor buffers + step tables + what a probe keeps)

One trace serves all rows. Granularity decides what is kept, so it takes one split each; layout and order only multiply
what one entry of the buffers weighs. Not in these numbers: what an engine needs while it runs (its activations and
copies of weights, known to the engine alone) and the inputs of a request.

With `--weights auto` the format of the weights is chosen as well, before all else: the precision if that fits in any
way, or else the widest format that does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from taylorseer_export.bundle.memory import kept_by_probe, role_bytes
from taylorseer_export.compile.quantised import check_weights
from taylorseer_export.errors import ConfigError
from taylorseer_export.graph.formats import FORMATS
from taylorseer_export.method.forecasts import GRANULARITIES, LAYOUTS, Forecasts, Granularity, Layout
from taylorseer_export.report.card import highest_gain

if TYPE_CHECKING:
    from taylorseer_export.compile.export import Draft, Options, Traced

AUTO = "auto"  # what --weights is where the budget chooses the format
_WEIGHTS = (None, "keep", *FORMATS)  # the widest first

_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))


@dataclass(frozen=True)
class Choice:
    """One way of keeping the Taylor buffers. Sizes in bytes.

    Attributes:
        granularity, layout, order: As on the command line.
        state_bytes: Taylor buffers of one slot; derivatives count twice, one set is read while the other is written.
        table_bytes: Step tables of one slot.
        graph_bytes: (graph, bytes of the weights it reads); graphs may share a weight.
        weights_bytes: Weights of the bundle, each counted once.
        ceiling: Steps over full steps of the plan: the highest speed-up it allows, dimensionless.
        gain: Highest noise amplification of the plan at this order, dimensionless.
        quoted: The sizes that the numbers hold for, and which of them are merely typical.
        probe_bytes: What the probe of one slot keeps; 0 without guards.
        lora_bytes: Low-rank weights of one slot; 0 where requests bring no LoRA.
        weights: Format of the weights of the blocks' linear layers; None for the precision.
    """

    granularity: Granularity
    layout: Layout
    order: int
    state_bytes: int
    table_bytes: int
    graph_bytes: tuple[tuple[str, int], ...]
    weights_bytes: int
    ceiling: float
    gain: float
    quoted: str
    probe_bytes: int = 0
    lora_bytes: int = 0
    weights: str | None = None

    @property
    def options(self) -> str:
        """The choice as the command line spells it."""
        form = f"--weights {self.weights} " if self.weights else ""
        return f"{form}--state {self.granularity} --layout {self.layout}"

    def total(self, slots: int = 1) -> int:
        """Bytes of the weights and of `slots` requests at one time."""
        return self.weights_bytes + slots * (self.state_bytes + self.table_bytes + self.probe_bytes + self.lora_bytes)


def choices(traced: Traced, options: Options) -> tuple[Choice, ...]:
    """Every granularity and layout at the asked order and below, in order of preference.

    Args:
        traced: The model; it is split three times and not traced again.
        options: Sizes, plan, precision and highest order. Its granularity and layout are ignored.
    """
    from taylorseer_export.compile.export import draft

    plan = options.plan()
    gains = [highest_gain(Forecasts(plan, order)) for order in range(options.order + 1)]
    rows = []
    for granularity in GRANULARITIES:
        made = draft(traced, replace(options, granularity=granularity, layout="snapshots"))
        kept = role_bytes(made.split.forecast.inputs, "taylor_in", made.typical)
        probe = made.split.probe
        entry = kept // (options.order + 1)  # every buffer is [order + 1, ...]
        first = Choice(
            granularity=granularity,
            layout="snapshots",
            order=0,
            state_bytes=entry,
            table_bytes=role_bytes(made.split.prepare.outputs, "step", made.typical),
            probe_bytes=kept_by_probe(probe.inputs, probe.outputs, made.typical) if probe else 0,
            graph_bytes=tuple((cut.name, made.weights_bytes(cut)) for cut in made.split.graphs),
            weights_bytes=made.weights_bytes(),
            ceiling=plan.ceiling,
            gain=gains[0],
            quoted=_quoted(made),
            lora_bytes=0 if made.lora is None else math.prod(made.lora.shape) * traced.trace.precision.itemsize,
            weights=options.weights,
        )
        for layout in LAYOUTS:
            sets = 2 if layout == "derivatives" else 1
            for order in range(options.order, -1, -1):
                state = entry * (order + 1) * sets
                rows.append(replace(first, layout=layout, order=order, state_bytes=state, gain=gains[order]))
    return tuple(rows)


def in_precision(options: Options) -> Options:
    """The same with unquantised weights."""
    return replace(options, weights=None, activations=None, keep_precision=())


def choices_of_formats(traced: Traced, options: Options) -> tuple[Choice, ...]:
    """`choices` in the precision and in every format that engine and GPUs take, the widest first."""
    rows = choices(traced, in_precision(options))
    for form in FORMATS:
        one = replace(options, weights=form)
        try:
            check_weights(one)
        except ConfigError:
            continue
        rows += choices(traced, one)
    return rows


def planned(
    traced: Traced, options: Options, budget: int | None, slots: int = 1
) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """The rows to choose from, and those in formats that were not asked for, where none of the first fits."""
    if options.weights == AUTO:
        return choices_of_formats(traced, options), ()
    rows = choices(traced, options)
    fits = budget is None or any(row.order == options.order and row.total(slots) <= budget for row in rows)
    return rows, () if fits or options.weights else choices_of_formats(traced, options)


def choose(
    rows: Sequence[Choice],
    budget: int,
    order: int,
    slots: int = 1,
    granularity: str | None = None,
    layout: str | None = None,
    formats: Sequence[Choice] = (),
) -> Choice:
    """The best row that fits: the asked order always, then weights, granularity and layout, as `_preference` has them.

    Args:
        rows: What `choices` returned.
        budget: Bytes for everything.
        order: The order that was asked for; it is never lowered.
        slots: Requests that share the budget.
        granularity, layout: Set where the user decided; then only the fit is checked.
        formats: Rows with the weights in formats that were not asked for, of which a refusal names one that fits.

    Raises:
        ConfigError: Nothing fits; says what the smallest allowed choice needs, and prints the table.
    """
    asked = [row for row in rows if row.order == order]

    def allows(row: Choice) -> bool:
        return row.order == order and granularity in (None, row.granularity) and layout in (None, row.layout)

    allowed = [row for row in asked if allows(row)]
    assert allowed, f"bug in taylorseer-export: no row of order {order} among {len(rows)}"
    fitting = [row for row in allowed if row.total(slots) <= budget]
    if fitting:
        return min(fitting, key=_preference)
    least = min(allowed, key=lambda row: (row.total(slots), _preference(row)))
    remedy = _remedy(rows, asked, least, budget, slots)
    if fitting := [row for row in formats if allows(row) and row.total(slots) <= budget]:
        remedy = f"add --weights {min(fitting, key=_preference).weights}, which fits, or raise it"
    refusal = ConfigError(
        f"--memory-budget is {_size(budget)}, expected at least {_size(least.total(slots), up=True)} "
        f"({least.options} --order {order}, {_counted(slots)}); {remedy}"
    )
    refusal.add_note(table(rows, slots))  # below the sentence
    raise refusal


def reason(
    best: Choice,
    rows: Sequence[Choice],
    budget: int,
    slots: int = 1,
    granularity: str | None = None,
    layout: str | None = None,
) -> str:
    """One line: what `choose` chose, what it needs, and what the next better choice would have needed."""
    better = [
        row
        for row in rows
        if row.order == best.order
        and _preference(row) < _preference(best)
        and granularity in (None, row.granularity)
        and layout in (None, row.layout)
    ]
    if granularity and layout:
        why = "as asked"
    elif better:
        least = min(better, key=lambda row: (row.total(slots), _preference(row)))
        why = f"{least.options} would need {_size(least.total(slots), up=True)}"
    else:
        why = "the first choice fits"
    return (
        f"budget {_size(budget)}: {best.options} needs {_size(best.total(slots), up=True)} for {_counted(slots)} "
        f"at {best.quoted}; {why}{_of_formats(best, rows)}"
    )


def _of_formats(best: Choice, rows: Sequence[Choice]) -> str:
    """What the weights of the bundle take in each format, where there are several to choose from."""
    taken = {
        row.weights or "the precision": _size(row.weights_bytes, up=True)
        for row in rows
        if (row.granularity, row.layout, row.order) == (best.granularity, best.layout, best.order)
    }
    return "; weights: " + ", ".join(f"{size} in {name}" for name, size in taken.items()) if len(taken) > 1 else ""


def table(rows: Sequence[Choice], slots: int = 1) -> str:
    """All rows in one unit, with what they hold for above them.

    Args:
        rows: What `choices` returned.
        slots: Requests in the column `total`.
    """
    unit, scale = next((u, s) for u, s in _UNITS if s <= min(row.state_bytes for row in rows) or s == 1)
    graphs = [name for name, _ in rows[0].graph_bytes]
    probe = ("probe kept",) if rows[0].probe_bytes else ()
    several = len({row.weights for row in rows}) > 1
    form = ("weights",) if several else ()
    head = (*form, "state", "layout", "order", "buffers", "tables", *probe, *graphs, "bundle", "total", "gain")
    body = []
    for row in rows:
        weights = (*dict(row.graph_bytes).values(), row.weights_bytes)
        slot = (row.state_bytes, row.table_bytes, *([row.probe_bytes] if probe else []))
        sizes = [_cell(count, scale) for count in (*slot, *weights, row.total(slots))]
        form = (row.weights or "precision",) if several else ()
        body.append((*form, row.granularity, row.layout, str(row.order), *sizes, f"{row.gain:.1f}"))
    widths = [max(len(line[k]) for line in (head, *body)) for k in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if k < 2 + several else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  " + "  ".join(padded)

    return "\n".join(
        [
            f"memory in {unit}: Taylor buffers and step tables per slot, weights per graph and of the bundle,",
            f"  total = bundle + {_counted(slots)}; what the engine needs while it runs comes on top",
            f"  at {rows[0].quoted}",
            f"  plan: speed-up at most {rows[0].ceiling:.2f}x; gain: its highest noise amplification at that order",
            line(head),
            *map(line, body),
        ]
    )


def _preference(row: Choice) -> tuple[int, int, int]:
    """Best first: the widest weights, closeness to the paper, then the layout without a second set of buffers."""
    return _WEIGHTS.index(row.weights), GRANULARITIES.index(row.granularity), LAYOUTS.index(row.layout)


def _remedy(rows: Sequence[Choice], asked: Sequence[Choice], least: Choice, budget: int, slots: int) -> str:
    """The change closest to what was asked for that would fit, if one of ours is enough."""
    if budget < least.weights_bytes:
        return f"raise it, the weights alone are {_size(least.weights_bytes, up=True)}"
    others = [row for row in asked if row.total(slots) <= budget]
    if others:
        return f"use {min(others, key=_preference).options}, which fits"
    count = (budget - least.weights_bytes) // (least.total() - least.weights_bytes)
    if count > 0:
        return f"use --slots {count}, or raise it"
    same = [r for r in rows if r.options == least.options and r.order < least.order]
    lower = max((r.order for r in same if r.total(slots) <= budget), default=None)
    if lower is not None:
        return f"use --order {lower}, or raise it"
    return "raise it, or lower --size or --batch"


def _quoted(made: Draft) -> str:
    """`batch 2, image_tokens 64*, steps 50 (* typical)`: the sizes, and which of them no option fixed."""
    free = [name for name, size in made.sizes.items() if size is None]
    text = ", ".join(f"{name} {size}{'*' if name in free else ''}" for name, size in made.typical.items())
    return f"{text} (* typical, the bundle accepts a range)" if free else text


def _counted(slots: int) -> str:
    return f"{slots} slot{'s' if slots > 1 else ''}"


def _cell(count: int, scale: int) -> str:
    return f"{count / scale:,.1f}" if scale > 1 else f"{count:,}"


def _size(count: int, up: bool = False) -> str:
    """Bytes for people. A need is rounded up and a budget down, so what is printed as enough is enough."""
    unit, scale = next((u, s) for u, s in _UNITS if s <= count or s == 1)
    hundredths = -(-count * 100 // scale) if up else count * 100 // scale
    return f"{hundredths // 100}.{hundredths % 100:02} {unit}" if scale > 1 else f"{count} {unit}"
