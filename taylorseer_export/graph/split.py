"""The split: one traced graph becomes `prepare`, `full` and `forecast`.

    prepare    request constants, all timesteps          -> request values, tables of step values [steps, batch, W]
    full       latent, request values, table rows        -> noise_pred, what the Taylor buffers keep
    forecast   latent, table rows, Taylor buffers, weights -> noise_pred

and where a guard is asked for, `full` once more in two parts, `probe` and `rest` (`probe.py`).

`full` and `forecast` are the latent-dependent nodes behind `noise_pred`, without and with the cut; what they read of
earlier binding times is `prepare`'s output. `splitter.py` says how.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from taylorseer_export.graph.cut import Builder, Cut
from taylorseer_export.graph.ensures import ensure
from taylorseer_export.graph.merge import merge_equal
from taylorseer_export.graph.narrow import narrow
from taylorseer_export.graph.probe import Prober
from taylorseer_export.graph.splitter import Splitter
from taylorseer_export.graph.trace import Trace
from taylorseer_export.method import Granularity, Layout
from taylorseer_export.method.guard import Rule


@dataclass(frozen=True)
class Split:
    """The derived graphs of one model and the sites whose history they keep: name -> shape of one snapshot."""

    prepare: Cut
    full: Cut
    forecast: Cut
    sites: dict[str, tuple[int | str, ...]]
    probe: Cut | None = None
    rest: Cut | None = None

    @property
    def graphs(self) -> tuple[Cut, ...]:
        return tuple(cut for cut in (self.prepare, self.full, self.forecast, self.probe, self.rest) if cut)


def split(
    trace: Trace,
    granularity: Granularity,
    layout: Layout,
    order: int,
    state_dtype: torch.dtype | None = None,
    guards: Collection[Rule] = (),
) -> Split:
    """Derive the graphs of `trace`.

    Args:
        trace: The tapped graph; it is narrowed in place, equal nodes become one, and it is otherwise left alone.
        granularity: What is forecast. `module`: every site. `residual`: what the block stack adds to its input.
            `last`: the hidden state that leaves the stack.
        layout: `snapshots`: the full graph returns what it computed, and a ring keeps the last `order + 1`.
            `derivatives`: it reads the old differences and returns the new ones.
        order: Highest difference kept, dimensionless.
        state_dtype: dtype of the Taylor buffers; the model's if left out. Sums and differences over them are formed
            in float32.
        guards: The rules that the probe computes an error for; without any there is no probe.

    Raises:
        ExportError: A size inside the graph cannot be computed from the inputs of a derived graph, or the family's
            sites are not complete: see `ensure`.
    """
    narrow(trace)
    merge_equal(trace.module.graph)
    parts = Splitter(trace, granularity, layout, order, state_dtype or trace.precision)
    late_full = parts.late(parts.full_targets, stop=())
    gates = parts.sums.gates
    late_forecast = parts.late([*parts.predictions.values(), *parts.bases.values(), *gates], stop=parts.stops)
    early_full, early_forecast = parts.frontier(late_full), parts.frontier(late_forecast, also=gates)
    prober = Prober(parts, guards) if guards else None
    early_probe = prober.early_probe if prober else set()
    early = early_full | early_forecast | early_probe
    tables = parts.tables(early, early_forecast, early_probe)
    full = parts.full(Builder(trace, "full"), early_full, tables)
    forecast, prepare = parts.forecast(early_forecast, tables), parts.prepare(early, tables)
    guarded = (prober.probe(tables), prober.rest(tables)) if prober else ()
    made = Split(prepare, full, forecast, parts.sites, *guarded)
    ensure(trace, made.graphs, late_forecast)
    return made
