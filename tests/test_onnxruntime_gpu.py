"""ONNX Runtime on a GPU: what its sessions are asked for, on a double of the library."""

from types import SimpleNamespace

import onnxruntime
import pytest

from taylorseer_export.bundle.manifest import Dimension, Graph, Tensor
from taylorseer_export.compile.export import check_options
from taylorseer_export.errors import BundleError, ConfigError
from taylorseer_export.runtime import onnxruntime as runner

X = Tensor(name="x", dtype="float32", shape=("batch", 4), role="latent")
Y = Tensor(name="y", dtype="float32", shape=("batch", 4), role="noise_pred")
GRAPHS = {"full": Graph(file="full.onnx", inputs=(X,), outputs=(Y,), weights_bytes=0)}
DIMENSIONS = {"batch": Dimension(minimum=1, maximum=8, typical=2)}
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def library(monkeypatch):
    """The double: a GPU build of ONNX Runtime whose sessions only record."""
    made = SimpleNamespace(__version__="1.27.0", SessionOptions=onnxruntime.SessionOptions, sessions=[], starts=None)

    class Session:
        def __init__(self, path, options, providers, disabled_optimizers):
            self.providers, self.runs = providers, []
            made.sessions.append(self)

        def get_providers(self):
            return made.starts or [p if isinstance(p, str) else p[0] for p in self.providers]

        def get_inputs(self):
            return [SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 4])]

        def get_outputs(self):
            return [SimpleNamespace(name="y", type="tensor(float)", shape=["batch", 4])]

        def io_binding(self):
            return SimpleNamespace(bind_input=lambda *a: None, bind_output=lambda *a: None)

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


def opened(library, **options):
    made = runner.OnnxRuntimeRunner({"full": "full.onnx"}, GRAPHS, "cuda", dimensions=DIMENSIONS, **options)
    return made, library.sessions[-1]


def bound(made):
    buffers = [runner.HostBuffer.zeros((2, 4), "float32") for _ in range(2)]
    return made.bind("full", {"x": buffers[0]}, {"y": buffers[1]})


def test_every_bound_call_has_a_cuda_graph_of_its_own(library):
    """Under one number two bindings would replay the addresses of the first."""
    made, session = opened(library)
    assert session.providers == [(CUDA, {"use_tf32": "0", "enable_cuda_graph": "1"})]
    calls = [bound(made), bound(made)]
    assert session.runs == [{"gpu_graph_id": "1"}, {"gpu_graph_id": "2"}]  # captured when bound
    for call in calls:
        call()
    assert session.runs[2:] == [{"gpu_graph_id": "1"}, {"gpu_graph_id": "2"}]
    assert made.fallbacks == 0


def test_without_cuda_graphs_calls_are_counted(library):
    made, session = opened(library, cuda_graphs=False)
    assert session.providers == [(CUDA, {"use_tf32": "0"})]
    call = bound(made)
    assert session.runs == []
    call()
    assert (session.runs, made.fallbacks) == ([None], 1)


def test_the_tensorrt_provider_is_told_the_ranges(library):
    """It keeps one CUDA graph for a session, so it gets none."""
    made, session = opened(library, provider="tensorrt")
    shapes = {"trt_profile_min_shapes": "x:1x4", "trt_profile_opt_shapes": "x:2x4", "trt_profile_max_shapes": "x:8x4"}
    assert session.providers == [(TENSORRT, shapes), (CUDA, {"use_tf32": "0"})]
    bound(made)()
    assert (session.runs, made.fallbacks) == ([None], 1)


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
        runner.OnnxRuntimeRunner({}, {}, "cuda", provider=provider)


def test_a_provider_belongs_to_a_gpu(drafts):
    options = drafts("dit").options
    from dataclasses import replace

    with pytest.raises(ConfigError, match=r"--provider is tensorrt with --device cpu, expected it with --device cuda"):
        check_options(replace(options, device="cpu", engine_options={"provider": "tensorrt"}))
    check_options(replace(options, device="cuda", precision="bf16", engine_options={"provider": "tensorrt"}))
    assert runner.OnnxRuntimeRunner({}, {}, "cpu").fallbacks == 0
