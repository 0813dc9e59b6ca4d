"""Which family a checkpoint is of, by the class in its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taylorseer_export.checkpoint.files import INDEX, read_json
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.family import Family


def family_of(reference: str) -> Family:
    """The family whose model class the config of a checkpoint names.

    Of several families of one class (a base model and its editing variant) it is the one that declares the pipeline of
    the folder, else the one whose own word stands in the reference (`kontext` for `flux-kontext`), else the one with
    the shortest name.

    Args:
        reference: A diffusers folder, of a pipeline or of its transformer, or a hub id.

    Raises:
        CheckpointError: There is no config, or no family has its class; says how to name the family.
    """
    path = config_path(reference)
    name = class_of(reference)
    found = sorted((f for f in FAMILIES.values() if f.model_class == name), key=lambda family: len(family.name))
    if not found:
        known = ", ".join(sorted({family.model_class for family in FAMILIES.values()}))
        raise CheckpointError(
            f"{path} is of class {name}, expected one that a family declares ({known}); pass family=NAME for "
            "weights of another layout, or propose a declaration with `taylorseer-export taps`"
        )
    pipeline = pipeline_of(path.parent)
    base = found[0].name
    own = [f for f in found if pipeline in f.pipelines]
    own += [f for f in found[1:] if f.name.removeprefix(base).strip("-") in reference.lower()]
    return own[0] if own else found[0]


def class_of(reference: str) -> str:
    """The model class that the config of a checkpoint names.

    Raises:
        CheckpointError: There is no config.
    """
    return str(read_json(config_path(reference)).get("_class_name"))


def pipeline_of(folder: Path) -> str:
    """The class of the pipeline that a transformer's folder lies in; empty where it lies in none."""
    return str(pipeline_config(folder).get("_class_name", ""))


def pipeline_config(folder: Path) -> dict[str, Any]:
    """The entries of the pipeline that a transformer's folder lies in; none where it lies in none."""
    index = folder.parent / INDEX
    return read_json(index) if folder.name == "transformer" and index.is_file() else {}


def refuse_other_pipeline(folder: Path, family: Family) -> None:
    """Refuse a transformer that lies in a pipeline of another family: their models may have one class and one config.

    Args:
        folder: Of the transformer.
        family: What it was asked for as.

    Raises:
        CheckpointError: It is; names the family that the pipeline is of.
    """
    pipeline = pipeline_of(folder)
    owners = [other.name for other in FAMILIES.values() if pipeline in other.pipelines]
    if not pipeline or family.name in owners or not (owners or family.pipelines):
        return
    expected = " or ".join(family.pipelines) or "one that no other family declares"
    raise CheckpointError(
        f"{folder.parent / INDEX} is of {pipeline}, expected {expected} for family {family.name}; "
        + (f"export it as family {owners[0]}" if owners else "check --model and the family")
    )


def config_path(reference: str) -> Path:
    """Where the config of a checkpoint lies: in a diffusers folder, or fetched of a hub id.

    Raises:
        CheckpointError: There is none.
    """
    folder = Path(reference).expanduser()
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        if path.is_file():
            return path
    if folder.exists() or reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{reference} has no config that names a model class, expected a diffusers folder or a hub id; pass "
            "family=NAME with it"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(reference, "transformer/config.json"))
    except Exception as error:
        raise CheckpointError(
            f"hub id {reference} could not be fetched ({type(error).__name__}), expected a repository you can reach; "
            "log in with `hf auth login`, or download it and pass the folder"
        ) from error
