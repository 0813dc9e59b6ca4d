"""The command line: families export, verbs use what was exported.

Every verb exits 0 on success, 1 on a failed check, 2 on bad usage or input, with one sentence and no traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taylorseer_export.errors import ConfigError, TaylorSeerError
from taylorseer_export.families import FAMILIES, family_named
from taylorseer_export.families.family import Family
from taylorseer_export.options import PROGRAM, VERBS, family_parser, help_text

if TYPE_CHECKING:
    from taylorseer_export.method import Plan
    from taylorseer_export.runtime.denoiser import Denoiser


_CUT_SHORT = 141  # what a shell reports for a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    A reader that leaves early, like `head`, ends the command quietly. A command that was already done keeps its code.
    """
    code: Any = _CUT_SHORT
    try:
        try:
            code = _answer(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as leaving:  # argparse, after its help
            code = leaving.code
            raise
        finally:
            sys.stdout.flush()
    except OSError as error:  # of standard output; all others were answered
        with suppress(OSError):  # or the interpreter's own last flush would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = _say(f"standard output is not writable ({error.strerror}), expected room on it; mend that", 2)
    return int(code or 0)


def _answer(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(help_text())
            return 0
        if arguments[0] == "--version":
            from importlib.metadata import version

            print(version("taylorseer-export"))
            return 0
        command, rest = arguments[0], arguments[1:]
        if command in VERBS:
            build, _ = VERBS[command]
            return _RUN[command](build(command).parse_args(rest))
        family = _family_or_verb(command)
        return _export(family, family_parser(family).parse_args(rest))
    except TaylorSeerError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("the command was interrupted; nothing half-written was left, run it again", 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say(
            f"{error.filename or 'a file'} is not usable ({error.strerror}), expected access to it; mend that", 2
        )


def _say(sentence: str, code: int) -> int:
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return code


# Export --------------------------------------------------------------------------------------------------------------


def _export(family: Family, given: argparse.Namespace) -> int:
    if given.model is None:
        print(
            f"no --model: exporting the tiny {family.name} embedded in this package; "
            f"for the real one: {PROGRAM} {family.name} --model {family.reference}"
        )
    _need("export", "torch", "diffusers", "accelerate", "onnx", "onnxscript", "onnxruntime")
    from taylorseer_export.build import export
    from taylorseer_export.graph.checkpoint import open_checkpoint
    from taylorseer_export.report import planner
    from taylorseer_export.report.card import card

    checkpoint = open_checkpoint(given.model, family)
    options = export.Options(
        order=given.order,
        interval=given.interval,
        warmup=given.warmup,
        steps=given.steps,
        dialect=given.dialect,
        granularity=given.state or export.Options.granularity,
        layout=given.layout or export.Options.layout,
        engine=given.engine,
        precision=given.precision,
        state_dtype=given.state_dtype,
        latent_size=_latent_size(given, checkpoint.latent_scale),
        batch=given.batch,
    )
    export.check_options(options)
    if given.slots > 1 and not (given.memory_budget or given.dry_run):
        raise ConfigError(f"--slots is {given.slots} without a budget, expected --memory-budget too; add it")
    name = given.name or ("tiny" if given.model is None else Path(given.model.rstrip("/")).name.lower())
    with _progress("tracing and splitting", 1) as advance:
        traced = export.trace_model(checkpoint, options)
        rows = planner.choices(traced, options) if given.memory_budget or given.dry_run else ()
        advance(1, 1)
    if given.memory_budget:
        best = planner.choose(rows, given.memory_budget, options.order, given.slots, given.state, given.layout)
        print(planner.reason(best, rows, given.memory_budget, given.slots, given.state, given.layout))
        options = replace(options, granularity=best.granularity, layout=best.layout)
    plan = export.draft(traced, options)
    print(card(export.describe(plan, name)))
    if given.dry_run:
        print(planner.table(rows, given.slots))
        return 0
    with _stages() as report:
        folder = export.write_bundle(plan, given.out, name, report)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}/ ({written / 1e6:.1f} MB); next: {PROGRAM} run {folder}")
    return 0


def _latent_size(given: argparse.Namespace, scale: int) -> tuple[int, int] | None:
    """(height, width) of the latent image; `scale` pixels make one latent pixel."""
    if given.size and given.latent_size:
        raise ConfigError("--size and --latent-size are both given, expected one of them; leave one out")
    if given.latent_size or not given.size:
        return given.latent_size
    for label, value in zip(("height", "width"), given.size, strict=True):
        if value % scale:
            raise ConfigError(f"--size {label} is {value}, expected a multiple of {scale} (pixels); change it")
    return given.size[0] // scale, given.size[1] // scale


# Verbs ---------------------------------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> int:
    _need("sample", "torch", "diffusers", "PIL")
    import numpy as np

    from taylorseer_export.runtime import sampling
    from taylorseer_export.runtime.picture import grid

    denoiser = _open(given)
    plan = _plan(denoiser, given)
    manifest = denoiser.manifest
    count = max(len(given.label or ()), len(given.prompt or ()), len(given.seed))
    seeds = _spread("--seed", given.seed, count)
    if manifest.family == "dit":
        labels = _spread("--label", given.label or list(range(10))[:count], count)
        request = sampling.dit_request(denoiser, labels, seeds, given.guidance_scale)
        names = [f"label {label}" for label in labels]
    else:
        prompts = given.prompt or (None if given.inputs else ["a red circle left of a blue square"])
        prompts = None if prompts is None else _spread("--prompt", prompts, count)
        tensors = _read_tensors(given.inputs) if given.inputs else None
        request = sampling.flux_request(denoiser, prompts, seeds, given.size, tensors, given.guidance_scale)
        names = list(prompts or [f"seed {seed}" for seed in seeds])
    with _progress("sampling", len(plan)) as advance:
        result = sampling.sample(
            denoiser, request, plan, given.order, given.form, on_step=lambda k: advance(k + 1, len(plan))
        )
    out = given.out or Path(
        f"{manifest.family}-{manifest.name}.png" if manifest.model.embedded else "latents.safetensors"
    )
    if out.suffix == ".safetensors":
        _write_tensors(out, {"latents": result.latents}, {"plan": str(plan)})
    else:
        made = sampling.pictures(denoiser, request, result)
        scale = max(1, 256 // made.shape[1])
        grid([list(made)], scale, (), names if len(names) > 1 else ()).save(out)
    kinds = np.array(list(result.executed))
    times = np.array(result.milliseconds)
    forecast = times[kinds == "."]
    print(f"plan      {result.executed} ({result.executed.count('F')} of {len(plan)} steps full, as planned)")
    print(
        f"times     prepare {result.prepare_ms:.1f} ms, full {np.median(times[kinds == 'F']):.2f} ms"
        + (f", forecast {np.median(forecast):.2f} ms" if len(forecast) else "")
        + f", loop {times.sum():.0f} ms"
    )
    print(f"wrote     {out}")
    return 0


def _replay(given: argparse.Namespace) -> int:
    import numpy as np

    from taylorseer_export.errors import StepError

    tensors = _read_tensors(given.inputs)
    for name in ("latents", "timestep"):
        if name not in tensors:
            raise StepError(
                f"tensor `{name}` is missing in {given.inputs}, expected latents [S, ...] and timestep [S]; add it"
            )
    latents, timesteps = tensors.pop("latents"), tensors.pop("timestep")
    if latents.ndim < 2 or timesteps.shape != (len(latents),):
        raise StepError(
            f"tensor `timestep` is {list(timesteps.shape)}, expected [{len(latents)}], one for each of the latents "
            f"{list(latents.shape)}; give both the same first dimension"
        )
    denoiser = _open(given)
    plan = denoiser.plan(given.plan, len(latents))
    slot = denoiser.slot(denoiser.sizes(latents.shape[1:], tensors))
    slot.start(tensors, plan, given.order, timesteps, given.form)
    predictions = []
    with _progress("replaying", len(plan)) as advance:
        for step, latent in enumerate(latents):
            predictions.append(slot.step(latent))
            advance(step + 1, len(plan))
    _write_tensors(given.outputs, {"noise_pred": np.stack(predictions)}, {"plan": slot.executed})
    print(f"plan      {slot.executed}\nwrote     {given.outputs}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    _need("export", "torch", "diffusers")
    from taylorseer_export.report import inputs, verify

    denoiser = _open(given)
    checkpoint = verify.checkpoint_of(denoiser, given.model)
    data = inputs.random_trajectory(denoiser, given.steps)
    total = len(verify.plans(denoiser, given.steps))
    done = 0
    with _progress("comparing", total) as advance:

        def on_plan(result: verify.Parity) -> None:
            nonlocal done
            done += 1
            advance(done, total)
            seen = max(result.seen)
            print(f"{result.plan}  order {result.order}  differs by {seen:.1e}, {result.ratio:.2f} of its bound")

        verify.verify(denoiser, checkpoint, data, on_plan)
    print(f"{denoiser.manifest.family}-{denoiser.manifest.name} equals the eager model within its bounds")
    return 0


def _bench(given: argparse.Namespace) -> int:
    from taylorseer_export.report import bench

    denoiser = _open(given)
    plan = _plan(denoiser, given)
    with _progress("loops", 2 * (given.repeats + 1), quiet=given.json) as advance:
        done = iter(range(1, 2 * (given.repeats + 1) + 1))
        record = bench.bench(
            denoiser, plan, given.order, repeats=given.repeats,
            on_loop=lambda: advance(next(done), 2 * (given.repeats + 1)),
        )  # fmt: skip
    print(json.dumps(record) if given.json else bench.table(record))
    return 0


def _inspect(given: argparse.Namespace) -> int:
    from taylorseer_export.bundle.store import open_bundle
    from taylorseer_export.report.card import card, orders, size

    bundle = open_bundle(given.bundle)
    print(card(bundle.manifest))
    print(orders(bundle.manifest))
    for name, file in bundle.manifest.files.items():
        print(f"  file       {file.sha256[:16]}  {size(file.size):>9}  {name}")
    print(f"  digest     {bundle.manifest.digest}")
    print("  versions   " + ", ".join(f"{k} {v}" for k, v in bundle.manifest.engine.versions.items()))
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "replay": _replay,
    "verify": _verify,
    "bench": _bench,
    "inspect": _inspect,
}


# Small parts ---------------------------------------------------------------------------------------------------------


def _family_or_verb(command: str) -> Family:
    from difflib import get_close_matches

    if command not in FAMILIES and (close := get_close_matches(command, VERBS, n=1)):
        raise ConfigError(f"command is `{command}`, expected a family or a verb; did you mean `{close[0]}`?")
    return family_named(command)


def _open(given: argparse.Namespace) -> Denoiser:
    from taylorseer_export.runtime.denoiser import load

    return load(given.bundle, given.device, given.threads)


def _plan(denoiser: Denoiser, given: argparse.Namespace) -> Plan:
    return denoiser.plan(given.plan, given.steps)


def _spread(name: str, values: list[Any], count: int) -> list[Any]:
    """One value for every picture: as given, or one for all."""
    if len(values) not in (1, count):
        raise ConfigError(f"{name} has {len(values)} values, expected 1 or {count}; give one for each picture")
    return values if len(values) == count else values * count


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing, expected a safetensors file; check --inputs") from error
    except (SafetensorError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not readable ({error}), expected float32 safetensors; write it again") from error


def _write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write whole or not at all."""
    from safetensors.numpy import save_file

    if not path.parent.is_dir():
        raise ConfigError(f"folder {path.parent} is missing, expected it for {path.name}; create it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _need(extra: str, *modules: str) -> None:
    """Refuse early when an optional library is missing."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(
                f"{module} is not installed, expected it for this command; pip install 'taylorseer-export[{extra}]'"
            )


@contextmanager
def _progress(label: str, total: int, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that appears once the work has taken half a second."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, leave=False, delay=0.5, disable=quiet or None, file=sys.stderr) as bar:

        def advance(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield advance


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """The bar of an export: weights by bytes, then graphs by count."""
    with _progress("writing", 1) as advance:

        def report(stage: str, done: int, total: int) -> None:
            advance(done, total)

        yield report


if __name__ == "__main__":
    sys.exit(main())
