"""Example inputs and profiles in Polygraphy's formats, so that its command line works on the files of a bundle:

polygraphy run full.onnx --onnxrt --load-inputs polygraphy/full.inputs.json
polygraphy convert full.onnx --convert-to trt -o full.plan $(cat polygraphy/full.profile)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from taylorseer_export.bundle.manifest import Dimension, Graph, Tensor
from taylorseer_export.bundle.tensorrt import extents
from taylorseer_export.errors import ConfigError

FOLDER = "polygraphy"
_LARGEST = 256 << 20  # bytes of one graph's inputs; they are stored as text


def example_inputs(graph: Graph, dimensions: Mapping[str, Dimension], seed: int = 0) -> dict[str, Any]:
    """Random inputs of a graph at the smallest sizes it accepts: arrays, and tensors where numpy has no such dtype.

    Args:
        graph: The contract.
        dimensions: Ranges of the sizes.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(tensor: Tensor) -> Any:
        shape, dtype = extents(tensor, dimensions)[0], getattr(torch, tensor.dtype)
        if dtype.is_floating_point:
            numbers = torch.randn(shape, generator=generator).to(dtype)
        else:
            low, high = tensor.values or (0, 1)
            numbers = torch.randint(low, high + 1, shape, generator=generator).to(dtype)
        return numbers if dtype == torch.bfloat16 else numbers.numpy()

    return {tensor.name: values(tensor) for tensor in graph.inputs}


def check_sizes(graphs: Mapping[str, Graph], dimensions: Mapping[str, Dimension]) -> None:
    """Refuse inputs that are too large to be stored as text.

    Raises:
        ConfigError: Names the graph.
    """
    for name, graph in graphs.items():
        size = sum(getattr(torch, t.dtype).itemsize * math.prod(extents(t, dimensions)[0]) for t in graph.inputs)
        if size > _LARGEST:
            raise ConfigError(
                f"inputs of graph `{name}` are {size} bytes, expected at most {_LARGEST} for --polygraphy; leave out "
                "--size, so that it may take the smallest, or leave out --polygraphy"
            )


def write_examples(folder: Path, graphs: Mapping[str, Graph], dimensions: Mapping[str, Dimension]) -> None:
    """Write `polygraphy/<graph>.inputs.json` and `polygraphy/<graph>.profile` into a bundle's folder."""
    from polygraphy.json import save_json

    (folder / FOLDER).mkdir()
    for name, graph in graphs.items():
        save_json([example_inputs(graph, dimensions)], str(folder / FOLDER / f"{name}.inputs.json"))
        words = []
        for k, end in enumerate(("min", "opt", "max")):
            shapes = (f"{t.name}:[{','.join(map(str, extents(t, dimensions)[k]))}]" for t in graph.inputs)
            words.append(f"--trt-{end}-shapes {' '.join(shapes)}")
        (folder / FOLDER / f"{name}.profile").write_text("\n".join(words) + "\n", "utf-8")
