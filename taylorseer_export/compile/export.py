"""Export: from a checkpoint to a bundle, in the order trace, split, weights, graphs, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.bundle.low_rank import Layer, LowRank
from taylorseer_export.bundle.manifest import (
    MANIFEST,
    Comfy,
    File,
    Manifest,
    Model,
    PartName,
    Pipeline,
    PipelinePart,
    PlanDefaults,
    Sampling,
    Site,
    State,
    tool_version,
)
from taylorseer_export.bundle.parallel import ranges_of_one
from taylorseer_export.bundle.schedulers import SCHEDULERS
from taylorseer_export.bundle.store import hash_files, writing
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.draft import PRECISIONS as PRECISIONS
from taylorseer_export.compile.draft import Draft as Draft
from taylorseer_export.compile.draft import Options as Options
from taylorseer_export.compile.engines import Progress, builder, check_engine
from taylorseer_export.compile.parallel import check_parallel, declared_for, parallel_of, sizes_of_one
from taylorseer_export.compile.parts import refuse_missing, write_parts
from taylorseer_export.compile.polygraphy import check_sizes, write_examples
from taylorseer_export.compile.quantised import check_weights, quantised_entry, quantised_trace
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.graph.low_rank import check_rank, low_rank
from taylorseer_export.graph.shard import shard
from taylorseer_export.graph.split import split
from taylorseer_export.graph.trace import Trace, trace


@dataclass(frozen=True)
class Traced:
    """A checkpoint traced once, from which any number of drafts are made.

    Attributes:
        checkpoint: The checkpoint, its config completed by the model's defaults.
        trace: The tapped graph; splitting narrows it once and leaves it alone after that.
        precision: `fp32`, `fp16` or `bf16`, fixed by the trace.
        buffers: Tensors that are computed when the model is built and are in no checkpoint.
        layers: Those with low-rank inputs.
    """

    checkpoint: Checkpoint
    trace: Trace
    precision: str
    buffers: dict[str, torch.Tensor]
    layers: tuple[Layer, ...] = ()


def check_options(options: Options) -> None:
    """Refuse contradictions before any file is read.

    Raises:
        ConfigError: An option is out of range, or this engine does not do what is asked.
    """
    options.plan()
    if not 0 <= options.order <= 4:
        raise ConfigError(f"--order is {options.order}, expected 0 to 4 (dimensionless); the paper uses 1 to 4")
    check_parallel(options)
    check_engine(options)
    check_weights(options)
    check_rank(options.lora_rank, options.lora_targets)
    if options.batch is not None and options.batch < 1:
        raise ConfigError(f"--batch is {options.batch}, expected at least 1 (samples); leave it out for any batch")


def trace_model(checkpoint: Checkpoint, options: Options) -> Traced:
    """Trace a checkpoint once, whatever the granularity, layout, order and sizes of the drafts made from it.

    Args:
        checkpoint: The model; no weight of it is read.
        options: Its precision is traced; its sizes are checked before the work starts.

    Raises:
        ConfigError, CheckpointError, ExportError: See the parts.
    """
    check_options(options)
    checkpoint = declared_for(checkpoint, options)
    sampling_of(checkpoint)
    dtype = PRECISIONS[options.precision]
    skeleton = checkpoint.skeleton(dtype)
    # The model knows the defaults of entries that an older config.json lacks.
    config = {key: value for key, value in dict(skeleton.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
    checkpoint = replace(checkpoint, config=config)
    _sizes(checkpoint, options)
    traced = trace(skeleton, checkpoint.family, dtype)
    if shared := parallel_of(checkpoint, options):
        traced = shard(traced, shared.mode, shared.degree, shared.dimension, checkpoint.family.name)
    stored = checkpoint.files.keys() | checkpoint.derived.keys()
    computed = {name: value for name, value in skeleton.named_buffers() if name not in stored}
    layers: tuple[Layer, ...] = ()
    if options.lora_rank is not None:
        traced, layers = low_rank(traced, options.lora_rank, options.lora_targets)
    return Traced(checkpoint, traced, options.precision, computed | traced.constants, layers)


def draft(source: Checkpoint | Traced, options: Options) -> Draft:
    """Split a model, tracing it first if that was not done; reads no weights and writes nothing.

    Raises:
        ConfigError, CheckpointError, ExportError: See the parts.
    """
    traced = source if isinstance(source, Traced) else trace_model(source, options)
    assert traced.precision == options.precision, "bug in taylorseer-export: the trace is of another precision"
    check_options(options)
    checkpoint = traced.checkpoint
    shared = parallel_of(checkpoint, options)
    ranges = ranges_of_one(shared, checkpoint.family.dimensions(checkpoint.config))
    sizes = sizes_of_one(shared, _sizes(checkpoint, options))
    how = (options.granularity, options.layout, options.order, options.state_type(), options.guards)
    quantised = quantised_trace(traced.trace, options, checkpoint)
    pieces = split(quantised.trace, *how)
    default = checkpoint.family.latent_sizes(checkpoint.config, *checkpoint.latent_size)
    default |= checkpoint.family.typical
    default |= {name: checkpoint.card[name] for name in ranges if name in checkpoint.card}
    # Guidance by a batch of two halves doubles what a single picture needs.
    default |= {"batch": 2 if checkpoint.family.guidance == "batched" else 1}
    default = sizes_of_one(shared, default)
    within = {name: min(max(default.get(name, low), low), high) for name, (low, high) in ranges.items()}
    typical = {name: sizes[name] or within[name] for name in ranges} | {"steps": options.steps}
    stored = {}
    for name in dict.fromkeys(n for cut in pieces.graphs for n in cut.parameters()):
        value = traced.buffers[name] if name in traced.buffers else attrgetter(name)(quantised.trace.module)
        stored[name] = (value.dtype, tuple(value.shape))
    held = {*stored, *(part.weight for part in quantised.parts.values())}
    lora = _low_rank(traced, options, held) if traced.layers else None
    return Draft(checkpoint, options, pieces, sizes, typical, stored, traced.buffers, quantised.parts, lora, shared)


def _low_rank(traced: Traced, options: Options, held: Collection[str]) -> LowRank:
    """The low-rank inputs, and the modules whose weights no graph reads: what a LoRA says of these changes nothing."""
    checkpoint = traced.checkpoint
    read = {*held, *(one.source for one in checkpoint.derived.values())}
    weights = [n for n, shape in checkpoint.shapes.items() if n.endswith(".weight") and len(shape) == 2]
    unread = tuple(sorted(n.removesuffix(".weight") for n in weights if n not in read))
    assert options.lora_rank is not None, "bug in taylorseer-export: low-rank inputs of no rank"
    return LowRank(rank=options.lora_rank, pattern=options.lora_targets, layers=traced.layers, unread=unread)


def _sizes(checkpoint: Checkpoint, options: Options) -> dict[str, int | None]:
    """Dimension -> the one size that the options fix, or None."""
    family, config = checkpoint.family, checkpoint.config
    ranges = family.dimensions(config)
    sizes: dict[str, int | None] = {name: low if low == high else None for name, (low, high) in ranges.items()}
    asked = options.latent_size
    if options.parallel and family.shared:  # at one size alone
        asked = asked or checkpoint.latent_size
    fixed = {} if asked is None else family.latent_sizes(config, *asked)
    if options.batch is not None:
        fixed["batch"] = options.batch
    for name, size in fixed.items():
        if name not in ranges:
            continue
        low, high = ranges[name]
        if not low <= size <= high:
            raise ConfigError(
                f"size `{name}` is {size}, expected {low} to {high} for family {family.name}; change --size or --batch"
            )
        sizes[name] = size
    return sizes


def folder_name(checkpoint: Checkpoint, name: str) -> str:
    """Of the bundle `name` of a checkpoint."""
    return f"{checkpoint.family.name}-{name}"


def write_bundle(plan: Draft, out: Path, name: str, progress: Progress | None = None) -> Path:
    """Build the engines of a draft and write its bundle `out/<family>-<name>/`, whole or not at all.

    Args:
        plan: What to write.
        out: Folder that gets the bundle.
        name: Name of the bundle within its family.
        progress: Called with (stage, done, total); bytes for weights, graphs for graphs.

    Raises:
        ConfigError: `out` cannot hold a bundle, or example inputs would be too large.
        BuildError: A graph has no form in this engine.
        BundleError: The disk is full.
    """
    checkpoint = plan.checkpoint
    target = out / folder_name(checkpoint, name)
    graphs = {cut.name: plan.contract(cut) for cut in plan.split.graphs}
    if plan.options.polygraphy:
        check_sizes(graphs, plan.dimensions())
    report = progress or (lambda *_: None)
    refuse_missing(checkpoint, plan.options.parts)
    with writing(target, plan.weights_bytes() + (32 << 20)) as folder:
        builder(plan.options.engine).build(plan, folder, report)
        parts = write_parts(checkpoint, plan.options, folder, report)
        if plan.options.polygraphy:
            write_examples(folder, graphs, plan.dimensions())
        manifest = describe(plan, name, checkpoint.sha256(), hash_files(folder), parts)
        (folder / MANIFEST).write_bytes(manifest.to_json())
    return target


def describe(
    plan: Draft,
    name: str,
    weights_sha256: str = "0" * 64,
    files: Mapping[str, File] | None = None,
    parts: Mapping[PartName, PipelinePart] | None = None,
) -> Manifest:
    """The manifest of a draft: everything about the bundle, before or after its files are written.

    Args:
        plan: The draft.
        name: Name of the bundle within its family.
        weights_sha256: Hash of the checkpoint; zeros while it is not known.
        files: Hash and size of every file; empty entries for the graphs while they are not written.
        parts: What of the pipeline was written besides the transformer.
    """
    checkpoint, options = plan.checkpoint, plan.options
    family = checkpoint.family
    graphs = {cut.name: plan.contract(cut) for cut in plan.split.graphs}
    return Manifest(
        tool_version=tool_version(),
        family=family.name,
        name=name,
        precision=options.precision,  # type: ignore[arg-type]
        model=_model_of(checkpoint, weights_sha256),
        dimensions=plan.dimensions(),
        sites=tuple(Site(name=site, shape=shape) for site, shape in plan.split.sites.items()),
        state=State(
            granularity=options.granularity,
            layout=options.layout,
            order=options.order,
            dtype=str(options.state_type()).removeprefix("torch."),  # type: ignore[arg-type]
            guards=options.guards,
        ),
        graphs=graphs,  # type: ignore[arg-type]
        plan=PlanDefaults(
            steps=options.steps,
            interval=options.interval,
            warmup=options.warmup,
            order=options.order,
            dialect=options.dialect,
            text=str(options.plan()),
        ),
        sampling=sampling_of(checkpoint, parts or {}),
        pipeline=pipeline_of(checkpoint),
        comfy=comfy_of(checkpoint),
        lora=plan.lora,
        parallel=plan.parallel,
        parts=dict(parts or {}),
        quantised=quantised_entry(plan),
        engine=builder(options.engine).engine(options).model_copy(update={"options": _texts(options.engine_options)}),
        files=dict(files or {graph.file: File(sha256="0" * 64, size=0) for graph in graphs.values()}),
        cache_key=_cache_key(weights_sha256, options),
    )


def _model_of(checkpoint: Checkpoint, weights_sha256: str) -> Model:
    try:
        return Model(
            reference=checkpoint.reference,
            class_name=checkpoint.family.model_class,
            config=checkpoint.config,
            weights_sha256=weights_sha256,
            embedded=checkpoint.embedded,
            variant=checkpoint.variant,
            config_file=checkpoint.config_file,
            loras=tuple(lora.given for lora in checkpoint.loras),
            lora_skip=checkpoint.lora_skip,
        )
    except ValueError as error:
        raise _undescribable(f"model {checkpoint.reference}", error) from error


def _undescribable(what: str, error: ValueError) -> CheckpointError:
    """The refusal of what no manifest can hold: names that do not print, numbers that are none."""
    said = error.errors(include_url=False)[0]  # type: ignore[attr-defined]
    where, why = ".".join(map(str, said["loc"])), said["msg"].removeprefix("Value error, ")
    return CheckpointError(
        f"{f'`{where}`' if where else 'config'} of {what} is not usable ({why}), expected what a manifest can hold; "
        "correct it"
    )


def sampling_of(checkpoint: Checkpoint, parts: Collection[PartName] = ()) -> Sampling:
    """Scheduler and guidance: what the checkpoint says, else what the family's pipeline uses.

    Args:
        checkpoint: The model.
        parts: What of the pipeline the bundle holds besides.

    Raises:
        CheckpointError: Its scheduler is none that is known here, or its config is none of a scheduler.
    """
    family = checkpoint.family
    config = checkpoint.scheduler or family.scheduler_config
    guidance = family.guidance
    if guidance == "embedded" and not checkpoint.config.get("guidance_embeds", True):
        guidance = "none"
    scheduler = str(config.get("_class_name", family.scheduler)) or "none"
    if scheduler not in SCHEDULERS:
        raise CheckpointError(
            f"scheduler of {checkpoint.reference} is `{scheduler}`, expected one of diffusers that this version knows "
            f"({', '.join(sorted(SCHEDULERS))}); name one in scheduler/scheduler_config.json"
        )
    brought = dict(checkpoint.card) if checkpoint.embedded else {}
    brought |= {"source": "prompts"} if "text" in parts else {}
    brought |= {"pictures": "decoder"} if "decode" in parts else {}
    try:
        return Sampling(
            scheduler=scheduler,
            # A bound of minus infinity, which DPM-Solver's config has, bounds nothing, and JSON does not know it.
            config={k: value for k, value in config.items() if not k.startswith("_") and value != float("-inf")},
            guidance=guidance,
            guidance_scale=checkpoint.card.get("guidance_scale")
            or checkpoint.guider.get("guidance_scale")
            or family.guidance_scale,
            timestep_divisor=family.timestep_divisor,
            source=brought.get("source", family.source),
            pictures=brought.get("pictures"),
            latent_scale=checkpoint.latent_scale,
            time_scale=family.time_scale,
        )
    except ValueError as error:
        raise _undescribable(f"{scheduler} of {checkpoint.reference}", error) from error


def pipeline_of(checkpoint: Checkpoint) -> Pipeline:
    """What the family declares of its pipeline, as far as it holds for this config."""
    family, config = checkpoint.family, checkpoint.config
    declared = asdict(family.pipeline)
    inputs = {spec.name for spec in family.inputs(config)}
    declared["ignored_inputs"] = tuple(name for name in declared["ignored_inputs"] if name not in inputs)
    return Pipeline(**declared, packing=family.packing, attributes=dict(family.attributes(config)))


def comfy_of(checkpoint: Checkpoint) -> Comfy | None:
    """ComfyUI's model of the family, for this config."""
    told = checkpoint.family.comfy(checkpoint.config)
    return None if told is None else Comfy(**asdict(told))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: "" if value is True else str(value) for name, value in values.items()}


def _cache_key(weights_hash: str, options: Options) -> str:
    """Hash of everything the engines are made of; engines themselves are not reproducible bit by bit."""
    inputs = {
        "weights": weights_hash,
        "options": asdict(options),
        "tool": tool_version(),
        "libraries": builder(options.engine).engine(options).versions,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
