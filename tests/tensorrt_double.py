"""A double of the `tensorrt` library whose plans are names of eager graphs, run on memory at the addresses it is given.

It shows which documented calls our runner makes, in which order and with what. It proves nothing about the library: no
kernel, stream or CUDA graph of it ever runs here.

| promise of the library, refused or answered here as there | read in |
|---|---|
| None from `deserialize_cuda_engine`, `create_execution_context`; False from `set_*` and `execute_async_v3` | 1, 2 |
| addresses and scratch are multiples of 256 bytes | 1, 3 |
| every shape is set before the size of the scratch is asked for, scratch and addresses before a launch | 1 |
| `infer_shapes` raises RuntimeError for sizes that do not go together | 1 |
| contexts that share scratch never run at one time | 1 |
| a tensor of location HOST is read in memory of the host | 3 |
| a budget for streamed weights is set before any context; its property drops the answer | 2 |
| the automatic budget comes as 32 bits, signed | 2 |
| RTX: one cache serves several contexts, `serialize` may give None | 1 |
| a communicator is a capsule around the address of NCCL's, and `set_communicator` answers False | 1 |

1: docstrings of tensorrt_rtx 1.7.1. 2: the Python bindings of TensorRT 10, where they bind `ICudaEngine`.
3: the comments of NvInferRuntime.h on `setTensorAddress` and `setDeviceMemoryV2`, as other projects copy that header.
Not looked at here: that a launch off the default stream is advised, and that nobody captures around a context of RTX
that captures by itself. That scratch outlives the work is looked at by the double of `torch.cuda`, whose memory it is.
"""

import ctypes
from types import SimpleNamespace

import tensorrt_rtx
import torch

from taylorseer_export.bundle.shapes import evaluate, names
from taylorseer_export.bundle.tensorrt import extents

TAKEN = (
    "ILogger",
    "DataType",
    "TensorIOMode",
    "TensorLocation",
    "ExecutionContextAllocationStrategy",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
)
THEIRS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def library(modules, manifest, gpu=lambda: 0, gpu_of=lambda stream: 0, use=lambda memory, stream: None, **behaviour):
    """The double as a module; `contexts` and `refits` record what was asked of it.

    Args:
        modules: Graph name -> eager module.
        manifest: What its engines say of themselves.
        gpu: The GPU that is current in this thread.
        gpu_of: Handle of a stream -> its GPU.
        use: Told of the scratch and the stream of every launch.
        behaviour: `alias`: output -> input; `dtype`, `shape`, `profile`: tensor -> what an engine claims instead;
            `refuses`: graphs whose plans are not taken; `no_address`: tensor whose address is not; `no_context`,
            `no_cache`, `no_budget`, `no_communicator`: whether those are not; `mixed`: whether shapes do not go
            together; `on_host`: tensor that is read there; `weights`: bytes that are streamed; `aligned`: what
            addresses are multiples of.
    """
    trt = SimpleNamespace(**{name: getattr(tensorrt_rtx, name) for name in TAKEN})
    trt.__name__, trt.__version__ = "tensorrt", "10.9.0.34"
    trt.contexts, trt.refits, trt.caches = [], [], []
    trt.gpu, trt.gpu_of, trt.use = gpu, gpu_of, use

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, plan):
            name = bytes(plan).decode()
            if name in behaviour.get("refuses", ()):
                self.log.log(trt.ILogger.Severity.ERROR, "the double refuses it")
                return None
            return Engine(trt, name, modules[name], manifest, behaviour)

    class OnnxParserRefitter:
        def __init__(self, refitter, log):
            pass

        def refit_from_file(self, path):
            trt.refits.append(path)
            return not path.endswith(behaviour.get("no_weights", "?"))

    trt.Runtime, trt.OnnxParserRefitter = Runtime, OnnxParserRefitter
    trt.Refitter = lambda engine, log: SimpleNamespace(refit_cuda_engine=lambda: True)
    return trt


class Engine:
    def __init__(self, trt, name, module, manifest, behaviour):
        self.trt, self.name, self.module, self.behaviour = trt, name, module, behaviour
        self.contract, self.dimensions = manifest.graphs[name], manifest.dimensions
        self.inputs = {t.name: t for t in self.contract.inputs}
        self.tensors = {**self.inputs, **{t.name: t for t in self.contract.outputs}}
        self.num_io_tensors = len(self.tensors)
        self._budget, self.streamable_weights_size = 0, behaviour.get("weights", 20000)
        self.device_memory_size_v2 = 1000
        self.gpu = trt.gpu()  # where it was deserialised, it stays

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        claimed = self.behaviour.get("dtype", {}).get(name, self.tensors[name].dtype)
        return getattr(self.trt.DataType, THEIRS[claimed])

    def get_tensor_shape(self, name):
        fixed = {n: d.minimum for n, d in self.dimensions.items() if d.minimum == d.maximum}
        shape = [evaluate(s, fixed) if names(s) <= fixed.keys() else -1 for s in self.tensors[name].shape]
        return self.behaviour.get("shape", {}).get(name, shape)

    def get_tensor_profile_shape(self, name, index):
        assert index == 0
        return self.behaviour.get("profile", {}).get(name, extents(self.tensors[name], self.dimensions))

    def get_aliased_input_tensor(self, name):
        return self.behaviour.get("alias", {}).get(name)

    def get_tensor_location(self, name):
        return self.trt.TensorLocation.HOST if name == self.behaviour.get("on_host") else self.trt.TensorLocation.DEVICE

    def get_weight_streaming_automatic_budget(self):
        return ctypes.c_int32(self.streamable_weights_size * 3 // 4).value  # as the binding gives it

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        busy = any(context.engine is self for context in self.trt.contexts)
        if 0 <= budget <= self.streamable_weights_size and not busy and not self.behaviour.get("no_budget"):
            self._budget = budget

    def create_execution_context(self, how):
        if self.behaviour.get("no_context"):
            return None
        assert self.trt.gpu() == self.gpu, "a context is made where another GPU is current than that of its engine"
        self.trt.contexts.append(Context(self, how))
        return self.trt.contexts[-1]

    def create_runtime_config(self):
        return Config(self.trt, self.behaviour)


class Config:
    """What TensorRT-RTX makes a context from."""

    def __init__(self, trt, behaviour):
        self.behaviour = behaviour
        self.trt, self.strategy, self.cache, self.cuda_graph_strategy = trt, None, None, None
        self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        found = []
        self.trt.caches.append(found)
        compiled = self.behaviour.get("compiled", b"compiled")
        return SimpleNamespace(deserialize=found.append, serialize=lambda: compiled)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return not self.behaviour.get("no_cache")


class Context:
    def __init__(self, engine, how):
        self.engine, self.how = engine, how
        self.shapes, self.addresses, self.memory, self.runs = {}, {}, None, []
        self.communicator = None

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        self.shapes[name] = tuple(shape)
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        aligned = address % self.engine.behaviour.get("aligned", 1) == 0
        if not address or not aligned or name not in self.engine.tensors:
            return False
        self.addresses[name] = address
        return name != self.engine.behaviour.get("no_address")

    def set_communicator(self, communicator):
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        self.communicator = address(communicator, None)
        return not self.engine.behaviour.get("no_communicator")

    def infer_shapes(self):
        assert self.engine.trt.gpu() == self.engine.gpu, "shapes are set where another GPU is current"
        if self.engine.behaviour.get("mixed"):
            raise RuntimeError("broadcast of 3 with 4")
        return sorted(self.engine.inputs.keys() - self.shapes.keys())

    def update_device_memory_size_for_shapes(self):
        assert self.shapes.keys() == self.engine.inputs.keys(), "the size of scratch is asked for before shapes are set"
        return 1000

    def set_device_memory(self, address, size):
        assert size >= self.update_device_memory_size_for_shapes(), "scratch is too small"
        assert address % self.engine.behaviour.get("aligned", 1) == 0, "scratch is not aligned"
        self.memory = address

    def execute_async_v3(self, stream):
        if not self.memory or self.addresses.keys() != self.engine.tensors.keys():
            return False
        self.engine.trt.use(self.memory, stream)
        gpu, trt = self.engine.gpu, self.engine.trt
        assert trt.gpu() == gpu, "a launch where another GPU is current than that of its engine"
        assert trt.gpu_of(stream) == gpu, "a launch on a stream of another GPU than that of its engine"
        self.runs.append(stream)
        contract = self.engine.contract
        sources = [_tensor(self.addresses[t.name], self.shapes[t.name], t.dtype).clone() for t in contract.inputs]
        with torch.no_grad():
            for tensor, value in zip(contract.outputs, self.engine.module(*sources), strict=True):
                _tensor(self.addresses[tensor.name], tuple(value.shape), tensor.dtype).copy_(value)
        return not self.engine.behaviour.get("fails")


def _tensor(address, shape, dtype):
    """The memory at an address as a tensor."""
    kind = getattr(torch, dtype)
    size = kind.itemsize * torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=kind).reshape(shape)
