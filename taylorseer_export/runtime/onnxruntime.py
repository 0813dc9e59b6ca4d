"""The ONNX Runtime runner: IO binding to buffers that never move, on CPU or CUDA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from taylorseer_export.bundle.contract import unlike
from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.external import external_files, initializers, relocated
from taylorseer_export.bundle.manifest import Dimension, Graph
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import BundleError, StepError, first_line
from taylorseer_export.runtime.engines import check_version
from taylorseer_export.runtime.identity import IDENTITY
from taylorseer_export.runtime.runner import Buffer, Call, check_binding, from_bits, host_dtype, to_bits
from taylorseer_export.runtime.turns import Turn

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# On the CPU this fusion puts the last residual add and the final norm into one kernel that is slower than both.
_SLOW_FUSIONS = ["SkipLayerNormFusion"]
# Left alone, the CUDA provider rounds the inputs of float32 products to 10 bits.
_FLOAT32 = {"use_tf32": "0"}
_ONNX_BFLOAT16 = 16
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# How products of int8 weights are computed: 1 in float32, 4 in int8, which is what ONNX Runtime does if left alone.
_INT8_PRODUCTS = "session.qdq_matmulnbits_accuracy_level"
_NO_SATURATION = "session.x64quantprecision"  # of sums of two int8 products, which some CPUs without VNNI form in int16
# What a session calls a dtype -> the contract's name.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_MOST_BOUND = 4096  # copies that are kept bound: rows of several tables of the longest loops
_ALIGNMENT = 256  # bytes; what TensorRT asks for, and a multiple of every cache line


def open_runner(
    bundle: Bundle,
    device: Device,
    threads: int,
    cuda_graphs: bool = True,
    weights: Mapping[str, np.ndarray] | None = None,
) -> OnnxRuntimeRunner:
    """Load the graphs of a bundle, `weights` in the place of its own of these names.

    Raises:
        BundleError: onnxruntime is not installed, of another minor version, has no such device, or refuses a file.
    """
    check_version(bundle, "onnxruntime", _library().__version__, parts=2)
    graphs: dict[str, Graph] = dict(bundle.manifest.graphs.items())
    for graph in graphs.values():
        bundle.check_listed(graph.file)
    files = {name: bundle.path(graph.file) for name, graph in graphs.items()}
    provider = bundle.manifest.engine.options.get("provider") if device.is_gpu else None
    ranges, quantised = bundle.manifest.dimensions, bundle.manifest.quantised
    how = "none" if quantised is None else quantised.activations
    flags = (how == "token", how == "static")
    return OnnxRuntimeRunner(files, graphs, device, threads, provider, cuda_graphs, ranges, weights, *flags)


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError(
            "onnxruntime is not installed, expected it for an onnxruntime bundle; "
            "pip install 'taylorseer-export[onnxruntime]'"
        ) from error
    return onnxruntime


class OnnxRuntimeRunner:
    """Runs the ONNX graphs of a bundle.

    Args:
        files: Graph name -> ONNX file.
        graphs: Graph name -> contract.
        device: Where to run; a GPU without a number is the first.
        threads: Threads of each graph on the CPU; 0 leaves it to ONNX Runtime.
        provider: `cpu`, `cuda` or `tensorrt`; the kind of device if left out.
        cuda_graphs: Whether the CUDA provider captures each bound call. The TensorRT provider has one CUDA graph for a
            session, which would replay the first call for all, so it has none here and its calls count as fallbacks.
            Other libraries must keep off the GPUs of this process while a call is bound: they end the capture.
        dimensions: Ranges of the sizes, which the TensorRT provider builds for.
        weights: Tensor name -> values in the place of the files'; bfloat16 as its bits, uint16. All graphs share them.
        rounds: Whether what int8 weights are multiplied with may be rounded to int8 too.
        static: Whether the graphs round it themselves.

    Raises:
        BundleError: onnxruntime is not installed, has no such device, or refuses a file.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        graphs: Mapping[str, Graph],
        device: Device = CPU,
        threads: int = 0,
        provider: str | None = None,
        cuda_graphs: bool = True,
        dimensions: Mapping[str, Dimension] | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
        rounds: bool = False,
        static: bool = False,
    ) -> None:
        onnxruntime = _library()
        self.graphs, self.device, self.fallbacks = graphs, device.at(0), 0
        # Sessions on the CPU run on several threads at once; all that reaches a GPU takes turns there.
        self._captured = Turn() if device.is_gpu else None
        self._turn: AbstractContextManager[None] = self._captured or nullcontext()
        kind = provider or device.kind
        first = _PROVIDERS.get(kind, kind)
        if first not in onnxruntime.get_available_providers():
            raise BundleError(
                f"device is `{device}`, expected one that this onnxruntime has "
                f"({', '.join(onnxruntime.get_available_providers())}, not {first}); install onnxruntime-gpu in its "
                "place, or use --device cpu"
            )
        self._alignment = _ALIGNMENT if kind == "tensorrt" else 1  # it passes addresses on to TensorRT as they are
        # Every bound call has a number, under which the provider keeps its CUDA graph.
        self._numbers = itertools.count(1) if kind == "cuda" and cuda_graphs else None
        self._sessions: dict[str, Any] = {}
        self._weights = {name: _value(onnxruntime, bits) for name, bits in (weights or {}).items()}
        place = {"device_id": str(self.device.number)}
        for name, path in files.items():
            providers: list[Any] = [first]
            if kind == "tensorrt":
                profile = _profile(graphs[name], dimensions or {})
                providers = [(first, {**place, **profile}), (_PROVIDERS["cuda"], {**place, **_FLOAT32})]
            elif kind == "cuda":
                captured = {} if self._numbers is None else {"enable_cuda_graph": "1"}
                providers = [(first, {**place, **_FLOAT32, **captured})]
            options = _options(onnxruntime, threads)
            options.add_session_config_entry(_INT8_PRODUCTS, "4" if rounds else "1")
            if static:
                options.add_session_config_entry(_NO_SATURATION, "1")
            try:
                source, folder = _source(path)
                if folder is not None:
                    options.add_session_config_entry(_EXTERNAL_FOLDER, str(folder))
                own = self._weights.keys() & set(initializers(path.read_bytes())) if self._weights else set()
                if own:
                    options.add_external_initializers([*own], [self._weights[weight] for weight in own])
                with self._turn:
                    self._sessions[name] = onnxruntime.InferenceSession(
                        source, options, providers=providers, disabled_optimizers=_SLOW_FUSIONS
                    )
            except Exception as error:
                if self._numbers is not None and "graph capture" in str(error):
                    raise BundleError(
                        f"{path} cannot be captured ({first_line(error)}), expected nodes that the GPU runs, all of "
                        "them; run without CUDA graphs (--no-cuda-graphs), which is slower"
                    ) from error
                raise BundleError(
                    f"{path} is refused by onnxruntime {onnxruntime.__version__} ({error}), expected a graph it can "
                    "load; rebuild the bundle with this version"
                ) from error
            _check_contract(path, graphs[name], self._sessions[name], dimensions)
            if self._sessions[name].get_providers()[0] != first:
                raise BundleError(
                    f"{first} does not start on this machine, expected it for {path} (onnxruntime fell back to "
                    f"{', '.join(self._sessions[name].get_providers())}); install the CUDA libraries that it names on "
                    "standard error, or use --device cpu"
                )
        self._copies = _Copies(onnxruntime, self.device, self._turn) if device.is_gpu else None

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        if self._copies is None:
            return HostBuffer.zeros(shape, dtype)
        return _DeviceBuffer.zeros(shape, dtype, self._copies)

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        contract, session = self.graphs[graph], self._sessions[graph]
        check_binding(contract, inputs, outputs)
        for name, b in (*inputs.items(), *outputs.items()):
            if b.address % self._alignment:
                raise StepError(
                    f"tensor `{name}` of graph `{graph}` starts at {b.address % self._alignment} bytes past a multiple "
                    f"of {self._alignment}, expected a multiple (bytes), as TensorRT needs; use a size whose rows fill "
                    "it, or export again with --provider cuda"
                )
        binding, place = session.io_binding(), (self.device.kind, self.device.number)
        for tensor in contract.inputs:
            b = inputs[tensor.name]
            binding.bind_input(tensor.name, *place, _element_type(tensor.dtype), b.shape, b.address)
        for tensor in contract.outputs:
            b = outputs[tensor.name]
            binding.bind_output(tensor.name, *place, _element_type(tensor.dtype), b.shape, b.address)
        keep = (*inputs.values(), *outputs.values())  # the binding holds addresses; the call holds the memory
        options = None
        if self._numbers is not None:
            options = _library().RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(next(self._numbers)))
        falls_back = int(options is None and self.device.is_gpu)

        def run() -> None:
            assert keep
            session.run_with_iobinding(binding, options)

        captured = self._captured if options is not None else None
        if captured is not None:
            try:
                captured.capture(run)  # the first step finds everything warm
            except Exception as error:
                raise StepError(
                    f"graph `{graph}` cannot be captured ({first_line(error)}), expected a CUDA graph; check that the "
                    "sizes lie in the bundle's ranges, or run without CUDA graphs (--no-cuda-graphs), which is slower"
                ) from error

        def call() -> None:
            try:
                if captured is not None:
                    captured.launch(run)
                else:
                    with self._turn:
                        self.fallbacks += falls_back
                        run()
            except Exception as error:
                raise StepError(
                    f"graph `{graph}` failed ({first_line(error)}), expected it to run; "
                    "check that the sizes lie in the bundle's ranges"
                ) from error

        return call

    def close(self) -> None:
        with self._turn:  # a session that ends while one of this process captures takes the process with it
            self._sessions.clear()
            self._weights.clear()


def _value(onnxruntime: Any, bits: np.ndarray) -> Any:
    """Weights as ONNX Runtime takes them; they keep their memory."""
    if bits.dtype == np.uint16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(bits)


def _options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Graphs run one after the other: a pool that keeps spinning after its graph would rob the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _source(path: Path) -> tuple[Path | bytes, Path | None]:
    """What a session loads: the file, or where it or its weights are links, its bytes with the weights' own name.

    ONNX Runtime takes no weights that a link leads to in another folder. Named as they are called where they lie, they
    are mapped from there as they would be from beside the graph.

    Returns:
        (source, folder of the weights where that is not the folder of the source).
    """
    model, beside = path.read_bytes(), path.parent
    places = {name: (beside / name).resolve() for name in external_files(model)}
    if all(place == beside.resolve() / name for name, place in places.items()):
        return path, None
    folders = {place.parent for place in places.values()}
    if len(folders) > 1:
        raise ValueError(f"its weights are links into {len(folders)} folders, and one is taken; put them into one")
    return relocated(model, lambda name: places[name].name), folders.pop()


def _check_contract(path: Path, graph: Graph, session: Any, dimensions: Mapping[str, Dimension] | None) -> None:
    """Refuse a file whose own inputs and outputs are not those of the manifest; shapes where the ranges are known."""
    sides = {"inputs": (graph.inputs, session.get_inputs()), "outputs": (graph.outputs, session.get_outputs())}
    for kind, (tensors, found) in sides.items():
        seen, expected = [t.name for t in found], [t.name for t in tensors]
        if seen != expected:
            raise BundleError(
                f"{kind} of {path} are {seen}, expected {expected} as in the manifest; export the bundle again"
            )
    inputs, outputs = (
        {
            t.name: (_DTYPES.get(t.type, t.type), _extents(t.shape) if dimensions is not None else contract.shape)
            for contract, t in zip(tensors, found, strict=True)
        }
        for tensors, found in sides.values()
    )
    if problem := unlike(graph, inputs, outputs, dimensions or {}):
        raise BundleError(f"{path}: {problem}, as in the manifest; export the bundle again")


def _extents(shape: Sequence[int | str | None]) -> list[int | str]:
    return [-1 if extent is None else extent for extent in shape]


def _profile(graph: Graph, dimensions: Mapping[str, Dimension]) -> dict[str, str]:
    """The TensorRT provider's own words for the smallest, typical and largest shapes of a graph's inputs."""
    sizes = [{name: getattr(d, end) for name, d in dimensions.items()} for end in ("minimum", "typical", "maximum")]
    return {
        f"trt_profile_{word}_shapes": ",".join(
            f"{t.name}:{'x'.join(map(str, resolve(t.shape, chosen)))}" for t in graph.inputs
        )
        for word, chosen in zip(("min", "opt", "max"), sizes, strict=True)
    }


def _element_type(dtype: str) -> Any:
    """What ONNX Runtime calls a dtype; bfloat16, which numpy lacks, goes by its number in ONNX."""
    return _ONNX_BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _storage(dtype: str) -> Any:
    """The numpy dtype that holds the bits of `dtype`."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


class HostBuffer:
    """A buffer in host memory, aligned for vector instructions; bfloat16 is held as its bits, `[...]` of uint16."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        kind = _storage(dtype)
        size = math.prod(shape) * kind.itemsize
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return cls(memory[start : start + size].view(kind).reshape(shape), dtype)

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
        return HostBuffer(self.array[index, ...], self.dtype)  # also of one number the same memory

    def write(self, values: np.ndarray) -> None:
        np.copyto(self.array, to_bits(values) if self.dtype == "bfloat16" else values, casting="same_kind")

    def copy(self, source: Buffer) -> None:
        assert isinstance(source, HostBuffer), "bug in taylorseer-export: a foreign buffer"
        np.copyto(self.array, source.array, casting="no")

    def clear(self) -> None:
        self.array.fill(0)

    def read(self) -> np.ndarray:
        return from_bits(self.array) if self.dtype == "bfloat16" else self.array.copy()


class _Copies:
    """Copies between places on a GPU, none of them by way of the host: a graph of one Identity, over bytes.

    ONNX Runtime's CUDA kernel of Identity is one copy on the device (cudaMemcpyAsync); as source and target any address
    may be bound, so a row of a table or an entry of a ring as well. A run ends when the copy is done, as that of every
    graph does: what is read next is in place, whichever session's stream it is read on.

    Args:
        onnxruntime: The library.
        device: The GPU.
        turn: Held while anything is done on the GPU.
    """

    def __init__(self, onnxruntime: Any, device: Device, turn: AbstractContextManager[None]) -> None:
        self.device, self.turn = device, turn
        self.value: Any = onnxruntime.OrtValue
        self._place = (device.kind, device.number)
        options: dict[str, str] = {"device_id": str(device.number)} if device.is_gpu else {}
        providers = [(_PROVIDERS[device.kind], options)]
        with turn:
            self._session = onnxruntime.InferenceSession(IDENTITY, _options(onnxruntime, 1), providers=providers)
        self._bound: dict[tuple[int, int, int], Any] = {}  # to bind takes longer than to copy, and a loop's rows recur

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy `size` bytes from one address to another."""
        way = (source, target, size)
        with self.turn:
            if way not in self._bound:
                if len(self._bound) >= _MOST_BOUND:
                    self._bound.clear()
                self._bound[way] = binding = self._session.io_binding()
                binding.bind_input("source", *self._place, np.uint8, (size,), source)
                binding.bind_output("target", *self._place, np.uint8, (size,), target)
            self._session.run_with_iobinding(self._bound[way])


class _DeviceBuffer:
    """A buffer in device memory, kept by an OrtValue; an entry is a window on it."""

    def __init__(self, value: Any, dtype: str, shape: tuple[int, ...], address: int, copies: _Copies) -> None:
        self._value, self.dtype, self.shape, self.address, self._copies = value, dtype, shape, address, copies

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str, copies: _Copies) -> _DeviceBuffer:
        device, zeros = copies.device, np.zeros(shape, _storage(dtype))
        with copies.turn:
            value = copies.value.ortvalue_from_numpy(zeros, device.kind, device.number)
        return cls(value, dtype, shape, value.data_ptr(), copies)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(_storage(self.dtype).itemsize)

    def entry(self, index: int) -> _DeviceBuffer:
        tail = self.shape[1:]
        step = math.prod(tail) * int(_storage(self.dtype).itemsize)
        return _DeviceBuffer(self._value, self.dtype, tail, self.address + index * step, self._copies)

    def clear(self) -> None:
        self.write(np.zeros((), host_dtype(self.dtype)))

    def write(self, values: np.ndarray) -> None:
        assert self.address == self._value.data_ptr(), "bug in taylorseer-export: a window is written from the host"
        stored = to_bits(values) if self.dtype == "bfloat16" else values
        values = np.ascontiguousarray(np.broadcast_to(stored, self.shape), _storage(self.dtype))
        with self._copies.turn:
            self._value.update_inplace(values)

    def copy(self, source: Buffer) -> None:
        assert isinstance(source, _DeviceBuffer), "bug in taylorseer-export: a foreign buffer"
        assert (source.shape, source.dtype) == (self.shape, self.dtype), "bug in taylorseer-export: an unlike buffer"
        self._copies.copy(source.address, self.address, self.nbytes)

    def read(self) -> np.ndarray:
        if self.address != self._value.data_ptr() or self.shape != tuple(self._value.shape()):
            part = _DeviceBuffer.zeros(self.shape, self.dtype, self._copies)  # the window alone comes to the host
            part.copy(self)
            return part.read()
        with self._copies.turn:
            whole: np.ndarray = self._value.numpy()
        return from_bits(whole) if self.dtype == "bfloat16" else whole
