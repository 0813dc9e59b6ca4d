"""Fixtures that cost seconds, made once: checkpoints are saved, models traced, and bundles written on first use.

`make test` runs on several workers. What lives in memory is made once by each worker that asks for it; checkpoints and
bundles, which take longest, are written once for all of them and kept for the next run, see `tests/kept.py`.
"""

import gc
import os
from functools import cache, partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may reach the net
# What exports of tiny models pay for sizes that are symbols: torch's cache of shapes, which costs more than it spares,
# and sympy's, which holds a thousand expressions by default and loses them before they are asked for again.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ.setdefault("SYMPY_CACHE_SIZE", "20000")

import diffusers
import onnxruntime
import pytest
import torch
from _pytest.junitxml import xml_key
from harness import Tiny, eager_denoiser
from hypothesis import settings
from kept import ROOT, Kept, key_of, sources, surroundings, sweep
from record import commit_of
from tiny_bundles import (
    BUNDLES,
    MODELS,
    ON_GPU,
    PACKAGES,
    WHOLE,
    WHOLE_AS,
    WHOLE_SIZES,
    options_of,
    trace_of,
    write_embedded,
    write_whole,
)

from taylorseer_export.bundle.tensorrt import library_name
from taylorseer_export.compile import export
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.denoiser import load

torch.set_num_threads(1)
settings.register_profile("no clock", deadline=None)  # a busy machine is no failure
settings.load_profile("no clock")
torch.backends.cudnn.allow_tf32 = False  # a GPU's float32 is held to the bounds of float32
# Tracing makes millions of small objects that live; looking through them for garbage took a third of an export.
gc.set_threshold(50_000, 20, 50)

# The files that take minutes: they start first, so that no worker is left with one when the others are done.
LONG = (
    "test_tensorrt.py",
    "test_mid_size.py",
    "test_families.py",
    "test_triton.py",
    "test_inductor.py",
    "test_readme.py",
    "test_whole.py",
    "test_videos.py",
    "test_whole_doors.py",
    "test_flux2_whole.py",
    "test_image_to_video.py",
    "test_hunyuan_image_to_video.py",
)


def pytest_sessionstart(session):
    """A JUnit report names the commit that it is of, so that `tools/families.py` can refuse an old one."""
    report = session.config.stash.get(xml_key, None)
    if report is not None:
        commit, changed = commit_of()
        report.add_global_property("commit", commit)
        report.add_global_property("uncommitted_changes", str(changed))


# The files whose time goes into one model after the other: their cases of one model run on one worker, which traces it.
BY_MODEL = (
    "test_tensorrt.py",
    "test_families.py",
    "test_guard.py",
    "test_split.py",
    "test_binding.py",
    "test_serve.py",
    "test_dropin_families.py",
    "test_precisions.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
        if reason := too_old_for(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))


def is_slow(item):
    """Whether a case is of AOTInductor, or of a model other than those of `BUNDLES`: FLUX and DiT, which are enough to
    see soon that something broke."""
    words = words_of(item)
    compiled = {"inductor", "packages"} & {*item.fixturenames, *words}
    return bool(compiled) or bool(words & (MODELS.keys() | FAMILIES.keys()) - BUNDLES.keys())


# Models that need a newer torch than the oldest that is asked for: their sizes are guarded by how memory is laid out.
NEWER_TORCH = {"cogvideox-image": (2, 12)}


def words_of(item):
    """The words of a case's parameters: names of models, families and engines, among others."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {word for value in values if isinstance(value, str) for word in value.split()}


def too_old_for(item, version=torch.__version__):
    """Why the libraries at hand, which may be the oldest asked for, have not the model of a case; or nothing."""
    words = words_of(item)
    if any(tuple(map(int, version.split(".")[:2])) < NEWER_TORCH[word] for word in words & NEWER_TORCH.keys()):
        return f"torch {version} does not trace this model"
    families = words & FAMILIES.keys() | {MODELS[word][0] for word in words & MODELS.keys()}
    classes = sorted({FAMILIES[family].model_class for family in families})
    missing = [name for name in classes if not hasattr(diffusers, name)]
    return f"diffusers {diffusers.__version__} has no {missing[0]}" if missing else ""


def group_of(item):
    """The model that a case is about, or its file; what has one group runs on one worker."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    models = [value for value in values if isinstance(value, str) and value in MODELS]
    return models[0] if models and item.path.name in BY_MODEL else item.path.stem


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """As many as there are cores for this process, and at most four: each holds traces and models, about 2 GB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def once(pytestconfig):
    """(name, write) -> what `write(folder)` returned, a path in a folder of that name; see `Kept`.

    No test may change what it gets: it copies the folder, and links to none of its files.
    """
    root = pytestconfig.rootpath / ".pytest_cache" / "kept"
    store = Kept(root, key_of(ROOT, sources(), surroundings()))
    sweep(root)
    yield store
    changed = store.changed()
    store.close()
    assert not changed, f"a test changed {', '.join(changed)}, which later runs would read; copy it first"


@pytest.fixture(scope="session")
def tiny(once):
    """Name of `MODELS` -> `Tiny`, saved as diffusers does."""

    @cache
    def make(name):
        family, build, inputs = MODELS[name]
        model = build()

        def write(folder):
            model.save_pretrained(folder / name)
            return folder / name

        folder = once(f"model-{name}", write)
        return Tiny(family, model, folder, lambda steps, **sizes: inputs(model, steps, **sizes))

    return make


@pytest.fixture(scope="session")
def traced(tiny):
    """(name, options) -> the model traced in their precision. One serves every split: narrowing is done once."""
    made = {}

    def make(name, options=None):
        options = options or options_of()
        if (name, options.precision) not in made:
            made[name, options.precision] = trace_of(name, tiny(name).folder, options)
        return made[name, options.precision]

    return make


@pytest.fixture(scope="session")
def traces(traced):
    """Name -> its trace in float32."""
    return lambda name: traced(name).trace


@pytest.fixture(scope="session")
def drafts(traced):
    """(name, granularity, layout, order, **options) -> draft of that model, from its one trace."""

    made = {}

    def make(name, *how, **changes):
        options = options_of(*how, **changes)
        key = (name, repr(options))
        if key not in made:
            made[key] = export.draft(traced(name, options), options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def bundles(drafts, once, whole_bundles):
    """Name -> folder of its bundle, with the options of `BUNDLES` if it is one of them; the whole one if it has one."""

    def write(name, folder):
        return export.write_bundle(drafts(name, **BUNDLES.get(name, {})), folder, name)

    def make(name):
        wholly = name in WHOLE and name not in (BUNDLES.keys() | WHOLE_SIZES.keys() | WHOLE_AS.keys())
        return whole_bundles(name) if wholly else once(f"bundle-{name}", partial(write, name))

    return cache(make)


@pytest.fixture(scope="session")
def embedded(once):
    """Name of `EMBEDDED` -> folder of the bundle of that embedded model."""
    return cache(lambda name: once(f"embedded-{name}", partial(write_embedded, name)))


@pytest.fixture(scope="session")
def eager(drafts):
    """Arguments of `drafts` -> denoiser over its eager graphs."""
    return cache(lambda *args, **options: eager_denoiser(drafts(*args, **options)))


@pytest.fixture(scope="session")
def onnx(bundles):
    """Name -> denoiser over ONNX Runtime."""
    return cache(lambda name: load(bundles(name), threads=1))


@pytest.fixture(scope="session")
def packages(drafts, once):
    """Name of `PACKAGES` -> folder of its bundle."""

    def write(name, folder):
        return export.write_bundle(drafts(name, **PACKAGES[name]), folder, name)

    return cache(lambda name: once(f"package-{name}", partial(write, name)))


@pytest.fixture(scope="session")
def inductor(packages):
    """Name of `PACKAGES` -> denoiser over AOTInductor."""
    return cache(lambda name: load(packages(name), threads=1))


@pytest.fixture(scope="session")
def on_gpu(drafts, once):
    """(kind, name, cuda_graphs) -> denoiser over engines of the GPU at hand; a key of `ON_GPU`.

    Skips where the library is missing, or does not build for this GPU.
    """

    def needs_of(kind):
        if kind == "onnxruntime" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider; onnxruntime-gpu has")
        if kind == "torch-tensorrt":
            pytest.importorskip("torch_tensorrt")
        if "tensorrt" in kind:
            trt = pytest.importorskip(library_name(kind))
            here = "SM{}{}".format(*torch.cuda.get_device_capability())
            if kind == "tensorrt-rtx" and here not in trt.ComputeCapability.__members__:
                pytest.skip(f"TensorRT-RTX does not build for {here}")

    def write(kind, name, folder):
        return export.write_bundle(drafts(name, engine=kind, device="cuda", **ON_GPU[kind, name]), folder, name)

    @cache
    def make(kind, name, cuda_graphs=True):
        needs_of(kind)
        folder = once(f"gpu-{kind}-{name}", partial(write, kind, name))
        return load(folder, "cuda", cuda_graphs=cuda_graphs)

    return make


@pytest.fixture(scope="session")
def whole(tiny, whole_bundles):
    """Name of `WHOLE` -> (the pipeline, a denoiser over its bundle)."""
    return cache(lambda name: (WHOLE[name](tiny(name).model), load(whole_bundles(name), threads=1)))


@pytest.fixture(scope="session")
def whole_bundles(once):
    """Name of `WHOLE` -> folder of the bundle of that tiny pipeline with its parts; `pipeline` beside it is what it was
    made of."""
    return cache(lambda name: once(f"whole-{name}", partial(write_whole, name)))


@pytest.fixture(scope="session")
def whole_flux(whole_bundles):
    return whole_bundles("flux")


@pytest.fixture(scope="session")
def whole_kontext(whole_bundles):
    """Of a FLUX Kontext, which edits pictures."""
    return whole_bundles("kontext")


@pytest.fixture(scope="session")
def residual_digits(embedded):
    """The embedded DiT at granularity `residual`, with a guard: the folder of its bundle."""
    return embedded("residual-digits")
