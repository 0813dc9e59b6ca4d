"""Binding times: when in a denoising loop the value of each node is known.

    WEIGHT  < REQUEST < STEP < LATENT

A weight is known at export; a prompt projection when the request arrives; a modulation row when the timesteps are
known; everything behind the latent only in its step. The time of a node is the latest time among its inputs, so one
pass in graph order finds all of them.

A step value is worth computing ahead only if it is a row per sample, `[batch, fixed sizes...]`: then all steps make one
small table. FLUX's first text projections also depend on the step alone, but hold a row per token; `S` copies of them
would be larger than the latent work they save, so they count as latent.
"""

from __future__ import annotations

from enum import IntEnum

import sympy
import torch
from torch import fx

from taylorseer_export.bundle.shapes import names
from taylorseer_export.graph.sizes import is_size
from taylorseer_export.graph.trace import Trace


class Time(IntEnum):
    """When a value is known; later is larger."""

    WEIGHT = 0
    REQUEST = 1
    STEP = 2
    LATENT = 3


# A LoRA comes with the request, and is read like the weights that it changes: by each graph itself.
_OF_ROLE = {"lora": Time.WEIGHT, "constant": Time.REQUEST, "step": Time.STEP, "latent": Time.LATENT}


def binding_times(trace: Trace) -> dict[fx.Node, Time]:
    """Time of every node: `time(node) = max(time(input) for input)`; sizes count as known at export."""
    roles = {spec.name: _OF_ROLE[spec.role] for spec in trace.inputs}
    known = {name for spec in trace.inputs if spec.role == "constant" for entry in spec.shape for name in names(entry)}
    unknown = {symbol for symbol, name in trace.names.items() if name not in known}
    times: dict[fx.Node, Time] = {}
    for node in trace.module.graph.nodes:
        if node.op == "placeholder":
            times[node] = roles.get(str(node.target), Time.WEIGHT)
        elif is_size(node):
            times[node] = Time.WEIGHT
        else:
            time = max((times[n] for n in node.all_input_nodes), default=Time.WEIGHT)
            early = Time.WEIGHT < time < Time.LATENT
            if (time is Time.STEP and not _is_row(node, trace)) or (
                early and any(_symbols(n) & unknown for n in (node, *node.all_input_nodes))
            ):
                time = Time.LATENT
            times[node] = time
    return times


def _symbols(node: fx.Node) -> set[sympy.Symbol]:
    """The symbols in the sizes of a node's tensors, or in the size that it is."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else (v,))]
    return {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}


def _is_row(node: fx.Node, trace: Trace) -> bool:
    """Whether every tensor of the node is [batch, fixed sizes...]."""
    values = node.meta["val"]
    for value in values if isinstance(values, tuple | list) else (values,):
        first, *rest = value.shape or (None,)
        if not isinstance(first, torch.SymInt) or trace.names.get(first.node.expr) != "batch":
            return False
        if any(isinstance(size, torch.SymInt) for size in rest):
            return False
    return True
