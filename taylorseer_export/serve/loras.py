"""LoRAs that requests of one bundle choose of, each by a name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import adapter_of
from taylorseer_export.runtime.lora import file_and_scale


def named(given: Sequence[str]) -> dict[str, str]:
    """Name -> file, as `--lora NAME=FILE` says them.

    Raises:
        ConfigError: One has no name, or two have the same.
    """
    found: dict[str, str] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if not (separator and file and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,31}", name)) or name in found:
            raise ConfigError(
                f"--lora is {text[:100]}, expected NAME=FILE or NAME=FILE:SCALE, the names of lower-case letters, "
                "digits and . _ -, each once; write it so"
            )
        found[name] = file
    return found


def chosen(text: str, names: Collection[str], model: str) -> tuple[str, float]:
    """(name, strength) of `NAME` or `NAME:STRENGTH`; the strength is 1 where there is none.

    Args:
        text: What a request says.
        names: Of the LoRAs that its model is served with.
        model: Its name.

    Raises:
        ConfigError: It is served with no LoRA of that name, or the strength is no finite number.
    """
    name, separator, last = text.partition(":")
    try:
        strength = float(last) if separator else 1.0
    except ValueError:
        strength = math.nan
    if name in names and math.isfinite(strength):
        return name, strength
    known = "none, since it is served with none"
    if names:
        known = f"{' or '.join(names)}, or one of them with a strength like {next(iter(names))}:0.8"
    raise ConfigError(
        f"lora is `{text[:64]}` for {model}, expected {known}; "
        f"{'choose one of those' if names else 'leave it out, or ask for a `model` that has it'}"
    )


def files_of(manifest: Manifest, loras: Mapping[str, str]) -> dict[str, tuple[Path, float]]:
    """Name -> (file, scale) of LoRAs `FILE` or `FILE:SCALE` that requests of a bundle are to choose of.

    Raises:
        ConfigError: The bundle takes none with a request, or one is missing or does not fit it.
    """
    if loras and manifest.lora is None:
        raise ConfigError(
            f"--lora is given for {manifest.family}-{manifest.name}, expected a bundle that takes a LoRA with each "
            "request; export it with --lora-rank, or with --lora, which is then part of it"
        )
    for given in loras.values():
        adapter_of(manifest, given)
    return {name: file_and_scale(given) for name, given in loras.items()}
