"""Export from Python: what `taylorseer-export FAMILY` does, as one function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import BUNDLE_NAME
from taylorseer_export.bundle.store import check_place
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.recognise import family_of
from taylorseer_export.compile.engines import Progress
from taylorseer_export.compile.export import Options, check_options, draft, folder_name, write_bundle
from taylorseer_export.compile.gpu import building_on
from taylorseer_export.compile.parts import parts_asked, refuse_missing
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import family_named


def export(
    model: str | Path | None = None,
    *,
    family: str | None = None,
    out: str | Path = "engines",
    name: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    loras: Sequence[str] = (),
    whole: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Export a model as a bundle of engines.

        folder = tse.export("black-forest-labs/FLUX.1-dev", order=2, engine="onnxruntime", out="engines/")
        denoiser = tse.load(folder)

    Args:
        model: A diffusers folder, hub id, safetensors or GGUF file; the tiny model embedded for `family` if left out.
        family: Name of the family; found by the class in the model's config if left out.
        out: Folder that gets `<family>-<name>/`.
        name: Name of the bundle; the model's if left out.
        variant, config, loras: Which weights, their config, and what is added to them, as on the command line.
        whole: Whether to export the pipeline around the transformer too, every part that its family has; fewer by
            `parts=("decode",)`. The embedded FLUX is exported whole if neither is given.
        progress: Called with (stage, done, total); bytes for weights, a count for graphs.
        options: Fields of `Options` by name (`order`, `interval`, `warmup`, `steps`, `granularity`, `layout`, `engine`,
            `precision`, `latent_size`, `batch`, `guards`, ...); the family's defaults where left out. A `device` with a
            number, `cuda:1`, is built on that GPU.

    Returns:
        The folder of the bundle, for `tse.load`.

    Raises:
        ConfigError: An option is unknown, out of range, or neither model nor family is given.
        CheckpointError, ExportError, BuildError, BundleError: See the parts.
    """
    known = [field.name for field in fields(Options)]
    for option in options:
        if option not in known:
            raise ConfigError(f"option is `{option}`, expected one of {', '.join(known)}; correct the name")
    if model is None and family is None:
        raise ConfigError("neither model nor family is given, expected one; pass a checkpoint, or the name of a family")
    reference = None if model is None else str(model)
    declared = family_named(family) if family is not None else family_of(str(reference))
    checkpoint = open_checkpoint(reference, declared, variant, config, loras, whole=whole or bool(options.get("parts")))
    options = {"parts": parts_asked(checkpoint, whole), **options}
    default = checkpoint.family.defaults
    device = None if options.get("device") is None else Device.parse(options["device"])
    asked = Options(
        **{
            "order": default.order,
            "interval": default.interval,
            "warmup": default.warmup,
            "steps": default.steps,
            **options,
            "device": None if device is None else device.kind,
        }
    )
    called = bundle_name(reference, name)
    with building_on(device):
        check_options(asked)
        refuse_missing(checkpoint, asked.parts)
        check_place(Path(out) / folder_name(checkpoint, called))
        return write_bundle(draft(checkpoint, asked), Path(out), called, progress)


def bundle_name(reference: str | None, name: str | None = None) -> str:
    """Name of a bundle: the one given, else the last part of the path or hub id; `tiny` for the embedded model.

    Raises:
        ConfigError: The name given is no plain file name.
    """
    path = Path((reference or "tiny").rstrip("/"))
    path = path.with_suffix("") if path.suffix in (".safetensors", ".json", ".gguf") else path
    found = name or re.sub(r"[^a-z0-9._+-]+", "-", path.name.lower()).lstrip("._+-")[:100] or "model"
    if not re.fullmatch(BUNDLE_NAME, found):
        raise ConfigError(
            f"--name is {found!r}, expected letters, digits and . _ + -, at most 100, a letter or digit first; choose "
            "such a name"
        )
    return found
