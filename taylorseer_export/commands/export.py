"""The families: export a model as a bundle of engines."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from taylorseer_export.bundle.device import DEVICES
from taylorseer_export.bundle.store import check_place
from taylorseer_export.commands.options import PROGRAM, device, engine_options, given_engine_options
from taylorseer_export.commands.terminal import progress, read_tensors, require_extra, stages
from taylorseer_export.compile.engines import ENGINES
from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Family
from taylorseer_export.method.guard import RULES
from taylorseer_export.values import memory, size, whole


def options(parser: argparse.ArgumentParser, family: Family) -> None:
    """Its options, with the family's defaults."""
    default = family.defaults
    what = parser.add_argument_group("what to export")
    what.add_argument(
        "--model",
        metavar="REF",
        help="diffusers folder, hub id, or safetensors or GGUF file of any layout; with --dry-run also a config.json "
        "alone (default: the embedded tiny model)",
    )
    what.add_argument("--variant", metavar="NAME", help="which weights of several, like fp16 (default: the plain ones)")
    what.add_argument(
        "--config",
        metavar="PATH",
        help="config of the transformer, or a published model's name, for weights that bring none (default: beside the "
        "weights; for one file that of the published model whose tensors it has)",
    )
    what.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="LoRA to add to the weights; may be repeated (default: none, scale 1)",
    )
    what.add_argument(
        "--lora-skip",
        action="append",
        choices=("text-encoder",),
        default=[],
        help="what of the LoRAs to leave out on purpose: their updates of text encoders, which no bundle holds "
        "(default: nothing, such a file is refused)",
    )
    what.add_argument(
        "--lora-rank",
        metavar="R",
        type=whole(1),
        help="highest rank of the LoRA that each request may bring to the engines, dimensionless (default: none does)",
    )
    what.add_argument(
        "--lora-targets",
        metavar="PATTERN",
        help="regular expression found in the names of the layers that it may change (default: all linear layers)",
    )
    form = "FxHxW" if len(family.latent_size) == 3 else "HxW"
    made = "video in frames and pixels" if len(family.latent_size) == 3 else "picture in pixels"
    what.add_argument("--size", metavar=form, type=size, help=f"{made}; makes the bundle static (default: any)")
    what.add_argument("--latent-size", metavar=form, type=size, help="the same in latent pixels (default: any)")
    what.add_argument("--batch", metavar="B", type=whole(1), help="samples per call of the transformer (default: any)")
    what.add_argument("--name", help="name of the bundle (default: the model's)")
    how = parser.add_argument_group("how to forecast")
    how.add_argument(
        "--order",
        "--max-order",
        type=whole(0, 4),
        default=default.order,
        help="highest order kept, 0 to 4, dimensionless (default: %(default)s)",
    )
    how.add_argument(
        "--interval",
        "--cache-interval",
        type=whole(1),
        default=default.interval,
        help="steps from one full step to the next (default: %(default)s)",
    )
    how.add_argument(
        "--warmup",
        "--warmup-steps",
        type=whole(1),
        default=default.warmup,
        help="full steps at the start (default: %(default)s)",
    )
    how.add_argument(
        "--steps",
        type=whole(1, 1000),
        help=f"denoising steps of the default plan (default: {_steps(family)})",
    )
    how.add_argument(
        "--dialect",
        choices=("original", "diffusers"),
        default="original",
        help="rule that places full steps after warm-up (default: %(default)s)",
    )
    how.add_argument(
        "--state",
        choices=("module", "residual", "last"),
        help="granularity: what is forecast (default: module, or the best that fits --memory-budget)",
    )
    how.add_argument(
        "--layout",
        choices=("snapshots", "derivatives"),
        help="what the Taylor buffers hold (default: snapshots, or the best that fits --memory-budget)",
    )
    how.add_argument(
        "--guard",
        action="append",
        choices=RULES,
        default=[],
        help="rule that requests may guard their forecasts by; may be repeated (default: none)",
    )
    how.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=memory,
        help="memory for weights, Taylor buffers and step tables, like 24GiB; chooses --state and --layout, "
        "and the format with --weights auto (default: no limit)",
    )
    how.add_argument(
        "--slots",
        metavar="N",
        type=whole(1),
        default=1,
        help="requests that share the memory budget at one time (default: %(default)s)",
    )
    engine = parser.add_argument_group("what to build")
    engine.add_argument(
        "--engine", default="onnxruntime", help=f"kind of engine: {', '.join(ENGINES)} (default: %(default)s)"
    )
    engine.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help=f"where the engines are to run: {DEVICES}; a GPU by its number builds them (default: what the engine "
        "serves best)",
    )
    engine.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="dtype of weights and arithmetic (default: %(default)s)",
    )
    engine.add_argument(
        "--weights",
        choices=("fp8", "nvfp4", "int8", "keep", "auto"),
        help="format of the weights of the blocks' linear layers; keep: what a quantised checkpoint has; auto: the "
        "widest that fits --memory-budget, if the precision does not. On a CPU this is for memory: only int8 with "
        "--activations token is faster too. All others keep the precision (default: all)",
    )
    engine.add_argument(
        "--activations",
        choices=("none", "token", "static"),
        help="what these layers read: as it comes, each token quantised, or all by one constant for each layer, found "
        "on samples or the checkpoint's own (default: token for fp8 and nvfp4 in TensorRT's engines, else none)",
    )
    engine.add_argument(
        "--samples",
        metavar="N",
        type=whole(1),
        help="samples that --activations static finds its constants by (default: all of --inputs or --prompts, or 8)",
    )
    engine.add_argument("--prompts", type=Path, help="for it, text file: a class per line (default: all in turn)")
    engine.add_argument(
        "--inputs",
        type=Path,
        help="for it, safetensors with the conditioning under diffusers' argument names, a row per sample; "
        "`negative_NAME` for guidance",
    )
    engine.add_argument(
        "--keep-precision",
        metavar="PATTERN",
        action="append",
        default=[],
        help="layers whose weights keep the precision, like *.attn.to_q; may be repeated (default: none)",
    )
    engine.add_argument(
        "--state-dtype",
        choices=("fp32", "fp16", "bf16"),
        help="dtype of the Taylor buffers; sums over them stay float32 (default: the precision)",
    )
    engine.add_argument(
        "--out", type=Path, default=Path("engines"), help="folder that gets <family>-<name>/ (default: %(default)s/)"
    )
    engine.add_argument(
        "--polygraphy", action="store_true", help="add example inputs and profiles for Polygraphy's command line"
    )
    engine.add_argument(
        "--whole",
        action="store_true",
        help="export the pipeline around the transformer too: text encoders, tokenizers and VAE of the folder that "
        "--model names (default: the transformer alone; without --model all that comes with it)",
    )
    engine.add_argument(
        "--without",
        action="append",
        choices=("text", "encode", "decode"),
        default=[],
        help="a part that --whole leaves out; may be repeated (default: none)",
    )
    engine.add_argument(
        "--parallel",
        choices=("gather", "ulysses"),
        help="share the latent's rows out over ranks: every rank gets all keys and values, or all rows of some heads "
        "(default: one process does all)",
    )
    engine.add_argument("--degree", metavar="N", type=whole(2, 64), help="how many ranks (default: 2)")
    engine.add_argument("--dry-run", action="store_true", help="print the card and the memory table, write nothing")
    engine_options(parser)


def _steps(family: Family) -> str:
    others = [
        f"{change['defaults'].steps} for {word}" for word, change in family.variants.items() if "defaults" in change
    ]
    return ", ".join([str(family.defaults.steps), *others])


def run(family: Family, given: argparse.Namespace) -> int:
    """Trace, split, build, write."""
    require_extra("export", "torch", "diffusers", "accelerate")
    if given.polygraphy:
        require_extra("polygraphy", "polygraphy")
    from taylorseer_export.compile.gpu import building_on

    with building_on(given.device):
        return _export(family, given)


def _export(family: Family, given: argparse.Namespace) -> int:
    from taylorseer_export.checkpoint.checkpoint import open_checkpoint
    from taylorseer_export.compile import export
    from taylorseer_export.compile.api import bundle_name
    from taylorseer_export.compile.parts import parts_asked, refuse_missing
    from taylorseer_export.report import memory_table
    from taylorseer_export.report.card import card
    from taylorseer_export.report.input_scales import check_samples, input_scales
    from taylorseer_export.report.samples import read_prompts

    if given.lora_skip and not given.lora:
        raise ConfigError("--lora-skip is given without --lora, expected it too; add it, or leave --lora-skip out")
    if given.degree and not given.parallel:
        raise ConfigError("--degree is given without --parallel, expected it too; add it, or leave --degree out")
    if given.without and given.model and not given.whole:
        raise ConfigError("--without is given without --whole, expected it too; add it, or leave --without out")
    skip = tuple(dict.fromkeys(given.lora_skip))
    checkpoint = open_checkpoint(
        given.model, family, given.variant, given.config, given.lora, given.dry_run, skip, given.whole
    )
    if formats := checkpoint.said_of_formats(given.precision):
        print(formats)
    if given.model is None:
        print(
            f"no --model: exporting the tiny {family.name} embedded in this package; "
            f"for the real one: {PROGRAM} {family.name} --model {family.reference}"
        )
        if "weights" in checkpoint.card:
            print(f"its weights are {checkpoint.card['weights']}")
    if checkpoint.taken:
        print(
            f"no --config: taking that of {'/'.join(checkpoint.taken)}, which all {len(checkpoint.shapes)} tensors of "
            f"{checkpoint.reference} fit in name and shape, and no other of this package"
        )
    if checkpoint.aside:
        parts = " and ".join(f"{tensors} tensors of {part}" for part, tensors in checkpoint.aside.items())
        print(f"set aside: {parts} in {checkpoint.reference}, no part of the transformer; a bundle holds it alone")
    for lora in checkpoint.loras:
        for part, tensors in lora.skipped.items():
            print(f"left out: {tensors} tensors of {part} in {lora.path}, by --lora-skip {part}")
    options = export.Options(
        order=given.order,
        interval=given.interval,
        warmup=given.warmup,
        steps=given.steps or checkpoint.family.defaults.steps,
        dialect=given.dialect,
        granularity=given.state or export.Options.granularity,
        layout=given.layout or export.Options.layout,
        engine=given.engine,
        engine_options=given_engine_options(given),
        device=given.device and given.device.kind,
        precision=given.precision,
        state_dtype=given.state_dtype,
        latent_size=_latent_size(given, family, checkpoint.latent_scale),
        batch=given.batch,
        polygraphy=given.polygraphy,
        guards=tuple(dict.fromkeys(given.guard)),
        parts=parts_asked(checkpoint, given.whole, given.without),
        weights=given.weights,
        activations=given.activations,
        keep_precision=tuple(dict.fromkeys(given.keep_precision)),
        lora_rank=given.lora_rank,
        lora_targets=given.lora_targets,
        parallel=given.parallel,
        degree=given.degree or export.Options.degree,
    )
    asked = options
    if asked.weights == memory_table.AUTO:
        if not given.memory_budget:
            raise ConfigError(
                "--weights is auto without --memory-budget, expected it too; add it, or name a format like fp8"
            )
        if asked.activations == "static":
            raise ConfigError(
                "--activations is static with --weights auto, expected a format by name, since samples are run for it; "
                "name one like fp8"
            )
        options = memory_table.in_precision(asked)
    export.check_options(options)
    source = export.sampling_of(checkpoint).source
    sampled = check_samples(options, source, given.samples, given.prompts, given.inputs)
    prompts = read_prompts(given.prompts) if given.prompts else None
    conditioning = read_tensors(given.inputs) if given.inputs else None
    if not given.dry_run:
        refuse_missing(checkpoint, options.parts)
    if given.slots > 1 and not (given.memory_budget or given.dry_run):
        raise ConfigError(f"--slots is {given.slots} without a budget, expected --memory-budget too; add it")
    name = bundle_name(given.model, given.name)
    if not given.dry_run:
        check_place(given.out / export.folder_name(checkpoint, name))
    traced = None
    if sampled:
        traced = export.trace_model(checkpoint, options)
        with progress("sampling for --activations static", 1) as advance:
            found = input_scales(traced, options, given.samples, prompts, conditioning, advance)
        asked = options = replace(options, input_scales=found.scales, samples=found.samples)
    with progress("tracing and splitting", 1) as advance:
        traced = traced or export.trace_model(checkpoint, options)
        counted = given.memory_budget or given.dry_run
        rows, others = memory_table.planned(traced, asked, given.memory_budget, given.slots) if counted else ((), ())
        advance(1, 1)
    if given.memory_budget:
        decided = (given.slots, given.state, given.layout)
        best = memory_table.choose(rows, given.memory_budget, options.order, *decided, others)
        print(memory_table.reason(best, rows, given.memory_budget, *decided))
        options = asked if best.weights else options
        options = replace(options, weights=best.weights, granularity=best.granularity, layout=best.layout)
    plan = export.draft(traced, options)
    if options.parts:
        print(f"whole: beside the transformer, the parts {' and '.join(options.parts)} of {checkpoint.root}")
    print(card(export.describe(plan, name)))
    if given.dry_run:
        print(memory_table.table(rows, given.slots))
        return 0
    with stages() as report:
        folder = export.write_bundle(plan, given.out, name, report)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}/ ({written / 1e6:.1f} MB); next: {PROGRAM} run {folder}")
    return 0


def _latent_size(given: argparse.Namespace, family: Family, scale: int) -> tuple[int, ...] | None:
    """Size of the latent that the options fix, or None."""
    if given.size and given.latent_size:
        raise ConfigError("--size and --latent-size are both given, expected one of them; leave one out")
    if given.latent_size is not None:
        _check_form("--latent-size", given.latent_size, family)
        return tuple(given.latent_size)
    return None if given.size is None else latent_size("--size", given.size, family, scale)


def latent_size(option: str, value: tuple[int, ...], family: Family, scale: int) -> tuple[int, ...]:
    """Size of the latent: `scale` pixels make a latent pixel, and after the first frame `time_scale` a latent frame.

    Raises:
        ConfigError: The size has another form, or does not divide.
    """
    _check_form(option, value, family)
    *frames, height, width = value
    for label, pixels in (("height", height), ("width", width)):
        if pixels % scale:
            raise ConfigError(f"{option} {label} is {pixels}, expected a multiple of {scale} (pixels); change it")
    if frames and (frames[0] - 1) % family.time_scale:
        raise ConfigError(
            f"{option} frames is {frames[0]}, expected a multiple of {family.time_scale} and 1, like 81; change it"
        )
    return (*((f - 1) // family.time_scale + 1 for f in frames), height // scale, width // scale)


def _check_form(option: str, value: tuple[int, ...], family: Family) -> None:
    if len(value) != len(family.latent_size):
        form = "FxHxW (frames first)" if len(family.latent_size) == 3 else "HxW"
        raise ConfigError(
            f"{option} is {'x'.join(map(str, value))}, expected {form} for family {family.name}; write it so"
        )
