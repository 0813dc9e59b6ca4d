"""The check at load: sound engines pass, and each way to be unsound is named."""

import pytest
import torch
from harness import eager_denoiser
from tiny_models import tiny_dit

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.errors import BundleError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime import denoiser as denoisers
from taylorseer_export.runtime.check import _LARGEST, check_engines
from taylorseer_export.runtime.denoiser import load

pytestmark = pytest.mark.slow

CASES = [
    ("flux", "module", "snapshots"),
    ("flux", "module", "derivatives"),
    ("plain", "residual", "snapshots"),
    ("dit", "last", "derivatives"),
]


def checked(denoiser):
    return check_engines(denoiser.contract, denoiser.runner, denoiser.device)


def spoilt(denoiser, graph, name, value, patch):
    """A denoiser whose `graph` writes `value` to the last element of every row of its output `name`."""
    contract = denoiser.manifest.graphs[graph]
    place = len(contract.inputs) + [tensor.name for tensor in contract.outputs].index(name)
    sound = denoiser.runner._functions[graph]

    def function(*tensors):
        sound(*tensors)
        tensors[place][..., -1] = value

    patch.setitem(denoiser.runner._functions, graph, function)
    return denoiser


@pytest.mark.parametrize(("name", "granularity", "layout"), CASES)
def test_sound_engines_pass(eager, name, granularity, layout):
    assert checked(eager(name, granularity, layout)) is None


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_passes(drafts, precision):
    assert checked(eager_denoiser(drafts("plain", precision=precision, device="cuda"))) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -_LARGEST["float32"]])
@pytest.mark.parametrize("graph", ["prepare", "full", "forecast"])
def test_a_value_that_is_no_number_is_named(eager, monkeypatch, graph, value):
    denoiser = eager("flux")
    outputs = denoiser.manifest.graphs[graph].outputs
    for output in (t.name for t in outputs if t.role != "constant"):
        with monkeypatch.context() as patch:
            spoilt(denoiser, graph, output, value, patch)
            with pytest.raises(BundleError) as caught:
                checked(denoiser)
        said = str(caught.value)
        assert said.startswith(f"output `{output}` of graph `{graph}` has ")
        assert "values that are NaN, infinite or cut off on typical inputs, the others up to" in said
        assert "expected numbers below 3.4e+38 (float32); check the weights of " in said


def test_a_mask_may_be_infinite_and_no_nan(eager, monkeypatch):
    denoiser = eager("hunyuan")
    name = next(t.name for t in denoiser.manifest.graphs["prepare"].outputs if t.role == "constant")
    with monkeypatch.context() as patch:
        spoilt(denoiser, "prepare", name, float("nan"), patch)
        with pytest.raises(
            BundleError, match=rf"output `{name}` of graph `prepare` has \d+ of \d+ values that are NaN"
        ):
            checked(denoiser)


def test_a_forecast_that_does_not_repeat_the_full_step_is_named(eager, monkeypatch):
    denoiser = eager("dit")

    def forgotten(*tensors):
        tensors[-1].zero_()

    monkeypatch.setitem(denoiser.runner._functions, "forecast", forgotten)
    with pytest.raises(
        BundleError, match=r"graph `forecast` is off by \S+ where it repeats a full step of up to .* rounding; export"
    ):
        checked(denoiser)


def test_weights_that_overflow_float16(tmp_path, monkeypatch):
    """Real arithmetic: features that leave float16's range, and stay in that of bfloat16."""
    model = tiny_dit(layers=2)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.ff.net[2].weight.mul_(2.0**17)  # the weights themselves stay in both ranges
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), FAMILIES["dit"])
    monkeypatch.setattr(export, "check_options", lambda options: None)  # the eager graphs run any type on the CPU

    def made(precision):
        return eager_denoiser(export.draft(checkpoint, export.Options(1, 4, 2, precision=precision)))

    with pytest.raises(
        BundleError,
        match=r"output `\S+` of graph `full` has .* below 6.55e\+04 \(float16\); .*--precision bf16`, whose",
    ):
        checked(made("fp16"))
    assert checked(made("bf16")) is None


def test_load_checks_and_lets_go_of_what_it_refuses(bundles, monkeypatch):
    closed = []

    def refuse(*_, **__):
        raise BundleError("unsound")

    monkeypatch.setattr(denoisers, "check_engines", refuse)
    monkeypatch.setattr(denoisers.Denoiser, "close", lambda self: closed.append(self.runner))
    with pytest.raises(BundleError, match="unsound"):
        load(bundles("dit"), threads=1)
    assert len(closed) == 1
    assert load(bundles("dit"), threads=1, check=False).runner is not closed[0]
