"""Fixtures that cost seconds, made once: checkpoints are saved, models traced, and bundles written on first use.

`make test` runs files on several workers. What lives in memory is made once by each worker that asks for it; bundles,
which take longest, are written once for all of them.
"""

import gc
import os
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may reach the net

import onnxruntime
import pytest
import tiny_models as tm
import torch
from filelock import FileLock
from harness import Tiny, eager_denoiser
from hypothesis import settings

from taylorseer_export import cli
from taylorseer_export.bundle.tensorrt import library_name
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.trace import trace
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
)

# The only ONNX exports of the graph and engine tests; each takes many seconds.
BUNDLES = {
    "flux": {"layout": "snapshots", "guards": ("cg", "fbcache", "teacache")},
    "dit": {"layout": "derivatives", "guards": ("cg",)},
    # Static but for the text.
    "plain": {"granularity": "last", "latent_size": (4, 6), "batch": 2, "guards": ("cg", "teacache")},
}

# The only packages compiled for the engine tests; each takes half a minute.
PACKAGES = {
    "plain": {"engine": "inductor", "guards": ("cg", "fbcache")},
    "dit": {"engine": "inductor", "granularity": "residual", "layout": "derivatives", "precision": "bf16", "batch": 2},
}

# What engine tests build where there is a GPU; `on_gpu` says what each of them needs.
ON_GPU = {
    ("inductor", "flux"): {},
    ("inductor", "dit"): {"granularity": "residual", "layout": "derivatives", "precision": "bf16", "batch": 2},
    ("onnxruntime", "flux"): {},
    ("onnxruntime", "dit"): {"layout": "derivatives"},
    ("tensorrt-rtx", "flux"): {},
    ("tensorrt-rtx", "dit"): {"layout": "derivatives", "precision": "bf16"},
    ("tensorrt", "flux"): {},
    ("tensorrt", "dit"): {"layout": "derivatives", "precision": "bf16"},
    ("torch-tensorrt", "flux"): {},
}

# Name -> (family, how its tiny model is built, inputs for it).
MODELS = {
    "flux": ("flux", tm.tiny_flux, tm.flux_inputs),
    "plain": ("flux", lambda: tm.tiny_flux(seed=1, guidance=False, double=1, single=1), tm.flux_inputs),
    "kontext": ("flux-kontext", lambda: tm.tiny_flux(seed=2, double=1), tm.kontext_inputs),
    "qwen-image": ("qwen-image", tm.tiny_qwen_image, tm.qwen_image_inputs),
    "sd3": ("sd3", tm.tiny_sd3, tm.sd3_inputs),
    "hidream": ("hidream", tm.tiny_hidream, tm.hidream_inputs),
    "dit": ("dit", tm.tiny_dit, tm.dit_inputs),
    "framepack": ("framepack", tm.tiny_framepack, tm.framepack_inputs),
    "hunyuan": ("hunyuan-video", tm.tiny_hunyuan, tm.hunyuan_inputs),
    "hunyuan-channels": ("hunyuan-video", lambda: tm.tiny_hunyuan(1, "latent_concat", 9, False), tm.hunyuan_inputs),
    "hunyuan-replace": ("hunyuan-video", lambda: tm.tiny_hunyuan(2, "token_replace"), tm.hunyuan_inputs),
    "wan": ("wan", tm.tiny_wan, tm.wan_inputs),
    "wan-image": ("wan", lambda: tm.tiny_wan(seed=1, in_channels=9, image_dim=10), tm.wan_inputs),
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """As many as there are cores for this process, and at most four: each holds traces and models, about 2 GB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """(name, write) -> what `write(folder)` returned, a path in a folder of that name.

    It is called by the first worker that asks; the others wait for it and get the same path.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, write):
        folder = root / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        done = folder.with_suffix(".done")
        with FileLock(folder.with_suffix(".lock")):
            if not done.exists():
                done.write_text(str(write(folder)))
        return Path(done.read_text())

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Name of `MODELS` -> `Tiny`, saved as diffusers does."""

    @cache
    def make(name):
        family, build, inputs = MODELS[name]
        model = build()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return Tiny(family, model, folder, lambda steps, **sizes: inputs(model, steps, **sizes))

    return make


@pytest.fixture(scope="session")
def traces(tiny):
    """(name, precision) -> its trace. One serves every split: narrowing is done once and changes nothing later."""

    @cache
    def make(name, precision="fp32"):
        family, dtype = FAMILIES[tiny(name).family], export.PRECISIONS[precision]
        return trace(open_checkpoint(str(tiny(name).folder), family).skeleton(dtype), family, dtype)

    return make


@pytest.fixture(scope="session")
def drafts(tiny, traces):
    """(name, granularity, layout, order, **options) -> draft of that model, from its one trace."""

    @cache
    def make(name, granularity="module", layout="snapshots", order=2, **options):
        checkpoint = open_checkpoint(str(tiny(name).folder), FAMILIES[tiny(name).family])
        chosen = export.Options(
            order=order, interval=4, warmup=2, steps=20, granularity=granularity, layout=layout, **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "trace", lambda *_: traces(name, chosen.precision))
            return export.draft(checkpoint, chosen)

    return make


@pytest.fixture(scope="session")
def bundles(drafts, once):
    """Name -> folder of its bundle, with the options of `BUNDLES` where it is one of them."""

    def write(name, folder):
        return export.write_bundle(drafts(name, **BUNDLES.get(name, {})), folder, name)

    return cache(lambda name: once(f"bundle-{name}", partial(write, name)))


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
def residual_digits(once):
    """The embedded DiT at granularity `residual`, exported by the command line: the folder of its bundle."""

    def write(folder):
        assert cli.main(["dit", "--order", "2", "--state", "residual", "--guard", "cg", "--out", str(folder)]) == 0
        return folder / "dit-tiny"

    return once("residual-digits", write)
