"""A double of the `tensorrt` library whose plans are names of eager graphs, run on memory at the addresses it is given.

It shows which documented calls our runner makes, in which order and with what. It proves nothing about the library: no
kernel, stream or CUDA graph of it ever runs here.
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
    "ExecutionContextAllocationStrategy",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
)
THEIRS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def library(modules, manifest, gpu=lambda: 0, gpu_of=lambda stream: 0, **behaviour):
    """The double as a module; `contexts` and `refits` record what was asked of it.

    Args:
        modules: Graph name -> eager module.
        manifest: What its engines say of themselves.
        gpu: The GPU that is current in this thread.
        gpu_of: Handle of a stream -> its GPU.
        behaviour: `alias`: output -> input; `dtype`, `shape`, `profile`: tensor -> what an engine claims instead;
            `refuses`: graphs whose plans are not taken.
    """
    trt = SimpleNamespace(**{name: getattr(tensorrt_rtx, name) for name in TAKEN})
    trt.__name__, trt.__version__ = "tensorrt", "10.9.0.34"
    trt.contexts, trt.refits, trt.caches = [], [], []
    trt.gpu, trt.gpu_of = gpu, gpu_of

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
        self.weight_streaming_budget_v2 = None
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

    def get_weight_streaming_automatic_budget(self):
        return 12345

    def create_execution_context(self, how):
        assert self.trt.gpu() == self.gpu, "a context is made where another GPU is current than that of its engine"
        self.trt.contexts.append(Context(self, how))
        return self.trt.contexts[-1]

    def create_runtime_config(self):
        return Config(self.trt)


class Config:
    """What TensorRT-RTX makes a context from."""

    def __init__(self, trt):
        self.trt, self.strategy, self.cache, self.cuda_graph_strategy = trt, None, None, None
        self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        found = []
        self.trt.caches.append(found)
        return SimpleNamespace(deserialize=found.append, serialize=lambda: b"compiled")

    def set_runtime_cache(self, cache):
        self.cache = cache


class Context:
    def __init__(self, engine, how):
        self.engine, self.how = engine, how
        self.shapes, self.addresses, self.memory, self.runs = {}, {}, None, []

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        self.shapes[name] = tuple(shape)
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def infer_shapes(self):
        assert self.engine.trt.gpu() == self.engine.gpu, "shapes are set where another GPU is current"
        return sorted(self.engine.inputs.keys() - self.shapes.keys())

    def update_device_memory_size_for_shapes(self):
        return 1000

    def set_device_memory(self, address, size):
        assert size >= self.update_device_memory_size_for_shapes()
        self.memory = address

    def execute_async_v3(self, stream):
        assert self.memory and self.addresses.keys() == self.engine.tensors.keys()
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
