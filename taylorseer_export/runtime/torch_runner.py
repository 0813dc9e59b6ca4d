"""The torch runner: functions over tensors that never move, replayed as CUDA graphs on a GPU.

It serves whatever takes its inputs and outputs as tensors and writes the outputs in place: modules run operator by
operator, compiled ones, and AOTInductor packages. On a GPU each bound call, that is each graph, shape and phase of the
ring, is captured once when it is bound; the captures share one pool of memory, because they never run at one time:
calls, and what is done to buffers, are in one order over all threads and streams (`order.py`).

Of several GPUs the runner's own is made torch's current one around all that it does there: streams, captures and
launches of libraries go to the current GPU, whatever the tensors lie on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.manifest import Graph
from taylorseer_export.errors import StepError, first_line
from taylorseer_export.runtime.order import Order
from taylorseer_export.runtime.runner import Buffer, Call, check_binding

if TYPE_CHECKING:
    import torch

_MOST_PINNED = 64 << 20  # bytes; a LoRA may be larger, which comes at most once for a request


class TorchRunner:
    """Runs functions over torch tensors.

    Args:
        functions: Graph name -> function that takes the contract's inputs and then its outputs, and fills the latter.
        graphs: Graph name -> contract.
        device: Where to run; a GPU without a number is torch's current one.
        cuda_graphs: Whether calls on a GPU are captured. Without it every call counts as a fallback.

    Attributes:
        device: Where it runs; a GPU has its number.
        captures: CUDA graphs captured so far.
        fallbacks: Calls on a GPU that ran without a CUDA graph, because that was asked for.
        order: That of all that is done on a GPU; None on the CPU.
    """

    alignment = 16  # bytes; compiled kernels read that much at once and assume that every tensor starts at a multiple

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        graphs: Mapping[str, Graph],
        device: Device = CPU,
        cuda_graphs: bool = True,
    ) -> None:
        self.graphs, self.device = graphs, located(device)
        self.captures = self.fallbacks = 0
        self._functions = dict(functions)
        self._record: Callable[[str, Call], Call] | None = None
        self.order = Order(self.device) if device.is_gpu else None
        if device.is_gpu and cuda_graphs:
            with current(self.device):
                self._record = Recorder(self.device).record

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        import torch

        order = self.order
        with order or nullcontext():
            buffer = TorchBuffer(torch.zeros(shape, dtype=getattr(torch, dtype), device=str(self.device)), order)
        if order is not None:
            order.outlast(buffer, [buffer.tensor])
        return buffer

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        contract, function = self.graphs[graph], self._functions[graph]
        check_binding(contract, inputs, outputs)
        buffers = {t.name: inputs[t.name] for t in contract.inputs} | {
            t.name: outputs[t.name] for t in contract.outputs
        }
        return self.call_on_device(
            graph, buffers, partial(_run, graph, function, [_tensor(b) for b in buffers.values()])
        )

    def call_on_device(self, graph: str, buffers: Mapping[str, Buffer], call: Call) -> Call:
        """A bound call as it is made at every step: on a GPU a launch of its own CUDA graph, where that is wanted.

        Raises:
            StepError: A tensor does not start where the engine can read it, or the call cannot be captured.
        """
        order = self.order
        if order is None:
            return call
        for name, buffer in buffers.items():
            if buffer.address % self.alignment:
                raise StepError(
                    f"tensor `{name}` of graph `{graph}` starts at {buffer.address % self.alignment} bytes past a "
                    f"multiple of {self.alignment}, expected a multiple (bytes); use a size whose rows fill it"
                )
        if self._record is None:
            return partial(self._in_order, order, partial(self._fall_back, call))
        with order, current(self.device):  # warm runs write the memory that all calls share
            self.captures += 1
            return partial(self._in_order, order, self._record(graph, call))

    def close(self) -> None:
        if self.order is not None:
            self.order.wait()  # what is under way uses engines that are about to go
        self._functions.clear()
        self._record = None

    def _in_order(self, order: Order, call: Call) -> None:
        """Make a call on a GPU after those of other threads and streams, whose scratch memory is its own too."""
        with order, current(self.device):
            call()

    def _fall_back(self, call: Call) -> None:
        self.fallbacks += 1
        call()


def located(device: Device) -> Device:
    """The device with its number: torch's current GPU where none was chosen."""
    if not device.is_gpu or device.index is not None:
        return device
    import torch

    return device.at(torch.cuda.current_device())


def current(device: Device) -> AbstractContextManager[object]:
    """Makes a GPU torch's current one in this thread, and the one before again at the end; nothing on the CPU."""
    if not device.is_gpu:
        return nullcontext()
    import torch

    return torch.cuda.device(device.number)


class TorchBuffer:
    """A tensor as a buffer. Copies are queued in the order of the calls; only `read` waits.

    On a GPU values from the host are put into pinned memory first, of the tensor's own type and shape: from there the
    driver copies them while the host goes on, in one transfer. Values of more than 64 MiB are waited for.

    Args:
        tensor: On the device.
        order: That of its runner, on a GPU.
        whole: The buffer that this one is an entry of; it goes after its entries.
    """

    def __init__(self, tensor: torch.Tensor, order: Order | None = None, whole: TorchBuffer | None = None) -> None:
        self.tensor, self._order, self._whole = tensor, order, whole
        self._queued: AbstractContextManager[None] = order or nullcontext()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def entry(self, index: int) -> TorchBuffer:
        return TorchBuffer(self.tensor[index], self._order, self._whole or self)

    def write(self, values: Any) -> None:
        """Copy values from the host, or a tensor from anywhere."""
        import torch

        if not isinstance(values, torch.Tensor):
            values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if pinned := values.device.type == "cpu" and self._pins(self.tensor):
            values = torch.empty(self.shape, dtype=self.tensor.dtype, pin_memory=True).copy_(values)
        # torch keeps pinned memory that is let go until the copies from it are done (CachingHostAllocator.cpp).
        with self._queued:
            self.tensor.copy_(values, non_blocking=pinned or values.device.type != "cpu")

    def copy(self, source: Buffer) -> None:
        with self._queued:
            self.tensor.copy_(_tensor(source))

    def clear(self) -> None:
        with self._queued:
            self.tensor.zero_()

    def read(self) -> np.ndarray:
        import torch

        with self._queued:
            pass  # the copy comes after the last work; others need not wait until the host has it
        tensor = self.tensor.float() if self.tensor.dtype == torch.bfloat16 else self.tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pins(tensor))
        result: np.ndarray = host.copy_(tensor).numpy()
        return result

    def _pins(self, tensor: torch.Tensor) -> bool:
        """Whether the host's side of a copy of this is pinned."""
        return self._order is not None and tensor.nbytes <= _MOST_PINNED


class Recorder:
    """Captures calls as CUDA graphs, all on one stream and in one pool of memory.

    Args:
        device: The GPU, which is to be the current one while it records.
    """

    # Of all recorders: torch captures once at a time in a process, and begins by waiting for the whole GPU, which ends
    # any capture that is under way on it.
    _alone = threading.Lock()

    def __init__(self, device: Device) -> None:
        import torch

        self._stream = torch.cuda.Stream(device=str(device))
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, name: str, call: Call) -> Call:
        """The call as one launch, warm: its kernels have run, and a first launch has put the graph on the device."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream is chosen out here: a capture that fails does not give the caller's back (torch.cuda.graph).
            with self._alone, torch.cuda.stream(self._stream):
                for _ in range(2):
                    call()
                self._stream.synchronize()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    call()
            graph.replay()
        except RuntimeError as error:
            raise StepError(
                f"graph `{name}` cannot be captured ({first_line(error)}), expected a CUDA graph; "
                "export again, or run without CUDA graphs (--no-cuda-graphs), which is slower"
            ) from error
        return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Launch a CUDA graph; `call` keeps the memory alive that the graph has the addresses of."""
    graph.replay()


def _run(name: str, function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    import torch

    # A thread that torch has not worked in yet has OpenMP's and MKL's own number of threads, and so sums in another
    # order, with other bits. Asking for the number is what makes it that of `set_num_threads` (ATen/Parallel.h).
    torch.get_num_threads()
    try:
        with torch.no_grad():
            function(*tensors)
    except StepError:
        raise
    except RuntimeError as error:
        raise StepError(
            f"graph `{name}` failed ({first_line(error)}), expected it to run; "
            "check that the sizes lie in the bundle's ranges"
        ) from error


def _tensor(buffer: Buffer) -> torch.Tensor:
    assert isinstance(buffer, TorchBuffer), "bug in taylorseer-export: a buffer of another runner"
    return buffer.tensor
