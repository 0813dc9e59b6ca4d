"""A double of the parts of `torch.cuda` that the runners use, as on a machine of several GPUs; no GPU is there.

It notes what happens, and which GPU was torch's current one then. Tensors for a GPU lie in host memory.
"""

import contextlib
from types import SimpleNamespace

import torch

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
)


class FakeCuda:
    """A machine of GPUs of the capabilities given.

    Attributes:
        events: What was captured, launched and waited for.
        where: Of every event the GPU that was current.
        gpu: The current GPU.
        here: The current stream; the GPU's default one where it is None.
        allocated: Devices that tensors were asked for on.
    """

    def __init__(self, fails=False, capabilities=((8, 0), (9, 0))):
        self.events, self.where, self.fails, self.here, self.gpu = [], [], fails, None, 0
        self.capabilities, self.allocated, self._streams = capabilities, [], 0
        self._defaults = [self._stream(gpu) for gpu in range(len(capabilities))]

    def install(self, monkeypatch):
        """Take the place of torch's own, and of what allocates."""
        for name in NAMES:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, self._allocator(getattr(torch, name)))

    def note(self, event):
        self.events.append(event)
        self.where.append(self.gpu)

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

    def Stream(self, device=None):
        return self._stream(self.gpu if device is None else torch.device(device).index)

    def current_stream(self):
        return self.here or self._defaults[self.gpu]

    def default_stream(self):
        return self._defaults[self.gpu]

    def graph_pool_handle(self):
        self.note("pool")
        return (0, 1)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.note("replay"))

    @contextlib.contextmanager
    def stream(self, stream):
        assert stream.gpu == self.gpu, "a stream of another GPU than the current one"
        self.note("warm")
        yield

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert pool == (0, 1) and capture_error_mode == "thread_local"
        assert stream.gpu == self.gpu, "a stream of another GPU than the current one"
        self.note("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    def gpu_of(self, handle):
        """The GPU of the stream with this handle, as libraries are given it."""
        return handle >> 32

    def _stream(self, gpu):
        self._streams += 1
        return SimpleNamespace(
            gpu=gpu,
            cuda_stream=gpu << 32 | self._streams,
            wait_stream=lambda other: None,
            synchronize=lambda: self.note("synchronize"),
        )

    def _allocator(self, real):
        def allocate(*arguments, device=None, **options):
            if device is not None and torch.device(device).type == "cuda":
                self.allocated.append(str(device))
                device = "cpu"
            return real(*arguments, device=device, **options)

        return allocate
