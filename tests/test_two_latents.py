"""LTX-2 from the outside: a video and its sound through the pipeline, the command line and a manifest.

What each step computes is compared in `test_families.py` with all other families.
"""

# Shapes: S steps, B batch

import numpy as np
import oracle
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline
from harness import allowed, run
from oracle import assert_close
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_pipelines import ltx_2_pipeline

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.compile.export import write_bundle
from taylorseer_export.errors import StepError
from taylorseer_export.report import verify
from taylorseer_export.report.bench import bench
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.trajectory import random_trajectory

pytestmark = pytest.mark.slow

SOUND = "audio_hidden_states"
PROMPT = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])  # padded in front
PLAIN = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
GUIDED = {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
OPTIONS = {
    "prompt_embeds": PROMPT,
    "prompt_attention_mask": MASK,
    "negative_prompt_embeds": -PROMPT,
    "negative_prompt_attention_mask": MASK,
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "output_type": "latent",
    "return_dict": False,
}


def film(pipe, steps=5, **options):
    """(video, sound) latents."""
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=steps, generator=generator, **OPTIONS, **PLAIN, **options)


def listened(transformer):
    """What every call of it is given and returns, in turn: (inputs, predictions)."""
    calls = []
    transformer.register_forward_hook(lambda _, args, inputs, made: calls.append((inputs, made)), with_kwargs=True)
    return calls


@pytest.fixture
def pipe(tiny):
    return ltx_2_pipeline(tiny("ltx-2").model)


@pytest.mark.parametrize("options", [GUIDED, {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}])
def test_all_full_is_the_untouched_pipeline(pipe, tiny, eager, options):
    """Every call is the untouched model's within the bound; told the same, the untouched pipeline makes the same."""
    model = tiny("ltx-2").model
    pipe.transformer = eager("ltx-2").as_transformer(interval=1)
    calls = listened(pipe.transformer)
    made = film(pipe, **options)
    assert pipe.transformer.executed == {"cond_uncond": "FFFFF"}
    told = iter(calls)

    def answer(module, args, inputs, output):
        given, predictions = next(told)
        assert all(torch.equal(given[name], inputs[name]) for name in ("hidden_states", SOUND))
        for name, seen, expected in zip(("video", "sound"), predictions, output, strict=True):
            assert_close(name, seen[None], expected[None], 2 * allowed(model, expected[None], "F", 0))
        return predictions

    handle = model.register_forward_hook(answer, with_kwargs=True)
    try:
        untouched = film(ltx_2_pipeline(model), **options)
    finally:
        handle.remove()
    assert next(told, None) is None
    assert [latents.shape for latents in made] == [(1, 6, 2, 2, 3), (1, 2, 9, 2)]
    assert all(torch.equal(one, other) for one, other in zip(made, untouched, strict=True))


def test_forecasts_agree_with_the_oracle(pipe, tiny, eager):
    model, denoiser = tiny("ltx-2").model, eager("ltx-2")
    pipe.transformer = denoiser.as_transformer(interval=3, warmup=2)
    calls = listened(pipe.transformer)
    film(pipe, 6, **GUIDED)
    given, made = zip(*calls, strict=True)
    latents, sound = (torch.stack([inputs[name] for inputs in given]) for name in ("hidden_states", SOUND))
    conditioning = {name: given[0][name] for name in denoiser.constants} | {SOUND: sound}
    timestep = torch.stack([inputs["timestep"][0] for inputs in given])
    expected = oracle.replay(model, latents, timestep, conditioning, "FF..F.", 2)
    seen = torch.stack([torch.cat([one.flatten(1) for one in both], 1) for both in made])
    assert_close("pipeline", seen, expected, allowed(model, expected, "FF..F.", 2))


def test_from_a_picture(tiny, eager):
    """The frame that is the picture is without noise at every step, and stays: all steps full, then with forecasts."""
    model, denoiser = tiny("ltx-2-image").model, eager("ltx-2-image")
    given = GUIDED | {"image": Image.linear_gradient("L").convert("RGB").resize((96, 64))}
    untouched = film(ltx_2_pipeline(model, LTX2ImageToVideoPipeline), **given)
    pipe = ltx_2_pipeline(model, LTX2ImageToVideoPipeline)
    pipe.transformer = denoiser.as_transformer(interval=1)
    made = film(pipe, **given)
    assert torch.equal(made[0][:, :, 0], untouched[0][:, :, 0])
    for name, seen, expected in zip(("video", "sound"), made, untouched, strict=True):
        # Every step adds its part, guidance magnifies it, and the pipeline scales the latents at the end.
        bound = 5 * 2 * 7 * allowed(model, expected[None], "F", 0)
        assert_close(name, seen[None], expected[None], bound)
    pipe.transformer = denoiser.as_transformer(plan="FF..F.")
    calls = listened(pipe.transformer)
    film(pipe, 6, **given)
    assert pipe.transformer.executed == {"cond_uncond": "FF..F."}
    inputs, predictions = zip(*calls, strict=True)
    latents, sound = (torch.stack([one[name] for one in inputs]) for name in ("hidden_states", SOUND))
    conditioning = {name: inputs[0][name] for name in denoiser.constants} | {SOUND: sound}
    timestep = torch.stack([one["sigma"][0] for one in inputs])
    assert [one["timestep"][0].unique().tolist() for one in inputs] == [[0, t] for t in timestep.tolist()]
    expected = oracle.replay(model, latents, timestep, conditioning, "FF..F.", 2)
    seen = torch.stack([torch.cat([one.flatten(1) for one in both], 1) for both in predictions])
    assert_close("pipeline", seen, expected, allowed(model, expected, "FF..F.", 2))
    for change, sentence in (
        ({"timestep": inputs[0]["sigma"]}, r"`timestep` is \[2\], expected one for each token of the video, 0 for"),
        ({"timestep": inputs[0]["timestep"].flip(1)}, r"expected one for each token of the video, 0 for those of th"),
        ({"use_cross_timestep": False}, r"`use_cross_timestep` is False, expected True, as the pipeline passes it"),
    ):
        with pytest.raises(StepError, match=sentence):
            denoiser.as_transformer()(**{**inputs[0], **change})


def test_another_output_and_what_a_call_lacks(pipe, tiny, eager):
    """diffusers' output class has the fields of the model's own; guidance that leaves attentions out is refused."""
    dropin = eager("ltx-2").as_transformer()
    latents, timestep, conditioning = tiny("ltx-2").inputs(1)
    given = {**conditioning, "hidden_states": latents[0], SOUND: conditioning[SOUND][0]}
    made = dropin(timestep=timestep[:1], **given)
    assert (made.sample.shape, made.audio_sample.shape) == (latents[0].shape, given[SOUND].shape)
    dropin.reset()
    with pytest.raises(StepError, match=rf"input `{SOUND}` is missing at step 0, .* a latent beside `hidden_states`"):
        dropin(timestep=timestep[:1], **{name: value for name, value in given.items() if name != SOUND})
    with pytest.raises(StepError, match=rf"input `{SOUND}` is \[1, 4, 4\] at step 0, expected \[1, 5, 4\]"):
        dropin(timestep=timestep[:1], **{**given, SOUND: given[SOUND][:, 1:]})
    pipe.transformer = dropin
    for option, argument in (({"modality_scale": 3.0}, "isolate_modalities"), ({"stg_scale": 1.0}, "spatio_temporal_")):
        with pytest.raises(StepError, match=rf"argument `{argument}\w*` is given, expected only timestep, encoder"):
            pipe(**OPTIONS, **{**PLAIN, **option, "spatio_temporal_guidance_blocks": [1], "num_inference_steps": 2})


def test_a_frame_without_noise_is_refused(tiny, eager):
    """As LTX2ImageToVideoPipeline passes the picture's: a timestep for each token."""
    latents, _, conditioning = tiny("ltx-2").inputs(1)
    given = {**conditioning, "hidden_states": latents[0], SOUND: conditioning[SOUND][0]}
    timestep = torch.full(latents[0].shape[:2], 500.0)
    timestep[:, :6] = 0
    with pytest.raises(StepError, match=r"input `timestep` has 2 different values, expected one for all samples and t"):
        eager("ltx-2").as_transformer()(timestep=timestep, **given)


def test_a_package_of_torch(drafts, tiny, tmp_path):
    """AOTInductor, with a buffer for each stream: two inputs and two outputs more than a family of one latent."""
    model, plan, inputs = tiny("ltx-2").model, "FFF..F", tiny("ltx-2").inputs(6, batch=2)
    folder = write_bundle(drafts("ltx-2", "residual", batch=2, engine="inductor"), tmp_path, "package")
    reference = oracle.replay(model, *inputs, plan, 2, "residual")
    with load(folder, threads=1) as denoiser:
        assert [site.name for site in denoiser.manifest.sites] == ["residual", f"residual.{SOUND}"]
        seen = run(denoiser, inputs, plan, 2)
    assert_close("AOTInductor", seen, reference, allowed(model, reference, plan, 2))


# The command line ----------------------------------------------------------------------------------------------------


def test_replay(bundles, onnx, tiny, tmp_path, capsys):
    """Both latents go in with steps, and a prediction of each comes out."""
    folder, plan = bundles("ltx-2"), "FF.F.."
    assert cli.main(["inspect", str(folder)]) == 0
    latents, timestep, conditioning = tiny("ltx-2").inputs(len(plan), batch=2)
    tensors = {"latents": latents, "timestep": timestep, **conditioning}
    save_file({name: np.ascontiguousarray(value.numpy()) for name, value in tensors.items()}, tmp_path / "in")
    names = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
    assert cli.main(["replay", str(folder), *names, "--plan", plan, "--order", "2"]) == 0
    made = load_file(tmp_path / "out")
    assert [*made] == ["noise_pred", f"noise_pred.{SOUND}"]
    flat = np.concatenate([value.reshape(len(plan), 2, -1) for value in made.values()], 2)
    alone = run(onnx("ltx-2"), (latents, timestep, conditioning), plan, 2).numpy()
    np.testing.assert_allclose(flat, alone, rtol=0, atol=1e-6)
    tensors = {name: value for name, value in tensors.items() if name != SOUND}
    save_file({name: np.ascontiguousarray(value.numpy()) for name, value in tensors.items()}, tmp_path / "in")
    capsys.readouterr()
    assert cli.main(["replay", str(folder), *names]) == 2
    assert f"tensor `{SOUND}` is missing, expected [6, batch, audio_tokens, 4], one for" in capsys.readouterr().err


def test_verify_and_bench_at_small_sizes(onnx):
    denoiser, sizes, seen = onnx("ltx-2"), {"video_tokens": 12, "audio_tokens": 5, "text_tokens": 7}, []
    data = random_trajectory(denoiser, 8, sizes)
    verify.verify(denoiser, verify.checkpoint_of(denoiser), data, seen.append)
    assert [len(result.seen) for result in seen] == [8] * len(verify.plans(denoiser, 8))
    record = bench(denoiser, denoiser.forecasts(steps=4), sizes, repeats=1)
    assert record["sizes"]["audio_tokens"] == 5 and record["executed"] == record["plan"]


@pytest.mark.parametrize(
    ("verb", "asked"),
    [
        (["run"], "run"),
        (["calibrate", "--full-steps", "4", "--name", "few"], "calibrate"),
        (["evaluate"], "evaluate"),
        (["triton", "--out", "models"], "Triton"),
        (["serve"], "the images API"),
    ],
)
def test_what_serves_one_latent_says_so(bundles, tmp_path, monkeypatch, capsys, verb, asked):
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb[0], str(bundles("ltx-2")), *verb[1:]]) == 2
    said = capsys.readouterr().err
    assert f"has 2 latents (hidden_states, {SOUND}), expected one for {asked}; use it in its diffusers pipe" in said
    assert [*tmp_path.iterdir()] == []


def test_what_is_not_declared_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ltx-2", "--whole", "--out", str(tmp_path)]) == 2
    assert (
        "--whole is given for ltx-2, expected a family whose pipeline this version exports" in capsys.readouterr().err
    )
    assert [*tmp_path.iterdir()] == []


def test_a_manifest_of_two_latents_agrees_with_itself(onnx):
    def named(raw, name):
        raw["graphs"]["forecast"]["outputs"][1]["name"] = name

    def dropped(raw, _):
        raw["graphs"]["forecast"]["outputs"].pop()

    for change, sentence in (
        (named, rf"`noise_pred\.x` has role noise_pred, which is called so, and with `\.{SOUND}` behind"),
        (dropped, r"graph forecast has 1 outputs of role noise_pred, it takes 2"),
    ):
        raw = onnx("ltx-2").manifest.model_dump(mode="json")
        change(raw, "noise_pred.x")
        with pytest.raises(ValueError, match=sentence):
            Manifest.model_validate(raw)
