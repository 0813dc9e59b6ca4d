"""A FLUX of six blocks of width 512, by command line: against the oracle, and as TensorRT-RTX plans."""

import numpy as np
import oracle
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import flux_inputs, mid_flux

from taylorseer_export import cli
from taylorseer_export.bundle.store import open_bundle

pytestmark = pytest.mark.slow

STEPS, ORDER, UNEVEN = 8, 2, "FF.F...F"
BLOCKS = 2, 4  # double and single


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its folder): saved in shards by diffusers."""
    model, folder = mid_flux(0, True, *BLOCKS), tmp_path_factory.mktemp("mid") / "model"
    model.save_pretrained(folder, max_shard_size="40MB")
    return model, folder


@pytest.fixture(scope="module")
def mid(saved):
    """(model, bundle folder): exported from there."""
    model, folder = saved
    return model, exported(folder, folder.parent)


def exported(model, out, *options):
    """Folder of the bundle that the command line makes of a saved model."""
    arguments = ["flux", "--model", model, "--order", ORDER, "--latent-size", "16x12", *options, "--out", out]
    assert cli.main([str(a) for a in arguments]) == 0
    return out / "flux-model"


def test_verify_passes(mid, capsys):
    _, bundle = mid
    assert cli.main(["verify", str(bundle), "--steps", str(STEPS)]) == 0
    assert "equals the eager model" in capsys.readouterr().out


@pytest.mark.parametrize("plan", ["F" * STEPS, UNEVEN])
def test_replay_equals_the_oracle(mid, tmp_path, plan):
    model, bundle = mid
    latents, timestep, conditioning = flux_inputs(model, STEPS, height=8, width=6, text_tokens=12)
    tensors = {"latents": latents, "timestep": timestep, **conditioning}
    save_file({k: np.ascontiguousarray(v.float().numpy()) for k, v in tensors.items()}, tmp_path / "in.safetensors")
    files = ["--inputs", str(tmp_path / "in.safetensors"), "--outputs", str(tmp_path / "out.safetensors")]
    assert cli.main(["replay", str(bundle), *files, "--plan", plan, "--order", str(ORDER)]) == 0
    seen = torch.from_numpy(load_file(tmp_path / "out.safetensors")["noise_pred"])
    expected = oracle.replay(model, latents, timestep, conditioning, plan, ORDER)
    bound = oracle.bound(expected, oracle.gains(plan, ORDER), torch.float32, *oracle.extent(model))
    assert oracle.assert_close("noise_pred", seen, expected, bound) <= 1


def test_tensorrt_rtx_builds_it(saved, tmp_path):
    """Parser and builder are the real ones, for two generations of GPU; batch, text and steps are ranges."""
    pytest.importorskip("tensorrt_rtx")
    model, folder = saved
    bundle = exported(folder, tmp_path, "--engine", "tensorrt-rtx", "--precision", "bf16", "--gpu-arch", "8.9,12.0")
    graphs = open_bundle(bundle).manifest.graphs
    weights = {name: graph.weights_bytes for name, graph in graphs.items()}
    assert sum(weights.values()) >= 2 * sum(p.numel() for p in model.parameters())  # two bytes each, none left out
    assert all((bundle / graphs[name].file).stat().st_size > size / 2 for name, size in weights.items())
