"""The kinds of engine: their options and checks, and one contract for every engine that runs on this machine."""

import argparse
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taylorseer_export.commands import options as command_options
from taylorseer_export.compile import engines
from taylorseer_export.compile.export import Options, check_options
from taylorseer_export.errors import BuildError, ConfigError
from taylorseer_export.runtime.onnxruntime import HostBuffer
from taylorseer_export.runtime.runner import from_bits, to_bits

SHARED = engines.Option("level", "a level", int, "N")
KINDS = {
    "onnxruntime": engines.ENGINES["onnxruntime"],
    "one": engines.Kind("none", (SHARED, engines.Option("flag", "a flag", None))),
    "two": engines.Kind("none", (SHARED,)),
}


def options(**changes) -> Options:
    return Options(order=1, interval=2, warmup=1, **changes)


# Options


def test_options_of_an_engine_reach_it_and_no_other(monkeypatch):
    monkeypatch.setattr(engines, "ENGINES", KINDS)
    monkeypatch.setattr(command_options, "ENGINES", KINDS)
    parser = argparse.ArgumentParser()
    command_options.engine_options(parser)
    assert command_options.given_engine_options(parser.parse_args([])) == {}
    assert command_options.given_engine_options(parser.parse_args(["--level", "3", "--flag"])) == {
        "level": 3,
        "flag": True,
    }
    assert "for --engine one, two:" in parser.format_help()
    with pytest.raises(ConfigError, match="--level is given with --engine onnxruntime, expected it with one or two"):
        check_options(options(engine_options={"level": 3}))
    with pytest.raises(ConfigError, match="--flag is given with --engine two, expected it with one alone; leave it"):
        check_options(options(engine="two", engine_options={"flag": True}))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_onnxruntime_computes_in_float32_on_the_cpu(precision):
    with pytest.raises(ConfigError, match=f"--precision is {precision}, expected fp32 .* or add --device cuda"):
        check_options(options(precision=precision))
    with pytest.raises(ConfigError, match="expected fp32"):
        check_options(options(precision=precision, device="cpu"))
    check_options(options(precision=precision, device="cuda"))
    assert engines.builder("onnxruntime").engine(options(device="cuda")).device["devices"] == "cuda"


def test_a_missing_library_is_named():
    with pytest.raises(BuildError, match=r"no-such-library is not installed, .* --engine one; pip install"):
        engines.library_versions("one", "no-such-library")


def installed(monkeypatch, **versions):
    """Let these distributions be installed, and no others."""

    def version(name):
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(engines, "version", version)


def test_the_cuda_build_of_onnx_runtime_is_onnx_runtime(monkeypatch):
    installed(monkeypatch, onnxruntime_gpu="1.31.1", onnx="1.23.1", torch="2.11.0", diffusers="0.38.0")
    assert engines.builder("onnxruntime").engine(options(device="cuda")).versions["onnxruntime"] == "1.31.1"
    installed(monkeypatch, onnx="1.23.1", torch="2.11.0", diffusers="0.38.0")
    with pytest.raises(BuildError, match=r"^onnxruntime is not installed, expected it for --engine onnxruntime; pip"):
        engines.builder("onnxruntime").engine(options())


def test_a_package_names_torch_as_torch_names_itself(monkeypatch):
    """Of a wheel from the package index, pip says 2.11.0 where torch says 2.11.0+cu130, and a load asks torch."""
    installed(monkeypatch, torch=torch.__version__.partition("+")[0], diffusers="0.38.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert engines.builder("inductor").engine(options()).versions["torch"] == "2.11.0+cu130"


# bfloat16 on the host


@given(st.lists(st.floats(width=32), max_size=8))
def test_bfloat16_rounds_as_torch_does(values):
    values = np.array(values, np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(torch.from_numpy(from_bits(to_bits(values))).nan_to_num(7), expected.float().nan_to_num(7))


def test_a_bfloat16_buffer_takes_and_gives_float32():
    buffer, other = HostBuffer.zeros((2, 3), "bfloat16"), HostBuffer.zeros((2, 3), "bfloat16")
    buffer.write(np.float32([1.0, 1.001, -2.5]))
    assert buffer.read().dtype == np.float32
    assert buffer.read().tolist() == [[1.0, 1.0, -2.5]] * 2
    assert buffer.nbytes == 12
    other.entry(1).copy(buffer.entry(0))
    assert other.read().tolist() == [[0, 0, 0], [1.0, 1.0, -2.5]]


def test_a_new_thread_computes_with_as_many_threads_as_torch_was_told():
    """Sums of another number of threads have other bits, so a request would get another picture on a new thread."""
    import ctypes
    import threading

    from taylorseer_export.bundle.manifest import Graph
    from taylorseer_export.runtime.torch_runner import TorchRunner

    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line} if maps.exists() else ()
    if not loaded:
        pytest.skip("torch's OpenMP library is not to be found in this process, so it cannot be asked")
    openmp, seen = [ctypes.CDLL(path) for path in sorted(loaded)], []
    graph = Graph(file="x", inputs=(), outputs=(), weights_bytes=0)
    runner = TorchRunner(
        {"full": lambda: seen.append([library.omp_get_max_threads() for library in openmp])}, {"full": graph}
    )
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        thread = threading.Thread(target=runner.bind("full", {}, {}))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert before + 2 in seen[0]
