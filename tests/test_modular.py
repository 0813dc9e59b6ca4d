"""The drop-in inside diffusers' modular pipelines, whose guider states what ordinary ones say with `cache_context`."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from recorder import Recorder
from tiny_pipelines import flux_pipeline, qwen_image_pipeline

from taylorseer_export.errors import ConfigError, StepError

PLAN, ORDER = "FF..F.", 2


def text(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


WORDS = {"prompt_embeds": text(6, 24), "negative_prompt_embeds": -text(6, 24)}
MASKS = {"prompt_embeds_mask": torch.ones(1, 6).long(), "negative_prompt_embeds_mask": torch.ones(1, 6).long()}
# Name -> (blocks, scheduler, what the pipeline is given, guidance scale or none, branches)
CASES = {
    "flux": (
        FluxCoreDenoiseStep,
        {"use_dynamic_shifting": True},
        {"prompt_embeds": text(6, 24)},
        None,
        {"0"},
    ),
    "qwen-image": (
        QwenImageCoreDenoiseStep,
        {"use_dynamic_shifting": True},
        WORDS | MASKS,
        2.0,
        {"cond", "uncond"},
    ),
    "flux3": (Flux3CoreDenoiseStep, {"shift": 6.93}, WORDS, 2.0, {"cond", "uncond"}),
    "flux3-distilled": (
        Flux3DistilledCoreDenoiseStep,
        {"shift": 6.93},
        {"prompt_embeds": text(6, 24)},
        None,
        {"0"},
    ),
}


@pytest.fixture(scope="module")
def cases(tiny, eager):
    """Name -> (untouched transformer, denoiser over it)."""
    return lambda name: (tiny(name).model, eager(name))


def modular(name, transformer, scale=None):
    """The denoising part of a modular pipeline, prompt embeddings to latents."""
    blocks, config, _, usual, *_ = CASES[name]
    pipe = blocks().init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**config))
    if usual is not None:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale or usual))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, name, steps=6, **options):
    given = {"height": 32, "width": 48, **CASES[name][2], **options}
    if name == "flux":
        given["pooled_prompt_embeds"] = text(20)
    return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output="latents", **given)


def dropped(cases, name, guider=True, **options):
    """(modular pipeline with a drop-in, that drop-in)"""
    model, denoiser = cases(name)
    pipe = modular(name, model)
    told = {"guider": pipe.guider} if guider and CASES[name][3] is not None else {}
    pipe.update_components(transformer=denoiser.as_transformer(**told, **options))
    return pipe, pipe.transformer


@pytest.mark.parametrize("name", CASES)
def test_all_full_is_the_untouched_pipeline(cases, name):
    model, _ = cases(name)
    pipe, transformer = dropped(cases, name, interval=1)
    seen = Recorder(transformer)
    painted = paint(pipe, name)
    with seen.retold_by(model):
        assert torch.equal(painted, paint(modular(name, model), name))
    seen.assert_plan(model, "FFFFFF", ORDER)
    assert transformer.executed == dict.fromkeys(CASES[name][4], "FFFFFF")


@pytest.mark.parametrize("name", CASES)
def test_forecasts_agree_with_the_oracle_twice(cases, name):
    """The second run begins anew, though nothing but the guider says so where the same latents are given."""
    pipe, transformer = dropped(cases, name, plan=PLAN)
    seen = Recorder(transformer)
    first = paint(pipe, name)
    seen.assert_plan(cases(name)[0], PLAN, ORDER)
    assert torch.equal(first, paint(pipe, name))
    assert transformer.executed == dict.fromkeys(CASES[name][4], PLAN)


@pytest.mark.parametrize(("name", "ordinary"), [("flux", flux_pipeline), ("qwen-image", qwen_image_pipeline)])
def test_the_same_as_in_the_ordinary_pipeline(cases, name, ordinary):
    """To the bit, call for call, under a plan that forecasts."""
    pipe, transformer = dropped(cases, name, plan=PLAN)
    seen = Recorder(transformer)
    paint(pipe, name)
    model, denoiser = cases(name)
    usual = ordinary(model)
    usual.transformer = denoiser.as_transformer(plan=PLAN)
    expected = Recorder(usual.transformer)
    given = {**CASES[name][2], "prompt": None, "num_inference_steps": len(PLAN), "output_type": "latent"}
    sides = {"height": 2 * 4, "width": 3 * 4} if name == "flux" else {"height": 32, "width": 48}
    if name == "flux":
        given["pooled_prompt_embeds"] = text(20)
    usual(**given, **sides, generator=torch.Generator().manual_seed(0), **TRUE_GUIDANCE[name])
    assert len(seen.told) == len(expected.told) == len(PLAN) * len(CASES[name][4])
    for (latents, answer), (others, other) in zip(seen.told, expected.told, strict=True):
        assert torch.equal(latents, others) and torch.equal(answer, other)


TRUE_GUIDANCE = {"flux": {}, "qwen-image": {"true_cfg_scale": 2.0}}


def test_a_plan_of_another_length_than_the_guider_states_is_refused(cases):
    pipe, transformer = dropped(cases, "qwen-image", plan=PLAN)
    with pytest.raises(ConfigError, match=r"plan FF\.\.F\. is 6 steps long, expected 5 \(steps\)"):
        paint(pipe, "qwen-image", steps=5)
    assert transformer.executed == {}


def test_guidance_that_begins_late_is_a_branch_that_begins_late(cases):
    """The conditional branch goes on with its plan; the other one begins with a full step, as everywhere."""
    pipe, _ = dropped(cases, "qwen-image")
    guider = ClassifierFreeGuidance(guidance_scale=2.0, start=0.5)
    transformer = cases("qwen-image")[1].as_transformer(plan=PLAN, guider=guider)
    pipe.update_components(guider=guider, transformer=transformer)
    paint(pipe, "qwen-image")
    assert transformer.executed == {"cond": PLAN, "uncond": "FF."}


@pytest.mark.parametrize(
    ("guider", "expected"),
    [
        (object(), "guider is a object, expected a guider of diffusers; pass `guider=pipe.guider`"),
        (
            SkipLayerGuidance(skip_layer_guidance_layers=[0]),
            "guider is SkipLayerGuidance, which changes layers of the transformer, expected one that combines",
        ),
        (AutoGuidance(auto_guidance_layers=[0], dropout=0.1), "guider is AutoGuidance, which changes layers"),
    ],
    ids=("object", "skips", "auto"),
)
def test_a_guider_that_needs_the_model_is_refused(cases, guider, expected):
    with pytest.raises(ConfigError) as error:
        cases("qwen-image")[1].as_transformer(guider=guider)
    assert str(error.value).startswith(expected)


def stated(step, steps, timestep, branch, scale=2.0):
    guider = ClassifierFreeGuidance(guidance_scale=scale)
    guider.set_state(step, steps, torch.tensor(timestep))
    for _ in range(branch):
        guider.prepare_models(None)
    return guider


@pytest.mark.parametrize(
    ("guider", "expected"),
    [
        (ClassifierFreeGuidance(), "guider ClassifierFreeGuidance states no step, expected the step of a loop"),
        (stated(0, 4, 500.0, 0), "states step 0 of 4 and branch 0 of 2, expected a step of the loop and a branch"),
        (stated(4, 4, 500.0, 1), "states step 4 of 4 and branch 1 of 1, expected a step of the loop and a branch"),
        (stated(2, 4, 500.0, 1), "states step 2 and branch 1 after step -1 and branch 0, expected the step or the"),
        (stated(0, 4, 500.0, 2), "states step 0 and branch 2 after step -1 and branch 0, expected the step or the"),
        (stated(0, 4, 900.0, 1), "states timestep 900, passed on as 0.9, expected 0.5 as called"),
    ],
)
def test_a_state_that_is_not_of_the_call_is_refused(cases, guider, expected):
    """A guider of another pipeline, or one that was replaced: its state stands still or runs elsewhere."""
    transformer = cases("flux3")[1].as_transformer(guider=guider)
    inputs = {"encoder_hidden_states": text(6, 24), "img_ids": torch.zeros(6, 4), "txt_ids": torch.zeros(6, 4)}
    with pytest.raises(StepError) as error:
        transformer(text(6, 16), timestep=torch.tensor([0.5]), **inputs)
    assert expected in str(error.value) and "`as_transformer(guider=pipe.guider)`" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_guider_that_stands_still_is_refused_at_the_second_step(cases):
    """Its pipeline was given another guider after the drop-in was made."""
    pipe, transformer = dropped(cases, "flux3")
    transformer._guidance._guider = stated(0, 6, 1000.0, 1)
    with pytest.raises(StepError, match=r"states timestep 1000, passed on as 1, expected 0\.\d+ as called"):
        paint(pipe, "flux3")


def test_without_a_guider_branches_are_told_apart_by_their_order(cases):
    """As in any loop that says nothing: the plan is executed, and its length is not checked."""
    pipe, transformer = dropped(cases, "flux3", guider=False, interval=3, warmup=2)
    paint(pipe, "flux3")
    assert transformer.executed == {"0": PLAN, "1": PLAN}


def test_what_a_modular_pipeline_passes_and_the_bundle_lacks_is_refused(cases):
    """Such a pipeline passes what the model's `forward` takes, so that is what the drop-in shows."""
    pipe, _ = dropped(cases, "flux3")
    with pytest.raises(StepError, match="argument `image_cond_hidden_states` is given, expected only timestep"):
        paint(pipe, "flux3", denoiser_input_fields={"image_cond_hidden_states": text(2, 16)})
