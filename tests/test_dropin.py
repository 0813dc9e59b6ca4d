"""The drop-in inside unmodified diffusers pipelines: equal pictures under an all-`F` plan, and what ends a request."""

# Shapes: S steps, B batch

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext
from functools import cache

import accelerate
import numpy as np
import oracle
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from harness import FLOAT32, Tiny, allowed, eager_denoiser
from recorder import Recorder
from tiny_models import dit_inputs, flux_inputs, tiny_dit
from tiny_pipelines import dit_pipeline, flux_pipeline

from taylorseer_export.bundle.device import Device
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Plan
from taylorseer_export.runtime.callers import likeness
from taylorseer_export.runtime.calls import Seen
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.slot import Slot

INTERVAL, WARMUP, ORDER = 3, 2, 2


@pytest.fixture(scope="module")
def guided_dit(tmp_path_factory):
    """A DiT with the thousand classes that diffusers' pipeline takes for granted."""
    model, folder = tiny_dit(classes=1000, layers=2), tmp_path_factory.mktemp("dit")
    model.save_pretrained(folder)
    return Tiny("dit", model, folder, lambda steps, **sizes: dit_inputs(model, steps, **sizes))


@pytest.fixture(scope="module")
def cases(tiny, eager, guided_dit):
    """Family -> (untouched transformer, denoiser over it)."""

    @cache
    def make(family):
        if family == "flux":
            return tiny("flux").model, eager("flux")
        options = export.Options(order=ORDER, interval=4, warmup=2, steps=20)
        checkpoint = open_checkpoint(str(guided_dit.folder), FAMILIES["dit"])
        return guided_dit.model, eager_denoiser(export.draft(checkpoint, options))

    return make


@pytest.fixture
def flux(cases):
    """(pipeline with a drop-in, its drop-in)"""
    return piped(cases("flux"))


@pytest.fixture
def dit(cases):
    return piped(cases("dit"), dit_pipeline)


def piped(case, build=flux_pipeline, **options):
    model, denoiser = case
    pipe = build(model)
    options = options or {"interval": INTERVAL, "warmup": WARMUP}
    pipe.transformer = denoiser.as_transformer(**options)
    return pipe, pipe.transformer


def paint(pipe, seed=0, steps=5, size=16, prompt="cat", **options):
    """Latents that a pipeline ends with."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipe, FluxPipeline):
        options = {"height": size, "width": size, "max_sequence_length": 6, "output_type": "latent", **options}
        return pipe(prompt, num_inference_steps=steps, generator=generator, **options).images
    options = {"class_labels": [7], "output_type": "pt", "return_dict": False, **options}
    return pipe(num_inference_steps=steps, generator=generator, **options)[0]


# The same pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "dog", "true_cfg_scale": 2.0}, {"guidance_scale": 1.0}])
def test_flux_all_full_is_the_untouched_pipeline(cases, options):
    """Every prediction is the model's within the oracle's bound, and the pipeline does the same with it to the bit."""
    pipe, transformer = piped(cases("flux"), interval=1)
    seen = Recorder(transformer)
    painted = paint(pipe, **options)
    with seen.retold_by(cases("flux")[0]):
        assert torch.equal(painted, paint(flux_pipeline(cases("flux")[0]), **options))
    seen.assert_plan(cases("flux")[0], "FFFFF", ORDER)
    assert transformer.executed["cond"] == "FFFFF"


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"class_labels": [1, 2]}])
def test_dit_all_full_is_the_untouched_pipeline(cases, options):
    pipe, transformer = piped(cases("dit"), dit_pipeline, interval=1)
    seen = Recorder(transformer)
    painted = paint(pipe, **options)
    with seen.retold_by(cases("dit")[0]):
        assert torch.equal(painted, paint(dit_pipeline(cases("dit")[0]), **options))
    seen.assert_plan(cases("dit")[0], "FFFFF", ORDER)
    assert transformer.executed == {"0": "FFFFF"}


def test_pictures_and_not_latents_alone(cases):
    pipe, transformer = piped(cases("flux"), interval=1)
    seen = Recorder(transformer)
    painted = paint(pipe, output_type="np")
    with seen.retold_by(cases("flux")[0]):
        assert (painted == paint(flux_pipeline(cases("flux")[0]), output_type="np")).all()


def test_another_answer_or_call_is_seen(cases):
    """The comparison above can fail: on another prediction, on other latents, on a call too few."""
    pipe, transformer = piped(cases("flux"), interval=1)
    seen = Recorder(transformer)
    painted = paint(pipe)
    untouched = flux_pipeline(cases("flux")[0])
    latents, sample = seen.told[-1]
    seen.told[-1] = latents, sample + 1
    with seen.retold_by(cases("flux")[0]):
        assert not torch.equal(painted, paint(untouched))
    seen.told[0] = latents, sample
    with pytest.raises(AssertionError, match="asks about other latents"), seen.retold_by(cases("flux")[0]):
        paint(untouched)
    with pytest.raises(AssertionError, match="makes fewer calls"), seen.retold_by(cases("flux")[0]):
        pass


def test_flux_forecasts_agree_with_the_oracle(cases, flux):
    pipe, transformer = flux
    seen = Recorder(transformer)
    paint(pipe, steps=8, negative_prompt="dogs", true_cfg_scale=2.0)
    assert seen.calls.keys() == {"cond", "uncond"}
    seen.assert_plan(cases("flux")[0], "FF..F..F", ORDER)


def test_dit_forecasts_agree_with_the_oracle(cases, dit):
    pipe, transformer = dit
    seen = Recorder(transformer)
    paint(pipe, steps=8)
    seen.assert_plan(cases("dit")[0], "FF..F..F", ORDER)


def test_the_recorder_can_fail(cases, dit):
    pipe, transformer = dit
    seen = Recorder(transformer)
    paint(pipe, steps=8)
    seen.calls["0"][3][-1].add_(1e-4)
    with pytest.raises(AssertionError, match="branch 0 differs by"):
        seen.assert_plan(cases("dit")[0], "FF..F..F", ORDER)


def test_an_engine_in_the_pipeline(tiny, onnx):
    """ONNX Runtime in place of the eager graphs."""
    pipe, transformer = piped((tiny("flux").model, onnx("flux")))
    seen = Recorder(transformer)
    paint(pipe, steps=6)
    seen.assert_plan(tiny("flux").model, "FF..F.", ORDER)


# Steps ---------------------------------------------------------------------------------------------------------------


def test_a_scheduler_with_two_calls_per_step(cases, dit):
    pipe, transformer = dit
    pipe.scheduler = HeunDiscreteScheduler()
    seen = Recorder(transformer)
    paint(pipe, steps=5)
    assert [float(call[1][0]) for call in seen.calls["0"]] == [999, 749.25, 749.25, 499.5, 499.5, 249.75, 249.75, 0, 0]
    seen.assert_plan(cases("dit")[0], "FF..F..F.", ORDER)


def test_all_full_with_two_calls_per_step(cases):
    untouched = dit_pipeline(cases("dit")[0])
    pipe, _ = piped(cases("dit"), dit_pipeline, interval=1)
    untouched.scheduler, pipe.scheduler = HeunDiscreteScheduler(), HeunDiscreteScheduler()
    assert torch.equal(paint(pipe), paint(untouched))


def test_steps_and_guidance_change_from_call_to_call(cases, flux):
    pipe, transformer = flux
    for steps, options, plan in (
        (5, {}, "FF..F"),
        (3, {"guidance_scale": 1.0}, "FF."),
        (7, {"negative_prompt": "dog", "true_cfg_scale": 2.0}, "FF..F.."),
        (1, {}, "F"),
        (1, {}, "F"),
        (4, {}, "FF.."),
    ):
        painted = paint(pipe, steps=steps, **options)
        assert set(transformer.executed.values()) == {plan}
        assert len(transformer.executed) == (2 if "negative_prompt" in options else 1)
        fresh, _ = piped(cases("flux"))
        assert torch.equal(painted, paint(fresh, steps=steps, **options))


def test_a_loop_longer_than_the_bundle_expects(cases, dit):
    pipe, transformer = dit
    assert cases("dit")[1].manifest.plan.steps == 20
    paint(pipe, steps=45)
    assert transformer.executed["0"] == ("F" + "F.." * 15)[:45]


@pytest.mark.parametrize("plan", ["FFF", "F."])
def test_a_plan_is_lengthened_and_not_changed(cases, loop, plan):
    transformer, latents, timestep, conditioning = loop
    with transformer.request(plan="FF."):
        call(transformer, latents[0], timestep[0], conditioning)
        slot = transformer._callers.here.loop.slots["0"]
        with pytest.raises(StepError, match=rf"plan is {plan}, expected one that begins with FF\.; lengthen the plan"):
            slot.extend(Plan(plan))
        run(transformer, latents[1:3], timestep[1:3], conditioning)


def test_an_explicit_plan(cases):
    pipe, transformer = piped(cases("flux"), plan="FF.F.")
    seen = Recorder(transformer)
    paint(pipe)
    seen.assert_plan(cases("flux")[0], "FF.F.", ORDER)
    with pytest.raises(StepError, match=r"loop is at its step 5, expected its end after 5 steps \(plan FF.F.\); give"):
        paint(pipe, steps=6)


def test_a_fixed_number_of_steps(cases):
    pipe, transformer = piped(cases("flux"), steps=4, interval=2, warmup=1, order=1)
    seen = Recorder(transformer)
    paint(pipe, steps=4)
    seen.assert_plan(cases("flux")[0], "F.F.", order=1)
    with pytest.raises(StepError, match="expected its end after 4 steps"):
        paint(pipe, steps=5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"plan": "F.F", "interval": 2}, "interval is given beside plan, expected one of them"),
        ({"plan": "F.F", "steps": 4}, "plan F.F is 3 steps long, expected 4"),
        ({"plan": ".F"}, "step 0 is a forecast step"),
        ({"interval": 0}, r"interval is 0, expected at least 1 \(steps\)"),
        ({"warmup": 0}, r"warmup is 0, expected at least 1 \(steps\)"),
        ({"steps": 0}, r"steps is 0, expected 1 to 1000 \(steps\)"),
    ],
)
def test_a_plan_that_contradicts_itself(cases, options, text):
    with pytest.raises(ConfigError, match=text):
        cases("flux")[1].as_transformer(**options)


# Where a request ends ------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("after", [{}, {"steps": 3}, {"negative_prompt": "dog", "true_cfg_scale": 2.0}])
def test_an_error_in_a_callback_leaves_nothing_behind(cases, flux, step, after):
    pipe, transformer = flux

    def stop(pipe, i, t, tensors):
        if i == step:
            raise Stop
        return tensors

    with pytest.raises(Stop):
        paint(pipe, callback_on_step_end=stop)
    assert transformer.executed == {"cond": "FF..F"[: step + 1]}
    fresh, _ = piped(cases("flux"))
    assert torch.equal(paint(pipe, seed=1, **after), paint(fresh, seed=1, **after))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_an_error_in_the_scheduler_leaves_nothing_behind(cases, dit, monkeypatch, step, steps):
    """The next loop has the same labels and starts at a lower timestep than the last one reached."""
    pipe, transformer = dit
    real, calls = pipe.scheduler.step, []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) > step:
            raise Stop
        return real(*args, **options)

    monkeypatch.setattr(pipe.scheduler, "step", fail)
    with pytest.raises(Stop):
        paint(pipe, steps=8)
    assert len(transformer.executed["0"]) == step + 1
    monkeypatch.setattr(pipe.scheduler, "step", real)
    fresh, _ = piped(cases("dit"), dit_pipeline)
    assert torch.equal(paint(pipe, seed=1, steps=steps), paint(fresh, seed=1, steps=steps))
    assert len(transformer.executed["0"]) == steps


def test_an_error_of_its_own_leaves_nothing_behind(cases, flux):
    pipe, _ = flux

    def spoil(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * (float("nan") if i == 2 else 1)}

    with pytest.raises(StepError, match="input `hidden_states` has 256 values that are NaN or infinite at step 3"):
        paint(pipe, callback_on_step_end=spoil)
    fresh, _ = piped(cases("flux"))
    assert torch.equal(paint(pipe), paint(fresh))


def test_interrupt(cases, flux):
    pipe, transformer = flux

    def interrupt(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return tensors

    paint(pipe, callback_on_step_end=interrupt)
    assert transformer.executed == {"cond": "FF."}
    fresh, _ = piped(cases("flux"))
    assert torch.equal(paint(pipe, seed=1), paint(fresh, seed=1))


def test_a_callback_that_changes_the_latents(cases, flux):
    pipe, transformer = flux
    seen = Recorder(transformer)
    paint(pipe, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": 0.9 * tensors["latents"]})
    seen.assert_plan(cases("flux")[0], "FF..F", ORDER)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_that_changes_the_prompt_starts_over(flux, in_place):
    pipe, transformer = flux
    plans = []

    def change(pipe, i, t, tensors):
        plans.append(transformer.executed["cond"])
        prompt = tensors["prompt_embeds"]
        if i == 2:
            prompt = prompt.mul_(1.5) if in_place else 1.5 * prompt
        return {"prompt_embeds": prompt}

    paint(pipe, steps=6, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert plans == ["F", "FF", "FF.", "F", "FF", "FF."]


def test_two_pipelines_share_a_denoiser(cases):
    """The second paints a whole picture between any two steps of the first."""
    expected = [paint(piped(cases("flux"))[0], seed=seed, steps=4 + seed) for seed in (0, 1)]
    first, second = piped(cases("flux"))[0], piped(cases("flux"))[0]
    between = []

    def other(pipe, i, t, tensors):
        between.append(paint(second, seed=1, steps=5))
        return tensors

    assert torch.equal(paint(first, seed=0, steps=4, callback_on_step_end=other), expected[0])
    assert len(between) == 4
    assert all(torch.equal(latents, expected[1]) for latents in between)


def idle(transformer):
    """The slots that wait for a loop, of one at most."""
    sets = transformer._callers.idle
    assert len(sets) <= 1
    return [slot for _, slots in sets for slot in slots.values()]


def test_a_new_size_has_a_new_slot_and_the_old_one_is_freed(cases, flux):
    pipe, transformer = flux
    paint(pipe, negative_prompt="dog", true_cfg_scale=2.0)
    old = [weakref.ref(slot) for slot in idle(transformer)]
    paint(pipe, negative_prompt="dog", true_cfg_scale=2.0, seed=1)
    assert [ref() for ref in old] == idle(transformer)  # used again
    for options in ({"size": 20}, {"num_images_per_prompt": 2}, {"prompt": ["cat", "dog", "cow"]}):
        painted = paint(pipe, **options)
        assert [ref() for ref in old] == [None] * len(old)
        old = [weakref.ref(slot) for slot in idle(transformer)]
        fresh, _ = piped(cases("flux"))
        assert torch.equal(painted, paint(fresh, **options))


# Calls without a pipeline --------------------------------------------------------------------------------------------


@pytest.fixture
def loop(cases):
    """(drop-in, latents [S, B, T, C], timesteps [S], conditioning), and the oracle's model"""
    model, denoiser = cases("flux")
    transformer = denoiser.as_transformer(interval=INTERVAL, warmup=WARMUP)
    return transformer, *flux_inputs(model, 6)


def call(transformer, latents, timestep, conditioning, **options):
    return transformer(latents, timestep=timestep.expand(len(latents)), return_dict=False, **conditioning, **options)[0]


def run(transformer, latents, timestep, conditioning):
    return torch.stack([call(transformer, x, t, conditioning) for x, t in zip(latents, timestep, strict=True)])


def copied(conditioning):
    return {name: value.clone() for name, value in conditioning.items()}


def test_the_same_loop_twice(loop):
    """Nobody says that the first is over: its last timestep is below the second's first."""
    transformer, *inputs = loop
    first = run(transformer, *inputs)
    assert torch.equal(run(transformer, *inputs), first)
    assert transformer.executed == {"0": "FF..F."}


def test_timesteps_may_rise(loop):
    """As in models that count time from noise to data."""
    transformer, latents, timestep, conditioning = loop
    for _ in range(2):
        run(transformer, latents, 1 - timestep, conditioning)
        assert transformer.executed == {"0": "FF..F."}


def test_branches_without_a_context_are_told_apart_by_their_order(cases, loop):
    transformer, latents, timestep, conditioning = loop
    other = {**conditioning, "pooled_projections": -conditioning["pooled_projections"]}
    for begun in (False, True):
        if begun:
            transformer.begin()
        seen = []
        for x, t in zip(latents, timestep, strict=True):
            seen.append([call(transformer, x, t, c) for c in (conditioning, other)])
        assert transformer.executed == {"0": "FF..F.", "1": "FF..F."}
        for k, c in enumerate((conditioning, other)):
            alone = run(cases("flux")[1].as_transformer(interval=3, warmup=2), latents, timestep, c)
            assert torch.equal(torch.stack([pair[k] for pair in seen]), alone)


def test_a_branch_that_missed_a_step_starts_over(loop):
    transformer, latents, timestep, conditioning = loop
    other = copied(conditioning)
    for s, (x, t) in enumerate(zip(latents, timestep, strict=True)):
        with transformer.cache_context("cond"):
            call(transformer, x, t, conditioning)
        if s in (0, 1, 3, 4):
            with transformer.cache_context("uncond"):
                call(transformer, x, t, other)
    assert transformer.executed == {"cond": "FF..F.", "uncond": "FFFF"}


def test_new_tensors_at_every_call_are_refused(loop):
    transformer, latents, timestep, conditioning = loop
    with pytest.raises(StepError, match=r"new tensors of equal values at every call.*`with transformer.request\(\):`"):
        for x, t in zip(latents, timestep, strict=True):
            call(transformer, x, t, copied(conditioning))


def test_new_tensors_at_every_call_in_a_declared_request(loop):
    transformer, latents, timestep, conditioning = loop
    expected = run(transformer, latents, timestep, conditioning)
    with transformer.request(steps=6):
        seen = [call(transformer, x, t, copied(conditioning)) for x, t in zip(latents, timestep, strict=True)]
    assert torch.equal(torch.stack(seen), expected)


def test_any_timesteps_in_a_declared_request(loop):
    transformer, latents, timestep, conditioning = loop
    with transformer.request(plan="F.F..F", order=1):
        run(transformer, latents, timestep.roll(2), conditioning)
    assert transformer.executed == {"0": "F.F..F"}


def test_a_declared_request_ends_with_its_block(loop):
    transformer, *inputs = loop
    with transformer.request(plan="F" * 6):
        run(transformer, *inputs)
    run(transformer, *inputs)
    assert transformer.executed == {"0": "FF..F."}


def test_changed_conditioning_in_a_declared_request(loop):
    transformer, latents, timestep, conditioning = loop
    with pytest.raises(StepError, match="conditioning changed at step 0 of a request that was begun, expected the sa"):
        with transformer.request():
            call(transformer, latents[0], timestep[0], conditioning)
            conditioning["guidance"] = conditioning["guidance"] + 1
            call(transformer, latents[1], timestep[1], conditioning)


def test_timesteps_known_ahead_are_prepared_at_once(cases, loop, monkeypatch):
    transformer, latents, timestep, conditioning = loop
    prepared = []
    monkeypatch.setattr(
        transformer.denoiser.runner,
        "_functions",
        {n: noted(n, f, prepared) for n, f in transformer.denoiser.runner._functions.items()},
    )
    with transformer.request(timesteps=timestep):
        seen = run(transformer, latents, timestep, conditioning)
    assert prepared.count("prepare") == 1
    model = cases("flux")[0]
    expected = oracle.replay(model, latents, timestep, conditioning, "FF..F.", ORDER)
    oracle.assert_close("ahead", seen, expected, allowed(model, expected, "FF..F.", ORDER))
    with pytest.raises(StepError, match=r"timestep is 0.5 at step 0, expected 1.0 as prepared"):
        with transformer.request(timesteps=timestep):
            call(transformer, latents[0], torch.tensor(0.5), conditioning)


def noted(name, module, seen):
    def run(*args):
        seen.append(name)
        return module(*args)

    return run


def test_steps_that_are_not_the_timesteps(loop):
    transformer, _, timestep, _ = loop
    with pytest.raises(ConfigError, match="steps is 5, expected 6, one per timestep; leave steps out"):
        transformer.begin(steps=5, timesteps=timestep)


def test_inference_mode(loop):
    """Its tensors count no versions."""
    transformer, latents, timestep, conditioning = loop
    expected = run(transformer, latents, timestep, conditioning)
    with torch.inference_mode():
        seen = run(transformer, latents.clone(), timestep, copied(conditioning))
    assert torch.equal(seen, expected)


# The signature -------------------------------------------------------------------------------------------------------


def test_output_classes(loop, cases):
    transformer, latents, timestep, conditioning = loop
    inputs = {"hidden_states": latents[0], "timestep": timestep[:1], **conditioning}
    seen, expected = transformer(**inputs), cases("flux")[0](**inputs)
    assert type(seen) is type(expected) is Transformer2DModelOutput
    oracle.assert_close("sample", seen.sample, expected.sample, allowed(cases("flux")[0], expected.sample, "F", 0)[0])
    assert isinstance(transformer(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_caller(loop, dtype):
    transformer, latents, timestep, conditioning = loop
    rounded = {n: v.to(dtype) for n, v in conditioning.items()}
    seen = call(transformer, latents[0].to(dtype), timestep[0], rounded)
    expected = call(transformer, latents[0].to(dtype).float(), timestep[0], {n: v.float() for n, v in rounded.items()})
    assert seen.dtype == dtype
    assert torch.equal(seen, expected.to(dtype))


def test_config(cases, flux):
    model, transformer = cases("flux")[0], flux[1]
    for name in ("in_channels", "guidance_embeds", "joint_attention_dim", "num_layers"):
        assert getattr(transformer.config, name) == transformer.config[name] == model.config[name]
    with pytest.raises(AttributeError, match="the config has no entry `nothing`"):
        transformer.config.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="config entry `in_channels` cannot be set"):
        transformer.config.in_channels = 3
    assert (transformer.dtype, transformer.device) == (FLOAT32, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}},
        {"controlnet_block_samples": [torch.zeros(1)]},
        {"controlnet_blocks_repeat": True},
        {"no_such_thing": 1},
    ],
)
def test_what_the_graphs_do_not_have_is_refused(loop, arguments):
    transformer, latents, timestep, conditioning = loop
    name = next(iter(arguments))
    with pytest.raises(StepError, match=rf"argument `{name}` is given, expected only timestep, .*; leave it out"):
        call(transformer, latents[0], timestep[0], conditioning, **arguments)


def test_a_lora_scale_in_a_pipeline_is_refused(flux):
    with pytest.raises(StepError, match="argument `joint_attention_kwargs` is given"):
        paint(flux[0], joint_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("missing", ["encoder_hidden_states", "guidance", "img_ids"])
def test_missing_conditioning(loop, missing):
    transformer, latents, timestep, conditioning = loop
    with pytest.raises(StepError, match=rf"input `{missing}` is missing, expected float32 \[.*; pass it with"):
        call(transformer, latents[0], timestep[0], {**conditioning, missing: None})


@pytest.mark.parametrize("timestep", [None, torch.tensor([1.0, 0.5]), torch.tensor([])])
def test_one_timestep_for_all(loop, timestep):
    transformer, latents, _, conditioning = loop
    with pytest.raises(StepError, match=r"input `timestep` has [02] different values, expected one for all samples"):
        transformer(latents[0], timestep=timestep, **conditioning)


def test_another_device(loop):
    transformer, latents, timestep, conditioning = loop
    with pytest.raises(
        StepError, match="input `hidden_states` is on `meta`, expected a tensor on `cpu`, where the eng"
    ):
        call(transformer, latents[0].to("meta"), timestep[0], conditioning)


@pytest.mark.slow
def test_the_wrong_size_for_a_static_bundle(tiny, eager):
    static = eager("plain", latent_size=(4, 6), batch=1)
    pipe, _ = piped((tiny("plain").model, static))
    with pytest.raises(StepError, match=r"size `image_tokens` is 16, expected 6 \(the bundle is static\); use such a"):
        paint(pipe)


# As a part of a pipeline ---------------------------------------------------------------------------------------------


def test_moving(flux):
    pipe, transformer = flux
    assert pipe.to("cpu").transformer is transformer
    assert pipe.to(torch.float32).device == torch.device("cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # the other parts follow, the engines need not
        assert pipe.to(dtype).transformer.dtype == FLOAT32
        assert pipe.text_encoder.dtype == dtype
    with pytest.raises(ConfigError, match="device is `meta` for the transformer, expected `cpu`, where its engines w"):
        transformer.to("meta")


def test_engines_stay_where_they_are_when_a_pipeline_is_parked(cases):
    """Offloading moves parts to the CPU and back; the engines of a GPU stay on it."""
    _, denoiser = cases("flux")
    elsewhere = Denoiser(denoiser.manifest, denoiser.runner, device=Device("meta")).as_transformer()
    assert elsewhere._apply(lambda tensor: torch.empty(0)).device == torch.device("meta")
    assert elsewhere.to("meta") is elsewhere


def test_model_offloading(flux, monkeypatch):
    """To the CPU, whose two names `cpu` and `cpu:0` are not equal: tensors that are there already stay as they are."""
    pipe, _ = flux
    expected = paint(pipe)
    monkeypatch.setattr(accelerate.hooks, "send_to_device", lambda tensors, device: tensors)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(paint(pipe), expected)
    assert torch.equal(paint(pipe), expected)  # the pipeline puts its hooks back after a call


def test_a_pipeline_loaded_without_a_transformer(cases, flux, tmp_path):
    """The way to a drop-in that never holds the untouched weights."""
    flux_pipeline(cases("flux")[0]).save_pretrained(tmp_path)
    pipe = FluxPipeline.from_pretrained(tmp_path, transformer=None)
    pipe.transformer = flux[1]
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(paint(pipe), paint(flux[0]))


def test_a_lora_comes_too_late(flux):
    with pytest.raises(ConfigError, match=r"load_lora_adapter is called on a compiled.*export again with --lora FILE"):
        flux[1].load_lora_adapter({})


def test_a_pipeline_in_another_precision_than_the_bundle(flux):
    """The engines keep theirs: a converted pipeline's rounding is all that differs, so every latent is finite."""
    pipe, transformer = flux
    painted = paint(pipe.to(torch.bfloat16))
    assert painted.dtype == torch.bfloat16 and painted.isfinite().all()
    assert transformer.executed == {"cond": "FF..F"}


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"mode": "reduce-overhead"}])
def test_torch_compile_runs_it_as_it_is(flux, options):
    pipe, transformer = flux
    expected = paint(pipe)
    pipe.transformer = torch.compile(transformer, **options)
    assert torch.equal(paint(pipe), expected)
    assert transformer.executed == {"cond": "FF..F"}
    assert (pipe.transformer.dtype, pipe.transformer.config) == (transformer.dtype, transformer.config)


def test_compiling_in_place_changes_nothing(flux, capsys):
    pipe, transformer = flux
    expected = paint(pipe)
    for _ in range(2):
        transformer.compile(fullgraph=True)
        transformer.compile_repeated_blocks(fullgraph=True)
    assert torch.equal(paint(pipe), expected)
    said = "{} has no effect on a transformer of engines, which are compiled already\n"
    assert capsys.readouterr().err == said.format("compile") + said.format("compile_repeated_blocks")


@pytest.mark.parametrize("pipeline", [False, True])
def test_what_is_about_speed_and_memory_alone_has_no_effect(flux, pipeline):
    pipe, transformer = flux
    expected = paint(pipe)
    transformer.fuse_qkv_projections()
    transformer.set_attention_backend("native")
    offload = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    (pipe if pipeline else transformer).enable_group_offload(**offload)
    if not pipeline:  # what enable_sequential_cpu_offload does to every part
        accelerate.cpu_offload(transformer, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(paint(pipe), expected)
    assert (transformer.dtype, transformer.device) == (FLOAT32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("enable_cache", "expected the plan of the bundle alone, which is a cache already"),
        ("enable_layerwise_casting", "expected the precision of the bundle; export again with another --precision"),
        ("set_attn_processor", "expected the attention that was traced"),
        (
            "set_adapters",
            "expected it in the weights; load the bundle with lora=FILE, or export again with --lora FILE",
        ),
        ("save_pretrained", "expected its bundle, which is saved already"),
        ("_load_ip_adapter_weights", "expected no IP-Adapter, whose attentions are in no graph; use the untouched"),
    ],
)
def test_what_would_change_the_numbers_is_refused(flux, name, text):
    with pytest.raises(ConfigError, match=f"{name} is called on a compiled transformer, {text}"):
        getattr(flux[1], name)("anything")


def test_a_name_that_no_model_has_is_no_method(flux):
    assert not hasattr(flux[1], "enable_anything")


def shifted(pipe, mu):
    """The pipeline with the timesteps of a large picture, whatever its size."""
    shift = {"base_shift": mu, "max_shift": mu, "use_dynamic_shifting": True}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    return pipe


@pytest.mark.parametrize(("mu", "steps"), [(3.23, 28), (3.23, 50), (5.0, 12)])
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "dog", "true_cfg_scale": 2.0}])
def test_a_plan_is_executed_where_bfloat16_rounds_the_timesteps(cases, mu, steps, options):
    """As of FLUX at 2048 x 2048; a second picture from the same tensors is a loop of its own."""
    plan = "FF" + "." * (steps - 3) + "F"
    pipe, transformer = piped(cases("flux"), plan=plan)
    shifted(pipe, mu).to(torch.bfloat16)
    clock = Recorder(transformer).calls
    given = {
        name: pipe.encode_prompt("cat", "cat")[k] for k, name in enumerate(("prompt_embeds", "pooled_prompt_embeds"))
    }
    for seed in (0, 1):
        paint(pipe, seed, steps, prompt=None, **given, **options)
        assert set(transformer.executed.values()) == {plan}
        assert len(transformer.executed) == (2 if options else 1)
    first, second = (float(t[0]) for _, t, _, _ in clock["cond"][:2])
    assert first == second or steps == 12


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler])
def test_a_plan_is_executed_under_any_scheduler(cases, scheduler):
    calls = {HeunDiscreteScheduler: 9, PNDMScheduler: 14}.get(scheduler, 5)
    plan = "F." * (calls // 2) + "F" * (calls % 2)
    pipe, transformer = piped(cases("dit"), dit_pipeline, plan=plan)
    pipe.scheduler = scheduler()
    for seed in (0, 1):
        paint(pipe, seed)
        assert transformer.executed == {"0": plan}


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(flux, copy_of):
    with pytest.raises(ConfigError, match="a transformer of engines is copied or pickled, expected its bundle in its"):
        copy_of(flux[1])


# Loops of several callers, and loops whose timesteps say little -------------------------------------------------------


def test_threads_share_a_drop_in(cases, loop):
    """Each loop is bit for bit what it is alone, whatever runs between its steps; one waits for the other's step."""
    transformer, latents, timestep, conditioning = loop
    other = {**copied(conditioning), "pooled_projections": -conditioning["pooled_projections"]}
    both = [conditioning, other]
    alone = [run(cases("flux")[1].as_transformer(interval=3, warmup=2), latents, timestep, c) for c in both]
    turn, seen, executed = threading.Barrier(2, timeout=60), [[], []], {}

    def work(k):
        for x, t in zip(latents, timestep, strict=True):
            turn.wait()
            seen[k].append(call(transformer, x, t, both[k]))
        executed[k] = transformer.executed

    in_threads(2, work)
    assert executed == {0: {"0": "FF..F."}, 1: {"0": "FF..F."}}
    assert all(torch.equal(torch.stack(mine), expected) for mine, expected in zip(seen, alone, strict=True))
    assert transformer.executed == {}  # this thread ran nothing


def test_the_slots_of_a_thread_end_with_it(loop):
    transformer, *inputs = loop
    slots = []

    def work():
        run(transformer, *inputs)
        slots.append(weakref.ref(transformer._callers.here.loop.slots["0"]))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    gc.collect()
    assert slots[0]() is None


def test_two_pipelines_share_a_drop_in_in_two_threads(cases):
    """The recipe of diffusers for servers: heavy parts are shared, the scheduler is not."""
    guided = {"negative_prompt": "dog", "true_cfg_scale": 2.0}
    wanted = [{"seed": 0, "steps": 6, **guided}, {"seed": 1, "steps": 8, "size": 20}]
    expected = [paint(piped(cases("flux"))[0], **options) for options in wanted]
    pipes = [piped(cases("flux"))[0] for _ in wanted]
    pipes[1].transformer = transformer = pipes[0].transformer
    ready, painted, executed = threading.Barrier(2, timeout=60), {}, {}

    def work(k):
        ready.wait()
        painted[k] = [paint(pipes[k], **wanted[k]) for _ in range(3)]
        executed[k] = transformer.executed

    in_threads(2, work)
    assert all(torch.equal(latents, expected[k]) for k in (0, 1) for latents in painted[k])
    assert executed == {0: {"cond": "FF..F.", "uncond": "FF..F."}, 1: {"cond": "FF..F..F"}}
    assert len(transformer._callers.idle) == 1


def in_threads(count, work):
    workers = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]


def test_idle_slots_serve_another_thread(loop):
    transformer, *inputs = loop
    slots = []

    def work(_):
        run(transformer, *inputs)
        slots.append(transformer._callers.here.loop.slots["0"])
        transformer.reset()

    for _ in range(3):
        in_threads(1, work)
    assert slots[0] is slots[1] is slots[2] and idle(transformer) == slots[:1]


def test_tasks_of_one_thread_share_a_drop_in(cases, loop):
    transformer, latents, timestep, conditioning = loop
    both = [conditioning, {**copied(conditioning), "guidance": conditioning["guidance"] + 1}]
    alone = [run(cases("flux")[1].as_transformer(interval=3, warmup=2), latents, timestep, c) for c in both]

    async def work(conditioning):
        seen = []
        for x, t in zip(latents, timestep, strict=True):
            await asyncio.sleep(0)
            seen.append(call(transformer, x, t, conditioning))
        return torch.stack(seen), transformer.executed

    async def together():
        return await asyncio.gather(*map(work, both))

    for (seen, executed), expected in zip(asyncio.run(together()), alone, strict=True):
        assert torch.equal(seen, expected) and executed == {"0": "FF..F."}


TURNS = "latents of a call follow those of a loop that another one came between, or that another thread began, expected"


def euler(transformer, x, conditioning, timestep, name=None):
    """Steps of a loop as a scheduler makes them, one for each time that it is asked."""
    for t, after in zip(timestep, [*timestep[1:], torch.tensor(0.0)], strict=True):
        with transformer.cache_context(name) if name else nullcontext():
            x = x + (after - t) * call(transformer, x, t, conditioning)
        yield x


@pytest.mark.parametrize("name", [None, "cond"])
@pytest.mark.parametrize("lead", [0, 1, 3])
@pytest.mark.parametrize("same", [False, True])
def test_loops_that_take_turns_are_refused(loop, name, lead, same):
    """In one thread nobody says whose a call is: of other prompts or of the same one, in step or one ahead."""
    transformer, latents, timestep, conditioning = loop
    other = conditioning if same else copied(conditioning) | {"guidance": conditioning["guidance"] + 1}
    first, second = (euler(transformer, latents[k], c, timestep, name) for k, c in enumerate((conditioning, other)))
    with pytest.raises(StepError, match=TURNS):
        for _ in range(lead):
            next(first)
        for _ in timestep:
            next(first), next(second)


def test_a_picture_painted_between_two_steps_is_refused(cases):
    """By the same drop-in, in a callback: the outer loop cannot go on."""
    (first, transformer), (second, _) = piped(cases("flux")), piped(cases("flux"))
    second.transformer = transformer
    painted = []

    def other(pipe, i, t, tensors):
        painted.append(paint(second, seed=1))
        return tensors

    with pytest.raises(StepError, match=TURNS):
        paint(first, callback_on_step_end=other)
    fresh, _ = piped(cases("flux"))
    assert torch.equal(painted[0], paint(fresh, seed=1))
    assert torch.equal(paint(first, seed=2), paint(fresh, seed=2))


def test_a_loop_that_goes_from_thread_to_thread_is_refused(loop):
    transformer, latents, timestep, conditioning = loop
    steps, errors = euler(transformer, latents[0], conditioning, timestep), []

    def work(_):
        try:
            next(steps)
        except StepError as error:
            errors.append(str(error))

    begun, stays = threading.Event(), threading.Event()
    owner = threading.Thread(target=lambda: (work(0), begun.set(), stays.wait(60)))
    owner.start()
    begun.wait()
    in_threads(1, work)
    stays.set()
    owner.join()
    assert len(errors) == 1 and errors[0].startswith(TURNS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("left", [1, 3])
def test_a_loop_that_was_left_is_no_rival_of_the_next_one(loop, seed, left):
    """An error between two calls is not seen: the same prompt again, from the same or other noise, is a loop of its
    own, as if it were the first."""
    transformer, latents, timestep, conditioning = loop
    expected = list(euler(transformer, latents[seed], conditioning, timestep))
    transformer.reset()
    steps = euler(transformer, latents[0], conditioning, timestep)
    for _ in range(left):
        next(steps)
    if left == 1 and seed == 1:  # by its timestep it may as well be the second step of the loop that was left
        transformer.reset()
    again = list(euler(transformer, latents[seed], conditioning, timestep))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert transformer.executed == {"0": "FF..F."}


def test_likeness_can_tell():
    """Near 1 of a step, near 0 of other noise, whatever part of them stays as it is."""
    noise = torch.randn(2, 1, 4096, generator=torch.Generator().manual_seed(0))
    picture = torch.full((1, 4096), 3.0)
    one, other, next_one = (torch.cat([x, picture]) for x in (*noise, 0.9 * noise[0] + 0.01))
    assert likeness(Seen.of(one), Seen.of(next_one)) > 0.99
    assert abs(likeness(Seen.of(one), Seen.of(other))) < 0.1
    assert likeness(Seen.of(one), Seen.of(one.clone())) == 0.0 == likeness(Seen.of(one), Seen.of(one[:1]))


@pytest.mark.parametrize("equal", [2, 3])
@pytest.mark.parametrize("named", [False, True])
def test_timesteps_that_round_to_the_first_are_steps(cases, loop, equal, named):
    _, latents, timestep, conditioning = loop
    transformer = cases("flux")[1].as_transformer(plan="FF.F.F")
    timestep = timestep.clone()
    timestep[:equal] = timestep[0]
    for _ in range(2):  # the second loop begins where the timestep returns
        for x, t in zip(latents, timestep, strict=True):
            for name in ("cond", "uncond") if named else (None,):
                with transformer.cache_context(name) if named else nullcontext():
                    call(transformer, x, t, conditioning)
        assert transformer.executed == dict.fromkeys(("cond", "uncond") if named else ("0",), "FF.F.F")


def test_a_loop_of_equal_timesteps_that_is_complete_is_over(cases, loop):
    _, latents, timestep, conditioning = loop
    transformer = cases("flux")[1].as_transformer(plan="FFF")
    for _ in range(2):
        run(transformer, latents[:3], timestep[:1].expand(3), conditioning)
        assert transformer.executed == {"0": "FFF"}


def test_a_step_index_tells_the_steps(cases, loop):
    """Timesteps that return to the first or turn round are no new loop where the pipeline says where it is."""
    _, latents, timestep, conditioning = loop
    transformer = cases("flux")[1].as_transformer(plan="FF.F.F")
    for _ in range(2):
        for k, x in enumerate(latents):
            with transformer.cache_context("cond", step_index=k, num_inference_steps=6):
                call(transformer, x, timestep[(0, 1, 0, 3, 2, 0)[k]], conditioning)
        assert transformer.executed == {"cond": "FF.F.F"}


def test_a_loop_shorter_than_its_plan_is_warned_of(cases, loop):
    _, latents, timestep, conditioning = loop
    transformer = cases("flux")[1].as_transformer(plan="FF.F.F")
    text = (
        r"loop ended after 4 steps, expected 6 \(plan FF.F.F\); it was interrupted, or a call was taken for the first"
    )
    run(transformer, latents[:4], timestep[:4], conditioning)
    with pytest.warns(UserWarning, match=text):
        transformer.reset()
    transformer.reset()  # once is enough
    run(transformer, latents[:4], timestep[:4], conditioning)
    with pytest.warns(UserWarning, match=text):
        call(transformer, latents[0], timestep[0], conditioning)
    with pytest.warns(UserWarning, match=text), transformer.request():
        run(transformer, latents[:4], timestep[:4], conditioning)


def test_a_loop_that_an_error_ended_is_not_warned_of(cases, loop, recwarn):
    _, latents, timestep, conditioning = loop
    transformer = cases("flux")[1].as_transformer(plan="FF.F.F")
    with pytest.raises(Stop), transformer.request():
        call(transformer, latents[0], timestep[0], conditioning)
        raise Stop
    call(transformer, latents[0], timestep[0], conditioning)  # left by an error that it does not see
    run(transformer, latents, timestep, copied(conditioning))
    transformer.reset()
    assert not [seen for seen in recwarn if "the loop ended" in str(seen.message)]


def test_a_prediction_that_is_not_finite_is_refused(loop, monkeypatch):
    transformer, latents, timestep, conditioning = loop
    real = Slot.advance

    def spoil(slot, *args):
        prediction = real(slot, *args)
        values = prediction.read()
        values.flat[0] = np.inf
        prediction.write(values)
        return prediction

    monkeypatch.setattr(Slot, "advance", spoil)
    with pytest.raises(StepError, match=r"noise_pred has values that are NaN or infinite at step 0 \(plan FF\."):
        call(transformer, latents[0], timestep[0], conditioning)
