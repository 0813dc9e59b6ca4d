"""What sharing a model out over several GPUs sends and takes, on paper: `graphs/parallel.md`.

    python tools/parallel_page.py            count again (about five minutes for each model) and write the page
    python tools/parallel_page.py --render   write the page from the counts that it holds

Bytes and arithmetic are counted from the graphs that each rank would run, of the published configurations at their
usual sizes, on fake tensors; what is counted is held against a formula over the attentions' shapes on the way. Times
are computed from those counts by the model that the page states; nothing is measured. The counts stand at the end of
the page, and all else on it is made of them, which a test holds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from operator import attrgetter
from typing import Any

import cards
import torch
from torch import fx
from tqdm import tqdm
from weight_formats import GPUS, flops

from taylorseer_export.bundle.memory import role_bytes, size
from taylorseer_export.bundle.shapes import names
from taylorseer_export.compile.export import Draft, Traced, draft
from taylorseer_export.errors import ExportError
from taylorseer_export.graph.rowwise import attentions
from taylorseer_export.graph.shard import counted, sent, shard
from taylorseer_export.method import Plan
from taylorseer_export.report.memory_table import GRANULARITIES

PAGE = cards.GRAPHS / "parallel.md"
MODELS = ("flux.1-dev", "wan2.1-t2v-14b", "hunyuanvideo")
RANKS, MODES = (2, 4, 8), ("gather", "ulysses")
EACH = {"gather": 2, "ulysses": 4}  # collectives of an attention
Counts = dict[str, Any]

# The model of time ----------------------------------------------------------------------------------------------------

GPU = GPUS["H200"]
COMPUTED, COPIED = 0.6, 0.8  # of the data sheet's arithmetic, and of its bandwidths, that is reached
LAUNCH = 15e-6  # s, in which a captured graph of a few kernels is launched


@dataclass(frozen=True)
class Link:
    """A connection of each rank: bytes per second that it sends, and seconds before the first arrives.

    Attributes:
        between: Of the network card of each rank, where one half of the ranks is on another machine.
    """

    what: str
    bandwidth: float
    latency: float
    between: float = math.inf


LINKS = {
    "NVLink": Link("NVLink 4: 450 GB/s each way", 450e9, 10e-6),
    "PCIe": Link("PCIe 5.0 x16: 64 GB/s each way, straight from GPU to GPU", 64e9, 20e-6),
    "2 nodes": Link("half of the ranks on each, NVLink within, a card of 400 Gbit/s for each GPU between", 450e9, 30e-6,
                    between=50e9),
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of one rank: of the graphs' calls."""

    prepare: float
    computed: float
    wire: float
    forecast: float

    def loop(self, full: int, forecasts: int) -> float:
        """Of a request with so many full and forecast steps."""
        return self.prepare + full * (self.computed + self.wire) + forecasts * (self.forecast if forecasts else 0)


def times(one: Mapping[str, Any], granularity: str, mode: str = "", ranks: int = 1, link: Link | None = None) -> Times:
    """By the counts of what one rank runs."""
    read = COPIED * GPU.bandwidth
    computed = max(one["flops"] / (COMPUTED * GPU.rates["bf16"]), one["full_bytes"] / read)
    wire = _wire(one, mode, ranks, link) if link else 0.0
    return Times(one["prepare_bytes"] / read, computed, wire, one["forecast_bytes"][granularity] / read + LAUNCH)


def _wire(one: Mapping[str, Any], mode: str, ranks: int, link: Link) -> float:
    """Of the collectives of a full step, which wait for each other and for all else."""
    given = one["sent"]
    # A gather hands rows on around a ring that each card is a part of; an exchange sends each rank its own.
    across = given * (2 / ranks if mode == "gather" else ranks / (2 * (ranks - 1)))
    return max(given / link.bandwidth, across / link.between) / COPIED + one["collectives"] * link.latency


# Counting -------------------------------------------------------------------------------------------------------------


def counts(name: str) -> Counts:
    """What the page holds of a model.

    Raises:
        AssertionError: A graph sends something else than the formula says.
    """
    traced, options = cards.traced_model(name, cards.config(name))
    family = traced.checkpoint.family
    whole = _drafts(traced, options)
    sizes = whole["module"].typical
    (latent,) = (spec for spec in traced.trace.inputs if spec.role == "latent")
    of_latent = [s for entry in latent.shape for s in sorted(names(entry)) if s in sizes and s != "batch"]
    found: Counts = {"sizes": sizes, "plan": str(options.plan()), "order": options.order, "refused": "", "ranks": {}}
    found["ranks"]["1"] = _one(whole, whole["module"], traced, sizes)
    for ranks in RANKS:
        divided = [s for s in of_latent if sizes[s] % ranks == 0]
        dimension = (divided or [max(of_latent, key=sizes.__getitem__)])[0]
        mine = {**sizes, dimension: -(-sizes[dimension] // ranks)}
        for mode in MODES:
            formula = by_shapes(whole["module"], traced, dimension, mine, mode, ranks)
            try:
                trace = shard(copied(traced).trace, mode, ranks, dimension, family.name)  # type: ignore[arg-type]
            except ExportError as error:
                found["refused"] = str(error)
                one = _one(whole, whole["module"], traced, mine) | formula
            else:
                made = _drafts(replace(traced, trace=trace), options)
                full = made["module"].split.full
                one = _one(made, made["module"], replace(traced, trace=trace), mine)
                one |= {"collectives": counted({"full": full.module.graph})["full"], "sent": sent(full, mine, ranks)}
                others = counted({cut.name: cut.module.graph for cut in made["module"].graphs if cut.name != "full"})
                assert not any(others.values()), others
                seen = {key: one[key] for key in formula}
                assert seen == formula, f"{name}, {mode} on {ranks}: the graph has {seen}, expected {formula}"
            one |= {"dimension": dimension, "rows": mine[dimension], "padded": not divided}
            found["ranks"][f"{mode} {ranks}"] = one
    return found


def by_shapes(made: Draft, traced: Traced, dimension: str, mine: Mapping[str, int], mode: str, ranks: int) -> Counts:
    """Collectives, bytes sent and arithmetic of one rank by a formula over the attentions of the whole model.

    Of an attention over R rows of the latent on each of N ranks and T others, of C = heads x width:

        gather      (N - 1) 2 R C         and 4 (R + T) (N R + T) C operations
        ulysses     (N - 1) / N (4 R + T) C     4 (N R + T)^2 C / N
    """
    one = replace(made, typical=dict(mine))
    layers = {str(node.args[1].target) for node in made.split.full.module.graph.nodes if _is_linear(node)}
    arithmetic = flops(one, made.split.full, traced.trace.names, layers)
    for channels, rows, keys, local, *_ in _attended(made, traced, dimension, mine, ranks):
        all_keys = keys + (ranks - 1) * local
        alone = mode == "gather" or not local
        arithmetic += 4 * channels * (rows * all_keys if alone else all_keys * all_keys // ranks)
    return {**wire_by_shapes(made, traced, dimension, mine, mode, ranks), "flops": arithmetic}


def wire_by_shapes(
    made: Draft, traced: Traced, dimension: str, mine: Mapping[str, int], mode: str, ranks: int
) -> Counts:
    """Collectives, and bytes that one rank sends, in a full step; from the attentions of the whole model.

    Of one that looks from other rows at those of the latent, no queries are exchanged. A product over rows sends what
    it makes, and a convolution the rows that it sees beyond both ends of a rank's.
    """
    given = collectives = Fraction(0)
    for channels, rows, _, local, asking, number in _attended(made, traced, dimension, mine, ranks):
        if local and asking:
            given += channels * number * rows_sent(mode, ranks, local, rows - local)
            collectives += EACH[mode]
        elif local:
            back = (1, rows) if mode == "ulysses" else (0, 0)
            given += channels * number * (ranks - 1) * Fraction(2 * local + back[1], ranks if back[0] else 1)
            collectives += 2 + back[0]
    for count in _mixed(made, traced, dimension, mine):
        given += (ranks - 1) * count
        collectives += 1
    return {"collectives": int(collectives), "sent": int(given)}


def _mixed(made: Draft, traced: Traced, dimension: str, mine: Mapping[str, int]) -> Iterator[int]:
    """Bytes that a rank sends each other one for every product over rows of the latent, and for every convolution that
    sees beyond its own row."""
    one, two = (replace(made, typical={**mine, dimension: n * mine[dimension]}) for n in (1, 2))
    for node in made.split.full.module.graph.nodes:
        name = str(node.target)
        if name not in ("aten.matmul.default", "aten.conv2d.default") or node.args[0].op == "placeholder":
            continue
        grows = [a != b for a, b in zip(*(_extents(node.args[0], sizes, traced) for sizes in (one, two)), strict=True)]
        number = node.meta["val"].element_size()
        if "matmul" in name and grows[-1]:
            yield number * prod(_extents(node, one, traced))
        elif "conv2d" in name and any(grows[2:]):
            weight = attrgetter(str(node.args[1].target))(made.split.full.module)
            beyond = weight.shape[2] // 2  # a patch is not seen beyond
            patch = len(node.args) > 3 and node.args[3][0] > 1
            if beyond and not patch:
                pairs = zip(_extents(node.args[0], one, traced), grows, strict=True)
                yield number * prod(2 * beyond if grew else size for size, grew in pairs)


def _attended(
    made: Draft, traced: Traced, dimension: str, mine: Mapping[str, int], ranks: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Of every attention of a full step: batch x heads x width, rows, keys, how many of the keys are the latent's, how
    many of the rows, and bytes of a number."""
    one, every = (replace(made, typical={**mine, dimension: n * mine[dimension]}) for n in (1, ranks))
    for node in attentions(made.split.full.module.graph):
        (batch, heads, rows, width), (*_, keys, _) = (_extents(source, one, traced) for source in node.args[:2])
        asking, local = (
            (_extents(source, every, traced)[2] - count) // (ranks - 1)
            for source, count in zip(node.args[:2], (rows, keys), strict=True)
        )
        yield batch * heads * width, rows, keys, local, asking, node.args[1].meta["val"].element_size()


def rows_sent(mode: str, ranks: int, local: int, others: int) -> Fraction:
    """Rows of keys, of one sample, that one rank sends for one attention over `local` of the latent and `others`."""
    return Fraction(
        (ranks - 1) * (2 * local if mode == "gather" else 4 * local + others), 1 if mode == "gather" else ranks
    )


def _is_linear(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.linear.default


def _extents(node: Any, made: Draft, traced: Traced) -> list[int]:
    symbols = {symbol: made.typical[name] for symbol, name in traced.trace.names.items()}
    shape = node.meta["val"].shape
    return [int(s.node.expr.xreplace(symbols)) if isinstance(s, torch.SymInt) else int(s) for s in shape]


def copied(traced: Traced) -> Traced:
    """The same trace with a graph of its own, since sharing out changes it in place."""
    graph, module = fx.Graph(), traced.trace.module
    graph.output(graph.graph_copy(module.graph, {}))
    return replace(traced, trace=replace(traced.trace, module=fx.GraphModule(module, graph)))


def _drafts(traced: Traced, options: Any) -> dict[str, Draft]:
    return {g: draft(traced, replace(options, granularity=g)) for g in GRANULARITIES[:2]}


def _one(drafts: Mapping[str, Draft], made: Draft, traced: Traced, sizes: Mapping[str, int]) -> Counts:
    """Of one rank with these sizes, in bytes and operations."""
    prepare, full = made.split.prepare, made.split.full

    def moved(one: Draft, cut: Any) -> int:
        tensors = (*cut.inputs, *cut.outputs)
        roles = {tensor.role for tensor in tensors}
        return one.weights_bytes(cut) + sum(role_bytes(tensors, role, sizes) for role in roles)

    return {
        "collectives": 0,
        "sent": 0,
        "flops": flops(replace(made, typical=dict(sizes)), full, traced.trace.names),
        "full_bytes": moved(made, full),
        "prepare_bytes": moved(made, prepare),
        "forecast_bytes": {g: moved(d, d.split.forecast) for g, d in drafts.items()},
        "state_bytes": {g: role_bytes(d.split.forecast.inputs, "taylor_in", sizes) for g, d in drafts.items()},
    }


# The page -------------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Counts]) -> str:
    """Its whole text."""
    lines = [
        "# Several GPUs, on paper",
        "",
        "What `--parallel gather|ulysses --degree N` sends and would take at the usual sizes of published models, in",
        "bfloat16, order 1, one branch of guidance. Generated by `python tools/parallel_page.py`.",
        "",
        "**Nothing here was run on several GPUs.** Bytes and arithmetic are counted from the graphs that a rank",
        "would run; tests hold that a run sends the bytes that its graph says. Times are computed from the counts,",
        "by the model below.",
        "",
        "## What is sent",
        "",
        "By one rank to all others. A forecast step and `prepare` send nothing, at any granularity: their graphs",
        "hold no collective. So a request sends what its full steps send.",
        "",
        *_table(_SENT, (row for name, of_it in found.items() for row in _sent(name, of_it))),
        "",
        *_notes(found),
        "",
        "## The model of time",
        "",
        *_assumptions(),
        "",
    ]
    for name, of_it in found.items():
        plan = Plan.parse(of_it["plan"])
        lines += [
            f"### {name}",
            "",
            f"Granularity `module`; {len(plan)} steps, {len(plan.full_steps)} of them full. Steps in milliseconds,",
            "loops in seconds; gains over one GPU that computes every step. *Off by*: both gains over their product.",
            "",
            *_table(_TOOK, _rows(of_it, "module")),
            "",
        ]
    lines += [*_verdict(found), "", f"<!-- counted {json.dumps(found, separators=(',', ':'))} -->"]
    return "\n".join(lines) + "\n"


_SENT = ("model", "ranks", "", "collectives", "a full step", "a forecast step", "a request, all full", "with its plan",
         "TFLOP of a full step", "Taylor buffers, `module`", "`residual`")  # fmt: skip
_TOOK = ("", "ranks", "", "full step", "of it wire", "forecast step", "loop, all full", "with the plan",
         "gain of ranks", "of the plan", "of both", "product", "off by")  # fmt: skip


def held(text: str) -> dict[str, Counts]:
    """The counts of a page."""
    (told,) = re.findall(r"^<!-- counted (.*) -->$", text, re.MULTILINE)
    found: dict[str, Counts] = json.loads(told)
    return found


def _sent(name: str, of_it: Counts) -> Iterator[tuple[str, ...]]:
    plan = Plan.parse(of_it["plan"])
    for key, one in of_it["ranks"].items():
        mode, _, ranks = key.rpartition(" ")
        steps = (size(n * one["sent"]) for n in (len(plan), len(plan.full_steps)))
        state = (size(one["state_bytes"][g]) for g in ("module", "residual"))
        mark = "†" if one.get("padded") else ""
        yield (
            name, ranks + mark, mode, str(one["collectives"]), size(one["sent"]), "0", *steps,
            f"{one['flops'] / 1e12:.1f}", *state,
        )  # fmt: skip


def _notes(found: Mapping[str, Counts]) -> Iterator[str]:
    """What the rows need to be read with."""
    most = max(RANKS)
    for name, of_it in found.items():
        sizes = ", ".join(f"{k} {v}" for k, v in of_it["sizes"].items() if k != "steps")
        cut = ", ".join(
            f"{key.split()[1]}{'†' * one['padded']} ranks along {one['dimension']}"
            for key, one in of_it["ranks"].items()
            if key.startswith("gather")
        )
        yield f"- {name}: {sizes}. Shared out: {cut}."
        if of_it["refused"]:
            yield f"  The export refuses it so far: {of_it['refused'].split(', expected')[0]}."
            yield "  Its numbers are those of the formula over its attentions' shapes; the graphs of the others, for"
            yield "  which it was computed as well, were held against it."
        alone = of_it["ranks"]["1"]["flops"]
        shares = (f"{of_it['ranks'][f'{mode} {most}']['flops'] * most / alone:.2f} ({mode})" for mode in MODES)
        yield f"  On {most} ranks each computes {' and '.join(shares)} times its {most}th of a full step."
    if any(one.get("padded") for of_it in found.values() for one in of_it["ranks"].values()):
        yield "- † N divides none of the latent's sizes; counted as if rows were padded to the next that it divides."
    yield "- Rows of a text are on every rank and computed on each: that is what arithmetic falls short of 1/N by."
    yield "- Of an attention over R rows of the latent on each rank and T others, C bytes each, `gather` sends"
    yield "  (N - 1) 2 R C and `ulysses` (N - 1) / N (4 R + T) C: on 2 ranks `gather` sends no more, from 4 on"
    yield "  `ulysses` sends less."
    yield "- Beside that a rank sends each other one 8 bytes before a full step, and its predictions once, at the end."


def _assumptions() -> list[str]:
    rates = f"{GPU.rates['bf16'] / 1e12:.0f} TFLOP/s dense in bfloat16, of which {COMPUTED:.0%} are reached"
    links = ((name, f"{link.what}; {1e6 * link.latency:.0f} µs for each collective") for name, link in LINKS.items())
    assumed = (
        ("GPU", f"H200 by its data sheet: {rates}; {GPU.bandwidth / 1e12:.1f} TB/s, of which {COPIED:.0%}"),
        *links,
        ("every link", f"{COPIED:.0%} of its bandwidth is reached; nothing else is sent over it"),
        ("2 nodes", "a gather hands rows around a ring that every card is in; an exchange sends to each rank its own"),
        ("full step", "the longer of its arithmetic and of its bytes (weights, inputs, outputs); then its collectives, "
         "one after the other, with nothing computed meanwhile"),
        ("forecast step", f"its bytes, and {1e6 * LAUNCH:.0f} µs to launch it"),
        ("`prepare`", "its bytes, once for a request, on each rank alike"),
    )  # fmt: skip
    return [
        *_table(("assumed", ""), assumed),
        "",
        "The wire is taken at its worst: collectives that overlap with arithmetic cost less. Sampler, guard and host",
        "are left out. Latencies and the shares that are reached are guesses; a measurement replaces them.",
    ]


@dataclass(frozen=True)
class Gains:
    """Of a number of ranks, of a plan on one, and of both, over one GPU that computes every step."""

    ranks: float
    plan: float
    both: float

    @property
    def off(self) -> float:
        """Both over their product, less 1."""
        return self.both / (self.ranks * self.plan) - 1


def gains(of_it: Counts, granularity: str, key: str, link: Link) -> tuple[Times, Gains]:
    """Of one entry of a model's counts on a link."""
    plan = Plan.parse(of_it["plan"])
    full, forecasts = len(plan.full_steps), len(plan) - len(plan.full_steps)
    mode, _, ranks = key.rpartition(" ")
    alone = times(of_it["ranks"]["1"], granularity)
    shared = times(of_it["ranks"][key], granularity, mode, int(ranks), link)
    base = alone.loop(len(plan), 0)
    return shared, Gains(
        base / shared.loop(len(plan), 0), base / alone.loop(full, forecasts), base / shared.loop(full, forecasts)
    )


def _rows(of_it: Counts, granularity: str) -> Iterator[tuple[str, ...]]:
    plan = Plan.parse(of_it["plan"])
    full, forecasts = len(plan.full_steps), len(plan) - len(plan.full_steps)
    alone = times(of_it["ranks"]["1"], granularity)
    loops = alone.loop(len(plan), 0), alone.loop(full, forecasts)
    yield ("one GPU", "1", "", *_steps(alone), f"{loops[0]:.2f}", f"{loops[1]:.2f}", "1.00",
           f"{loops[0] / loops[1]:.2f}", f"{loops[0] / loops[1]:.2f}", "", "")  # fmt: skip
    for link_name, link in LINKS.items():
        for key, one in of_it["ranks"].items():
            if key == "1":
                continue
            mode, _, ranks = key.rpartition(" ")
            shared, g = gains(of_it, granularity, key, link)
            yield (link_name, ranks + "†" * one["padded"], mode, *_steps(shared), f"{shared.loop(len(plan), 0):.2f}",
                   f"{shared.loop(full, forecasts):.2f}", f"{g.ranks:.2f}", f"{g.plan:.2f}", f"{g.both:.2f}",
                   f"{g.ranks * g.plan:.2f}", _signed(g.off))  # fmt: skip


def _steps(one: Times) -> tuple[str, str, str]:
    full = one.computed + one.wire
    return f"{1e3 * full:.1f}", f"{one.wire / full:.0%}", f"{1e3 * one.forecast:.2f}"


_WHY = """\
With F full steps of S, f(N) and c(N) the times of a full and of a forecast step on N ranks, and p of `prepare`:

    both       p + F f(1) + (S - F) c(1)     p + S f(N)
    -------  = -------------------------  *  ----------
    product    p + F f(N) + (S - F) c(N)     p + S f(1)

That is 1 where full steps, forecast steps and `prepare` shrink alike. They do not, and in both directions:

- A full step shrinks by less than N, by the wire and by the text's rows. A forecast step sends nothing and reads its
  own rows alone. Where it takes time that counts, both together gain **more** than the product, the more the slower
  the wire.
- A launch and `prepare` do not shrink at all. Where forecast steps are short, both together gain **less**.

A forecast step is a small share of a loop whatever N is, so neither matters much. What holds exactly is the wire: a
plan with F full steps of S sends F / S of the bytes, in F / S of the collectives."""


def _verdict(found: Mapping[str, Counts]) -> list[str]:
    """Whether the gains multiply, from the numbers."""
    said = []
    for granularity in GRANULARITIES[:2]:
        rows = [
            (gains(of_it, granularity, key, link)[1].off, f"{name}, {key} over {where}")
            for name, of_it in found.items()
            for key in of_it["ranks"]
            if key != "1"
            for where, link in LINKS.items()
        ]
        (least, lowest), (most, highest) = min(rows), max(rows)
        said.append(f"- `{granularity}`: {_signed(least)} ({lowest}) to {_signed(most)} ({highest}).")
    return [
        "## Do the gains multiply?",
        "",
        "Nearly. The gain of ranks and plan together is off the product of both gains by",
        "",
        *said,
        "",
        *_WHY.splitlines(),
    ]


def _signed(share: float) -> str:
    text = f"{share:+.1%}"
    return text[1:] if text[1:] == "0.0%" else text


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *map(list, rows))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the page from the counts that it holds")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="count these again (default: all)")
    args = parser.parse_args()
    found = held(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    if not args.render:
        for name in tqdm(args.model, unit="model", leave=False):
            found[name] = counts(name)
            PAGE.write_text(page({n: found[n] for n in MODELS if n in found}), encoding="utf-8")
    PAGE.write_text(page({n: found[n] for n in MODELS if n in found}), encoding="utf-8")
    print(PAGE.relative_to(cards.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
