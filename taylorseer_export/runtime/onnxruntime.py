"""The ONNX Runtime runner: IO binding to buffers that never move, on CPU or CUDA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.errors import BundleError, StepError
from taylorseer_export.runtime.runner import Buffer, Call, check_binding

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ALIGNMENT = 256  # bytes; what TensorRT asks for, and a multiple of every cache line


class OnnxRuntimeRunner:
    """Runs the ONNX graphs of a bundle.

    Args:
        files: Graph name -> ONNX file.
        graphs: Graph name -> contract.
        device: `cpu` or `cuda`.
        threads: Threads of each graph on the CPU; 0 leaves it to ONNX Runtime.

    Raises:
        BundleError: onnxruntime is not installed, has no such device, or refuses a file.
    """

    def __init__(
        self, files: Mapping[str, Path], graphs: Mapping[str, Graph], device: str = "cpu", threads: int = 0
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BundleError(
                "onnxruntime is not installed, expected it for an onnxruntime bundle; "
                "pip install 'taylorseer-export[onnxruntime]'"
            ) from error
        self.graphs, self.device = graphs, device
        provider = _PROVIDERS.get(device, device)
        if provider not in onnxruntime.get_available_providers():
            raise BundleError(
                f"device is `{device}`, expected one that this onnxruntime has "
                f"({', '.join(onnxruntime.get_available_providers())}); install onnxruntime-gpu or use --device cpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Graphs run one after the other: a pool that keeps spinning after its graph would rob the next one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._sessions: dict[str, Any] = {}
        for name, path in files.items():
            try:
                self._sessions[name] = onnxruntime.InferenceSession(path, options, providers=[provider])
            except Exception as error:
                raise BundleError(
                    f"{path} is refused by onnxruntime {onnxruntime.__version__} ({error}), expected a graph it can "
                    "load; rebuild the bundle with this version"
                ) from error

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        if self.device == "cpu":
            return HostBuffer.zeros(shape, dtype)
        return _DeviceBuffer.zeros(shape, dtype, self.device)

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        contract, session = self.graphs[graph], self._sessions[graph]
        check_binding(contract, inputs, outputs)
        binding = session.io_binding()
        for tensor in contract.inputs:
            b = inputs[tensor.name]
            binding.bind_input(tensor.name, self.device, 0, np.dtype(tensor.dtype), b.shape, b.address)
        for tensor in contract.outputs:
            b = outputs[tensor.name]
            binding.bind_output(tensor.name, self.device, 0, np.dtype(tensor.dtype), b.shape, b.address)
        keep = (*inputs.values(), *outputs.values())  # the binding holds addresses; the call holds the memory

        def call() -> None:
            assert keep
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise StepError(
                    f"graph `{graph}` failed ({str(error).strip().splitlines()[0]}), expected it to run; "
                    "check that the sizes lie in the bundle's ranges"
                ) from error

        return call

    def close(self) -> None:
        self._sessions.clear()


class HostBuffer:
    """A buffer in host memory, aligned for vector instructions."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return cls(memory[start : start + size].view(kind).reshape(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def entry(self, index: int) -> HostBuffer:
        return HostBuffer(self.array[index])

    def write(self, values: np.ndarray | float) -> None:
        np.copyto(self.array, values, casting="same_kind")

    def read(self) -> np.ndarray:
        return self.array.copy()


class _DeviceBuffer:
    """A buffer in device memory, kept by an OrtValue; an entry is a window on it."""

    def __init__(self, value: Any, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self._value, self._dtype, self.shape, self.address = value, dtype, shape, address

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str, device: str) -> _DeviceBuffer:
        import onnxruntime

        kind = np.dtype(dtype)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), device, 0)
        return cls(value, kind, shape, value.data_ptr())

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self._dtype.itemsize)

    def entry(self, index: int) -> _DeviceBuffer:
        tail = self.shape[1:]
        step = math.prod(tail) * self._dtype.itemsize
        return _DeviceBuffer(self._value, self._dtype, tail, self.address + index * step)

    def write(self, values: np.ndarray | float) -> None:
        assert self.address == self._value.data_ptr(), "bug in taylorseer-export: a window is written from the host"
        self._value.update_inplace(np.ascontiguousarray(np.broadcast_to(values, self.shape), self._dtype))

    def read(self) -> np.ndarray:
        assert self.address == self._value.data_ptr(), "bug in taylorseer-export: a window is read by the host"
        result: np.ndarray = self._value.numpy()
        return result
