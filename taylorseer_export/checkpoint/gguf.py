"""GGUF files: their tensors by name, each read and dequantised alone by the `gguf` library.

The library's reader maps a file to find what is in it; a tensor's bytes are then read from their place, so that no page
of the map stays behind. Sizes stand in reverse order in these files, and a tensor that its writer gave another shape
has its own in `comfy.gguf.orig_shape.NAME`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.checkpoint.files import Header
from taylorseer_export.checkpoint.quantised import Quantised
from taylorseer_export.errors import CheckpointError, ConfigError, first_line

_SHAPE = "comfy.gguf.orig_shape."
_PLAIN = ("F32", "F16", "BF16", "F64")  # the same names as safetensors has for them


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: In the file.
        path: The file.
        kind: Its type, by the name that the library has for it.
        shape: Of the weight.
        stored: Shape that the bytes have.
        begin: Of its bytes in the file.
        size: Of them.
    """

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    begin: int
    size: int

    @property
    def label(self) -> str:
        """The format; empty for numbers as they are."""
        return "" if self.kind in _PLAIN else f"GGUF's {self.kind}"

    @property
    def paths(self) -> set[Path]:
        return {self.path}

    @property
    def header(self) -> Header:
        """Of what it is read as."""
        return Header(self.shape, "F32" if self.label else self.kind)

    def kept(self) -> Quantised | None:
        """No engine takes what is in these blocks as it is."""
        return None

    def dequantised(self) -> torch.Tensor:
        """The weight in float32, or as it is in the file."""
        import numpy as np

        data = np.fromfile(self.path, dtype=np.uint8, count=self.size, offset=self.begin)
        if data.size != self.size:
            raise CheckpointError(
                f"{self.path} ends within `{self.name}`, expected {self.size} bytes of it; download it again"
            )
        if self.kind in _PLAIN:
            return torch.from_numpy(data).view(getattr(torch, _DTYPES[self.kind])).reshape(self.shape)
        library = _library()
        kind = library.GGMLQuantizationType[self.kind]
        rows = data.reshape(library.quants.quant_shape_to_byte_shape(self.stored, kind))
        return torch.from_numpy(library.quants.dequantize(rows, kind)).reshape(self.shape)


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def gguf_tensors(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a file by name; none of them is read.

    Raises:
        CheckpointError: It is damaged, without tensors, or holds some of a type that the library cannot dequantise.
        ConfigError: The library is not installed.
    """
    library = _library()
    try:
        reader = library.GGUFReader(path)
        swapped = reader.byte_order == "S"
        found = {tensor.name: _tensor(path, reader, tensor) for tensor in reader.tensors}
    except Exception as error:  # what the library meets in a damaged file is of many kinds
        raise CheckpointError(
            f"{path} is damaged ({first_line(error)}), expected a complete GGUF file; download it again"
        ) from error
    if swapped or not found:
        seen = "is of a big-endian machine" if swapped else "has no tensors"
        raise CheckpointError(f"{path} {seen}, expected a GGUF file with the weights of a model; check the path")
    size = path.stat().st_size
    for tensor in found.values():
        if tensor.begin + tensor.size > size:
            raise CheckpointError(
                f"{path} ends within `{tensor.name}`, expected {tensor.size} bytes of it; download it again"
            )
    unread = {kind for kind in {tensor.kind for tensor in found.values()} if not _is_read(library, kind)}
    for tensor in found.values():
        if tensor.kind in unread:
            raise CheckpointError(
                f"`{tensor.name}` of {path} is {tensor.kind}, expected floating point or blocks that gguf "
                "dequantises, like Q8_0 or Q4_K; pass another quantisation of the model"
            )
    return found


def _is_read(library: Any, kind: str) -> bool:
    """Whether the library turns the blocks of a type into numbers; tried on a block of zeros."""
    import numpy as np

    if kind in _PLAIN:
        return True
    type_ = library.GGMLQuantizationType[kind]
    try:
        library.quants.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def _tensor(path: Path, reader: Any, tensor: Any) -> GgufTensor:
    stored = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    field = reader.get_field(f"{_SHAPE}{tensor.name}")
    shape = stored if field is None else tuple(int(size) for size in field.contents())
    if math.prod(shape) != math.prod(stored):
        raise ValueError(f"{tensor.name} is {list(stored)} and its writer says {list(shape)}")
    begin, size = int(tensor.data_offset), int(tensor.n_bytes)
    return GgufTensor(tensor.name, path, tensor.tensor_type.name, shape, stored, begin, size)


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError(
            "gguf is not installed, expected it for GGUF files; pip install 'taylorseer-export[gguf]'"
        ) from error
    return gguf
