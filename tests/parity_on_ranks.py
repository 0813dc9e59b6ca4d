"""Every model that is shared out, crossed with granularity, layout, gather and Ulysses, and 2 and 4 ranks.

    python tests/parity_on_ranks.py '{"models": ["flux"], "granularities": ["module"], ...}'

prints a line of JSON for each case; `tools/parallel_parity.py` runs that and files what it says. A case is a request of
two samples and an odd number of rows on each rank, on a plan with forecasts and on one of full steps alone. Its
predictions are held against the oracle and the untouched model, all ranks against each other, and what was sent against
the graphs and the formula. A model is traced once and shared out once for each mode, number of ranks and size of the
latent that they divide; all else is split from that.

The models have 4 heads, so that 4 ranks exchange them.
"""

# Shapes: S steps, B batch

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory

import oracle
import torch
from harness import allowed, as_arrays
from kill_ranks import begun
from parallel_page import EACH, copied, wire_by_shapes
from randomised import randomised
from ranks import Counting, denoisers_on_ranks, predicted, sound
from tiny_bundles import options_of
from tiny_models import MODELS

from taylorseer_export.bundle.shapes import names
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import Draft, Options, Traced, draft, trace_model
from taylorseer_export.compile.parallel import declared_for, parallel_of
from taylorseer_export.errors import ConfigError, ExportError
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.shard import counted, sent, shard

PLAN, ORDER, BATCH = "FF.F..", 2, 2
MODES = ("gather", "ulysses")
KINDS = {"full": "F", "forecast": "."}
# Entries of a config that grow with the number of heads.
_WITH_HEADS = (
    "num_attention_heads", "n_heads", "n_kv_heads", "dim", "model_dim", "caption_projection_dim", "added_kv_proj_dim",
    "cross_attention_dim", "num_cross_attention_heads", "audio_num_attention_heads", "audio_cross_attention_dim",
)  # fmt: skip
# Size of a latent -> what the inputs of a tiny model call it.
_CALLED = {"image_tokens": "", "frames": "frames", "rows": "height", "columns": "width"}


def wide(name):
    """The tiny model `name` with 4 heads in the place of 2, each as wide as they were."""
    small = MODELS[name][1]()
    config = {key: value for key, value in small.config.items() if not key.startswith("_")}
    more = {key: 2 * config[key] for key in _WITH_HEADS if config.get(key)}
    model = randomised(lambda: type(small)(**{**config, **more}), seed=4)
    for path, module in small.named_modules():
        if hasattr(module, "set_processor"):
            model.get_submodule(path).set_processor(module.processor)
    return model


def open_sizes(checkpoint) -> list[str]:
    """The sizes of a latent that a request chooses, in their order."""
    ranges = checkpoint.family.dimensions(checkpoint.config)
    told = [size for entry in _latent(checkpoint).shape for size in sorted(names(entry)) if size in _CALLED]
    found = [size for size in dict.fromkeys(told) if ranges[size][0] < ranges[size][1]]
    found = [size for size in found if size not in checkpoint.family.undivided]
    return found[:1] if checkpoint.family.shared else found  # those of a square are divided alike


def sizes_along(name: str, sizes: list[str], dimension: str, ranks: int) -> dict[str, int]:
    """Of a request, by what the inputs of a tiny model call them: ranks divide `dimension` alone, into odd numbers.

    Of Qwen-Image 2.1, whose tokens go by fours, into odd numbers of fours; HiDream's pictures are square.
    """
    if name == "hidream":
        return {"side": 3 * ranks}
    if dimension == "image_tokens":
        return {"height": 2 * ranks, "width": 6} if name == "qwen-image-2.1" else {"height": ranks, "width": 5}
    return {_CALLED[size]: 3 * ranks if size == dimension else 3 for size in sizes}


def usual(whole: Traced, latents: torch.Tensor) -> Traced:
    """The same with the size of these latents as the usual one, by which it is decided what is shared out.

    Rows of tokens alone do not tell their sides; those are decided by the published size.
    """
    sides = [n for n, entry in zip(latents.shape[1:], _latent(whole.checkpoint).shape, strict=True) if _open(entry)]
    if len(sides) > 1:
        (whole.checkpoint.root / "card.json").write_text(json.dumps({"latent_size": sides}))
    return replace(whole, checkpoint=replace(whole.checkpoint))  # which reads it once


def _open(entry) -> bool:
    return bool(names(entry) - {"batch"})


def _latent(checkpoint):
    return next(s for s in checkpoint.family.inputs(checkpoint.config) if s.role == "latent")


def shared_out(whole: Traced, options: Options) -> Traced:
    """The trace of a whole model as that of one rank; the whole one stays."""
    how = parallel_of(whole.checkpoint, options)
    assert how is not None
    trace = shard(copied(whole).trace, how.mode, how.degree, how.dimension, whole.checkpoint.family.name)
    return replace(whole, trace=trace)


def parallel_options(mode, ranks, granularity="module", layout="snapshots", latent_size=None) -> Options:
    how = {"engine": "inductor", "parallel": mode, "degree": ranks, "latent_size": latent_size}
    return options_of(granularity, layout, ORDER, **how)


def traced_for_ranks(name: str, folder: Path) -> Traced:
    """The trace of a whole model as it is declared for ranks; where that is at one size, its sizes are open still."""
    checkpoint = open_checkpoint(str(folder), FAMILIES[MODELS[name][0]])
    asked = parallel_options("gather", 2, latent_size=checkpoint.latent_size)
    return trace_model(declared_for(checkpoint, asked), options_of())


def fixed_size(whole: Traced, latents: torch.Tensor) -> tuple[int, ...] | None:
    """That of the export, where the model is shared out at one size alone; none where it is at any."""
    checkpoint = whole.checkpoint
    if not checkpoint.family.shared:
        return None
    return checkpoint.latent_size if len(checkpoint.latent_size) == 3 else (*latents.shape[-2:],)


def crossed(name: str, folder: Path, ranks, granularities, layouts, in_turn=False) -> Iterator[dict]:
    """Every case of a model; one that says why where it is not shared out.

    Every granularity and layout where a rank's rows are those that they would be at the published size, and one of
    them, in turn, where they are along another size; in turn everywhere if asked.
    """
    model = wide(name)
    model.save_pretrained(folder)
    whole = traced_for_ranks(name, folder)
    alone, sizes = draft(copied(whole), options_of()), open_sizes(whole.checkpoint)
    how, turns = list(product(granularities, layouts)), cycle(product(granularities, layouts))
    usually = {count: _usual_dimension(whole, count) for count in ranks}  # while the published size is the usual one
    for count, first in usually.items():
        for size in sorted(sizes, key=lambda size: size != first) or [first]:
            chosen = sizes_along(name, sizes, size, count)
            inputs = MODELS[name][2](model, len(PLAN), batch=BATCH, **chosen)
            reference = cache(partial(oracle.replay, model, *inputs, PLAN, ORDER))
            for mode in MODES:
                case = {"model": name, "mode": mode, "ranks": count, "along": size}
                try:
                    fixed = fixed_size(whole, inputs[0])
                    shared = shared_out(usual(whole, inputs[0]), parallel_options(mode, count, latent_size=fixed))
                except (ConfigError, ExportError) as error:
                    yield {**case, "refused": str(error)}
                    continue
                for granularity, layout in how if size == first and not in_turn else [next(turns)]:
                    made = draft(shared, parallel_options(mode, count, granularity, layout, fixed))
                    assert made.parallel.dimension == size, f"cut along {made.parallel.dimension}, expected {size}"
                    found = held(model, inputs, made, reference(granularity), (alone, whole))
                    yield {**case, "granularity": granularity, "layout": layout, **found}


def _usual_dimension(whole: Traced, ranks: int) -> str:
    """Which size is shared out at the published size; the first one where they divide none of it."""
    try:
        return parallel_of(replace(whole.checkpoint), parallel_options(MODES[0], ranks)).dimension
    except ConfigError:
        return next(iter(open_sizes(whole.checkpoint)), "")


def held(model, inputs, made: Draft, reference: torch.Tensor, alone: tuple[Draft, Traced]) -> dict:
    """What a case gave, and what was expected."""
    mode, ranks, dimension = made.parallel.mode, made.parallel.degree, made.parallel.dimension
    latents, timestep, conditioning = inputs
    untouched = plain(model, inputs, 2)

    def one(denoiser):
        counting = Counting(denoiser.share.group)
        sizes = denoiser.share.sizes(denoiser.sizes(latents.shape[1:], as_arrays(conditioning)))
        seen = replayed(denoiser, inputs, PLAN)
        counts = sum(counting.calls.values()), counting.bytes
        return seen, replayed(denoiser, (latents[:2], timestep[:2], conditioning), "FF"), counts, sizes

    results = sound(denoisers_on_ranks(made, one))
    (seen, full, (calls, given), mine), full_steps = results[0], PLAN.count("F")
    formula = wire_by_shapes(*alone, dimension, mine, mode, ranks)
    graphs = counted({cut.name: cut.module.graph for cut in made.graphs})
    expected = {
        "graphs": {"prepare": 0, "full": formula["collectives"], "forecast": 0},
        "collectives": full_steps * formula["collectives"],
        "bytes": full_steps * formula["sent"],
        "bytes by the graph": full_steps * sent(made.split.full, mine, ranks),
    }
    found = {"graphs": graphs, "collectives": calls, "bytes": given, "bytes by the graph": given}
    off, bound = _errors(seen, reference), allowed(model, reference, PLAN, ORDER)
    apart = {what: [step for step, kind in enumerate(PLAN) if kind == letter] for what, letter in KINDS.items()}
    held = {what: _worst(off[steps], bound[steps]) for what, steps in apart.items()}
    twice = 2 * allowed(model, untouched, "FF", ORDER)  # both are of float32
    held["all full"] = _worst(_errors(full, untouched), twice)
    alike = all(torch.equal(s, seen) and torch.equal(f, full) and n == (calls, given) for s, f, n, _ in results[1:])
    wrong = [what for what, is_wrong in (
        *((what, not one["error"] <= one["bound"]) for what, one in held.items()),
        ("ranks alike", not alike),
        *((what, found[what] != expected[what]) for what in expected),
        ("attentions", not formula["collectives"]),
        ("rows even", mine[dimension] % 2 == 0 and mine[dimension] % 12),
    ) if is_wrong]  # fmt: skip
    numbers = {"collectives": graphs["full"], "attentions": formula["collectives"] // EACH[mode], "bytes": given}
    told = {"found": found, "expected": expected} if wrong else {}
    return {"rows": mine[dimension], **held, **numbers, **told, "wrong": wrong}


def replayed(denoiser, inputs, plan) -> torch.Tensor:
    """noise_pred [S, ...] of all ranks."""
    slot, latents = begun(denoiser, inputs, plan, ORDER)
    return predicted(denoiser, slot, latents, inputs)


@torch.no_grad()
def plain(model, inputs, steps) -> torch.Tensor:
    """noise_pred [S, ...] of the untouched model in float32."""
    (latents, timestep, conditioning), call = inputs, oracle.FAMILIES[type(model).__name__].call
    given = zip(latents[:steps], timestep[:steps], oracle.next_timesteps(model, timestep[:steps]), strict=True)
    return torch.stack([call(model, t.expand(len(x)), hidden_states=x, **conditioning, **n) for x, t, n in given])


def _errors(seen: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[S], the largest of each step."""
    assert seen.shape == expected.shape, f"{[*seen.shape]}, expected {[*expected.shape]}"
    return (seen.double() - expected.double()).abs().flatten(1).amax(1)


def _worst(errors: torch.Tensor, bounds: torch.Tensor) -> dict[str, float]:
    """Where an error is the largest share of its bound."""
    step = int((errors / bounds).nan_to_num(nan=torch.inf).argmax())
    return {"error": float(f"{errors[step]:.3g}"), "bound": float(f"{bounds[step]:.3g}")}


def main(models: list[str], **asked) -> None:
    torch.set_num_threads(1)
    for name in models:
        begin = time.monotonic()
        with TemporaryDirectory() as folder:
            for case in crossed(name, Path(folder), **asked):
                print(json.dumps({**case, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
                begin = time.monotonic()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(**json.loads(sys.argv[1]))
