"""AOTInductor packages, the torch runner, and what GPUs add; the contract of all runners is in `test_runtime`."""

import gc
import json
import os
import platform
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from cuda_double import CONTRACT, FakeCuda
from harness import FLOAT32, NEEDS_GPU, allowed, eager_denoiser, open_slot, representable, run, toy_trace
from inductor_double import Package
from oracle import assert_close
from safetensors.torch import load_file
from tiny_bundles import PACKAGES

from taylorseer_export import cli
from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import MANIFEST, Manifest
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.compile import inductor as building
from taylorseer_export.compile.eager import eager_modules, pointwise_sums, weighted, writing
from taylorseer_export.compile.export import PRECISIONS, Options, check_options, write_bundle
from taylorseer_export.compile.program import exported_program, mixed_types
from taylorseer_export.errors import BuildError, BundleError, ParityError, StepError
from taylorseer_export.graph.casts import float_types
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.bench import bench
from taylorseer_export.report.calibrate import Calibrator
from taylorseer_export.report.evaluate import Case, evaluate
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.inductor import open_runner
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.torch_runner import Recorder, TorchBuffer, TorchRunner

pytestmark = pytest.mark.slow

GPU, SECOND = Device("cuda"), Device("cuda", 1)
SIZES = {"batch": 2, "image_tokens": 6, "text_tokens": 5, "steps": 3}


def values_of(tensors, seed=0):
    """Random tensors for a contract at `SIZES`."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for t in tensors:
        shape, dtype = resolve(t.shape, SIZES), getattr(torch, t.dtype)
        floats = dtype.is_floating_point
        made.append(torch.randn(shape, generator=rng).to(dtype) if floats else torch.zeros(shape, dtype=dtype))
    return made


def held(package, weights):
    """Names of the weights whose bytes lie somewhere in a zip file; those of few different values may lie anywhere."""
    telling = {name: value for name, value in weights.items() if value.unique().numel() > 15}
    assert telling
    content = [package.read(path) for path in package.namelist()]
    sought = {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in telling.items()}
    return [name for name, value in sought.items() if any(value in part for part in content)]


# Types


@pytest.mark.parametrize(("name", "precision"), [("plain", "bf16"), ("dit", "fp16")])
def test_no_operator_mixes_float_types(drafts, name, precision):
    draft = drafts(name, precision=precision, device="cuda")
    for cut in draft.split.graphs:
        assert mixed_types(exported_program(cut, draft.graph_sizes, draft.ranges())) == []


def test_a_mixed_type_is_seen_and_a_cast_mends_it():
    class Mixed(torch.nn.Module):
        def forward(self, x):
            return x + x.double(), x == x.double(), x * 2

    program = torch.export.export(Mixed(), (torch.zeros(3),))
    assert [text.split("`")[1] for text in mixed_types(program)] == ["aten.add.Tensor", "aten.eq.Tensor"]
    _, trace = toy_trace(lambda m, x, t, text, label: m.site(x) + (x.double() + x).float())
    assert all(len(float_types(node)) < 2 for node in trace.module.graph.nodes)
    assert any(float_types(node) == {torch.float64} for node in trace.module.graph.nodes)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("name", "granularity"), [("plain", "module"), ("plain", "residual"), ("dit", "last")])
def test_half_precision_stays_within_its_bound(drafts, tiny, name, granularity, precision):
    dtype, plan, order = PRECISIONS[precision], "FFF..F..", 2
    inputs = representable(tiny(name).inputs(8, batch=2), dtype)
    seen = run(eager_denoiser(drafts(name, granularity, precision=precision, device="cuda")), inputs, plan, order)
    latents, timestep, conditioning = inputs
    if name == "plain":  # FLUX multiplies it by 1000 in its own type
        timestep = oracle.seen_by(timestep, dtype)
    reference = oracle.replay(tiny(name).model, latents, timestep, conditioning, plan, order, granularity)
    ratio = assert_close(precision, seen, reference, allowed(tiny(name).model, reference, plan, order, dtype))
    assert ratio > 1e-3  # it did compute in that type
    narrow = allowed(tiny(name).model, reference, plan, order, FLOAT32)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(precision, seen, reference, narrow)


def test_numbers_that_overflow_are_refused(drafts):
    """Weights that float16 cannot carry through: `bench` and `verify` see it, where a mere timing would not."""
    denoiser = eager_denoiser(drafts("dit", "last", precision="fp16", device="cuda"))
    good = denoiser.runner._functions["full"]

    def overflow(*tensors):
        good(*tensors)
        tensors[-2].mul_(torch.inf)  # noise_pred is the first of two outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(denoiser.runner._functions, "full", overflow)
        with pytest.raises(
            ParityError, match=r"NaN or infinite in places at step 0 of plan FF\.\., .*--precision bf16"
        ):
            bench(denoiser, denoiser.forecasts(plan="FF.."), repeats=1)
    assert bench(denoiser, denoiser.forecasts(plan="FF.."), repeats=1)["fallbacks"] == 0


# Forms of a graph


@pytest.mark.parametrize("layout", ["snapshots", "derivatives"])
@pytest.mark.parametrize(("name", "granularity", "state"), [("flux", "module", None), ("dit", "residual", "bf16")])
def test_pointwise_sums_are_the_same_forecast(drafts, name, granularity, state, layout):
    draft = drafts(name, granularity, layout, state_dtype=state)
    cut = draft.split.forecast
    module = eager_modules(draft)["forecast"]
    inputs = values_of(cut.inputs)
    with torch.no_grad():
        (expected,) = module(*inputs)
        changed = pointwise_sums(eager_modules(draft)["forecast"])
        (seen,) = changed(*inputs)
    # Two orders of summing the same float32 terms, then the same layers.
    assert_close("noise_pred", seen, expected, oracle.bound(expected, 8.0, FLOAT32, len(draft.split.sites), 64))
    sums = [n for n in changed.graph.nodes if n.target is torch.ops.aten.sum.dim_IntList]
    assert len(sums) == len(draft.split.sites)
    assert len([n for n in changed.graph.nodes if n.target is torch.ops.aten.matmul.default]) == 0


def test_a_writing_graph_fills_what_it_is_given(drafts):
    draft = drafts("dit", "module", "derivatives")
    for cut in draft.split.graphs:
        module = eager_modules(draft)[cut.name]
        inputs = values_of(cut.inputs)
        with torch.no_grad():
            expected = module(*inputs)
            outputs = [torch.full_like(value, torch.nan) for value in expected]
            assert writing(module, cut)(*inputs, *outputs) == ()
        assert all(torch.equal(seen, value) for seen, value in zip(outputs, expected, strict=True))


def test_a_graph_moves_to_a_device_with_what_it_makes(drafts):
    draft = drafts("plain")
    for cut in draft.split.graphs:
        weights = {name: torch.empty(draft.stored[name][1], device="meta") for name in cut.parameters()}
        nodes = weighted(cut, weights, "meta").graph.nodes
        devices = {v for n in nodes for v in (*n.args, *n.kwargs.values()) if isinstance(v, torch.device)}
        assert devices <= {torch.device("meta")}


# Building


def test_without_a_compiler_nothing_starts(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"C\+\+ compiler `no-such-compiler` is not installed, .* name another in CXX"):
        check_options(Options(order=2, interval=4, warmup=2, engine="inductor"))


def test_without_a_gpu_nothing_is_built_for_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = Options(order=2, interval=4, warmup=2, engine="inductor", device="cuda")
    with pytest.raises(BuildError, match=r"--device is cuda, expected a GPU that torch can use here.*or use --device"):
        check_options(options)


def test_a_graph_that_does_not_compile_leaves_nothing(drafts, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(BuildError, match=r"graph `prepare` does not compile, expected torch .*: no kernel$"):
        write_bundle(drafts("plain", **PACKAGES["plain"]), tmp_path, "broken")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_one_package_and_weights_that_are_stored_once(packages, drafts, name):
    folder, draft = packages(name), drafts(name, **PACKAGES[name])
    assert {p.name for p in folder.iterdir()} == {building.PACKAGE, "weights.safetensors", MANIFEST}
    package = zipfile.ZipFile(folder / building.PACKAGE)
    inside = package.namelist()
    assert not [path for path in inside if path.endswith(".blob")]
    # torch 2.11 takes the name of the metadata from that of the wrapper's source, of which nothing else is kept.
    sources = {path: package.read(path).decode() for path in inside if path.endswith(".cpp")}
    assert set(sources.values()) == {building.EMPTIED} and len(sources) == len(draft.split.graphs)
    assert {path.replace(".cpp", "_metadata.json") for path in sources} < set(inside)
    assert {path.split("/")[-2] for path in inside if path.endswith(".so")} == {cut.name for cut in draft.split.graphs}
    assert not held(package, load_file(folder / "weights.safetensors"))
    engine = Manifest.from_bytes((folder / MANIFEST).read_bytes(), folder).engine
    assert engine.kind == "inductor" and engine.versions["torch"] == torch.__version__
    assert draft.options.precision == ("bf16" if name == "dit" else "fp32")


def test_a_weight_in_a_package_is_seen(tmp_path):
    weights = {"there": torch.randn(5, 7), "absent": torch.randn(5, 7), "zeros": torch.zeros(2)}
    with zipfile.ZipFile(tmp_path / "package", "w") as package:
        package.writestr("code.so", b"before" + weights["there"].numpy().tobytes() + bytes(64))
    assert held(zipfile.ZipFile(tmp_path / "package"), weights) == ["there"]


def test_float16_on_the_cpu(drafts, tiny, tmp_path):
    """The third type: a package of it compiles, passes the check at load, and stays within the bound of float16."""
    plan, order, options = "FFF..F..", 2, {"layout": "derivatives", "engine": "inductor", "precision": "fp16"}
    folder = write_bundle(drafts("dit", "residual", batch=2, **options), tmp_path, "half")
    inputs = representable(tiny("dit").inputs(len(plan), batch=2), torch.float16)
    reference = oracle.replay(tiny("dit").model, *inputs, plan, order, "residual")
    with load(folder, threads=1) as denoiser:
        seen = run(denoiser, inputs, plan, order)
    assert_close("float16", seen, reference, allowed(tiny("dit").model, reference, plan, order, torch.float16))


# Loading


def test_graphs_share_one_copy_of_the_weights(inductor):
    used = [call.args[1] for call in inductor("plain").runner._functions.values()]
    shared = set(used[0]) & set(used[1]) | set(used[1]) & set(used[2])
    assert shared
    for name in shared:
        assert len({tensors[name].data_ptr() for tensors in used if name in tensors}) == 1


def test_weights_go_with_the_last_call(packages):
    """The package itself holds on to them for ever: on a GPU that would be all of its memory."""
    with load(packages("plain"), threads=1) as denoiser:
        function = denoiser.runner._functions["full"]
        kept = list(function.args[1].values())
    del denoiser
    gc.collect()
    assert all(tensor.numel() for tensor in kept)  # the function may still be called
    del function
    gc.collect()
    assert {tensor.untyped_storage().nbytes() for tensor in kept} == {0}


def test_a_package_lets_go_of_no_weights_by_itself(packages, monkeypatch):
    """Why they are emptied; when a release of torch fails this, that can go."""
    monkeypatch.setattr("taylorseer_export.runtime.inductor.empty_after", lambda *arguments: None)
    with load(packages("plain"), threads=1) as denoiser:
        kept = max(denoiser.runner._functions["full"].args[1].values(), key=torch.numel)
    address, uses = kept.untyped_storage()._cdata, torch._C._storage_Use_Count
    del denoiser
    gc.collect()
    held = kept.untyped_storage()
    del kept
    gc.collect()
    assert uses(address) > 1 and held.nbytes()


def test_slots_of_several_threads_run_at_one_time(inductor, tiny):
    """As a server's workers do on the CPU: models made for one run at a time would not allow it."""
    denoiser, inputs = inductor("plain"), tiny("plain").inputs(6, batch=2)
    expected = run(denoiser, inputs, "FF.F..", 1)
    with ThreadPoolExecutor(4) as threads:
        for seen in threads.map(lambda _: run(denoiser, inputs, "FF.F..", 1), range(8)):
            assert torch.equal(seen, expected)


def test_a_package_for_the_cpu_is_opened_for_several_runs(packages, monkeypatch):
    given = {}

    def refuse(path, name, **options):
        given.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("torch._inductor.package.load_package", refuse)
    with pytest.raises(BundleError, match="enough"):
        load(packages("plain"))
    assert given == {"device_index": -1, "num_runners": os.cpu_count()}


@pytest.fixture
def rewritten(packages, tmp_path):
    """A bundle of links to the package's files, with another entry in its manifest's engine."""

    def make(**update):
        folder = tmp_path / "copy"
        folder.mkdir()
        for path in packages("plain").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes(), folder)
        engine = manifest.engine
        parts = {key: {**getattr(engine, key), **value} for key, value in update.items()}
        manifest = manifest.model_copy(update={"engine": engine.model_copy(update=parts)})
        (folder / MANIFEST).write_bytes(manifest.to_json())
        return folder

    return make


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ({"versions": {"torch": "2.9.0"}}, r"torch is \S+, expected 2.9.0, with which .* pip install 'torch==2.9.0'"),
        ({"device": {"instructions": "SVE256"}}, r"instructions is \w+, expected SVE256, for which .*; build it here"),
        (
            {"device": {"machine": "riscv64"}},
            r"machine is \w+, expected riscv64, .* `taylorseer-export flux .* --engin",
        ),
        ({"device": {"devices": "cuda"}}, r"device is `cpu`, expected one that .* \(cuda\).*--engine inductor .*--dev"),
    ],
)
def test_another_machine_is_refused_before_the_package_is_touched(rewritten, monkeypatch, update, expected):
    import torch._inductor.package as package

    monkeypatch.setattr(package, "load_package", lambda *a, **k: pytest.fail("the package was opened"))
    with pytest.raises(BundleError, match=expected):
        load(rewritten(**update))


def test_a_package_that_torch_refuses(packages, monkeypatch):
    import torch._inductor.package as package

    def refuse(*arguments, **options):
        raise RuntimeError("bad archive\ndetails")

    monkeypatch.setattr(package, "load_package", refuse)
    with pytest.raises(BundleError, match=r"graphs.pt2 is refused by torch .* \(bad archive\), .* build it again with"):
        load(packages("plain"))


def test_the_command_line_works_on_a_package(packages, tmp_path, capsys):
    from safetensors.numpy import save_file
    from tiny_models import dit_inputs, tiny_dit

    folder = str(packages("dit"))
    assert cli.main(["inspect", folder]) == 0
    assert "engine inductor" in capsys.readouterr().out
    assert cli.main(["verify", folder, "--steps", "6"]) == 0
    assert cli.main(["bench", folder, "--steps", "6", "--repeats", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (record["engine"], record["precision"], record["fallbacks"]) == ("inductor", "bf16", 0)
    latents, timestep, conditioning = dit_inputs(tiny_dit(), 4, batch=2)
    tensors = {"latents": latents, "timestep": timestep.float(), **conditioning}
    save_file({k: v.numpy() for k, v in tensors.items()}, tmp_path / "in.safetensors")
    files = ["--inputs", str(tmp_path / "in.safetensors"), "--outputs", str(tmp_path / "out.safetensors")]
    assert cli.main(["replay", folder, *files, "--plan", "FF.."]) == 0
    run_there = ["run", folder, "--label", "1", "--steps", "4", "--out", str(tmp_path / "latents.safetensors")]
    assert cli.main(run_there) == 0
    assert cli.main(["bench", folder, "--no-cuda-graphs"]) == 2
    assert "--no-cuda-graphs is given for the CPU" in capsys.readouterr().err


def test_a_package_is_calibrated_and_evaluated(inductor):
    """In bf16 at a static size: all-full is what `sample` makes, and calibration comes nearer to it."""
    denoiser, steps = inductor("dit"), 6
    samples = groups(denoiser, 4, 0, least=2)
    calibrator = Calibrator(denoiser, samples, groups(denoiser, 2, 9), steps, steps - 1, moves=0)
    assert np.array_equal(
        calibrator.fitted.latents(0)[-1], sample(denoiser, samples[0], Forecasts(Plan.all_full(steps), 0)).latents
    )
    best = calibrator.calibrate(3, 1)
    assert best.calibrated.fitted > best.regular.fitted
    ways = [
        Case("all full", Forecasts(Plan.all_full(steps), 0)),
        Case("regular", best.regular.forecasts),
        Case("calibrated", best.calibrated.forecasts),
    ]
    exact, regular, calibrated = evaluate(denoiser, samples, ways)
    assert exact.psnr is None and calibrated.full_steps == 3 and regular.latent_error > calibrated.latent_error


# Buffers and captures


def test_a_tensor_as_a_buffer():
    buffer = TorchBuffer(torch.zeros(3, 2, dtype=torch.bfloat16))
    buffer.entry(1).write(np.float32([5, 6.001]))
    assert buffer.read().dtype == np.float32 and buffer.read().tolist() == [[0, 0], [5, 6], [0, 0]]
    assert buffer.entry(1).address == buffer.address + 4 and buffer.nbytes == 12 and buffer.shape == (3, 2)
    buffer.write(torch.ones(2, dtype=torch.float64))
    buffer.entry(0).copy(TorchBuffer(torch.full((2,), 7.0, dtype=torch.bfloat16)))
    assert buffer.read().tolist() == [[7, 7], [1, 1], [1, 1]]
    buffer.read()[...] = 9
    readonly = np.broadcast_to(np.float32(4), (3, 2))
    buffer.write(readonly)
    assert buffer.read().tolist() == [[4, 4]] * 3
    buffer.clear()
    assert not buffer.read().any()


@pytest.fixture
def captured(monkeypatch):
    def make(fails=False, device=GPU, **options):
        fake, calls = FakeCuda(fails), []
        fake.install(monkeypatch)

        def double(x, y):
            calls.append(fake.gpu)
            y.copy_(2 * x)

        return fake, calls, TorchRunner({"full": double}, {"full": CONTRACT}, device, **options)

    return make


def bound(runner, offset=0):
    memory = torch.zeros(16)
    return runner.bind("full", {"x": TorchBuffer(memory[offset : offset + 4])}, {"y": TorchBuffer(memory[8:12])})


def test_a_bound_call_is_warmed_captured_and_replayed(captured):
    fake, calls, runner = captured()
    first, second = bound(runner), bound(runner)
    assert fake.events == ["pool", *["warm", "synchronize", "capture", "replay"] * 2]  # one pool, a graph for each
    assert len(calls) == 6
    first()
    second()
    assert fake.events[-2:] == ["replay", "replay"] and len(calls) == 6  # nothing but the launch
    assert (runner.captures, runner.fallbacks) == (2, 0)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_call_waits_for_that_of_another_stream(captured, cuda_graphs):
    """All captures write to one pool of memory, so no two may run at one time, whoever queues them."""
    fake, _, runner = captured(cuda_graphs=cuda_graphs)
    call, waited = bound(runner), []
    one, other = (SimpleNamespace(name=name, wait_stream=lambda s, n=name: waited.append((n, s.name))) for name in "ab")
    for fake.here in (one, one, other, one):
        call()
    assert waited == [("a", "default")] * cuda_graphs + [("b", "a"), ("a", "b")]  # a capture is work as well


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_all_of_a_runner_happens_on_its_gpu(captured, cuda_graphs):
    """Streams, captures and launches go to the current GPU, whatever the tensors lie on; the caller's stays so."""
    fake, calls, runner = captured(device=Device("cuda", 1), cuda_graphs=cuda_graphs)
    call = bound(runner)
    call()
    assert calls and set(calls) == {1}
    assert set(fake.where) == ({1} if cuda_graphs else set())
    assert runner.buffer((4,), "float32").shape == (4,) and fake.allocated == ["cuda:1"]
    assert fake.gpu == 0


def test_a_gpu_without_a_number_is_the_one_that_is_current_at_the_load(captured):
    _, calls, runner = captured(cuda_graphs=False)
    assert runner.device == Device("cuda", 0)
    with torch.cuda.device(1):
        bound(runner)()
        assert TorchRunner({}, {}, Device("cuda"), cuda_graphs=False).device == Device("cuda", 1)
    assert calls == [0]


@pytest.fixture
def two_gpus(monkeypatch):
    """(the double of torch.cuda, that of a package, a bundle of it for the second of two GPUs)."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    package = Package(fake, {"full": CONTRACT}, {"full": scaled}, {"full": ["weight"]})
    monkeypatch.setattr("torch._inductor.package.load_package", package.load_package)
    monkeypatch.setattr("safetensors.torch.load_file", package.load_file)
    limits = {"machine": platform.machine(), "compute_capability": "9.0"}
    engine = SimpleNamespace(versions={"torch": torch.__version__}, device=limits)
    manifest = SimpleNamespace(engine=engine, graphs={"full": CONTRACT}, command=lambda: "the command")
    return fake, package, SimpleNamespace(manifest=manifest, folder="it", path=Path)


def scaled(weights, x, y):
    """What the one graph of the double does."""
    y.copy_(weights["weight"] * x)


def test_a_package_is_loaded_on_its_gpu(two_gpus):
    fake, package, bundle = two_gpus
    runner = open_runner(bundle, Device("cuda", 1), threads=0, cuda_graphs=False)
    assert runner.device == Device("cuda", 1)
    assert package.events == [("weights", "cuda:1", 1), ("package", 1, 1), ("constants", "cuda:1", 1)]
    assert fake.gpu == 0


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_package_is_run_as_the_library_asks(two_gpus, cuda_graphs):
    """On its GPU, one run at a time, warm before it is captured, its weights in place until the last call goes."""
    fake, package, bundle = two_gpus
    runner = open_runner(bundle, SECOND, threads=0, cuda_graphs=cuda_graphs)
    with fake.watched():
        x, y = (runner.buffer((4,), "float32") for _ in range(2))
        x.write(np.arange(4, dtype=np.float32))
        call = runner.bind("full", {"x": x}, {"y": y})
        call()
        fake.here = FakeCuda.Stream(fake, "cuda:1")
        call()
        assert y.read().tolist() == [0, 2, 4, 6]
    runner.close()
    gc.collect()
    (weight,) = package.kept
    assert weight.numel() == 1  # the call may still be made
    del call, runner
    gc.collect()
    assert weight.numel() == 0 and package.recorded == [fake.here]  # after what is queued there
    fake.check()


def model_of(two_gpus, **options):
    """A model of the double, warm."""
    fake, package, _ = two_gpus
    model = package.load_package("graphs.pt2", "full", device_index=0, **options)
    model.load_constants(package.load_file("it", "cuda:0"), check_full_update=True, user_managed=True)
    return fake, package, model


def capturing(fake):
    return fake.graph(fake.CUDAGraph(), fake.graph_pool_handle(), fake.Stream(), "thread_local")


def test_the_double_of_a_package_refuses_what_spoils_a_capture(two_gpus):
    for options, problem in (
        ({"run_single_threaded": True}, "constants are folded within a capture"),
        ({}, "a run asks for an event within a capture"),
    ):
        fake, package, model = model_of(two_gpus, **options)
        tensors = [torch.zeros(4) for _ in range(2)]
        with capturing(fake), pytest.raises(AssertionError, match=problem):
            model.boxed_run(list(tensors))
    fake, package, model = model_of(two_gpus, run_single_threaded=True)
    model.boxed_run(list(tensors))
    with capturing(fake):
        model.boxed_run(list(tensors))
    with pytest.raises(AssertionError, match="weights are loaded after a capture"):
        model.load_constants(package.load_file("it", "cuda:0"), check_full_update=True)


def test_the_double_of_a_package_refuses_a_wrong_run(two_gpus):
    fake, package, model = model_of(two_gpus, run_single_threaded=True)
    memory = torch.zeros(64)
    good = [memory[0:4], memory[16:20]]
    given = list(good)
    assert model.boxed_run(given) == given == []
    with pytest.raises(AssertionError, match="an input is copied, and what is written there is lost"):
        model.boxed_run([memory[0:4], memory[17:21]])
    with model.busy, pytest.raises(AssertionError, match="two runs at one time of a model for one"):
        model.boxed_run(list(good))
    fake.gpu = 1
    with pytest.raises(AssertionError, match="a run where another GPU is current"):
        model.boxed_run(list(good))
    fake.gpu = 0
    package.kept[-1].data = torch.empty(0)
    with pytest.raises(AssertionError, match="a run reads weights whose memory was given back"):
        model.boxed_run(list(good))
    with pytest.raises(AssertionError, match="a run without weights"):
        package.load_package("graphs.pt2", "full", device_index=0).boxed_run(list(good))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: {}, "Cannot find constants weight"),
        (lambda tensors: {"other": tensors["weight"]}, "Constant not found: other"),
    ],
)
def test_the_double_of_a_package_refuses_wrong_weights(two_gpus, change, problem):
    _, package, model = model_of(two_gpus)
    with pytest.raises(RuntimeError, match=problem):
        model.load_constants(change(package.load_file("it", "cuda:0")), check_full_update=True)
    with pytest.raises(RuntimeError, match="is on another device than expected"):
        model.load_constants(package.load_file("it", "cuda:1"), check_full_update=True)


def test_the_gpu_that_was_chosen_is_compared_with_the_bundle(two_gpus):
    """Two GPUs of a machine may be of two kinds."""
    fake, package, bundle = two_gpus
    for asked in (Device("cuda", 0), Device("cuda")):
        with pytest.raises(BundleError, match=r"compute capability is 8.0, expected 9.0, for which it was built"):
            open_runner(bundle, asked, threads=0)
    assert not package.events
    fake.gpu = 1
    assert open_runner(bundle, Device("cuda"), threads=0, cuda_graphs=False).device == Device("cuda", 1)


def test_a_capture_that_fails_gives_the_stream_back(captured):
    """torch.cuda.graph does not: all that the caller does later would go to the recorder's stream."""
    fake, _, runner = captured(fails=True)
    before = fake.current_stream()
    with pytest.raises(StepError, match="cannot be captured"):
        bound(runner)
    assert fake.current_stream() is before


def test_a_second_capture_is_refused_by_the_double_and_awaited_by_a_recorder(captured):
    fake, _, runner = captured()
    stream, other = fake.Stream(), fake.Stream()
    with fake.graph(fake.CUDAGraph(), (0, 7), stream, "thread_local"):
        with pytest.raises(AssertionError, match="a second capture in this process"):
            with fake.graph(fake.CUDAGraph(), (0, 8), other, "thread_local"):
                pass
        with pytest.raises(AssertionError, match="the host waits for a stream while it captures"):
            stream.synchronize()
    thread = threading.Thread(target=bound, args=[TorchRunner(runner._functions, runner.graphs, GPU)])
    with Recorder._alone:  # another runner's capture
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and fake.events.count("capture") == 1
    thread.join(60)
    assert fake.events[-2:] == ["capture", "replay"]


def test_closing_waits_for_what_is_under_way(captured):
    fake, _, runner = captured()
    bound(runner)()
    runner.close()
    assert fake.events[-2:] == ["replay", "synchronize"]


def test_a_fallback_is_counted_where_it_is_asked_for(captured):
    fake, calls, runner = captured(cuda_graphs=False)
    call = bound(runner)
    call()
    call()
    assert (runner.captures, runner.fallbacks, len(calls), fake.events) == (0, 2, 2, [])


def test_a_fallback_that_was_not_asked_for_is_an_error(captured):
    _, _, runner = captured(fails=True)
    with pytest.raises(StepError, match=r"graph `full` cannot be captured \(operation not .*capturing\), .*--no-cuda"):
        bound(runner)


def test_a_tensor_that_starts_between_is_refused(captured):
    _, _, runner = captured()
    with pytest.raises(StepError, match=r"tensor `x` of graph `full` starts at 4 bytes past a multiple of 16, expecte"):
        bound(runner, offset=1)


def test_a_call_that_fails_says_so():
    def fail(x, y):
        raise RuntimeError("shapes differ\nmore")

    call = bound(TorchRunner({"full": fail}, {"full": CONTRACT}))
    with pytest.raises(
        StepError, match=r"graph `full` failed \(shapes differ\), expected it to run; check that the si"
    ):
        call()


# On a GPU


@pytest.mark.parametrize("kind", [pytest.param("inductor", marks=NEEDS_GPU)])
def test_a_step_on_a_gpu_allocates_nothing(on_gpu, tiny, kind):
    denoiser = on_gpu(kind, "dit")
    inputs = representable(tiny("dit").inputs(8, batch=2), torch.bfloat16)
    slot = open_slot(denoiser, inputs)
    latents = inputs[0].to("cuda", torch.bfloat16)
    expected = run(denoiser, inputs, "FFF..F..", 2)
    arrays = {name: value.numpy() for name, value in inputs[2].items()}
    slot.start(arrays, Forecasts(Plan("FFF..F.."), 2), inputs[1].float().numpy())
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    buffers = []
    for latent in latents:
        buffers.append(slot.advance(latent))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len({buffer.address for buffer in buffers}) == 1
    assert torch.equal(torch.from_numpy(buffers[-1].read()), expected[-1])
    assert denoiser.runner.fallbacks == 0 and denoiser.runner.captures >= 2
