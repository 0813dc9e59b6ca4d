"""Drafts of tiny and published models whose weights are not there: configs alone, for tools that compile and never run.

A family's name is that of its tiny model. A published one can be cut down to a few layers of each kind: its blocks are
alike, so that few of them show every kernel that all of them launch.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import dirty_option

from taylorseer_export.families import FAMILIES

PUBLISHED = ("flux.1-dev", "wan2.1-t2v-14b", "hunyuanvideo")  # of `cards.py`
MODELS = (*FAMILIES, *PUBLISHED)
GRAPHS = ("prepare", "full", "forecast", "probe", "rest")


def draft_of(model: str, layers: int | None = None, **how: Any) -> Any:
    """The draft of a model in bfloat16, with a guard, which brings the graphs `probe` and `rest`.

    Args:
        model: A family or a published model; the latter is drafted at the size that its family quotes.
        layers: Most layers of each kind of a published model; None keeps all.
        how: Further `Options` of the draft.
    """
    from cards import config, shallow, traced_model

    from taylorseer_export.checkpoint.checkpoint import Checkpoint
    from taylorseer_export.compile.export import Options, draft, trace_model

    how = {"guards": ("cg",), **how}
    if model in FAMILIES:
        from tiny_models import MODELS, of_families

        _, build, _ = MODELS[of_families()[model]]
        entries = {key: value for key, value in dict(build().config).items() if not key.startswith("_")}
        checkpoint = Checkpoint(model, FAMILIES[model], Path(model), entries, {}, weightless=True)
        options = Options(order=2, interval=5, warmup=3, precision="bf16", **how)
        return draft(trace_model(checkpoint, options), options)
    traced, options = traced_model(model, config(model) if layers is None else shallow(config(model), layers))
    options = replace(options, **how)
    batch = draft(traced, options).typical["batch"]
    return draft(traced, replace(options, latent_size=traced.checkpoint.latent_size, batch=batch))


def depth(model: str, layers: int | None) -> dict[str, str]:
    """Which layers of a published model a draft leaves out: entry of its config -> like "2 of 19"."""
    if model in FAMILIES or layers is None:
        return {}
    from cards import config, shallow

    whole: Mapping[str, Any] = config(model)
    kept = shallow(whole, layers)
    return {key: f"{kept[key]} of {n}" for key, n in whole.items() if isinstance(n, int) and kept[key] != n}


def add_choices(parser: ArgumentParser, gpus: Sequence[str], record: str) -> None:
    """The options of a tool that compiles such drafts: which models, for which GPUs, which graphs, what is filed."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--layers", type=int, help="keep so many layers of each kind of a published model")
    parser.add_argument("--gpu", nargs="+", choices=gpus, default=list(gpus), metavar="CAPABILITY")
    parser.add_argument("--graph", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--granularity", choices=["module", "residual", "last"], default="residual")
    parser.add_argument("--file", metavar="NAME", nargs="?", const=record, help="write a record of this name")
    dirty_option(parser)


def together(records: Iterable[Mapping[str, Any]], of_each: Collection[str]) -> list[dict[str, Any]]:
    """The records of GPUs for which the same came out as one, but for the entries `of_each`."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        own = {key: record[key] for key in of_each if key in record}
        same = {key: value for key, value in record.items() if key not in (*of_each, "capability")}
        found.setdefault(json.dumps(same), {**same, "capabilities": {}})["capabilities"][record["capability"]] = own
    return list(found.values())
