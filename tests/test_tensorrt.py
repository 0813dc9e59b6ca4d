"""TensorRT plans: the real parser and builder of `tensorrt_rtx` on every family, no GPU needed.

Strong typing makes the parser name every missing cast, so a model that builds here is typed throughout.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from inspect_rtx import layers, listening
from tiny_bundles import MODELS, TENSORRT_RTX

from taylorseer_export.bundle.contract import unlike
from taylorseer_export.bundle.manifest import Dimension, Graph, Tensor
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.bundle.tensorrt import extents, library, logger
from taylorseer_export.compile import export
from taylorseer_export.compile import tensorrt as plans
from taylorseer_export.compile import torch_tensorrt as torch_plans
from taylorseer_export.compile.export import Options, check_options
from taylorseer_export.compile.onnx import write_onnx
from taylorseer_export.compile.weights import WEIGHTS, write_weights
from taylorseer_export.errors import BuildError, ConfigError
from taylorseer_export.families import FAMILIES

trt = pytest.importorskip("tensorrt_rtx")


def options(**changes) -> Options:
    return Options(**{"order": 1, "interval": 2, "warmup": 1, "steps": 8, "engine": "tensorrt-rtx", **changes})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), TENSORRT_RTX, ids=[f"{n}-{p}" for n, p in TENSORRT_RTX])
def test_every_graph_of_every_family_builds(drafts, once, name, precision):
    """`build` refuses a network whose names, dtypes or shapes are not the contract's, so a bundle is the proof."""
    chosen = TENSORRT_RTX[name, precision]

    def write(folder):
        draft, stages = drafts(name, order=1, engine="tensorrt-rtx", precision=precision, **chosen), []
        log, parse = listening(trt), plans.parse
        built = []  # of each graph its products, and where its layers begin in the log

        def parsed(trt, builder, log, path):
            built.append((quantised_products(path), len(log.layers)))
            return parse(trt, builder, log, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plans, "logger", lambda _: log)
            patch.setattr(plans, "parse", parsed)
            made = export.write_bundle(draft, folder, name, lambda *it: stages.append(it))
        ends = [begin for _, begin in built[1:]] + [None]
        listed = [(products, log.layers[begin:end]) for (products, begin), end in zip(built, ends, strict=True)]
        wide = [product for one in listed for product in not_of(chosen.get("weights"), *one)]
        said = [[cut.name for cut in draft.split.graphs], stages, sum(len(products) for products, _ in built), wide]
        (folder / "said.json").write_text(json.dumps(said))
        return made

    folder = once(f"tensorrt-rtx-{name}-{precision}", write)
    graphs, said, products, wide = json.loads((folder.parent / "said.json").read_text())
    manifest = open_bundle(folder).manifest
    assert products >= (len(manifest.quantised.layers) if "weights" in chosen else 0)
    assert not wide, f"{len(wide)} of {products} products of {name} are not of {chosen['weights']}: {wide[:5]}"
    assert any(d.minimum < d.maximum for d in manifest.dimensions.values())
    assert sorted(p.name for p in folder.iterdir()) == sorted(["manifest.json", *(f"{g}.plan" for g in graphs)])
    assert all((folder / f"{g}.plan").stat().st_size > manifest.graphs[g].weights_bytes / 2 for g in graphs)
    assert manifest.engine.versions["tensorrt_rtx"] == trt.__version__
    built_for = chosen["engine_options"].get("gpu-arch", "8.0 8.6 8.9 12.0 12.1")
    assert manifest.engine.device == {"devices": "cuda", "compute_capability": built_for, "cuda": "13"}
    narrow = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert {t.dtype for t in manifest.graphs["full"].outputs if t.role == "taylor_out"} == {narrow}
    assert {stage for stage, _, _ in said} == {"weights", "graphs", *(f"plan of {g}" for g in graphs)}


# What the matrix units read where a layer is quantised, and the GPUs that have it. Bundles above are of nvfp4.
FEW_BITS = {"fp8": ("FP8", ("8.9", "12.0")), "nvfp4": ("FP4E2M1", ("12.0",)), "int8": ("Int8", ("8.0", "12.0"))}
QUANTISED = [(name, "fp8") for name, precision in TENSORRT_RTX if precision == "bf16"]
QUANTISED += [("dit", "nvfp4"), ("dit", "int8")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), QUANTISED)
def test_quantised_layers_multiply_in_few_bits(drafts, tmp_path, name, weights):
    """The builder's own list of layers: each product of a quantised weight reads that format, none was cast back.

    One graph is built for each GPU by itself: of an engine for several the builder lists the layers of one.
    """
    _, capabilities = FEW_BITS[weights]
    how = {"gpu-arch": ",".join(capabilities), "profiling-verbosity": "detailed", "builder-optimization-level": 0}
    chosen = {**TENSORRT_RTX[name, "bf16"], "guards": (), "weights": weights, "engine_options": how}
    chosen["activations"] = "token"  # which is not what int8 does if nothing is said
    draft = drafts(name, "residual", order=1, engine="tensorrt-rtx", precision="bf16", **chosen)
    cut = draft.split.full
    places = write_weights(tmp_path / WEIGHTS, {n: draft.stored[n] for n in cut.parameters()}, draft.read)
    write_onnx(draft, cut, places, tmp_path / "full.onnx")
    products = quantised_products(tmp_path / "full.onnx")
    assert len(products) >= len({part.weight for n, part in draft.quantised.items() if n in places})
    for capability in capabilities:
        log = listening(trt)
        builder = trt.Builder(log)
        network, parser = plans.parse(trt, builder, log, tmp_path / "full.onnx")
        config = plans.configure(trt, builder, replace(draft.options, engine_options={**how, "gpu-arch": capability}))
        plans.add_profile(builder, config, cut, draft.dimensions())
        assert builder.build_serialized_network(network, config) is not None, log.last()
        del parser
        wide = not_of(weights, products, log.layers)
        assert not wide, f"{len(wide)} of {len(products)} of {name} are not of {weights} for {capability}: {wide[:5]}"


def not_of(weights, products, listed):
    """Products of quantised weights that no layer of a builder's list reads in their format."""
    found = layers(listed) if products else []
    running = {product: [one for one in found if f"[ONNX Layer: {product}]" in one.nodes] for product in products}
    return [n for n, ran in running.items() if not any(FEW_BITS[weights][0] in one.inputs.values() for one in ran)]


def quantised_products(path):
    """Names of the products of a graph that read a dequantised weight."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    made = {output: node for node in nodes for output in node.output}

    def dequantised(name):
        node = made.get(name)
        passes = node is not None and node.op_type in ("Transpose", "Reshape")
        return dequantised(node.input[0]) if passes else node is not None and node.op_type == "DequantizeLinear"

    return [n.name for n in nodes if n.op_type in ("MatMul", "Gemm") and dequantised(n.input[1])]


def test_one_case_is_built_as_the_command_line_does_by_itself():
    """For every generation of GPU, with the library's own effort; and every family, in one precision or both."""
    by_default = [case for case, chosen in TENSORRT_RTX.items() if not chosen["engine_options"]]
    assert by_default == [("dit", "fp16")]
    families = {precision: {MODELS[n][0] for n, p in TENSORRT_RTX if p == precision} for precision in ("bf16", "fp16")}
    assert families == {"bf16": FAMILIES.keys(), "fp16": {"flux", "dit"}}


# Other ways to the same file


class Config:
    """A builder's config that keeps what it is given, `BuilderFlag`s as members."""

    def __init__(self):
        self.flags, self.pools, self.cache = {trt.BuilderFlag.TF32}, {}, None

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def get_flag(self, flag):
        return flag in self.flags

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def get_memory_pool_limit(self, pool):
        return self.pools[pool]

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data, serialize=lambda: data + b"+")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return not ignore_mismatch and cache.data != b"of another GPU"

    def get_timing_cache(self):
        return self.cache


def test_options_of_tensorrt_reach_its_config(tmp_path):
    """On a double, because full TensorRT is not here: names and values as its documentation has them."""
    file = tmp_path / "timings"
    given = {
        "version-compatible": True,
        "hardware-compatibility-level": "same-compute-capability",
        "refit": True,
        "strip-plan": True,
        "timing-cache": str(file),
        "pool-limit": "dla-local-dram:4096,dla-managed-sram:8192",
    }
    chosen = options(engine="tensorrt", engine_options=given)
    for found, kept in ((None, b"+"), (b"old", b"old+")):
        if found:
            file.write_bytes(found)
        config = plans.configure(trt, SimpleNamespace(create_builder_config=Config), chosen)
        plans._keep_timings(config, chosen)
        assert file.read_bytes() == kept
    flags = trt.BuilderFlag
    assert config.flags == {flags.VERSION_COMPATIBLE, flags.REFIT, flags.STRIP_PLAN}
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert config.pools == {trt.MemoryPoolType.DLA_LOCAL_DRAM: 4096, trt.MemoryPoolType.DLA_MANAGED_SRAM: 8192}
    file.write_bytes(b"of another GPU")
    with pytest.raises(BuildError, match=r"timings is a timing cache of another GPU or release, .*; delete it"):
        plans.configure(trt, SimpleNamespace(create_builder_config=Config), chosen)


@pytest.mark.slow
def test_torch_tensorrt_is_given_our_names_and_ranges(drafts, tmp_path, monkeypatch):
    """On a double, because it needs a GPU to import: one whole plan for each graph, under the contract's names."""
    calls = []

    def convert(program, **asked):
        calls.append((program, asked))
        return b"plan"

    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    library = SimpleNamespace(Input=lambda **asked: asked, dynamo=dynamo)
    monkeypatch.setattr(torch_plans, "_library", lambda: library)
    monkeypatch.setattr(torch_plans, "DEVICE", "cpu")
    draft = drafts("plain")
    draft = replace(draft, options=replace(draft.options, engine_options={"workspace": 8, "version-compatible": True}))
    torch_plans.build(draft, tmp_path, lambda *_: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forecast.plan", "full.plan", "prepare.plan"]
    dimensions = draft.dimensions()
    for cut, (program, asked) in zip(draft.split.graphs, calls, strict=True):
        assert asked["arg_input_binding_names"] == tuple(t.name for t in cut.inputs)
        assert asked["output_binding_names"] == tuple(t.name for t in cut.outputs)
        assert (asked["workspace_size"], asked["version_compatible"], asked["disable_tf32"]) == (8, True, True)
        assert asked["require_full_compilation"] is True
        for tensor, seen in zip(cut.inputs, asked["arg_inputs"], strict=True):
            assert (seen["min_shape"], seen["opt_shape"], seen["max_shape"]) == extents(tensor, dimensions)
            assert (seen["dtype"], seen["name"]) == (getattr(torch, tensor.dtype), tensor.name)
        assert len(program.graph_signature.user_outputs) == len(cut.outputs)
        assert len(program.graph_signature.user_inputs) == len(cut.inputs)

    def refuse(program, **asked):
        raise RuntimeError("no converter for aten.tan\nmore")

    dynamo.convert_exported_program_to_serialized_trt_engine = refuse
    with pytest.raises(
        BuildError, match=r"graph `prepare` is not converted by torch-tensorrt \(no converter for aten.tan"
    ):
        torch_plans.build(draft, tmp_path, lambda *_: None)


# The network and its profile


TENSORS = (
    Tensor(name="x", dtype="float16", shape=("batch", 4), role="latent"),
    Tensor(name="clock", dtype="int64", shape=("steps",), role="step"),
)
CONTRACT = Graph(file="g", inputs=TENSORS, outputs=TENSORS[:1], weights_bytes=0)
INPUTS = {"x": ("float16", (2, 4)), "clock": ("int64", (-1,))}
DIMENSIONS = {
    "batch": Dimension(minimum=2, maximum=2, typical=2),
    "steps": Dimension(minimum=1, maximum=9, typical=5),
}


@pytest.mark.parametrize(
    ("inputs", "outputs", "problem"),
    [
        ({}, {}, None),
        ({}, {"x": ("float16", (-1, 4))}, None),  # a computed size that the library leaves open
        ({"x": ("float32", (2, 4))}, {}, r"`x` is float32 \[2, 4\], expected float16 \[2, 4\]"),
        ({"x": ("float16", (-1, 4))}, {}, r"`x` is float16 \[-1, 4\], expected float16 \[2, 4\]"),
        ({"x": ("float16", (4,))}, {}, r"`x` is float16 \[4\]"),
        ({"clock": ("int64", (8,))}, {}, r"`clock` is int64 \[8\], expected int64 \[-1\]"),
        ({}, {"x": ("float16", (3, 4))}, r"`x` is float16 \[3, 4\]"),
        ({"y": ("float16", (2, 4))}, {}, r"inputs y are in one of engine and manifest"),
        ({}, {"x": None}, r"outputs x are in one of engine and manifest"),
    ],
)
def test_a_tensor_that_is_not_the_contract_is_named(inputs, outputs, problem):
    seen = [
        {n: v for n, v in {**base, **change}.items() if v}
        for base, change in ((INPUTS, inputs), ({"x": ("float16", (2, 4))}, outputs))
    ]
    found = unlike(CONTRACT, *seen, DIMENSIONS)
    assert found is None if problem is None else re.match(problem, found)


def test_extents_are_one_row_of_a_profile():
    wide = Tensor(name="y", dtype="float32", shape=("batch", "2*steps+1"), role="constant")
    assert extents(wide, DIMENSIONS) == ((2, 3), (2, 11), (2, 19))


@pytest.fixture(scope="module")
def builder():
    return trt.Builder(logger(trt))


def network_of(builder, dtype):
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (2, 4))
    output = network.add_cast(x, dtype).get_output(0)
    output.name = "x_out"
    network.mark_output(output)
    return network


def test_the_parser_names_what_it_refuses(builder, tmp_path):
    """A sum of float32 and float16: what a forgotten cast looks like."""
    from onnx import helper

    half, full = (helper.make_tensor_value_info(n, d, [2]) for n, d in (("a", 10), ("b", 1)))
    node = helper.make_node("Add", ["a", "b"], ["c"], name="the_sum")
    graph = helper.make_graph([node], "g", [half, full], [helper.make_tensor_value_info("c", 1, [2])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match=r"g.onnx is refused by the parser of tensorrt_rtx .*the_sum.*same input type"):
        plans.parse(trt, builder, logger(trt), tmp_path / "g.onnx")


# Options


def test_options_are_set_and_read_back(builder):
    given = {
        "builder-optimization-level": 5,
        "max-aux-streams": 2,
        "profiling-verbosity": "detailed",
        "workspace": 1 << 20,
        "pool-limit": "tactic-shared-memory:49152",
        "weight-streaming": True,
        "gpu-arch": "8.9",
    }
    config = plans.configure(trt, builder, options(engine_options=given))
    assert config.builder_optimization_level == 5
    assert config.max_aux_streams == 2
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20
    assert config.get_memory_pool_limit(trt.MemoryPoolType.TACTIC_SHARED_MEMORY) == 49152
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    plain = plans.configure(trt, builder, options(engine_options={"tf32": True}))
    assert plain.get_flag(trt.BuilderFlag.TF32)
    seen = {plain.get_compute_capability(k).name for k in range(plain.num_compute_capabilities)}
    assert seen == {name for name in trt.ComputeCapability.__members__ if name[2:].isdigit()} - {"SM75"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"pool-limit": "dla-local-dram:8"}, r"--pool-limit is DLA_LOCAL_DRAM 8, expected a value that tensorrt_rtx"),
        ({"pool-limit": "attic:8"}, r"--pool-limit is attic, expected one that tensorrt_rtx .* \(workspace, "),
        (
            {"gpu-arch": "9.0"},
            r"--gpu-arch is 9.0, expected capabilities .*8.9, 12.0, .*; choose .* --engine tensorrt ",
        ),
        ({"refit": True}, r"--refit is given with --engine tensorrt-rtx, expected it with tensorrt"),
        ({"timing-cache": "x"}, r"--timing-cache is given with --engine tensorrt-rtx, expected it with tensorrt"),
        ({"hardware-compatibility-level": "none"}, r"--hardware-compatibility-level is given with"),
    ],
)
def test_an_option_that_is_not_honoured_is_an_error(given, problem):
    with pytest.raises((BuildError, ConfigError), match=problem):
        check_options(options(engine_options=given))


def test_a_value_that_the_library_drops_is_noticed(builder):
    """RTX takes a hardware compatibility level without a word and keeps NONE; were it offered, this would say so."""
    with pytest.raises(BuildError, match=r"AMPERE_PLUS, expected a value that .* takes \(it keeps .*NONE\); choose"):
        plans.configure(trt, builder, options(engine_options={"hardware-compatibility-level": "ampere-plus"}))


def test_engines_for_a_gpu_are_refused_a_cpu():
    with pytest.raises(
        ConfigError, match=r"--device is cpu, expected cuda for --engine tensorrt-rtx; leave it out, or"
    ):
        check_options(options(device="cpu"))


def test_a_library_that_is_not_there_is_named():
    with pytest.raises(
        BuildError, match=r"tensorrt is not installed \(.*\), expected it for --engine tensorrt; pip inst"
    ):
        library("tensorrt", BuildError)
    with pytest.raises(
        BuildError, match=r"torch-tensorrt is not installed \(.*\), expected it for --engine torch-tensorrt"
    ):
        check_options(options(engine="torch-tensorrt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_a_plan_of_this_gpu_needs_one():
    with pytest.raises(BuildError, match=r"this machine has no GPU .* or use --engine tensorrt-rtx"):
        plans.this_gpu("tensorrt")


def test_a_report_that_raises_stops_the_build(builder):
    """Ctrl-C lands in the report; nothing may be thrown through the library."""

    def report(*_):
        raise KeyboardInterrupt

    monitor = plans._monitor(trt, "full", report)
    config = plans.configure(trt, builder, options(engine_options={"gpu-arch": "8.9"}))
    config.progress_monitor = monitor
    assert builder.build_serialized_network(network_of(builder, trt.float32), config) is None
    assert isinstance(monitor.stopped, KeyboardInterrupt)
