"""Safetensors on disk: which file holds which tensor, and its shape, from names and headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taylorseer_export.errors import CheckpointError, first_line

PUBLISHED = Path(__file__).parent.parent / "families" / "configs"  # of the transformers of published models
SINGLE = "diffusion_pytorch_model.safetensors"
_VARIANT = re.compile(
    r"diffusion_pytorch_model(?:\.safetensors\.index)?\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)$"
)


def tensor_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Tensor name -> file, for a single file or a sharded checkpoint.

    The names that diffusers writes come first; a folder may hold variants such as `.fp16.safetensors` beside them.

    Raises:
        CheckpointError: There are no weights, or not of this variant; a file is missing or damaged.
    """
    name = SINGLE if variant is None else SINGLE.replace(".safetensors", f".{variant}.safetensors")
    index = folder / f"{SINGLE}.index{'' if variant is None else f'.{variant}'}.json"
    single = folder / name
    if variant is not None and not index.is_file() and not single.is_file():
        others = sorted({m[1] for path in folder.glob("*.safetensors*") if (m := _VARIANT.search(path.name))})
        raise CheckpointError(
            f"{folder} has no weights of variant {variant}, expected {name} or its index; "
            + (f"use --variant {' or '.join(others)}" if others else "leave --variant out")
        )
    if not index.is_file() and not single.is_file():
        indices, singles = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
        if len(indices) != 1 and len(singles) != 1:
            raise CheckpointError(
                f"{folder} has {len(singles)} safetensors files and {len(indices) or 'no'} index, expected {SINGLE} "
                "or shards with an index.json; download the checkpoint again"
            )
        index, single = (indices[0], single) if len(indices) == 1 else (index, singles[0])
    if not index.is_file():
        return dict.fromkeys(tensor_names(single), single)
    files = {str(name): folder / str(file) for name, file in dict(read_json(index).get("weight_map", {})).items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise CheckpointError(
                f"shard {path} is missing, expected every file that {index.name} lists; download it again"
            )
    return files


def shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers alone; a tensor that its file does not hold is left out."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        wanted = {name for name, file in files.items() if file == path}
        with opened(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in wanted & set(file.keys())}
    return found


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors of one file."""
    with opened(path) as file:
        return tuple(file.keys())


def published(model_class: str) -> list[Path]:
    """The configs of published models of a class that this package has."""
    return [path for path in sorted(PUBLISHED.glob("*.json")) if read_json(path).get("_class_name") == model_class]


@contextmanager
def opened(path: Path, framework: str = "np") -> Iterator[Any]:
    """A safetensors file; one that cannot be read is named.

    To read its header `np` will do. torch maps it in a way that counts as memory, all of it, whatever is read.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} cannot be mapped ({first_line(error)}), expected {path.stat().st_size / 1e9:.0f} GB of "
            "memory and swap, used or not; save it in shards, or allow more with `sysctl vm.overcommit_memory=1`"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), expected a complete safetensors file; download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A config."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}), expected a diffusers config; download it again"
        ) from error
    return value
