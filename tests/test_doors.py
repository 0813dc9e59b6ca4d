"""Bundles that come by other ways, or made to do harm: what an engine reads is listed, what it writes fits.

Bundles are those of the engine tests, rewritten and sealed again, as someone who knows the format would.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bundle import resealed

from taylorseer_export.bundle.contract import signature, unlike
from taylorseer_export.bundle.external import external_files, relocated
from taylorseer_export.bundle.manifest import MANIFEST, Dimension, Graph, Manifest, Tensor
from taylorseer_export.bundle.schedulers import SCHEDULERS
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import open_bundle
from taylorseer_export.errors import BundleError, TaylorSeerError
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime import inductor as inductor_runner
from taylorseer_export.runtime import onnxruntime as onnxruntime_runner
from taylorseer_export.runtime.check import random_constants
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.engines import open_runner
from taylorseer_export.runtime.schedulers import scheduler_of


def linked(source: Path, target: Path, place) -> Path:
    """A bundle whose files are links, each to where `place(folder, name, hash)` says."""
    for file in source.rglob("*"):
        if file.is_file():
            name = file.relative_to(source)
            blob = place(target, name.as_posix(), hashlib.sha256(file.read_bytes()).hexdigest())
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link = target / "snapshots" / "abc" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return target / "snapshots" / "abc"


WAYS = {
    "a hub's cache": lambda folder, name, digest: folder / "blobs" / digest,
    "a folder for each file": lambda folder, name, digest: folder / "objects" / digest[:2] / digest / digest,
    "another disk": lambda folder, name, digest: folder / "disk" / name,
}


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of a bundle with a changed manifest, whatever that lists."""
    target.mkdir()
    manifest = open_bundle(source).manifest
    for name in manifest.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    (target / MANIFEST).write_bytes(resealed(manifest, change))
    return target


def inputs_for(denoiser):
    """(latents, constants) of the smallest sizes, the same at every call."""
    generator = np.random.default_rng(0)
    sizes = {name: d.minimum for name, d in denoiser.manifest.dimensions.items()}
    constants = random_constants(denoiser, sizes, generator)
    return generator.standard_normal(resolve(denoiser.latent.shape, sizes)).astype(np.float32), constants


def prediction(denoiser, inputs=None) -> np.ndarray:
    """`[S, ...]` of three steps."""
    latents, constants = inputs or inputs_for(denoiser)
    slot = denoiser.slot(denoiser.sizes(latents.shape, constants))
    slot.start(constants, Forecasts(Plan("FF."), 1), np.linspace(0.9, 0.3, 3, dtype=np.float32))
    return np.stack([slot.step(latents) for _ in range(3)])


# Links


@pytest.mark.parametrize("way", WAYS)
def test_a_bundle_of_links_computes_what_the_bundle_does(bundles, onnx, tmp_path, way):
    folder = linked(bundles("dit"), tmp_path, WAYS[way])
    with load(folder, threads=1) as denoiser:
        assert (prediction(denoiser) == prediction(onnx("dit"))).all()


def test_a_package_of_links_loads(packages, inductor, tmp_path):
    with load(linked(packages("plain"), tmp_path, WAYS["a folder for each file"]), threads=1) as denoiser:
        assert (prediction(denoiser) == prediction(inductor("plain"))).all()


# What a graph reads


def test_the_weights_of_a_graph_are_listed(bundles, tmp_path):
    folder = rewritten(bundles("dit"), tmp_path / "dit", lambda raw: raw["files"].pop("weights.safetensors"))
    assert (folder / "weights.safetensors").is_file()
    expected = r"file `weights.safetensors`, which .*onnx reads, is not listed in .*, expected every file that a graph"
    with pytest.raises(BundleError, match=expected):
        load(folder)


def test_the_weights_of_a_package_are_listed(packages, tmp_path):
    folder = rewritten(packages("plain"), tmp_path / "plain", lambda raw: raw["files"].pop("weights.safetensors"))
    with pytest.raises(BundleError, match=r"file `weights.safetensors` is not listed"):
        load(folder)


def nested_model() -> onnx.ModelProto:
    """External tensors wherever a model may hold any: weights, attributes, the branches of a choice, functions."""
    make = onnx.helper

    def tensor(name, file):
        made = onnx.TensorProto(name=name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", file), ("offset", "4096"), ("length", "4")):
            made.external_data.add(key=key, value=value)
        return made

    branch = make.make_graph([make.make_node("Constant", [], ["b"], value=tensor("b", "branch.bin"))], "branch", [], [])
    choice = make.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch)
    sparse = onnx.SparseTensorProto(values=tensor("v", "values.bin"), indices=tensor("i", "indices.bin"))
    graph = make.make_graph([choice], "graph", [], [], [tensor("w", "weights.bin")], sparse_initializer=[sparse])
    constant = make.make_node("Constant", [], ["f"], value=tensor("f", "function.bin"))
    function = make.make_function("own", "f", [], ["f"], [constant], [])
    return make.make_model(graph, functions=[function])


def engine_model(kind: str) -> onnx.ModelProto:
    """A graph that reads what no tensor names: an engine of another file or of its own, or an address."""
    make = onnx.helper
    if kind == "address":
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")
        return make.make_model(make.make_graph([], "graph", [], [], [tensor]))
    engine = make.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../engine", embed_mode=0
    )
    if kind == "function":
        function = make.make_function("own", "f", ["x"], ["y"], [engine], [make.make_opsetid("com.microsoft", 1)])
        return make.make_model(make.make_graph([], "graph", [], []), functions=[function])
    if kind == "branch":
        branch = make.make_graph([engine], "branch", [], [])
        engine = make.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch)
    return make.make_model(make.make_graph([engine], "graph", [], []))


ENGINES_OF_OTHERS = {"node": "compiled engine", "branch": "compiled engine", "function": "compiled engine"}
ENGINES_OF_OTHERS |= {"address": "reads the memory of the process"}


@pytest.mark.parametrize("kind", ENGINES_OF_OTHERS)
def test_a_graph_that_reads_what_no_hash_covers_is_refused(bundles, tmp_path, kind):
    """Wherever it stands, and with a manifest that lists it as it is."""
    data = engine_model(kind).SerializeToString()
    with pytest.raises(ValueError, match=ENGINES_OF_OTHERS[kind]):
        external_files(data)
    folder = rewritten(bundles("dit"), tmp_path / "dit", lambda raw: None)
    file = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "forecast.onnx").write_bytes(data)
    sealed = open_bundle(bundles("dit")).manifest
    (folder / MANIFEST).write_bytes(resealed(sealed, lambda raw: raw["files"].update({"forecast.onnx": file})))
    with pytest.raises(BundleError, match=rf"forecast.onnx is .*{ENGINES_OF_OTHERS[kind]}.*, expected an ONNX graph; "):
        load(folder)


def test_a_model_in_onnx_runtime_s_own_format_is_refused():
    with pytest.raises(ValueError, match=r"in ONNX Runtime's own format"):
        external_files(b"\x18\0\0\0ORTM" + bytes(20))
    assert external_files(b"") == ()


NESTED = {"weights.bin", "values.bin", "indices.bin", "branch.bin", "function.bin"}


def test_every_file_that_a_model_reads_is_found_and_can_be_changed():
    data = nested_model().SerializeToString()
    assert set(external_files(data)) == NESTED
    assert relocated(data, lambda name: name) == data
    changed = relocated(data, lambda name: "elsewhere/" * 40 + name)  # long enough to lengthen every length
    assert set(external_files(changed)) == {"elsewhere/" * 40 + name for name in NESTED}
    back = onnx.load_model_from_string(relocated(changed, lambda name: name.removeprefix("elsewhere/" * 40)))
    assert back == nested_model()


@pytest.mark.parametrize("name", ["full", "prepare", "forecast"])
def test_the_graphs_of_a_bundle_read_its_weights_alone(bundles, name):
    data = (bundles("dit") / f"{name}.onnx").read_bytes()
    assert external_files(data) == ("weights.safetensors",)
    read = onnx.load_model_from_string(relocated(data, lambda name: "other"))
    assert {e.value for t in read.graph.initializer for e in t.external_data if e.key == "location"} == {"other"}


@given(
    st.binary(max_size=200)
    | st.builds(lambda k, b: nested_model().SerializeToString()[:k] + b, st.integers(0, 300), st.binary(max_size=9))
)
def test_what_is_no_model_is_refused_or_read(data):
    try:
        external_files(data)
    except ValueError as error:
        assert str(error)


# What a graph writes


@pytest.mark.parametrize("name", ["plain", "dit"])
@pytest.mark.parametrize("engine", ["onnxruntime", "inductor"])
@pytest.mark.parametrize("field", ["dtype", "shape", "name"])
def test_a_tensor_that_is_not_the_engines_is_refused(bundles, packages, tmp_path, name, engine, field):
    """In every graph alike, so that the manifest does not contradict itself."""
    source = bundles(name) if engine == "onnxruntime" else packages(name)

    def change(raw):
        tensors = [t for g in raw["graphs"].values() for side in ("inputs", "outputs") for t in g[side]]
        for tensor in tensors:
            if tensor["name"] in ("step.full", "other"):
                if field == "dtype":
                    tensor["dtype"] = "float16" if tensor["dtype"] != "float16" else "float32"
                elif field == "shape":
                    tensor["shape"][-1] += 1
                else:
                    tensor["name"] = "step.other"

    folder = rewritten(source, tmp_path / name, change)
    with pytest.raises(BundleError, match=r"step\..* as in the manifest; export the bundle again"):
        open_runner(open_bundle(folder))


def test_shapes_that_agree_and_that_do_not():
    x = Tensor(name="x", dtype="float32", shape=("batch", "rows + text", 4), role="latent")
    y = Tensor(name="y", dtype="float32", shape=(), role="noise_pred")
    graph = Graph(file="f", inputs=(x,), outputs=(y,), weights_bytes=0)
    free, one = Dimension(minimum=1, maximum=9, typical=2), Dimension(minimum=2, maximum=2, typical=2)
    scalar = {"y": ("float32", ())}

    def seen(*shape):
        return {"x": ("float32", shape)}

    named = {"batch": free, "rows": free, "text": free}
    assert unlike(graph, seen("batch", "rows + text", 4), scalar, named) is None
    assert unlike(graph, seen(-1, -1, 4), scalar, named) is None
    fixed = {"batch": one, "rows": one, "text": one}
    assert unlike(graph, seen(2, 4, 4), scalar, fixed) is None
    assert unlike(graph, seen("batch", "rows + text", 4), scalar, fixed) is None
    wrong = [seen("other", "rows + text", 4), seen(2, "rows + text", 4), seen(-1, -1, 5), seen(-1, 4)]
    assert all(unlike(graph, shape, scalar, named) for shape in wrong)
    assert unlike(graph, seen(2, 5, 4), scalar, fixed) == "`x` is float32 [2, 5, 4], expected float32 [2, 4, 4]"


def test_a_package_notes_the_contract_of_every_graph(packages):
    from torch._inductor.package import load_package

    manifest = open_bundle(packages("plain")).manifest
    package = str(packages("plain") / manifest.graphs["full"].file)
    for name, graph in manifest.graphs.items():
        assert load_package(package, name).get_metadata()[inductor_runner.NOTE] == signature(graph)


# What is looked up by name


def test_every_scheduler_of_the_list_is_one_of_diffusers():
    assert [name for name in SCHEDULERS - {"none"} if not hasattr(diffusers, name)] == []


@pytest.mark.parametrize("config", [{"num_train_timesteps": 1000, "beta_schedule": "x"}, {"beta_start": "x"}])
def test_a_scheduler_that_its_config_does_not_make_is_said_so(bundles, config):
    manifest = open_bundle(bundles("dit")).manifest
    sampling = manifest.sampling.model_copy(update={"config": config})
    with pytest.raises(BundleError, match=r"config of DDIMScheduler is not usable .*, expected one that diffusers"):
        scheduler_of(manifest.model_copy(update={"sampling": sampling}))


# Every field


HOSTILE = {
    str: ["", "../../x", "\x1b[31m\n", "\uff42atch", "float16", "latent", "a" * 10_000, 7],
    int: [0, -1, 3, 10**40, 1e308, "1"],
    float: [0, -1.0, 1e308, "1"],
    bool: [None, 1],
    type(None): [0, "x"],
    list: [[], {}],
    dict: [{}, None],
}


def places(value, place=()):
    """Every field of a manifest; of many alike tensors of a graph the first of each role."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*place, key))
    elif isinstance(value, list):
        seen = set()
        for k, item in enumerate(value):
            role = item.get("role", "site") if isinstance(item, dict) else k
            if role not in seen:
                seen.add(role)
                yield from places(item, (*place, k))


def at(raw, place):
    for key in place:
        raw = raw[key]
    return raw


def changes(raw):
    """(place, what happens there, how): hostile values, entries taken away, given twice, and turned round."""
    for place in places(raw):
        if not place or place == ("schema_version",):
            continue
        value = at(raw, place)
        for other in HOSTILE[type(value)]:
            if type(other) is not type(value) or other != value:
                yield place, repr(other)[:30], lambda made, p=place, o=other: at(made, p[:-1]).__setitem__(p[-1], o)
        yield place, "taken away", lambda made, p=place: at(made, p[:-1]).pop(p[-1])
        if isinstance(value, list) and len(value) > 1:
            yield place, "turned round", lambda made, p=place: at(made, p).reverse()
            yield place, "given twice", lambda made, p=place: at(made, p).append(at(made, p)[0])


# Bundle, whether the change is in its graph `full`, and how many of them are tried, the same each time; None tries all.
TRIED = [("dit", False, None), ("dit", True, 60), ("flux", False, 60), ("flux", True, 30)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "full", "count"), TRIED)
def test_a_manifest_with_any_field_changed_is_refused_in_one_sentence_or_runs_right(
    bundles, tmp_path, monkeypatch, name, full, count
):
    """Nothing else: no traceback, no other numbers. Engines are the same files, so each is loaded once."""
    source = bundles(name)
    sealed = open_bundle(source).manifest
    raw = json.loads(sealed.to_json())
    del raw["digest"]
    library, sessions = onnxruntime_runner._library(), {}

    def session(path, options, **given):
        if path.name not in sessions:
            sessions[path.name] = library.InferenceSession(path, options, **given)
        return sessions[path.name]

    double = SimpleNamespace(**{**vars(library), "InferenceSession": session})
    monkeypatch.setattr(onnxruntime_runner, "_library", lambda: double)
    folder = rewritten(source, tmp_path / name, lambda made: None)
    with load(folder, threads=1) as denoiser:
        inputs = inputs_for(denoiser)
        expected = prediction(denoiser, inputs)
    tried = [change for change in changes(raw) if (change[0][:2] == ("graphs", "full")) == full]
    tried = tried if count is None else random.Random(0).sample(tried, count)
    refused = ran = 0
    for place, what, change in tried:
        where = f"{'.'.join(map(str, place))} {what}"
        try:
            data = resealed(sealed, change)
            Manifest.from_bytes(data, MANIFEST)
            (folder / MANIFEST).write_bytes(data)
            with load(folder, threads=1) as denoiser:
                same = (prediction(denoiser, inputs) == expected).all()
            assert same, where
            ran += 1
        except TaylorSeerError as error:
            assert str(error).isprintable() and len(str(error)) < 2000, where
            refused += 1
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    few, some = (500, 50) if count is None else (count // 2, 0)
    assert refused > few and ran > some, (refused, ran)
