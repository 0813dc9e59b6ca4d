"""A double of the parts of `torch.cuda` that the runners use, as on a machine of several GPUs; no GPU is there.

It notes what happens, and which GPU was torch's current one then. Tensors for a GPU lie in host memory. Of every stream
it keeps what that stream waits for, so that it refuses memory that two streams may use at one time.

| promise of the library, refused here when broken | read in |
|---|---|
| one capture at a time in a process; a capture begins with a wait for the whole GPU | torch 2.13, cuda/graphs.py |
| a capture that fails leaves its stream the current one | torch 2.13, cuda/graphs.py, `graph.__exit__` |
| graphs of one pool are captured on one stream and never run at one time | notes of torch 2.13, cuda/graphs.py |
| no capture on a default stream; no wait of the host for a stream within a capture | NVIDIA, "CUDA Graph constraints" |
| other threads may allocate and copy during a capture in mode `thread_local` | torch 2.14 docs, torch.cuda.graph |
| a wait for the device ends captures of every mode | NVIDIA/TensorRT issue 2888 |
| freed memory is given out again on its own stream at once, but for streams that were recorded | Tensor.record_stream |
| a copy that the host does not wait for is from pinned memory, of the type, shape and order of its target | 1 |
| pinned memory is not written to before such a copy is done; freed, it is kept until then | 1 |

1: torch's aten/native/cuda/Copy.cu, which converts and lays out on the host in memory that is not pinned, and
aten/core/CachingHostAllocator.h. From memory that is not pinned the driver waits for the stream, then for the copy
(CUDA driver API, "API synchronization behavior").
"""

import contextlib
import math
import weakref
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taylorseer_export.bundle.manifest import Graph, Tensor

# Of the one graph that its tests run: `y` of `x`.
CONTRACT = Graph(
    file="graphs.pt2",
    inputs=(Tensor(name="x", dtype="float32", shape=(4,), role="latent"),),
    outputs=(Tensor(name="y", dtype="float32", shape=(4,), role="noise_pred"),),
    weights_bytes=0,
)

NAMES = (
    "is_available",
    "device",
    "current_device",
    "get_device_capability",
    "get_device_name",
    "Stream",
    "current_stream",
    "default_stream",
    "graph_pool_handle",
    "CUDAGraph",
    "stream",
    "graph",
    "mem_get_info",
)


class FakeStream:
    """A queue of work. `after` says of each stream up to which of its works this one has waited."""

    def __init__(self, cuda, gpu, number):
        self.cuda, self.gpu, self.cuda_stream = cuda, gpu, gpu << 32 | number
        self.after = {}
        self.name = "other"

    def wait_stream(self, other):
        for stream, count in getattr(other, "after", {}).items():
            self.after[stream] = max(self.after.get(stream, 0), count)

    def synchronize(self):
        assert not self.cuda.capturing, "the host waits for a stream while it captures"
        self.cuda.note("synchronize")
        for stream in self.cuda.streams.values():  # what is queued later is queued after
            stream.wait_stream(self)
        self.cuda.pinned |= {address: None for address, stream in self.cuda.pinned.items() if stream is self}


class Block:
    """Memory that the allocator has given out: for work on `home`, and for that on the streams that are recorded."""

    def __init__(self, home):
        self.home, self.used, self.recorded = home, {}, []


class Watch(TorchDispatchMode):
    """Takes every operator on memory of the GPU for work on the current stream."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.cuda.check_host(function, *arguments)
        made = function(*arguments, **(options or {}))
        for value in tree_leaves((arguments, options, made)):
            block = isinstance(value, torch.Tensor) and self.cuda.blocks.get(value.untyped_storage().data_ptr())
            if block:
                self.cuda.use(block, self.cuda.current_stream(block.home.gpu))
        return made


class FakeCuda:
    """A machine of GPUs of the capabilities given.

    Attributes:
        events: What was captured, launched and waited for.
        where: Of every event the GPU that was current.
        gpu: The current GPU.
        here: The current stream; the GPU's default one where it is None.
        allocated: Devices that tensors were asked for on.
        capturing: The graph that is being captured; None if none is.
        free: Bytes that are free on every GPU.
        blocks: Address -> what was allocated there and is not free again.
        torn: Streams whose work went on in memory that had been given back.
        copied: Bytes of every copy from pinned memory.
        pinned: Address of pinned memory -> stream that a copy from it was queued on, None where that is done.
    """

    def __init__(self, fails=False, capabilities=((8, 0), (9, 0))):
        self.events, self.where, self.fails, self.here, self.gpu = [], [], fails, None, 0
        self.capabilities, self.allocated, self.streams = capabilities, [], {}
        self.capturing, self.free = None, 1 << 30
        self._pools, self._last, self._last_in_pool = 0, {}, {}
        self.blocks, self.torn, self.pinned, self.copied = {}, [], {}, []
        self._defaults = [self._stream(gpu) for gpu in range(len(capabilities))]
        for stream in self._defaults:
            stream.name = "default"

    def install(self, monkeypatch):
        """Take the place of torch's own, and of what allocates."""
        for name in NAMES:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, self._allocator(getattr(torch, name)))

    def note(self, event):
        self.events.append(event)
        self.where.append(self.gpu)

    def use(self, memory, stream):
        """Queue work that uses memory, or what lies at an address; `stream` or its handle.

        Within a capture it is queued at each replay.
        """
        memory = self.blocks.get(memory, memory) if isinstance(memory, int) else memory
        stream = self.streams[stream] if isinstance(stream, int) else stream
        if self.capturing is not None:
            assert stream is self.here, "work on another stream than that of the capture"
            self.capturing.uses.append(memory)
            return
        if not isinstance(stream, FakeStream):  # a test's own
            return
        number, count = self._last.get(memory, (stream.cuda_stream, 0))
        assert stream.after.get(number, 0) >= count, "memory is used while another stream may still use it"
        stream.after[stream.cuda_stream] = stream.after.get(stream.cuda_stream, 0) + 1
        self._last[memory] = stream.cuda_stream, stream.after[stream.cuda_stream]
        if isinstance(memory, Block):
            memory.used[stream.cuda_stream] = stream.after[stream.cuda_stream]

    def watched(self):
        """Within it every operator is work on its tensors; see `use`."""
        return Watch(self)

    def check_host(self, function, target=None, *given):
        """Refuse to tear what is being copied to a GPU, and a copy that the host waits for in spite of what it asks."""
        if not function._schema.is_mutable:
            return
        into = target.untyped_storage().data_ptr()
        assert self.pinned.get(into) is None, "pinned memory is written to while it is copied to the GPU"
        if function is not torch.ops.aten.copy_.default or into not in self.blocks or given[1:] != (True,):
            return
        source, start = given[0], given[0].untyped_storage().data_ptr()
        if start in self.blocks:
            return
        assert start in self.pinned, "a copy that nobody waits for is from memory that is not pinned"
        like = (target.dtype, target.shape, True, True)
        seen = (source.dtype, source.shape, target.is_contiguous(), source.is_contiguous())
        assert seen == like, "a copy from pinned memory goes by way of memory that is not"
        self.pinned[start] = self.current_stream(self.blocks[into].home.gpu)
        self.copied.append(source.nbytes)

    def check(self):
        """Refuse what a finaliser cannot: memory that was given out again while a stream used it."""
        assert not self.torn, f"memory is given out again that {', '.join(self.torn)} may still use"

    def is_available(self):
        return True

    @contextlib.contextmanager
    def device(self, gpu):
        assert gpu in range(len(self.capabilities))
        before, self.gpu = self.gpu, gpu
        try:
            yield
        finally:
            self.gpu = before

    def current_device(self):
        return self.gpu

    def get_device_capability(self, gpu=None):
        return self.capabilities[self.gpu if gpu is None else gpu]

    def get_device_name(self, gpu=None):
        return f"GPU {self.gpu if gpu is None else gpu}"

    def mem_get_info(self, gpu=None):
        return self.free, self.free

    def Stream(self, device=None):
        return self._stream(self.gpu if device is None else torch.device(device).index)

    def current_stream(self, gpu=None):
        gpu = self.gpu if gpu is None else gpu
        if self.here is None or getattr(self.here, "gpu", gpu) != gpu:  # a test's own is one of any GPU
            return self._defaults[gpu]
        return self.here

    def default_stream(self):
        return self._defaults[self.gpu]

    def graph_pool_handle(self):
        self.note("pool")
        self._pools += 1
        return (0, self._pools)

    def CUDAGraph(self):
        graph = SimpleNamespace(uses=[], pool=None)

        def replay():
            assert graph.pool is not None, "a graph is replayed that was not captured"
            assert self.capturing is None, "a graph is replayed within a capture"
            self.note("replay")
            for memory in (graph.pool, *graph.uses):
                self.use(memory, self.current_stream())

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def stream(self, stream):
        assert stream.gpu == self.gpu, "a stream of another GPU than the current one"
        before, self.here = self.here, stream
        self.note("warm")
        try:
            yield
        finally:
            self.here = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "a capture that other threads may end"
        assert stream.gpu == self.gpu, "a stream of another GPU than the current one"
        assert stream not in self._defaults, "a capture on a default stream"
        assert self.capturing is None, "a second capture in this process: the wait before it ends the first"
        assert self._last_in_pool.setdefault(pool, stream) is stream, "a pool is captured into on two streams"
        before, self.here, self.capturing = self.here, stream, graph
        self.note("capture")
        try:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            yield
        finally:
            self.capturing = None
        graph.pool, self.here = pool, before  # a failed one gives the stream not back

    def gpu_of(self, handle):
        """The GPU of the stream with this handle, as libraries are given it."""
        return handle >> 32

    def _stream(self, gpu):
        stream = FakeStream(self, gpu, len(self.streams) + 1)
        self.streams[stream.cuda_stream] = stream
        return stream

    def _allocator(self, real):
        def allocate(shape, *more, device=None, dtype=torch.float32, pin_memory=False, **options):
            if pin_memory:
                assert self.capturing is None, "memory is pinned within a capture"
                tensor = real(shape, *more, dtype=dtype, **options)
                memory, address = tensor.untyped_storage(), tensor.data_ptr()
                self.pinned[address] = None
                weakref.finalize(memory, self.pinned.pop, address).atexit = False
                return tensor
            if device is None or torch.device(device).type != "cuda":
                return real(shape, *more, device=device, dtype=dtype, **options)
            self.check()
            self.allocated.append(str(device))
            block, sizes = Block(self.current_stream(torch.device(device).index)), torch.Size(np.atleast_1d(shape))
            memory = np.zeros(max(1, math.prod(sizes) * dtype.itemsize), np.uint8)
            tensor = torch.from_numpy(memory)[: math.prod(sizes) * dtype.itemsize].view(dtype).reshape(sizes)
            self.blocks[memory.ctypes.data] = block
            weakref.finalize(memory, self._free, memory.ctypes.data, block).atexit = False
            self.use(block, block.home)
            tensor.record_stream = block.recorded.append
            return tensor

        return allocate

    def _free(self, address, block):
        """Whatever is allocated next on its home stream may get this memory, once what is queued there is done."""
        del self.blocks[address]
        for number, count in block.used.items():
            streams = [block.home, *block.recorded]
            if number != block.home.cuda_stream and all(s.after.get(number, 0) < count for s in streams):
                self.torn.append(f"stream {number}")
