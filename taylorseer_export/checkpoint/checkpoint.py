"""Checkpoints: where a model's config and weights come from, whatever their layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from taylorseer_export.checkpoint.files import (
    INDEX,
    MODULAR_INDEX,
    PUBLISHED,
    published,
    read_json,
    refuse_other_weights,
    tensor_files,
    tensor_names,
)
from taylorseer_export.checkpoint.formats import parts_of_a_pipeline, refuse_quantised, set_aside
from taylorseer_export.checkpoint.gguf import gguf_tensors, is_gguf
from taylorseer_export.checkpoint.lora import open_lora
from taylorseer_export.checkpoint.modelopt import algorithm_of, modelopt_algorithm
from taylorseer_export.checkpoint.original import Converted, Unread
from taylorseer_export.checkpoint.packed import ALSO_READ, is_part, packed_weights
from taylorseer_export.checkpoint.recognise import config_path, pipeline_config, pipeline_of, refuse_other_pipeline
from taylorseer_export.checkpoint.weights import EMBEDDED as EMBEDDED
from taylorseer_export.checkpoint.weights import Checkpoint as Checkpoint
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families.family import Family, unknown


def open_checkpoint(
    reference: str | None,
    family: Family,
    variant: str | None = None,
    config: str | None = None,
    loras: Sequence[str] = (),
    weightless: bool = False,
    lora_skip: Sequence[str] = (),
    whole: bool = False,
) -> Checkpoint:
    """Find a checkpoint, whatever its layout.

    Args:
        reference: A diffusers folder, a hub id, a safetensors file or an original folder; None for the embedded model.
        family: What it must be a checkpoint of.
        variant: Which of several precisions the folder holds, like `fp16`.
        config: The transformer's config.json, a folder with one, or a published model by name, where none lies beside
            the weights.
        loras: Files to be added to the weights, each as `file` or `file:scale`.
        weightless: Whether a config alone will do, a config.json or a folder with one, to be described and not written.
        lora_skip: What of those files is left out on purpose: `text-encoder`.
        whole: Whether the rest of the pipeline is fetched too, where the reference is a hub id.

    Raises:
        CheckpointError: Nothing is there, a file is missing or damaged, it is another family's, or this diffusers is
            older than the family's model.
    """
    if reference is None:
        folder = Path(__file__).parent.parent / "assets" / family.name
        if variant or config:
            raise CheckpointError("--variant or --config is given without --model, expected it too; add --model")
        if not folder.is_dir():
            raise CheckpointError(
                f"family {family.name} has no embedded model, expected --model; "
                f"pass a diffusers folder or a hub id like {family.reference}"
            )
        checkpoint = _open_folder(EMBEDDED, family, folder)
    else:
        _refuse_older_diffusers(family)
        alone = _config_alone(Path(reference).expanduser())
        if alone is not None and not weightless:
            if Path(reference).expanduser().is_dir():
                refuse_other_weights(alone.parent)
            raise CheckpointError(
                f"--model is {reference}, a config without weights, expected both; add --dry-run to see its card, or "
                "download the weights"
            )
        if alone is None:
            checkpoint = _open_named(reference, family, variant, config, whole)
        else:
            checkpoint = Checkpoint(reference, family, alone.parent, _config(alone, family), {}, weightless=True)
    refuse_other_pipeline(checkpoint.folder, family)
    known = checkpoint.shapes if loras else {}
    index = pipeline_config(checkpoint.folder)
    family = replace(family, **family.by_config({**index, **checkpoint.config}))
    family = replace(family, **family.by_pipeline.get(pipeline_of(checkpoint.folder), {}))
    if not checkpoint.embedded:  # a name says more than a config, and the pipeline's index more than a name
        named = family.variant(checkpoint.reference, index.get("is_distilled"))
        if named is family:
            _refuse_unnamed_variant(checkpoint, family)
        family = named
    added = tuple(open_lora(lora, family.model_class, family.lora_loader, known, lora_skip) for lora in loras)
    return replace(checkpoint, family=family, loras=added, lora_skip=tuple(lora_skip))


def _refuse_older_diffusers(family: Family) -> None:
    """Refuse a family whose class came to diffusers after the version at hand."""
    import diffusers

    if not hasattr(diffusers, family.model_class):
        raise CheckpointError(
            f"diffusers is {diffusers.__version__}, expected one with {family.model_class} for family {family.name}; "
            "`pip install --upgrade diffusers`"
        )


def _refuse_unnamed_variant(checkpoint: Checkpoint, family: Family) -> None:
    """Refuse a checkpoint whose scheduler is set as that of a variant, and whose name does not say that it is one.

    A distilled model may have the class and the config of its base, and needs other steps and no guidance.
    """
    given, usual = checkpoint.scheduler, family.scheduler_config
    for word, change in family.variants.items():
        own = change.get("scheduler_config", {})
        if own and all(name in usual and given.get(name) == value != usual[name] for name, value in own.items()):
            seen, expected = (", ".join(f"{name} {source[name]}" for name in own) for source in (own, usual))
            raise CheckpointError(
                f"scheduler of {checkpoint.reference} has {seen}, as that of a {family.name} `{word}`, expected "
                f"{expected}; give its folder a name with the word {word}, or correct scheduler/scheduler_config.json"
            )


def _config_alone(path: Path) -> Path | None:
    """The config.json that a path is or holds without any weights beside it, or None."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    lonely = (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*"))
    return folder / "config.json" if lonely else None


def open_config(reference: str) -> Checkpoint:
    """A transformer of any class in diffusers by its config alone: it can be traced and described, not written.

    Raises:
        CheckpointError: There is no config.json, or its class is none of diffusers'.
    """
    folder = Path(reference).expanduser()
    candidates = (folder / "transformer" / "config.json", folder / "config.json", folder)
    path = next((file for file in candidates if file.is_file()), candidates[1])
    entries = read_json(path)
    config = {key: value for key, value in entries.items() if not key.startswith("_")}
    return Checkpoint(reference, unknown(_class_in(path, entries)), path.parent, config, {}, weightless=True)


def open_undeclared(reference: str, variant: str | None = None) -> Checkpoint:
    """A model of any class in diffusers with its weights, of a family of which nothing is known but the class.

    Raises:
        CheckpointError: Config or weights are missing, the class is none of diffusers', or it does not know an entry.
    """
    path = config_path(reference)
    name = _class_in(path, read_json(path))
    return open_checkpoint(reference, unknown(name), variant)


def _class_in(path: Path, entries: dict[str, Any]) -> str:
    """The class that a config names, which diffusers has."""
    import diffusers

    name = str(entries.get("_class_name"))
    if not hasattr(diffusers, name):
        raise CheckpointError(
            f"{path} is of class {name}, expected a transformer of diffusers {diffusers.__version__}; check the path"
        )
    return name


def _open_named(
    reference: str, family: Family, variant: str | None, config: str | None, whole: bool = False
) -> Checkpoint:
    path = Path(reference).expanduser()
    if path.is_file():
        return _open_file(reference, family, path, config, variant)
    if path.exists():
        return _open_folder(reference, family, path, variant, config)
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise CheckpointError(
            f"--model is {reference}, expected an existing diffusers folder or a hub id like {family.reference}; "
            "check the path"
        )
    return _open_folder(reference, family, _download(reference, family, whole), variant, config)


def _download(reference: str, family: Family, whole: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["transformer/*", "scheduler/*", "guider/*", INDEX, MODULAR_INDEX, "vae/config.json"]
        if whole:
            patterns += ["vae/*", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*"]
            patterns += ["image_encoder/*.json", "image_encoder/*.safetensors"]
            patterns += ["image_processor/*", "feature_extractor/*", "processor/*"]
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"hub id {reference} could not be fetched ({type(error).__name__}), expected a repository you can reach; "
            f"log in with `hf auth login`, or download it and pass the folder"
        ) from error


def _open_folder(
    reference: str, family: Family, folder: Path, variant: str | None = None, config: str | None = None
) -> Checkpoint:
    folder = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
    if config is not None:
        found = Checkpoint(reference, family, folder, {}, tensor_files(folder, variant), variant=variant)
        return _other_layout(_without_others(found, folder), config)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, expected a diffusers folder of a {family.model_class}; check --model, "
            "or pass the config of an original layout with --config"
        )
    entries = _config(folder / "config.json", family)
    found = Checkpoint(reference, family, folder, entries, tensor_files(folder, variant), variant=variant)
    return _without_others(found, folder)


def _without_others(found: Checkpoint, where: Path) -> Checkpoint:
    """A checkpoint without what is no part of the transformer, each scale with its weight; others are refused."""
    aside = set_aside(found.files, found.model_class._keys_to_ignore_on_load_unexpected or ())
    left = {name for names in aside.values() for name in names}
    files = {name: path for name, path in found.files.items() if name not in left}
    found = replace(found, files=files, aside=parts_of_a_pipeline(aside))
    if found.packed:  # of GGUF, whose types say all
        return found
    weights = {name: header for name, header in found.headers.items() if not is_part(name)}
    refuse_quantised(where, weights, ALSO_READ)
    algorithm = modelopt_algorithm(where) if where.is_dir() else None
    packed = packed_weights(where, files, found.headers, "scaled_fp8" in aside, algorithm)
    return replace(found, files={name: path for name, path in files.items() if not is_part(name)}, packed=packed)


def _open_file(reference: str, family: Family, path: Path, config: str | None, variant: str | None) -> Checkpoint:
    if variant is not None:
        raise CheckpointError(f"--variant is {variant} for one file, expected a folder of several; leave it out")
    packed = gguf_tensors(path) if is_gguf(path) else {}
    files = dict.fromkeys(packed or tensor_names(path), path)
    found = _without_others(Checkpoint(reference, family, path.parent, {}, files, packed=packed), path)
    if config is not None:
        return _other_layout(found, config)
    fitting = _fitting(found)
    if len(fitting) == 1:
        return fitting[0]
    names = " and ".join("/".join(found.taken) for found in fitting)
    known = ", ".join(file.stem for file in published(family.model_class)) or "the models of this package"
    seen = f"fit those of {names}" if fitting else f"are those of none of {known}"
    raise CheckpointError(
        f"{path} has no config and its tensors {seen}, expected --config with it; pass "
        f"{'one of those names, or ' * bool(fitting)}the config.json of {family.reference}'s transformer or its like"
    )


def _fitting(given: Checkpoint) -> list[Checkpoint]:
    """The checkpoint under each config of a published model whose every tensor, in name and shape, the files have.

    Raises:
        Unread: They have all of one, and more.
    """
    found: dict[str, Checkpoint] = {}
    more: list[Unread] = []
    for path in published(given.family.model_class):
        try:
            one = _other_layout(given, str(path))
            with given.family.built(one.model_class):
                model = one.empty_model()
                given.family.inputs(dict(model.config))  # type: ignore[arg-type]  # refuses a variant not covered
                one.check_tensors(model)
        except (CheckpointError, ConfigError) as error:
            more += [error] if isinstance(error, Unread) else []
            continue
        same = json.dumps(one.config, sort_keys=True)
        taken = (*found[same].taken, path.stem) if same in found else (path.stem,)
        found[same] = replace(one, config_file=None, taken=taken)
    if more and not found:
        raise more[0]
    return list(found.values())


def _other_layout(given: Checkpoint, config: str) -> Checkpoint:
    """Weights whose config lies elsewhere: in diffusers' layout already, or to be converted to it."""
    path = Path(config).expanduser()
    candidates = (path, path / "config.json", path / "transformer" / "config.json", PUBLISHED / f"{config}.json")
    entries = _config(next((candidate for candidate in candidates if candidate.is_file()), path), given.family)
    found = replace(given, config=entries, config_file=str(config))
    with given.family.built(found.model_class):
        expected = found.empty_model().state_dict().keys()
    if 2 * len(expected & found.files.keys()) >= len(expected):
        return found
    return replace(found, converted=Converted(given.family.model_class, entries, found.shapes))


def _config(path: Path, family: Family) -> dict[str, Any]:
    """The entries of a config without the private ones."""
    config = read_json(path)
    name = config.get("_class_name", family.model_class)
    if name != family.model_class:
        raise CheckpointError(
            f"{path} is of class {name}, expected {family.model_class} for family {family.name}; "
            "check --model and the family"
        )
    algorithm_of(path, config)  # or refuse it
    entries = {k: value for k, value in config.items() if not k.startswith("_") and k != "quantization_config"}
    _refuse_unknown(path, entries, family)
    return entries


def _refuse_unknown(path: Path, entries: Mapping[str, Any], family: Family) -> None:
    """Refuse entries that diffusers would drop: one that asks for something belongs to a newer or another model."""
    import diffusers

    model = getattr(diffusers, family.model_class)
    taken = {*signature(model.__init__).parameters, *getattr(model, "_deprecated_kwargs", ()), *family.retired}
    unknown = sorted(f"`{key}`" for key, value in entries.items() if value and key not in taken)
    if unknown:
        raise CheckpointError(
            f"{path} has {', '.join(unknown[:5])}, which {family.model_class} of diffusers {diffusers.__version__} "
            "does not know, expected a config of that class; upgrade diffusers, or remove what means nothing to it"
        )
