"""Flow maps: models that are told the timestep of the next step too, as FLUX.3 distilled is."""

# Shapes: S steps, B batch

import json

import diffusers
import numpy as np
import oracle
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from harness import allowed, as_arrays, run
from oracle import assert_close
from safetensors.numpy import load_file, save_file

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.reuse import ReuseErrors, all_full
from taylorseer_export.runtime.sampling import Loop, sample
from taylorseer_export.runtime.tensors import tensor_request

NAME, PLAN, ORDER = "flux3-distilled", "FF.F..", 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(diffusers, "Flux3Transformer2DModel"), reason=f"diffusers {diffusers.__version__} has no FLUX.3"
    ),
]


@pytest.mark.parametrize(("granularity", "layout"), [("module", "derivatives"), ("last", "snapshots")])
def test_each_step_equals_the_oracle(eager, tiny, granularity, layout):
    """Known ahead, the next timesteps follow from the timesteps, and behind the last one is 0."""
    model, inputs = tiny(NAME).model, tiny(NAME).inputs(len(PLAN), batch=2)
    seen = run(eager(NAME, granularity, layout), inputs, PLAN, ORDER)
    reference = oracle.replay(model, *inputs, PLAN, ORDER, granularity)
    limit = allowed(model, reference, PLAN, ORDER)
    assert_close(granularity, seen, reference, limit)
    latents, timestep, conditioning = inputs
    longer = torch.cat([timestep, timestep[-1:] / 2]), torch.cat([latents, latents[-1:]])
    other = oracle.replay(model, longer[1], longer[0], conditioning, PLAN + ".", ORDER, granularity)[:-1]
    differs = ((seen - other).abs().flatten(1).amax(1) > limit).tolist()
    assert differs == [False] * (len(PLAN) - 1) + [True]  # what is behind the last step counts


def test_replay_takes_next_timesteps_of_its_own(bundles, tiny, tmp_path, capsys):
    folder, model = bundles(NAME), tiny(NAME).model
    latents, timestep, conditioning = tiny(NAME).inputs(len(PLAN), batch=2)
    tensors = {"latents": latents.numpy(), "timestep": timestep.float().numpy(), **as_arrays(conditioning)}
    names = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out"), "--plan", PLAN, "--order", "2"]

    def replayed(**more):
        save_file({n: np.ascontiguousarray(v) for n, v in {**tensors, **more}.items()}, tmp_path / "in")
        code = cli.main(["replay", str(folder), *names])
        return load_file(tmp_path / "out")["noise_pred"] if code == 0 else capsys.readouterr().err

    reference = oracle.replay(model, latents, timestep, conditioning, PLAN, ORDER)
    limit = allowed(model, reference, PLAN, ORDER)
    derived = np.append(tensors["timestep"][1:], np.float32(0))
    for more in ({}, {"target_timestep": derived}):
        assert_close(f"replay, {[*more]}", torch.from_numpy(replayed(**more)), reference, limit)
    away = np.abs(replayed(target_timestep=derived / 2) - reference.numpy()).reshape(len(PLAN), -1).max(1)
    assert (away > limit.numpy()).all()
    assert "`target_timestep` is [3], expected [6], one for each timestep" in replayed(target_timestep=derived[:3])
    assert cli.main(["verify", str(folder), "--model", str(tiny(NAME).folder), "--steps", "4"]) == 0


def test_a_loop_is_the_pipeline_s(onnx, tiny):
    """All steps full: latents of two samples at odd sides."""
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledCoreDenoiseStep

    denoiser, model, steps = onnx(NAME), tiny(NAME).model, 4
    words = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1))
    pipe = Flux3DistilledCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with torch.no_grad():
        expected = pipe(
            prompt_embeds=words,
            height=80,
            width=48,
            num_images_per_prompt=2,
            num_inference_steps=steps,
            generator=generators,
            output="latents",
        )
    given = {"encoder_hidden_states": words.numpy()}
    request = tensor_request(denoiser, given, (3, 4), {"image_tokens": 15}, sides=(5, 3))
    made = sample(denoiser, request, denoiser.forecasts(plan="F" * steps))
    depth, length, _ = oracle.extent(model)
    limit = oracle.bound(expected, 1.0, torch.float32, depth * steps, length)
    seen = torch.from_numpy(made.latents).transpose(1, 2).unflatten(2, (5, 3))
    assert_close("loop", seen, expected, limit)
    assert denoiser.manifest.sampling.guidance == "none"
    usual = FAMILIES["flux3"].by_config({"flow_map": True})["defaults"].steps
    assert Flux3DistilledCoreDenoiseStep().sub_blocks["set_timesteps"].num_inference_steps == usual


def test_steps_that_come_one_by_one_bring_both_timesteps(eager, tiny):
    latents, timestep, conditioning = tiny(NAME).inputs(2)
    denoiser = eager(NAME)
    slot = denoiser.slot(denoiser.sizes(tuple(latents.shape[1:]), as_arrays(conditioning)))
    forecasts, latent = denoiser.forecasts(plan="FF"), latents[0].numpy()
    slot.start(as_arrays(conditioning), forecasts)
    with pytest.raises(StepError, match=r"the next_timestep of step 0 is unknown, expected it from start\(\) or step"):
        slot.step(latent, 1.0)
    alone = slot.step(latent, 1.0, next_timestep=0.5)
    slot.start(as_arrays(conditioning), forecasts, timestep.float().numpy())
    with pytest.raises(StepError, match=r"next_timestep is 0.25 at step 0, expected 0.5 as prepared"):
        slot.step(latent, 1.0, next_timestep=0.25)
    ahead = slot.step(latent, 1.0, next_timestep=0.5)
    reference = torch.from_numpy(alone)[None]
    assert_close("ahead", torch.from_numpy(ahead)[None], reference, 2 * allowed(tiny(NAME).model, reference, "F", 0))
    with pytest.raises(StepError, match=r"input `target_timestep` has 0 different values, expected one for all"):
        denoiser.as_transformer()(latents[0], timestep=timestep[:1], return_dict=False, **conditioning)


def test_a_manifest_has_one_timestep_and_one_next(bundles):
    known = json.loads((bundles(NAME) / "manifest.json").read_text())
    clocks = {t["name"]: t for t in known["graphs"]["prepare"]["inputs"] if t["role"] == "step"}
    assert {name: clock["fill"] for name, clock in clocks.items()} == {"timestep": None, "target_timestep": "next"}
    clocks["target_timestep"]["fill"] = None
    with pytest.raises(ValueError, match=r"graph prepare has step inputs of fill None, None, it takes one of none"):
        Manifest.model_validate(known, strict=False)


def test_a_calibration_tells_what_follows_each_step(eager):
    """Its short requests predict what the whole loop does whose last full step is theirs, the last steps too."""
    denoiser, steps = eager(NAME), 4
    words = np.random.default_rng(1).standard_normal((1, 7, 24), np.float32)
    request = tensor_request(denoiser, {"encoder_hidden_states": words}, (3,), {"image_tokens": 15}, sides=(5, 3))
    loop, errors = Loop(denoiser, request, denoiser.forecasts(plan="F" * steps)), ReuseErrors(steps, 2)
    slot = loop.open(denoiser)
    known = all_full(denoiser, slot, request, steps, lambda: None)
    errors.add(denoiser, slot, known, lambda: None)
    squares = {}
    for source in range(steps - 1):
        plan = Plan("F" * (source + 1) + "." * (steps - source - 1))
        slot.start(request.branches, Forecasts(plan, 0), known.model_timesteps)
        for step, latents in enumerate(known.latents[:-1]):
            off = known.predictions[step] - loop.prediction(slot.step(loop.model_input(latents)))
            squares[source, step] = float(np.square(known.reach[step] * off).sum())
    expected = np.array([squares[pair] for pair in errors.index])
    assert np.diag(errors.products) == pytest.approx(expected / expected.sum(), rel=1e-3)
