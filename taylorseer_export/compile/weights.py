"""One weights file per bundle: `weights.safetensors`, written tensor by tensor and shared by all graphs.

ONNX calls it external data: a graph names file, offset and length. A safetensors file is a header and raw tensors,
so the same bytes serve ONNX Runtime, TensorRT's parser and anybody with `safetensors`, and no weight is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

WEIGHTS = "weights.safetensors"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_PAGE = 4096  # the data section starts on a page, so that loaders can map it


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file. Units: bytes from the start of the file, bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[int], object] | None = None,
) -> dict[str, Stored]:
    """Write a safetensors file without holding more than one tensor.

    Args:
        path: The file to create.
        shapes: Tensor name -> (dtype, shape) as stored.
        read: Returns a tensor by name; it is cast to the stored dtype.
        progress: Called with the bytes just written.

    Returns:
        Tensor name -> its place in the file.
    """
    # Wide elements first: then every tensor starts at a multiple of its element size.
    names = sorted(shapes, key=lambda n: (-shapes[n][0].itemsize, n))
    header: dict[str, object] = {}
    position, places = 0, {}
    for name in names:
        dtype, shape = shapes[name]
        length = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + length]}
        places[name] = Stored(dtype, shape, position, length)
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = read(name).detach().to(shapes[name][0]).contiguous().reshape(-1)
            file.write(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
            if progress:
                progress(places[name].length)
    return {n: Stored(p.dtype, p.shape, p.offset + start, p.length) for n, p in places.items()}
