"""ONNX Runtime on a GPU: what its sessions are asked for, on a double of the library."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from harness import NEEDS_GPU, begin, open_slot, run
from onnxruntime_double import Double

from taylorseer_export.bundle import driver
from taylorseer_export.bundle.device import CPU as HOST
from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Dimension, Graph, Tensor
from taylorseer_export.compile.export import check_options
from taylorseer_export.errors import BundleError, ConfigError, StepError
from taylorseer_export.method import Guard
from taylorseer_export.runtime import onnxruntime as runner
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.identity import IDENTITY

pytestmark = pytest.mark.slow

X = Tensor(name="x", dtype="float32", shape=("batch", 4), role="latent")
Y = Tensor(name="y", dtype="float32", shape=("batch", 4), role="noise_pred")
GRAPHS = {"full": Graph(file="full.onnx", inputs=(X,), outputs=(Y,), weights_bytes=0)}
DIMENSIONS = {"batch": Dimension(minimum=1, maximum=8, typical=2)}
SECOND = Device("cuda", 1)
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def library(monkeypatch):
    """The double: a GPU build of ONNX Runtime whose sessions only record."""
    made = SimpleNamespace(__version__="1.27.0", SessionOptions=onnxruntime.SessionOptions, sessions=[], starts=None)
    made.copiers, made.OrtValue = [], None

    class Session:
        def __init__(self, path, options, providers, disabled_optimizers=None):
            self.providers, self.runs, self.bound = providers, [], []
            (made.copiers if path == IDENTITY else made.sessions).append(self)

        def get_providers(self):
            return made.starts or [p if isinstance(p, str) else p[0] for p in self.providers]

        def get_inputs(self):
            return [SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 4])]

        def get_outputs(self):
            return [SimpleNamespace(name="y", type="tensor(float)", shape=["batch", 4])]

        def io_binding(self):
            return SimpleNamespace(bind_input=self.bind, bind_output=self.bind)

        def bind(self, name, device, number, dtype, shape, address):
            self.bound.append((name, device, number))

        def run_with_iobinding(self, binding, options):
            self.runs.append(options and dict(options.entries))

    class RunOptions:
        def __init__(self):
            self.entries = []

        def add_run_config_entry(self, key, value):
            self.entries.append((key, value))

    made.InferenceSession, made.RunOptions = Session, RunOptions
    made.get_available_providers = lambda: [TENSORRT, CUDA, CPU]
    monkeypatch.setattr(runner, "_library", lambda: made)
    monkeypatch.setattr(runner, "_source", lambda path: (path, None))
    return made


def opened(library, device=SECOND, **options):
    made = runner.OnnxRuntimeRunner({"full": "full.onnx"}, GRAPHS, device, dimensions=DIMENSIONS, **options)
    return made, library.sessions[-1]


def bound(made):
    buffers = [runner.HostBuffer.zeros((2, 4), "float32") for _ in range(2)]
    return made.bind("full", {"x": buffers[0]}, {"y": buffers[1]})


def test_every_bound_call_has_a_cuda_graph_of_its_own(library):
    """Under one number two bindings would replay the addresses of the first."""
    made, session = opened(library)
    assert session.providers == [(CUDA, {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"})]
    calls = [bound(made), bound(made)]
    assert session.runs == [{"gpu_graph_id": "1"}, {"gpu_graph_id": "2"}]  # captured when bound
    for call in calls:
        call()
    assert session.runs[2:] == [{"gpu_graph_id": "1"}, {"gpu_graph_id": "2"}]
    assert made.fallbacks == 0


def test_without_cuda_graphs_calls_are_counted(library):
    made, session = opened(library, cuda_graphs=False)
    assert session.providers == [(CUDA, {"device_id": "1", "use_tf32": "0"})]
    call = bound(made)
    assert session.runs == []
    call()
    assert (session.runs, made.fallbacks) == ([None], 1)


def test_the_tensorrt_provider_is_told_the_ranges(library):
    """It keeps one CUDA graph for a session, so it gets none."""
    made, session = opened(library, provider="tensorrt")
    shapes = {"trt_profile_min_shapes": "x:1x4", "trt_profile_opt_shapes": "x:2x4", "trt_profile_max_shapes": "x:8x4"}
    assert session.providers == [(TENSORRT, {"device_id": "1", **shapes}), (CUDA, {"device_id": "1", "use_tf32": "0"})]
    bound(made)()
    assert (session.runs, made.fallbacks) == ([None], 1)


def test_the_tensorrt_provider_is_given_aligned_addresses_alone(library):
    """It hands them to TensorRT as they are, which reads 256 bytes at a time."""
    memory = runner.HostBuffer.zeros((4, 2, 4), "float32")
    for provider in ("cuda", "tensorrt"):
        made, session = opened(library, provider=provider)
        buffers = {"x": memory.entry(1)}, {"y": memory.entry(2)}
        if provider == "cuda":
            made.bind("full", *buffers)
            assert session.bound
            continue
        with pytest.raises(StepError, match=r"`x` of graph `full` starts at 32 bytes past a multiple of 256, expected"):
            made.bind("full", *buffers)
        assert not session.bound


def test_a_provider_that_does_not_start_is_an_error(library):
    """ONNX Runtime itself goes on with the CPU and says so on standard error alone."""
    library.starts = [CPU]
    with pytest.raises(
        BundleError, match=r"CUDAExecutionProvider does not start on this machine, .* fell back to CPUEx"
    ):
        opened(library)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="says what the CPU package is told")
@pytest.mark.parametrize(("provider", "name"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_the_cpu_package_names_the_one_to_install(provider, name):
    with pytest.raises(
        BundleError, match=rf"device is `cuda`, .*not {name}\); install onnxruntime-gpu in its place, or"
    ):
        runner.OnnxRuntimeRunner({}, {}, Device("cuda"), provider=provider)


def test_a_provider_belongs_to_a_gpu(drafts):
    options = drafts("dit").options
    from dataclasses import replace

    with pytest.raises(ConfigError, match=r"--provider is tensorrt with --device cpu, expected it with --device cuda"):
        check_options(replace(options, device="cpu", engine_options={"provider": "tensorrt"}))
    check_options(replace(options, device="cuda", precision="bf16", engine_options={"provider": "tensorrt"}))
    assert runner.OnnxRuntimeRunner({}, {}, HOST).fallbacks == 0


# Several GPUs


@pytest.mark.parametrize(("device", "number"), [(SECOND, 1), (Device("cuda", 0), 0), (Device("cuda"), 0)])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_sessions_and_bindings_name_the_gpu(library, device, number, provider):
    made, session = opened(library, device, provider=provider)
    bound(made)
    (copier,) = library.copiers
    given = [options["device_id"] for _, options in (*session.providers, *copier.providers)]
    assert set(given) == {str(number)} and [name for name, _ in copier.providers] == [CUDA]
    assert session.bound == [("x", "cuda", number), ("y", "cuda", number)]
    assert made.device == Device("cuda", number)


@pytest.fixture
def second_gpu(monkeypatch, bundles):
    """Name of a bundle -> (the double, a denoiser over it on the second of two GPUs)."""

    def make(name):
        double = Double()
        monkeypatch.setattr(runner, "_library", lambda: double)
        monkeypatch.setattr(driver, "gpu_count", lambda: 2)
        return double, load(bundles(name), "cuda:1", threads=1)

    return make


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("options", [{}, {"guard": Guard("cg", 0.2)}], ids=["plan", "guard"])
def test_a_loop_on_the_second_gpu_is_that_on_the_cpu(second_gpu, onnx, tiny, name, options):
    """Rows of tables, entries of rings and what a guard keeps are windows, copied by the graph of one Identity."""
    inputs, expected = tiny(name).inputs(8, batch=2), onnx(name)
    reference = run(expected, inputs, "FFF..F..", 2, **options)
    double, denoiser = second_gpu(name)
    assert torch.equal(run(denoiser, inputs, "FFF..F..", 2, **options), reference)
    assert double.devices == {1} and denoiser.device == SECOND
    assert any(event == "copy" for event, _ in double.events)


def check_step(double, slot, latents):
    """A step moves its latents and its prediction between host and GPU; its numbers and its rows are there already."""
    memory, graph = slot.memory, slot.graph
    rows = [t.name for t in slot.contract.manifest.graphs[graph].inputs if t.role == "step"]
    numbers = [memory.numbers[graph]] if graph in memory.numbers else []
    double.events.clear()
    slot.step(latents.numpy())
    latent, copied = memory.buffers[slot.contract.latent.name], [*(memory.buffers[n] for n in rows), *numbers]
    assert [size for event, size in double.events if event == "to device"] == [latent.nbytes]
    assert [size for event, size in double.events if event == "copy"] == [b.nbytes for b in copied]
    assert [size for event, size in double.events if event == "to host"] == [memory.prediction.nbytes]
    assert [what for event, what in double.events if event == "replay"] == [graph]
    assert not any(event in ("run", "capture") for event, _ in double.events)
    assert rows and all(memory.buffers[n].nbytes < slot._tables[n].nbytes for n in rows)
    return graph


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_step_takes_nothing_but_its_latents_and_its_prediction_through_the_host(second_gpu, tiny, name):
    double, denoiser = second_gpu(name)
    inputs = tiny(name).inputs(8, batch=2)
    slot = open_slot(denoiser, inputs)
    begin(slot, inputs, "FFF..F..", 2)
    assert {check_step(double, slot, latents) for latents in inputs[0]} == {"full", "forecast"}


def test_a_copy_by_way_of_the_host_is_seen(second_gpu, tiny, monkeypatch):
    double, denoiser = second_gpu("dit")
    inputs = tiny("dit").inputs(2, batch=2)
    slot = open_slot(denoiser, inputs)
    begin(slot, inputs, "F.", 1)

    def by_way_of_the_host(row, source):
        count, start = np.prod(source.shape), source.address - source._value.data_ptr()
        row.write(source._value.numpy().reshape(-1)[start // 4 :][:count].reshape(source.shape))

    monkeypatch.setattr(runner._DeviceBuffer, "copy", by_way_of_the_host)
    with pytest.raises(AssertionError):
        check_step(double, slot, inputs[0][0])


def test_memory_of_another_gpu_is_refused_by_the_double(second_gpu):
    _, denoiser = second_gpu("dit")
    buffer = denoiser.runner.buffer((4,), "float32")
    copies = denoiser.runner._copies
    copies._place = ("cuda", 0)
    with pytest.raises(AssertionError, match="no memory of GPU 0"):
        copies.copy(buffer.address, buffer.address + 8, 8)


@pytest.mark.parametrize("what", ["write", "clear", "read", "copy", "entry", "buffer", "call"])
def test_nothing_reaches_the_gpu_while_a_thread_captures(second_gpu, what):
    """A capture of ONNX Runtime is spoilt by an allocation or a copy of any thread, so all of them take turns."""
    double, denoiser = second_gpu("dit")
    made = denoiser.runner
    one, other = (made.buffer((2, 3), "float32") for _ in range(2))
    do = {
        "write": lambda: one.write(np.ones((2, 3), np.float32)),
        "clear": one.clear,
        "read": one.read,
        "copy": lambda: one.copy(other),
        "entry": lambda: one.entry(1).read(),
        "buffer": lambda: made.buffer((1,), "float32"),
        "call": lambda: denoiser.slot(
            {name: d.minimum for name, d in denoiser.manifest.dimensions.items() if name != "steps"}
        ),
    }[what]
    with made._turn:
        double.capturing = True
        thread = threading.Thread(target=do)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()  # it waits for its turn
        double.capturing = False
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64"])
def test_windows_are_copied_and_read_alone(second_gpu, dtype):
    double, denoiser = second_gpu("dit")
    make = denoiser.runner.buffer
    table, ring = make((3, 2, 5), dtype), make((2, 2, 5), dtype)
    values = np.arange(30).reshape(3, 2, 5)
    table.write(values)
    double.events.clear()
    ring.entry(1).copy(table.entry(2))
    assert double.events == [("copy", ring.entry(1).nbytes)]
    assert ring.read().tolist() == [np.zeros((2, 5)).tolist(), values[2].tolist()]
    double.events.clear()
    assert table.entry(1).entry(0).read().tolist() == values[1, 0].tolist()
    assert [size for event, size in double.events if event == "to host"] == [table.entry(1).entry(0).nbytes]
    assert table.entry(0).read().tolist() == values[0].tolist()  # its address is that of the table


def test_copies_are_bound_once_and_not_without_end(monkeypatch):
    monkeypatch.setattr(runner, "_MOST_BOUND", 2)
    copies = runner._Copies(onnxruntime, HOST, nullcontext())
    source, target = np.arange(6, dtype=np.int16), np.zeros(6, np.int16)
    for k in (0, 1, 1, 2, 3, 4, 5):
        copies.copy(source[k:].ctypes.data, target[k:].ctypes.data, 2)
        assert len(copies._bound) <= 2
    assert target.tolist() == source.tolist()


def test_the_graph_that_copies_is_one():
    """Held against the `onnx` package, which the run side does not have."""
    import onnx

    model = onnx.load_from_string(IDENTITY)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


# What the library promises, and what it does not forgive


@pytest.fixture
def doubled(monkeypatch, tmp_path):
    """(the double, options -> a runner over it on the second GPU whose one graph doubles its input)."""
    import onnx
    from onnx import helper

    double, places = Double(), {name: helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy"}
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "full", [places["x"]], [places["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "full.onnx")
    monkeypatch.setattr(runner, "_library", lambda: double)

    def make(**options):
        return runner.OnnxRuntimeRunner(
            {"full": tmp_path / "full.onnx"}, GRAPHS, SECOND, 1, dimensions=DIMENSIONS, **options
        )

    return double, make


def bound_on(made):
    """(call, its input, its output) of a runner on the double."""
    buffers = [made.buffer((2, 4), "float32") for _ in range(2)]
    return made.bind("full", {"x": buffers[0]}, {"y": buffers[1]}), *buffers


def in_a_thread(do):
    """What a thread of its own returns, or raises."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(do).result(60)


def graphs_of(double):
    return [(event, graph) for event, graph in double.events if event in ("capture", "replay", "run")]


def test_a_call_has_one_cuda_graph_for_all_threads(doubled):
    """The library keeps it for the thread that captured it, and would capture again in the midst of a loop."""
    double, make = doubled
    made = make()
    call, x, y = in_a_thread(lambda: bound_on(made))
    other, *_ = bound_on(made)
    for value in (1, 2, 3):
        x.write(np.full((2, 4), value, np.float32))
        in_a_thread(call)
        assert (y.read() == 2 * value).all()
    other()
    call()
    assert graphs_of(double) == [("capture", "full")] * 2 + [("replay", "full")] * 5


def test_the_double_refuses_what_spoils_a_cuda_graph(doubled):
    double, make = doubled
    session = make()._sessions["full"]
    memory = [double.OrtValue.ortvalue_from_numpy(np.zeros((2, 4), np.float32), "cuda", 1) for _ in range(3)]

    def binding_of(one, other):
        binding = session.io_binding()
        binding.bind_input("x", "cuda", 1, np.float32, (2, 4), one.data_ptr())
        binding.bind_output("y", "cuda", 1, np.float32, (2, 4), other.data_ptr())
        return binding

    options = double.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "7")
    binding = binding_of(*memory[:2])
    for _ in range(2):
        session.run_with_iobinding(binding, options)
    with pytest.raises(AssertionError, match="another thread than captured a CUDA graph asks for it"):
        in_a_thread(lambda: session.run_with_iobinding(binding, options))
    with pytest.raises(AssertionError, match="is replayed on other addresses than those of its capture"):
        session.run_with_iobinding(binding_of(*memory[1:]), options)
    with pytest.raises(AssertionError, match="a binding is run by another session than made it"):
        make()._sessions["full"].run_with_iobinding(binding, options)
    for number in ("0", "-1"):
        with pytest.raises(AssertionError, match="gpu_graph_id is"):
            double.RunOptions().add_run_config_entry("gpu_graph_id", number)
    with session.busy, pytest.raises(AssertionError, match="a session with CUDA graphs runs twice at one time"):
        session.run_with_iobinding(binding, options)
    memory.clear()
    with pytest.raises(AssertionError, match="which is no memory of GPU 1"):
        session.run_with_iobinding(binding, options)


def test_a_call_keeps_its_memory(doubled):
    double, make = doubled
    call = bound_on(make())[0]  # nobody else holds the buffers
    gc.collect()
    assert len(double.memory) == 2
    call()
    del call
    gc.collect()
    assert not double.memory


def test_a_copy_onto_itself_is_refused_by_the_double(doubled):
    made = doubled[1]()
    buffer = made.buffer((4,), "float32")
    with pytest.raises(AssertionError, match="memory is copied onto itself"):
        made._copies.copy(buffer.address, buffer.address + 4, 8)


def test_a_graph_with_nodes_for_the_cpu_is_not_captured(doubled):
    double, make = doubled
    double.on_the_cpu = ("full",)
    with pytest.raises(BundleError, match=r"full.onnx cannot be captured \(This session cannot.*\(--no-cuda-graphs\)"):
        make()
    made = make(cuda_graphs=False)
    bound_on(made)[0]()
    assert made.fallbacks == 1


def test_a_capture_that_fails_says_how_to_go_on(doubled):
    double, make = doubled
    made = make()

    def fail(graph):
        raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing\nmore")

    double.during = fail
    with pytest.raises(StepError, match=r"`full` cannot be captured \(CUDA failure 900.*ing\), .*\(--no-cuda-graphs\)"):
        bound_on(made)


@pytest.mark.parametrize("what", ["load", "buffer", "write", "call", "capture", "close"])
def test_a_capture_has_the_process_to_itself(doubled, what):
    """Mode global: what any thread does by any session, on any GPU, ends it."""
    double, make = doubled
    capturing, go_on = threading.Event(), threading.Event()
    one, other = make(), make()
    call, x, _ = bound_on(other)

    def wait(graph):
        double.during = lambda graph: None
        capturing.set()
        assert go_on.wait(60)

    double.during = wait
    do = {
        "load": make,
        "buffer": lambda: other.buffer((1,), "float32"),
        "write": lambda: x.write(np.ones((2, 4), np.float32)),
        "call": call,
        "capture": lambda: bound_on(other),
        "close": other.close,
    }[what]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(bound_on, one)
        assert capturing.wait(60)
        second = threads.submit(do)
        assert wait_for([second], timeout=0.2).not_done  # it waits for the capture
        go_on.set()
        assert first.result(60) and (second.result(60), True)[1]
    double.touch()


def test_a_capture_waits_for_what_is_under_way(doubled):
    double, make = doubled
    one, other = make(), make()
    with ThreadPoolExecutor(1) as thread:
        with other._turn:
            captured = thread.submit(bound_on, one)
            assert wait_for([captured], timeout=0.2).not_done and graphs_of(double) == []
        assert captured.result(60)


def test_a_session_that_ends_beside_a_capture_is_refused_by_the_double(doubled):
    double, make = doubled
    session = make()._sessions.pop("full")
    double.capturing = True
    with pytest.raises(BundleError, match="memory of a GPU is allocated or copied while a thread captures"):
        make()
    del session
    gc.collect()
    double.capturing = False
    with pytest.raises(AssertionError, match="a session has ended while a thread captured"):
        double.touch()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"trt_cuda_graph_enable": "1"}, "one CUDA graph for all bindings of a session"),
        ({"trt_profile_opt_shapes": "z:2x4"}, "which are dropped without a word"),
    ],
)
def test_what_the_tensorrt_provider_would_get_wrong_is_refused_by_the_double(doubled, monkeypatch, options, problem):
    _, make = doubled
    assert make(provider="tensorrt")
    given = runner._profile
    monkeypatch.setattr(runner, "_profile", lambda *arguments: {**given(*arguments), **options})
    with pytest.raises(BundleError, match=problem):
        make(provider="tensorrt")


def test_an_unaligned_address_for_tensorrt_is_refused_by_the_double(doubled):
    made = doubled[1](provider="tensorrt")
    made._alignment = 1  # as if it were not looked at
    memory = made.buffer((2, 2, 100), "uint8")
    odd = memory.entry(0) if memory.address % 256 else memory.entry(1)
    binding = made._sessions["full"].io_binding()
    with pytest.raises(AssertionError, match="an address that is no multiple of 256 bytes"):
        binding.bind_input("x", "cuda", 1, np.float32, (2, 4), odd.address)


# On a GPU


@pytest.mark.parametrize("kind", [pytest.param("onnxruntime", marks=NEEDS_GPU)])
def test_rows_stay_on_a_gpu(on_gpu, tiny, kind, monkeypatch):
    """What the double cannot show: the CUDA provider runs the graph of one Identity as a copy between two windows."""
    denoiser = on_gpu(kind, "dit")
    make = denoiser.runner.buffer
    table, row = make((3, 5), "float32"), make((5,), "float32")
    table.write(np.arange(15, dtype=np.float32).reshape(3, 5))
    row.copy(table.entry(2))
    assert row.read().tolist() == [10, 11, 12, 13, 14]
    inputs, seen = tiny("dit").inputs(4, batch=2), []
    real = onnxruntime.OrtValue.numpy
    slot = open_slot(denoiser, inputs)
    begin(slot, inputs, "FF..", 1)
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda value: seen.append(value.shape()) or real(value))
    for latents in inputs[0]:
        slot.step(latents.numpy())
    assert seen == [list(slot.memory.prediction.shape)] * 4
