"""Safetensors on disk: which file holds which tensor, and its shape, from names and headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from taylorseer_export.errors import CheckpointError, first_line

PUBLISHED = Path(__file__).parent.parent / "families" / "configs"  # of the transformers of published models
INDEX = "model_index.json"  # of a pipeline folder
MODULAR_INDEX = "modular_model_index.json"  # of one that diffusers puts together of blocks
SINGLE = "diffusion_pytorch_model.safetensors"
_VARIANT = re.compile(
    r"diffusion_pytorch_model(?:\.safetensors\.index)?\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)$"
)
# First bytes of what is taken for a safetensors file -> what it is.
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a PyTorch pickle",
    **{bytes([0x80, protocol]): "a PyTorch pickle" for protocol in range(2, 6)},
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "a web page, not the file itself",
}


class Header(NamedTuple):
    """What a file says of a tensor without giving it: its shape, and its dtype by the name safetensors has for it."""

    shape: tuple[int, ...]
    dtype: str


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
        refuse_other_weights(folder)
        indices, singles = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
        if len(indices) != 1 and len(singles) != 1:
            raise CheckpointError(
                f"{folder} has {len(singles)} safetensors files and {len(indices) or 'no'} index, expected {SINGLE} "
                "or shards with an index.json; download the checkpoint again"
            )
        index, single = (indices[0], single) if len(indices) == 1 else (index, singles[0])
    if not index.is_file():
        return dict.fromkeys(tensor_names(single), single)
    return _indexed(index)


def _indexed(index: Path) -> dict[str, Path]:
    """Tensor name -> file of a sharded checkpoint; what its shards hold and what its index says are one."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(
            f"weight_map of {index} is {_kind(listed)}, expected a map of tensor names to files; download it again"
        )
    outside = [file for file in listed.values() if Path(file).name != file or file in ("", "..")]
    if outside:
        raise CheckpointError(
            f"{index} names shard {outside[0]}, expected the name of a file beside it; download it again"
        )
    files = {name: index.parent / file for name, file in listed.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise CheckpointError(
                f"shard {path} is missing, expected every file that {index.name} lists; download it again"
            )
        unlisted = [name for name in tensor_names(path) if files.get(name) != path]
        if unlisted:
            raise CheckpointError(
                f"shard {path} holds {len(unlisted)} tensors that {index.name} does not place in it "
                f"(`{unlisted[0]}` is missing), expected an index of all; download both again"
            )
    return files


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}" if not isinstance(value, dict) else "irregular"


def headers(files: Mapping[str, Path]) -> dict[str, Header]:
    """Tensor name -> its header; a tensor that its file does not hold is left out."""
    found: dict[str, Header] = {}
    for path in sorted(set(files.values())):
        wanted = {name for name, file in files.items() if file == path}
        with opened(path) as file:
            slices = ((name, file.get_slice(name)) for name in sorted(wanted & set(file.keys())))
            found |= {name: Header(tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices}
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
        raise _unreadable(path, error) from error


def refuse_other_weights(folder: Path) -> None:
    """Name the weights of a folder without safetensors, where it has some of another kind."""
    if any(folder.glob("*.safetensors*")):
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and (other := _other_kind(path)):
            raise other


def _other_kind(path: Path) -> CheckpointError | None:
    """The refusal of a file that is weights in another format, or stands for them."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return None
    for mark, what in _OTHERS.items():
        if start.startswith(mark):
            fix = (
                "pass the file itself, with --config"
                if mark == b"GGUF"
                else "pass the checkpoint that it was made from"
            )
            return CheckpointError(f"{path} is {what}, expected safetensors; {fix}")
    return None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What a file is that does not open as safetensors."""
    if other := _other_kind(path):
        return other
    return CheckpointError(f"{path} is damaged ({error}), expected a complete safetensors file; download it again")


def read_json(path: Path) -> dict[str, Any]:
    """A config."""
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}), expected a diffusers config; download it again"
        ) from error


def json_object(text: str | bytes) -> dict[str, Any]:
    """What a JSON text holds, which is an object; raises ValueError or RecursionError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value
