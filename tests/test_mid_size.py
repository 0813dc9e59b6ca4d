"""One pass over a FLUX of twelve blocks and 71 M random weights, through the command line and against the oracle."""

import numpy as np
import oracle
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import flux_inputs, mid_flux

from taylorseer_export import cli

STEPS, ORDER, UNEVEN = 8, 2, "FF.F...F"


@pytest.fixture(scope="module")
def mid(tmp_path_factory):
    """(model, bundle folder): saved in shards by diffusers, exported from there."""
    folder = tmp_path_factory.mktemp("mid")
    model = mid_flux()
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    arguments = ["flux", "--model", folder / "model", "--order", ORDER, "--latent-size", "16x12", "--out", folder]
    assert cli.main([str(a) for a in arguments]) == 0
    return model, folder / "flux-model"


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
