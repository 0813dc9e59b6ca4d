"""The eager torch runner: the same graphs, run operator by operator. It is the reference for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taylorseer_export.bundle.manifest import Graph, Tensor
from taylorseer_export.runtime.onnxruntime import HostBuffer
from taylorseer_export.runtime.runner import Buffer, Call, check_binding


class EagerRunner:
    """Runs graph modules on the CPU with their real weights.

    Args:
        modules: Graph name -> callable that takes the contract's inputs in order and returns its outputs.
        graphs: Graph name -> contract.
    """

    def __init__(self, modules: Mapping[str, Callable[..., Any]], graphs: Mapping[str, Graph]) -> None:
        self.graphs, self._modules = graphs, dict(modules)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return HostBuffer.zeros(shape, dtype)

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        import torch

        contract, module = self.graphs[graph], self._modules[graph]
        check_binding(contract, inputs, outputs)

        def tensor(spec: Tensor, buffer: Buffer) -> torch.Tensor:
            assert isinstance(buffer, HostBuffer), "bug in taylorseer-export: a foreign buffer"
            return torch.from_numpy(buffer.array).view(getattr(torch, spec.dtype))

        sources = [tensor(spec, inputs[spec.name]) for spec in contract.inputs]
        targets = [tensor(spec, outputs[spec.name]) for spec in contract.outputs]

        def call() -> None:
            with torch.no_grad():
                for target, value in zip(targets, module(*sources), strict=True):
                    target.copy_(value)

        return call

    def close(self) -> None:
        self._modules.clear()
