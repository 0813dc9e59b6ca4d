"""Graphs compiled for GPUs that are not there: how a wrapper is read, and, with torch's CUDA build, what it says."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from compile_for_gpu import absent, faults, read
from pretended_gpu import GPUS, Kernel, in_a_fork, usage, why_not
from tiny_models import of_families

from taylorseer_export.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
NEEDS_COMPILER = [
    pytest.mark.gpu_compiler,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
WRAPPER = """
    aoti_torch_cuda_bmm_out(before, what, is, read);
    inputs.clear();
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, cached_torch_device_type_cuda, 0, &buf0));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(buf0, bias, x, w, 1L, 1L));
    call_triton_poi_fused_0(buf0, out, stream);
    call_triton_poi_fused_0(buf0, out, stream);
    %s
} // AOTInductorModel::run_impl
"""
RECORD = {"model": "flux", "granularity": "residual", "capability": "9.0", "graph": "forecast"}


def test_a_wrapper_is_read():
    found = read(WRAPPER % "")
    assert (found["launches"], found["launches_triton"], found["kernels"]) == (3, 2, 1)
    assert found["launches_libraries"]["addmm_out"] == 1 and "bmm_out" not in found["launches_libraries"]
    assert (found["allocations"], found["host_copies"], found["synchronisations"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("aoti_torch_empty_strided(1, s, t, cached_torch_device_type_cpu, 0, &buf1);", "host_copies"),
        ("aoti_torch_cpu_addmm_out(a, b, c, d);", "host_copies"),
        ("cpp_fused_add_0(a, b);", "host_copies"),
        ("aoti_torch_item_float32(a, &x);", "synchronisations"),
        ("cudaStreamSynchronize(stream);", "synchronisations"),
    ],
)
def test_what_is_done_on_the_host_is_seen(said, what):
    found = read(WRAPPER % said)
    assert found[what] == 1
    assert faults({**RECORD, **found}) == [f"flux residual forecast for 9.0: 1 {what}"]


def test_a_text_that_is_no_wrapper_is_refused():
    with pytest.raises(SystemExit, match=r"expected the source that AOTInductor writes; mend `read`"):
        read("int main() {}")


def test_more_launches_than_promised_are_a_fault():
    found = read(WRAPPER % "call_triton_poi_fused_1(buf0, out, stream);\n    " * 4)
    assert found["launches"] > 6
    assert faults({**RECORD, **found}) == [
        f"flux residual forecast for 9.0: {found['launches']} launches, expected at most 6"
    ]
    assert faults({**RECORD, **found, "graph": "full"}) == []


def test_what_does_not_compile_is_a_fault():
    assert faults({**RECORD, "error": "no"}) == ["flux residual forecast for 9.0: no"]


def test_resources_of_a_kernel_are_read():
    text = " Function k:\n  REG:27 STACK:16 SHARED:512 LOCAL:0 CONSTANT[0]:960 TEXTURE:0\n"
    assert usage(text) == Kernel(registers=27, spilled=4, shared=512)


def test_every_family_and_generation_is_there():
    assert of_families().keys() == FAMILIES.keys()
    assert all(name == "{}.{}".format(*gpu.capability) for name, gpu in GPUS.items())


def test_a_family_newer_than_the_diffusers_at_hand_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(FluxTransformer2DModel=object))
    assert absent(["flux", "wan", "flux.1-dev"]) == {"wan": "WanTransformer3DModel"}


def test_nothing_of_ours_loads_the_compilers_before_a_gpu_is_pretended():
    """What the tool imports before; torch keeps what it asked of the machine when they were loaded."""
    code = "import sys, taylorseer_export.compile.inductor; print('torch._dynamo.device_interface' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_a_fork_answers_and_one_that_ends_early_is_an_error(capfd):
    assert in_a_fork(lambda: {"a": 1}) == {"a": 1}
    assert in_a_fork(lambda: {"a": 1 / 0}) == {"error": "its process ended with 1"}
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.fixture(scope="module")
def records():
    """Arguments of the tool -> the records that one process of it prints; made once for all GPUs."""

    @cache
    def make(*arguments):
        command = [sys.executable, "tools/compile_for_gpu.py", "--here", "--model", "flux", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return make


@pytest.mark.parametrize("capability", [pytest.param(name, marks=NEEDS_COMPILER) for name in GPUS])
def test_flux_compiles_for_a_gpu_that_is_not_there(records, capability):
    found = [r for r in records("--graph", "full", "forecast", "--gpu", *GPUS) if r["capability"] == capability]
    assert [record["graph"] for record in found] == ["full", "forecast"]
    assert [fault for record in found for fault in faults(record)] == []
    assert all(record["bytes"] >= record["floor_bytes"] for record in found)


@pytest.mark.parametrize("graphs", [pytest.param(("full", "forecast"), marks=NEEDS_COMPILER)])
def test_kernels_of_one_gpu_compile_for_the_others_as_theirs_do(records, graphs):
    """What each has for itself is what it has of the first one's, down to its registers."""
    timed, lowered = {"seconds", "export_seconds"}, {"lowered_for": next(iter(GPUS))}
    each, once = (records("--graph", *graphs, "--gpu", *GPUS, *how) for how in ((), ("--once",)))
    assert len(once) == len(graphs) * len(GPUS)
    for one, other in zip(once, each, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in (other | lowered).items() if k not in timed
        }


@pytest.mark.parametrize("capability", [pytest.param("9.0", marks=NEEDS_COMPILER)])
def test_a_library_links_for_a_gpu_that_is_not_there(records, capability):
    (found,) = records("--graph", "forecast", "--gpu", capability, "--link")
    assert found["linked"] and faults(found) == []
