"""The TensorRT runner: its checks before a plan is touched, and its binding, on a double of the library.

On a GPU the real one is held to the contract of `test_runtime`; see `tensorrt_double` for what the double cannot show.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from cuda_double import FakeCuda
from harness import allowed, open_slot, run
from oracle import assert_close, replay

from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.bundle.manifest import MANIFEST, Engine
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import Bundle, hash_files
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import describe
from taylorseer_export.errors import BundleError, ConfigError, StepError
from taylorseer_export.runtime import tensorrt as runner
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.order import Order

real = pytest.importorskip("tensorrt_rtx")
import tensorrt_double as double  # noqa: E402

SECOND = Device("cuda", 1)

CASES = [("dit", "module", "derivatives"), ("flux", "module", "snapshots"), ("plain", "residual", "snapshots")]
ENGINE = Engine(
    kind="tensorrt",
    versions={"tensorrt": "10.9.0.34"},
    device={"devices": "cuda", "compute_capability": "9.0", "gpu": "NVIDIA H200", "cuda": "12"},
)


@pytest.fixture
def bundle_of(drafts, tmp_path):
    """(draft's arguments, changes of its engine) -> a bundle whose plans hold the name of their graph."""

    def make(*what, **changes):
        draft = drafts(*what)
        manifest = describe(draft, "double")
        graphs = {n: g.model_copy(update={"file": f"{n}.plan"}) for n, g in manifest.graphs.items()}
        for name in graphs:
            (tmp_path / f"{name}.plan").write_text(name)
            (tmp_path / f"{name}.onnx").write_bytes(b"\x08\x08")  # an ONNX model of IR version 8, with no graph
        engine = ENGINE.model_copy(update=changes)
        manifest = manifest.model_copy(update={"graphs": graphs, "engine": engine, "files": hash_files(tmp_path)})
        (tmp_path / MANIFEST).write_bytes(manifest.to_json())
        return Bundle(tmp_path, manifest), eager_modules(draft)

    return make


@pytest.fixture
def opened(bundle_of):
    """(draft's arguments, options and behaviour) -> (the double, a denoiser that runs on it)."""

    def make(*what, engine=None, **behaviour):
        bundle, modules = bundle_of(*what, **(engine or {}))
        trt = double.library(modules, bundle.manifest, **behaviour)
        return trt, Denoiser(bundle.manifest, runner.TensorRTRunner(trt, bundle, CPU), bundle)

    return make


# Binding


@pytest.mark.parametrize("what", CASES, ids="-".join)
@pytest.mark.parametrize(("plan", "order"), [("FFF..F.F..", 2), ("FFFF", 2)])
def test_it_equals_the_oracle(opened, tiny, what, plan, order):
    model, inputs = tiny(what[0]).model, tiny(what[0]).inputs(len(plan), batch=2)
    _, denoiser = opened(*what)
    expected = replay(model, *inputs, plan, order, what[1])
    assert_close("noise_pred", run(denoiser, inputs, plan, order), expected, allowed(model, expected, plan, order))


def test_every_call_has_a_context_and_all_share_their_scratch(opened, tiny):
    """A captured graph holds its context; the ring rotates by one bound call for each of its entries."""
    trt, denoiser = opened("flux")
    slot = open_slot(denoiser, tiny("flux").inputs(1, batch=2))
    full = [c for c in trt.contexts if c.engine.name == "full"]
    forecast = [c for c in trt.contexts if c.engine.name == "forecast"]
    assert (len(full), len(forecast)) == (3, 1)
    assert {c.how for c in trt.contexts} == {real.ExecutionContextAllocationStrategy.USER_MANAGED}
    assert len({c.memory for c in trt.contexts}) == 1
    (ring,) = slot.memory.taylor
    for k, context in enumerate(full):
        for site, buffer in ring.items():
            assert context.addresses[f"taylor_out.{site}"] == buffer.entry(k).address
    for site, buffer in ring.items():
        assert forecast[0].addresses[f"taylor_in.{site}"] == buffer.address
        assert forecast[0].shapes[f"taylor_in.{site}"] == buffer.shape


def test_contexts_that_send_are_given_the_communicator_of_the_ranks(bundle_of, tiny, monkeypatch):
    """On doubles of the library and of a group over NCCL: its address arrives, at the graphs that send alone."""
    bundle, modules = bundle_of("dit")
    connected, address = [], 0x5EED
    backend = SimpleNamespace(eager_connect_single_device=connected.append, _comm_ptr=lambda: address)
    group = object.__new__(Group)
    group.size, group._handle = 2, SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def contexts(**behaviour):
        trt = double.library(modules, bundle.manifest, **behaviour)
        made = runner.TensorRTRunner(trt, bundle, CPU, group=group)
        open_slot(Denoiser(bundle.manifest, made, bundle), tiny("dit").inputs(1, batch=2))
        return {(context.engine.name, context.communicator) for context in trt.contexts}

    assert contexts() == {("full", address), ("forecast", None)}
    assert set(map(str, connected)) == {"cuda:1"}
    with pytest.raises(StepError, match=r"graph `full` does not take the communicator of 2 ranks"):
        contexts(no_communicator=True)
    del backend._comm_ptr
    with pytest.raises(ConfigError, match="does not tell the communicator of its group, expected one that does"):
        contexts()


@pytest.mark.parametrize(("kind", "cuda_graphs"), [("tensorrt", False), ("tensorrt", True), ("tensorrt-rtx", True)])
def test_all_of_a_runner_happens_on_its_gpu(bundle_of, tiny, monkeypatch, tmp_path, kind, cuda_graphs):
    """Plans, contexts, scratch, captures and launches: the double refuses each where another GPU is current."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle, modules = bundle_of("flux", kind=kind)
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    trt = double.library(modules, bundle.manifest, gpu=lambda: cuda.gpu, gpu_of=cuda.gpu_of, use=cuda.use)
    made = runner.TensorRTRunner(trt, bundle, SECOND, cuda_graphs)
    made.alignment = 1  # memory of the host
    denoiser = Denoiser(bundle.manifest, made, bundle, made.device)
    inputs, plan = tiny("flux").inputs(5, batch=2), "FFF.."
    before = len(cuda.allocated)
    seen = run(denoiser, inputs, plan, 2)
    assert {context.engine.gpu for context in trt.contexts} == {1}
    assert {cuda.gpu_of(stream) for context in trt.contexts for stream in context.runs} == {1}
    assert set(cuda.where) <= {1} and len(cuda.allocated) > before and set(cuda.allocated) == {"cuda:1"}
    assert cuda.gpu == 0
    if not made.captures:  # the double's graphs replay nothing
        expected = replay(tiny("flux").model, *inputs, plan, 2, "module")
        assert_close("noise_pred", seen, expected, allowed(tiny("flux").model, expected, plan, 2))


def test_the_double_refuses_the_wrong_gpu(bundle_of, monkeypatch):
    """As the library does, late and without a word: kernels of one GPU on the memory of another."""
    bundle, modules = bundle_of("dit")
    current = [1]
    trt = double.library(modules, bundle.manifest, gpu=lambda: current[0])
    made = runner.TensorRTRunner(trt, bundle, CPU)
    current[0] = 0
    with pytest.raises(AssertionError, match="a context is made where another GPU is current"):
        made._context("full")


def test_an_engine_that_updates_in_place_is_given_one_buffer(opened, tiny):
    """The library says which output must be the memory of which input; ours never are, so it is refused."""
    with pytest.raises(
        StepError, match=r"output `noise_pred` of \w+.plan has its own memory, expected that of input `h"
    ):
        open_slot(opened("dit", alias={"noise_pred": "hidden_states"})[1], tiny("dit").inputs(1, batch=2))


def test_what_the_engine_aliases_may_overlap(opened, tiny):
    _, denoiser = opened("plain", alias={"noise_pred": "hidden_states"})
    sizes = {"batch": 2, "image_tokens": 6, "text_tokens": 3}
    inputs = denoiser.manifest.graphs["forecast"].inputs
    buffers = {t.name: denoiser.runner.buffer(resolve(t.shape, sizes), t.dtype) for t in inputs}
    denoiser.runner.bind("forecast", buffers, {"noise_pred": buffers["hidden_states"]})()
    assert denoiser.runner._engines["forecast"].trt.contexts[-1].runs == [0]


def test_a_shape_outside_the_profile_and_a_failed_launch_are_errors(opened, tiny):
    inputs = tiny("dit").inputs(1, batch=2)
    _, denoiser = opened("dit", fails=True)
    with pytest.raises(StepError, match=r"graph `prepare` failed \(it gives no reason\), expected it to run"):
        run(denoiser, inputs, "F")
    engine = denoiser.runner._engines["forecast"]
    engine.behaviour = {"profile": {"hidden_states": ((1, 4, 8, 8),) * 3}}
    with pytest.raises(
        StepError, match=r"input `hidden_states` of graph `forecast` is \[2, 4, 8, 8\], expected a shape w"
    ):
        open_slot(denoiser, inputs)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        ({"no_address": "noise_pred"}, r"tensor `noise_pred` of graph `full` is at 0x.*, expected an address that the"),
        ({"aligned": 1 << 40}, r"is at 0x\w+, expected an address .* rows fill multiples of 256 bytes"),
        ({"mixed": True}, r"shapes of graph `\w+` are broadcast of 3 with 4, expected sizes that go together"),
        ({"no_context": True}, r"an execution context of graph `\w+` is not made .* free memory of the GPU"),
        ({"no_cache": True, "engine": {"kind": "tensorrt-rtx"}}, r"an execution context of graph `\w+` is not made"),
    ],
)
def test_what_the_library_answers_is_heard(opened, tiny, tmp_path, monkeypatch, behaviour, problem):
    """It raises nothing: it answers False or None, and a launch would then read where it may not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, denoiser = opened("dit", **behaviour)
    with pytest.raises(StepError, match=problem):
        open_slot(denoiser, tiny("dit").inputs(1, batch=2))


def test_scratch_that_two_streams_would_use_at_once_is_refused_by_the_double():
    cuda = FakeCuda()
    one, other = cuda.Stream(), cuda.Stream()
    cuda.use("scratch", one)
    with pytest.raises(AssertionError, match="memory is used while another stream may still use it"):
        cuda.use("scratch", other)
    other.wait_stream(one)
    assert cuda.use("scratch", other.cuda_stream) is None


@pytest.mark.parametrize("told", [True, False])
def test_scratch_that_goes_back_outlasts_the_step_that_uses_it(bundle_of, monkeypatch, told):
    bundle, modules = bundle_of("dit")
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    if not told:
        monkeypatch.setattr(Order, "outlast", lambda *arguments: None)
    made = runner.TensorRTRunner(double.library(modules, bundle.manifest), bundle, SECOND)
    address = made._scratch_of(1000).address
    cuda.here = FakeCuda.Stream(cuda, "cuda:1")
    made.call_on_device("full", {}, lambda: cuda.use(address, cuda.current_stream(1)))()
    cuda.here = made._scratch = None
    gc.collect()
    assert bool(cuda.torn) is not told and not cuda.blocks


def test_a_slot_that_is_bound_waits_for_a_step_on_another_stream(bundle_of, tiny, monkeypatch):
    """Its warm runs write the scratch that the step may still be using."""
    bundle, modules = bundle_of("dit")
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    trt = double.library(modules, bundle.manifest, gpu=lambda: cuda.gpu, gpu_of=cuda.gpu_of, use=cuda.use)
    made = runner.TensorRTRunner(trt, bundle, SECOND)
    made.alignment = 1  # memory of the host
    denoiser, inputs = Denoiser(bundle.manifest, made, bundle, made.device), tiny("dit").inputs(1, batch=2)
    with torch.cuda.device(1):
        one, other = torch.cuda.Stream(), torch.cuda.Stream()
    cuda.here = one
    open_slot(denoiser, inputs).memory.calls["full"][0]()
    cuda.here = other
    open_slot(denoiser, inputs).memory.calls["full"][0]()
    cuda.here = one
    open_slot(denoiser, inputs)
    assert made.order.last is one
    made.order.last = None  # as if nothing were under way
    cuda.here = other
    with pytest.raises(AssertionError, match="memory is used while another stream may still use it"):
        open_slot(denoiser, inputs)


def test_a_call_out_of_order_is_refused_by_the_double(opened):
    context = opened("dit")[1].runner._context("full")
    assert context.execute_async_v3(0) is False  # no addresses
    with pytest.raises(AssertionError, match="the size of scratch is asked for before shapes are set"):
        context.update_device_memory_size_for_shapes()
    assert context.set_tensor_address("noise_pred", 0) is False


def test_scratch_that_the_library_cannot_use_is_refused_by_the_double(opened):
    _, denoiser = opened("dit", aligned=256)
    context, tensors = denoiser.runner._context("full"), denoiser.manifest.graphs["full"].inputs
    for tensor in tensors:
        assert context.set_input_shape(tensor.name, context.engine.get_tensor_profile_shape(tensor.name, 0)[0])
    with pytest.raises(AssertionError, match="scratch is not aligned"):
        context.set_device_memory(256 + 16, 1000)
    with pytest.raises(AssertionError, match="scratch is too small"):
        context.set_device_memory(256, 999)
    context.set_device_memory(256, 1000)
    assert context.memory == 256


def test_what_was_not_compiled_is_not_kept(opened, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, denoiser = opened("dit", engine={"kind": "tensorrt-rtx"}, compiled=None)
    with denoiser:
        open_slot(denoiser, tiny("dit").inputs(1, batch=2))
    assert not (tmp_path / "cache").exists()


def test_closing_lets_go_of_the_engines(opened):
    _, denoiser = opened("dit")
    with denoiser:
        assert denoiser.runner._engines
    assert not denoiser.runner._engines


# Loading


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (
            {"dtype": {"noise_pred": "float16"}},
            r"full.plan: `noise_pred` is float16 .*, expected float32 .*, as in the man",
        ),
        ({"shape": {"hidden_states": [-1, 4, 8]}}, r"full.plan: `hidden_states` is float32 \[-1, 4, 8\], expected"),
        (
            {"profile": {"hidden_states": ((1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8))}},
            r"profile of `hidden_states` is \[1, 4, 8, 8\] to \[3, 4, 8, 8\], expected \[1, .* to \[64, 4, 8, 8\]",
        ),
        ({"on_host": "hidden_states"}, r"`hidden_states` is read in memory of the host, expected that of the device"),
        (
            {"refuses": ["forecast"]},
            r"forecast.plan is refused by tensorrt 10.9.0.34 \(the double refuses it\), expected",
        ),
    ],
)
def test_a_plan_that_is_not_the_manifests_does_not_load(opened, behaviour, problem):
    with pytest.raises(
        BundleError, match=problem + r".*; export again here with `taylorseer-export dit .*--engine tenso"
    ):
        opened("dit", **behaviour)


def test_a_stripped_plan_takes_its_weights_from_the_bundle(opened, tmp_path):
    trt, denoiser = opened("dit", engine={"options": {"strip-plan": ""}})
    assert trt.refits == [str(tmp_path / f"{name}.onnx") for name in denoiser.manifest.graphs]
    with pytest.raises(BundleError, match=r"full.plan does not take its weights from full.onnx .*--strip-plan`"):
        opened("dit", engine={"options": {"strip-plan": ""}}, no_weights="full.onnx")


def test_streamed_weights_get_a_budget(opened):
    _, denoiser = opened("dit", engine={"options": {"weight-streaming": ""}})
    assert {e.weight_streaming_budget_v2 for e in denoiser.runner._engines.values()} == {15000}


def test_a_budget_beyond_32_bits_is_our_own(opened, monkeypatch):
    """Of 3 GiB the library's Python interface gives 2.25 GiB as a negative number, and takes that for nothing."""
    FakeCuda().install(monkeypatch)
    _, denoiser = opened("dit", engine={"options": {"weight-streaming": ""}}, weights=3 << 30)
    (engine, *_) = denoiser.runner._engines.values()
    assert engine.get_weight_streaming_automatic_budget() < 0
    assert engine.weight_streaming_budget_v2 == ((1 << 30) - 1000) // 2


def test_a_budget_that_is_not_taken_is_an_error(opened):
    with pytest.raises(BundleError, match=r"streams its weights within 0 bytes, expected 15000 .*; free memory"):
        opened("dit", engine={"options": {"weight-streaming": ""}}, no_budget=True)


def test_rtx_keeps_what_it_compiled_and_captures_by_itself(opened, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for found in ([], [b"compiled"]):
        trt, denoiser = opened("dit", engine={"kind": "tensorrt-rtx"})
        with denoiser:
            open_slot(denoiser, tiny("dit").inputs(1, batch=2))
        assert trt.caches == [found] * 2  # full and forecast; prepare is bound by a request
        config = trt.contexts[0].how
        assert config.strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cuda_graph_strategy == real.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert config.cache is not None
        kernels = {c.engine.name: c.how.dynamic_shapes_kernel_specialization_strategy.name for c in trt.contexts}
        assert kernels == {"full": "EAGER", "forecast": "EAGER"}
    names = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "cache" / "taylorseer-export").iterdir())
    assert names == ["forecast.rtx", "full.rtx"]


# Before a plan is touched


def test_the_exact_version_is_needed(bundle_of):
    bundle, _ = bundle_of("dit")
    runner.check_library(bundle, "10.9.0.34")
    for other in ("10.9.0.35", "10.9.1", "11.1.0.6"):
        with pytest.raises(
            BundleError, match=rf"tensorrt is {other}, expected 10.9.0.34, with which .* was built; .*--engine tensorrt"
        ):
            runner.check_library(bundle, other)


def test_a_compatible_plan_runs_on_later_versions(bundle_of):
    bundle, _ = bundle_of("dit", options={"version-compatible": ""})
    assert runner.check_library(bundle, "10.9.0.34") is runner.check_library(bundle, "11.1") is None
    with pytest.raises(BundleError, match=r"tensorrt is 10.8.0.1, expected 10.9.0.34"):
        runner.check_library(bundle, "10.8.0.1")


def test_a_bundle_of_another_release_is_refused_by_its_manifest(bundle_of):
    """The installed library is real; no byte of a plan is read."""
    bundle, _ = bundle_of("dit", kind="tensorrt-rtx", versions={"tensorrt_rtx": "1.2.0.54"})
    with pytest.raises(BundleError, match=rf"tensorrt_rtx is {real.__version__}, expected 1.2.0.54, with which"):
        load(bundle.folder, device="cuda")


def test_a_library_that_is_missing_is_named(bundle_of):
    with pytest.raises(
        BundleError, match=r"tensorrt is not installed .* expected it for --engine tensorrt; pip install"
    ):
        load(bundle_of("dit")[0].folder, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_a_machine_without_a_gpu_is_told_what_is_needed(bundle_of):
    bundle, _ = bundle_of("dit", kind="tensorrt-rtx", versions={"tensorrt_rtx": real.__version__})
    with pytest.raises(
        BundleError, match=r"has no GPU .*, expected one of compute capability 9.0 for .*--engine onnxr"
    ):
        load(bundle.folder, device="cuda")
    with pytest.raises(BundleError, match=r"device is `cpu`, expected one that .* was built for \(cuda\)"):
        load(bundle.folder)


@pytest.mark.parametrize(
    ("capability", "gpu", "driver", "limits", "problem"),
    [
        ((9, 0), "NVIDIA H200", 13, {}, None),
        (
            (9, 0),
            "NVIDIA H200",
            11,
            {},
            r"the NVIDIA driver serves CUDA 11, expected 12 or newer .* upgrade the driver",
        ),
        (
            (8, 9),
            "NVIDIA H200",
            12,
            {},
            r"compute capability is 8.9, expected 9.0, for which .* was built; export again",
        ),
        (
            (9, 0),
            "NVIDIA H100",
            12,
            {},
            r"the GPU is NVIDIA H100, expected NVIDIA H200, for which .* ampere-plus there",
        ),
        ((9, 0), "any", 12, {"compute_capability": "9.0"}, None),
        ((12, 0), "any", 12, {"compute_capability": "8.0+"}, None),
        ((7, 5), "any", 12, {"compute_capability": "8.0+"}, r"capability is 7.5, expected 8.0\+, for which"),
        ((8, 9), "any", 12, {"compute_capability": "8.6 8.9"}, None),
        ((9, 0), "any", 12, {"compute_capability": "8.6 8.9"}, r"capability is 9.0, expected 8.6 or 8.9, for which"),
    ],
)
def test_gpu_and_driver_are_those_of_the_manifest(bundle_of, monkeypatch, capability, gpu, driver, limits, problem):
    bundle, _ = bundle_of("dit", device={"cuda": "12", **limits} if limits else ENGINE.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {1: capability}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", {1: gpu}.get)
    monkeypatch.setattr(runner, "driver_cuda", lambda: driver)
    if problem is None:
        assert runner.check_gpu(bundle, SECOND) is None
    else:
        with pytest.raises(BundleError, match=problem):
            runner.check_gpu(bundle, SECOND)


def test_the_command_for_another_gpu_names_it(bundle_of, monkeypatch):
    bundle, _ = bundle_of("dit", kind="tensorrt-rtx", device={"compute_capability": "8.9"}, options={"gpu-arch": "8.9"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {1: (12, 0)}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", {1: "any"}.get)
    monkeypatch.setattr(runner, "driver_cuda", lambda: 13)
    with pytest.raises(BundleError, match=r"is 12.0, expected 8.9, .* --engine tensorrt-rtx .*--gpu-arch 12.0`"):
        runner.check_gpu(bundle, SECOND)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU machine serves some release")
def test_without_a_driver_no_cuda_is_served():
    assert runner.driver_cuda() == 0


def test_the_header_of_a_plan_is_read_first():
    """The real library on bytes that are no plan; a release that cannot tell has no say."""
    runtime = real.Runtime(real.Logger(real.Logger.INTERNAL_ERROR))
    assert "malformed engine" in runner.invalid(real, runtime, b"no plan" * 20)
    assert runner.invalid(real, SimpleNamespace(), b"no plan") is None
    for verdict, seen in ((real.EngineValidity.VALID, None), (real.EngineValidity.SUBOPTIMAL, None)):
        judge = SimpleNamespace(engine_header_size=4, get_engine_validity=lambda header, v=verdict: (v, 1))
        assert runner.invalid(real, judge, b"plan and more") is seen
    both = SimpleNamespace(engine_header_size=4, get_engine_validity=lambda h: (real.EngineValidity.INVALID, 1 + 4))
    assert runner.invalid(real, both, b"plan") == "version mismatch, old cuda driver"
