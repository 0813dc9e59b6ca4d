"""A double of a GPU build of ONNX Runtime, over the CPU build that is installed.

What it calls memory of a GPU is memory of the host, so that its sessions compute. It notes what crosses between the two
and what is captured, and refuses what the library or the driver would refuse, or get wrong without a word.

| promise of the library, refused here when broken | read in |
|---|---|
| with `enable_cuda_graph` no session is made of a graph with nodes for the CPU, but for those of shapes | 1 |
| a CUDA graph is kept by thread and `gpu_graph_id`: a run on another thread captures again, there and then | 2, 3 |
| under one id the addresses of the capture are read and written, whatever is bound | 3 |
| an id is a number that the caller chooses, of a RunOptions; 0 is the library's own, -1 captures nothing | 4 |
| the first run under an id is made three times: the second still allocates, the third is captured | 1, 2, 5 |
| beside a capture no thread of the process allocates, copies, waits, or makes a session (mode global) | 3, 6 |
| a session that ends beside a capture ends the process | 7 |
| sessions with CUDA graphs run one at a time | 8 |
| the TensorRT provider keeps one CUDA graph for a session and knows no ids | 9 |
| it takes ranges for the same inputs in all three of its options, or goes on with none | 9 |
| it hands bound addresses to TensorRT as they are, which reads 256 bytes at a time | header of TensorRT |
| a binding holds addresses, not memory, and is run by the session that made it | 10 |
| a copy on the device does not go onto itself (cudaMemcpyAsync, of overlapping memory) | CUDA runtime API |
| a run returns when its work is done, whichever stream that went to | 1 |

1: core/session/inference_session.cc, its messages also in the library of 1.32. 2: cuda_execution_provider.h and .cc.
3: cuda_graph.cc, that of the plug-in too, and what tools on it measured. 4: onnxruntime_run_options_config_keys.h.
5: pull request 15005. 6: issue 18806. 7: pull request 32081. 8: pull requests 9978 and 10423.
9: tensorrt_execution_provider.cc. 10: IOBinding of the Python package, 1.32.
Not looked at here: `user_compute_stream`, which we do not give it, and that graphs of calls that are gone stay captured
until their session ends, as the CUDA provider releases none.
"""

import contextlib
import math
import threading
import weakref
from pathlib import Path

import numpy as np
import onnxruntime

from taylorseer_export.runtime.identity import IDENTITY

CUDA, CPU, TENSORRT = "CUDAExecutionProvider", "CPUExecutionProvider", "TensorrtExecutionProvider"
RUNS_OF_A_CAPTURE = 3


class RunOptions:
    """Options of one run; the real ones tell nobody what they hold in older versions."""

    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, key, value):
        assert key == "gpu_graph_id" and int(value) not in (0, -1), f"{key} is {value}"
        self.entries[key] = int(value)


class Double:
    """The library as a module.

    Attributes:
        events: (what, bytes or graph): `to device`, `to host`, `copy` on the device; `capture`, `replay` and `run` of a
            graph.
        devices: Numbers of GPUs that sessions, buffers and bindings were asked for.
        capturing: Whether a thread captures, or a test says so.
        on_the_cpu: Graphs that have a node for the CPU.
        during: Called within every capture, with its graph.
    """

    __version__ = onnxruntime.__version__
    SessionOptions, RunOptions = onnxruntime.SessionOptions, RunOptions

    def __init__(self):
        self.events, self.devices, self.memory = [], set(), []
        self.capturing, self.gone, self.on_the_cpu, self.during = False, False, (), lambda graph: None

    def get_available_providers(self):
        return [TENSORRT, CUDA, CPU]

    def InferenceSession(self, source, options, providers, disabled_optimizers=None):
        return Session(self, source, options, providers, disabled_optimizers)

    @property
    def OrtValue(self):
        return Values(self)

    def touch(self):
        """Refuse what a thread may not do while another captures."""
        assert not self.gone, "a session has ended while a thread captured, and the process with it"
        assert not self.capturing, "memory of a GPU is allocated or copied while a thread captures"

    def end(self):
        """A session has ended; what a finaliser raises nobody hears."""
        self.gone = self.gone or self.capturing

    @contextlib.contextmanager
    def capture(self, graph):
        self.touch()
        self.capturing = True
        self.events.append(("capture", graph))
        try:
            yield self.during(graph)
        finally:
            self.capturing = False

    def check(self, device, number, address, shape, dtype):
        """Refuse an address that is no memory of that GPU, or no longer; returns its end."""
        self.devices.add(number)
        assert device == "cuda", f"bound to {device}"
        end = address + math.prod(shape) * np.dtype("uint16" if dtype == 16 else dtype).itemsize
        assert any(number == gpu and start <= address and end <= stop for start, stop, gpu in self.memory), (
            f"bound to {address}, which is no memory of GPU {number}"
        )
        return end


class Session:
    def __init__(self, double, source, options, providers, disabled):
        double.touch()
        self.double, self.providers, self.graphs, self.busy = double, providers, {}, threading.Lock()
        for _, given in providers:
            double.devices.add(int(given["device_id"]))
        given = dict(providers)
        self.graph = "copy" if source == IDENTITY else Path(source).stem
        self.captures = given[providers[0][0]].get("enable_cuda_graph") == "1"
        self.aligned = 256 if TENSORRT in given else 1
        if self.captures and self.graph in double.on_the_cpu:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user  as all compute graph "
                "nodes have not been partitioned to the CUDAExecutionProvider"
            )
        if TENSORRT in given:
            assert "trt_cuda_graph_enable" not in given[TENSORRT], "one CUDA graph for all bindings of a session"
            ranges = [given[TENSORRT].get(f"trt_profile_{word}_shapes", "") for word in ("min", "opt", "max")]
            inputs = [[part.split(":")[0] for part in text.split(",")] for text in ranges]
            assert inputs[0] == inputs[1] == inputs[2] != [""], f"ranges for {inputs}, which are dropped without a word"
        self.real = onnxruntime.InferenceSession(source, options, providers=[CPU], disabled_optimizers=disabled)
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        weakref.finalize(self, double.end)

    def get_providers(self):
        return [name for name, _ in self.providers]

    def io_binding(self):
        return Binding(self)

    def run_with_iobinding(self, binding, options=None):
        assert binding.session is self, "a binding is run by another session than made it"
        binding.check()
        number = options.entries["gpu_graph_id"] if options is not None else 0
        if not self.captures:
            self.double.touch()
            self.double.events.append(("copy", binding.size) if self.graph == "copy" else ("run", self.graph))
            self.real.run_with_iobinding(binding.real)
            return
        assert self.busy.acquire(blocking=False), "a session with CUDA graphs runs twice at one time"
        try:
            self._run(binding, number)
        finally:
            self.busy.release()

    def _run(self, binding, number):
        double, key = self.double, (threading.get_ident(), number)
        double.touch()
        if key in self.graphs:
            assert self.graphs[key] == binding.bound, (
                "a CUDA graph is replayed on other addresses than those of its capture"
            )
            double.events.append(("replay", self.graph))
            self.real.run_with_iobinding(binding.real)
        else:
            known = {captured for _, captured in self.graphs}
            assert number not in known, "another thread than captured a CUDA graph asks for it, and captures it again"
            for _ in range(RUNS_OF_A_CAPTURE):
                self.real.run_with_iobinding(binding.real)
            with double.capture(self.graph):
                self.graphs[key] = dict(binding.bound)


class Binding:
    def __init__(self, session):
        self.session, self.double, self.real = session, session.double, session.real.io_binding()
        self.bound, self.size = {}, None

    def check(self):
        """Refuse memory that has been freed since it was bound, and a copy onto itself."""
        ends = {name: (place[2], self.double.check(*place)) for name, place in self.bound.items()}
        if self.session.graph == "copy":
            (a, to_a), (b, to_b) = ends["source"], ends["target"]
            assert to_a <= b or to_b <= a, "memory is copied onto itself"

    def bind_input(self, name, *place):
        self._bind(name, self.real.bind_input, *place)
        self.size = place[3][0] if place[3] else None

    def bind_output(self, name, *place):
        self._bind(name, self.real.bind_output, *place)

    def _bind(self, name, bind, device, number, dtype, shape, address):
        self.double.check(device, number, address, shape, dtype)
        assert address % self.session.aligned == 0, "TensorRT is handed an address that is no multiple of 256 bytes"
        self.bound[name] = (device, number, address, tuple(shape), dtype)
        bind(name, "cpu", 0, dtype, shape, address)


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
        place = (start, start + array.nbytes, number)
        self.double.memory.append(place)
        weakref.finalize(value, self.double.memory.remove, place)
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
