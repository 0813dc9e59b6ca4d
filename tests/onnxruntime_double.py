"""A double of a GPU build of ONNX Runtime, over the CPU build that is installed.

What it calls memory of a GPU is memory of the host, so that its sessions compute. It notes what crosses between the two
and refuses a binding to memory of another GPU than it says.
"""

import math
from pathlib import Path

import numpy as np
import onnxruntime

from taylorseer_export.runtime.identity import IDENTITY

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Double:
    """The library as a module.

    Attributes:
        events: (what, bytes or graph): `to device`, `to host`, `copy` on the device, `run` of a graph.
        devices: Numbers of GPUs that sessions, buffers and bindings were asked for.
    """

    __version__ = onnxruntime.__version__
    SessionOptions, RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions

    def __init__(self):
        self.events, self.devices, self.memory = [], set(), []
        self.capturing = False  # set by a test: another thread is at it

    def get_available_providers(self):
        return [CUDA, CPU]

    def InferenceSession(self, source, options, providers, disabled_optimizers=None):
        return Session(self, source, options, providers, disabled_optimizers)

    @property
    def OrtValue(self):
        return Values(self)

    def touch(self):
        """Refuse what a thread may not do while another captures."""
        assert not self.capturing, "memory of a GPU is allocated or copied while a thread captures"

    def check(self, device, number, address, shape, dtype):
        """Refuse an address that is no memory of that GPU."""
        self.devices.add(number)
        assert device == "cuda", f"bound to {device}"
        end = address + math.prod(shape) * np.dtype(dtype).itemsize
        assert any(number == gpu and start <= address and end <= stop for start, stop, gpu in self.memory), (
            f"bound to {address}, which is no memory of GPU {number}"
        )


class Session:
    def __init__(self, double, source, options, providers, disabled):
        self.double, self.providers = double, providers
        for _, given in providers:
            double.devices.add(int(given["device_id"]))
        self.graph = "copy" if source == IDENTITY else Path(source).stem
        self.real = onnxruntime.InferenceSession(source, options, providers=[CPU], disabled_optimizers=disabled)
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs

    def get_providers(self):
        return [name for name, _ in self.providers]

    def io_binding(self):
        return Binding(self.double, self.real.io_binding())

    def run_with_iobinding(self, binding, options=None):
        self.double.touch()
        self.double.events.append(("copy", binding.size) if self.graph == "copy" else ("run", self.graph))
        self.real.run_with_iobinding(binding.real)


class Binding:
    def __init__(self, double, real):
        self.double, self.real, self.size = double, real, None

    def bind_input(self, name, device, number, dtype, shape, address):
        self.double.check(device, number, address, shape, dtype)
        self.size = shape[0] if shape else None
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name, device, number, dtype, shape, address):
        self.double.check(device, number, address, shape, dtype)
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)


class Values:
    """What makes OrtValues."""

    def __init__(self, double):
        self.double = double

    def ortvalue_from_numpy(self, array, device, number):
        assert device == "cuda"
        self.double.touch()
        self.double.devices.add(number)
        value = Value(self.double, array)
        start = value.data_ptr()
        self.double.memory.append((start, start + array.nbytes, number))
        return value


class Value:
    def __init__(self, double, array):
        self.double, self.array = double, np.array(array)

    def data_ptr(self):
        return self.array.ctypes.data

    def shape(self):
        return list(self.array.shape)

    def update_inplace(self, values):
        assert (values.shape, values.dtype) == (self.array.shape, self.array.dtype)
        self.double.touch()
        self.double.events.append(("to device", values.nbytes))
        self.array[...] = values

    def numpy(self):
        self.double.touch()
        self.double.events.append(("to host", self.array.nbytes))
        return self.array.copy()
