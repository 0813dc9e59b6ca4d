"""What NVIDIA ModelOpt says of weights that it wrote: their algorithm, in a model's config or in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taylorseer_export.checkpoint.files import read_json
from taylorseer_export.errors import CheckpointError

_CONFIGS = ("config.json", "hf_quant_config.json")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")  # whose scales are read


def modelopt_algorithm(folder: Path) -> str | None:
    """What ModelOpt says that the weights of a folder are in, or None where it says nothing.

    Raises:
        CheckpointError: It is an algorithm that is not known here, or another tool's.
    """
    found = None
    for name in _CONFIGS:
        path = folder / name
        if path.is_file() and (algorithm := algorithm_of(path, read_json(path))):
            found = algorithm
    return found


def algorithm_of(path: Path, config: Mapping[str, Any]) -> str | None:
    """The same of one file, a model's config or ModelOpt's own."""
    given = config.get("quantization_config") or (config.get("quantization") if path.name == _CONFIGS[1] else None)
    if not given:
        return None
    given = given if isinstance(given, dict) else {}
    method = "modelopt" if path.name == _CONFIGS[1] else given.get("quant_method")
    algorithm = given.get("quant_algo")
    if method != "modelopt" or algorithm not in _ALGORITHMS:
        by = f"{method or 'a method it does not name'}{f' to {str(algorithm)[:40]}' if algorithm else ''}"
        raise CheckpointError(
            f"{path} is of weights quantised by {by} (quantization_config), expected ModelOpt's "
            f"{', '.join(_ALGORITHMS)}, or weights that need no scales; pass the checkpoint that they were made from"
        )
    return str(algorithm)
