"""A device and its number: how it is typed, which there are, and what of it reaches whom."""

import pytest
import torch
from harness import run
from tiny_bundles import ON_GPU
from torch._subclasses.fake_tensor import FakeTensorMode

from taylorseer_export import cli
from taylorseer_export.bundle import driver
from taylorseer_export.bundle.device import CPU, Device
from taylorseer_export.compile import api
from taylorseer_export.compile.gpu import building_on
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.engine_module import EngineModule

TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs on this machine"),
]


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", CPU), ("cuda", Device("cuda")), ("cuda:0", Device("cuda", 0)), ("cuda:12", Device("cuda", 12))],
)
def test_what_is_typed_is_what_is_shown(text, device):
    assert Device.parse(text) == device and str(device) == text
    assert Device.parse(device) is device
    assert device.is_gpu == (device != CPU)


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:1.0", "CUDA:1", "cuda:1 ", "cuda:1000"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"^device is .*, expected cpu, cuda or cuda:N .*; choose one of those$"):
        Device.parse(text)


def test_a_number_is_given_where_none_was_chosen():
    assert Device("cuda").at(3) == Device("cuda", 3)
    assert Device("cuda", 1).at(3) == Device("cuda", 1)
    assert CPU.at(3) == CPU


@pytest.mark.parametrize(
    "command",
    [
        ["run", "x"],
        ["bench", "x"],
        ["verify", "x"],
        ["evaluate", "x"],
        ["calibrate", "x"],
        ["flux"],
        ["replay", "x", "--inputs", "a", "--outputs", "b"],
        ["triton", "x", "--out", "y"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_takes_a_device_takes_the_same(command, capsys):
    assert cli.main([*command, "--device", "cuda:x"]) == 2
    said = capsys.readouterr().err
    assert "--device is cuda:x, expected cpu, cuda or cuda:N (number of a GPU, 0 to 999); choose one of those" in said


@pytest.mark.parametrize(
    ("count", "here"), [(0, "sees 0 GPUs;"), (1, r"sees 1 GPU \(cuda:0\);"), (2, r"sees 2 GPUs \(cuda:0, cuda:1\);")]
)
def test_a_gpu_that_is_not_here_is_refused_with_how_many_there_are(bundles, monkeypatch, capsys, count, here):
    monkeypatch.setattr(driver, "gpu_count", lambda: count)
    refusal = rf"device is `cuda:7`, expected a GPU that is here: this process {here} choose another, or check"
    with pytest.raises(ConfigError, match=refusal):
        load(bundles("dit"), device="cuda:7")
    with pytest.raises(ConfigError, match=refusal):
        api.export(family="dit", device="cuda:7")
    assert cli.main(["run", str(bundles("dit")), "--device", "cuda:7"]) == 2
    assert here.replace("\\", "") in capsys.readouterr().err
    for device in (CPU, Device("cuda"), *(Device("cuda", k) for k in range(count))):
        driver.check_number(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU machine shows its GPUs")
def test_without_a_driver_there_are_no_gpus():
    assert driver.gpu_count() == 0


class Driver:
    """A driver that shows GPUs once it was begun."""

    def __init__(self, count, fails=0):
        self.count, self.fails, self.begun = count, fails, False

    def cuInit(self, flags):
        self.begun = not self.fails
        return self.fails

    def cuDeviceGetCount(self, found):
        assert self.begun
        found._obj.value = self.count
        return 0


@pytest.mark.parametrize(("made", "count"), [(Driver(3), 3), (Driver(3, fails=100), 0)])
def test_gpus_are_counted_by_the_driver(monkeypatch, made, count):
    monkeypatch.setattr(driver, "_driver", lambda: made)
    assert driver.gpu_count() == count


# Export


@pytest.mark.parametrize("device", [None, CPU, Device("cuda")])
def test_a_build_without_a_number_stays_where_it_is(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device", None)
    with building_on(device):
        assert True


def test_a_build_with_a_number_is_made_on_that_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(driver, "gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", made.append)
    building_on(Device("cuda", 1))
    assert made == [1]


@pytest.mark.slow
def test_a_manifest_holds_kinds_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "gpu_count", lambda: 2)
    shown = []
    monkeypatch.setattr(api, "write_bundle", lambda draft, *_: shown.append(draft.options) or tmp_path)
    api.export(family="dit", device="cuda:1")
    assert [options.device for options in shown] == ["cuda"]


# Tensors of a GPU that is not there


def test_a_transformer_on_one_gpu_refuses_another():
    """With fake tensors, which have a device and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = EngineModule(torch.float32, Device("cuda", 1))
        assert next(module.parameters()).device == module.device == torch.device("cuda:1")
        assert module.is_on(torch.empty(1, device="cuda:1").device)
        assert not module.is_on(torch.empty(1, device="cuda:0").device)
        assert module._apply(lambda tensor: tensor) is module._apply(lambda tensor: torch.empty(0)) is module
        with pytest.raises(ConfigError, match=r"device is `cuda:0` for the transformer, expected `cuda:1`, where its"):
            module._apply(lambda tensor: torch.empty(0, device="cuda:0"))


# On two GPUs


@pytest.mark.parametrize(("kind", "name"), [pytest.param(*key, marks=TWO_GPUS) for key in ON_GPU])
def test_engines_run_on_the_second_gpu(on_gpu, tiny, kind, name):
    """They compute there, from the caller's thread, whose current GPU stays the first."""
    inputs, plan = tiny(name).inputs(8, batch=2), "FFF..F.."
    folder = on_gpu(kind, name).bundle.folder
    torch.cuda.set_device(0)
    first = load(folder, "cuda:0")
    expected = run(first, inputs, plan, 2)
    before = torch.cuda.memory_allocated(0)
    second = load(folder, "cuda:1")
    assert torch.equal(run(second, inputs, plan, 2), expected)
    assert second.device == Device("cuda", 1)
    assert torch.cuda.current_device() == 0 and torch.cuda.memory_allocated(0) == before
