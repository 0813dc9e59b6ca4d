"""The eager torch runner: the same graphs, run operator by operator. It is the reference for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.runtime.torch_runner import TorchRunner


class EagerRunner(TorchRunner):
    """Runs graph modules on the CPU with their real weights.

    Args:
        modules: Graph name -> callable that takes the contract's inputs in order and returns its outputs.
        graphs: Graph name -> contract.
    """

    def __init__(self, modules: Mapping[str, Callable[..., Any]], graphs: Mapping[str, Graph]) -> None:
        super().__init__({name: partial(_fill, module, graphs[name]) for name, module in modules.items()}, graphs)


def _fill(module: Callable[..., Any], graph: Graph, *tensors: Any) -> None:
    count = len(graph.inputs)
    for target, value in zip(tensors[count:], module(*tensors[:count]), strict=True):
        target.copy_(value)
