"""Whole pipelines: what a bundle makes of a prompt, and of latents, is what the untouched diffusers pipeline makes.

Bundles run on ONNX Runtime, and `test_whole_doors.py` asks the same ones through every door.
"""

# Shapes: S steps

import inspect
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image
from pipelines_with_parts import (
    CASES,
    EDITED,
    OTHER,
    PROMPT,
    TEXT_ALONE,
    bound_of_picture,
    denoiser_with_parts,
    depth_and_length,
    drawn,
    encoders_of,
    write_pipeline,
)
from tiny_pipelines import LAYERS

from taylorseer_export import cli
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import Given, given_picture, size_to_see, steps_that_run
from taylorseer_export.embedded.requests import label_request, pictures_of, prompt_request
from taylorseer_export.errors import ConfigError, TaylorSeerError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import RequestOptions
from taylorseer_export.report.samples import groups
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.noise import normals
from taylorseer_export.runtime.parts import cleaned
from taylorseer_export.runtime.sampling import Beginning, Loop, denoise, sample, steps_at
from taylorseer_export.runtime.schedulers import begun, scheduler_of
from taylorseer_export.serve import contract

NEGATIVE = {"negative_prompt": OTHER}
STEPS, SEED = 2, 3


def encoded(pipe, name, length):
    """What the pipeline's own `encode_prompt` makes of `PROMPT`, under the transformer's names."""
    more = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        match name:
            case "flux" | "kontext":
                states, pooled, _ = pipe.encode_prompt(PROMPT, **more)
                return {"encoder_hidden_states": states, "pooled_projections": pooled}
            case "sd3":
                states, _, pooled, _ = pipe.encode_prompt(
                    PROMPT, PROMPT, PROMPT, do_classifier_free_guidance=False, **more
                )
                return {"encoder_hidden_states": states, "pooled_projections": pooled}
            case "flux2" | "flux2-base":
                return {"encoder_hidden_states": pipe.encode_prompt(PROMPT, **more, text_encoder_out_layers=LAYERS)[0]}
            case "flux3":
                embed = type(pipe.blocks.sub_blocks["text_encoder"])._get_qwen3_vl_prompt_embeds
                return {
                    "encoder_hidden_states": embed(
                        pipe.text_encoder, pipe.tokenizer, PROMPT, hidden_states_layers=LAYERS
                    )
                }
            case "qwen-image" | "qwen-image-2.1":
                return {"encoder_hidden_states": pipe.encode_prompt(PROMPT)[0]}
            case "chroma":
                states, _, mask, *_ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, **more)
                return {"encoder_hidden_states": states, "attention_mask": mask}
            case "z-image":
                (states,), _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
                return {"cap_feats": states[None]}
            case "pixart" | "sana":
                told = inspect.signature(pipe.__call__).parameters.get("complex_human_instruction")
                told = {} if told is None else {"complex_human_instruction": told.default}
                states, mask, *_ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, **told, **more)
                return {"encoder_hidden_states": states, "encoder_attention_mask": mask.float()}
            case "ovis-image":
                return {
                    "encoder_hidden_states": pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, **more)[0]
                }
            case "longcat-image":
                return {"encoder_hidden_states": pipe.encode_prompt(PROMPT)[0]}
            case "krea-2":
                states, mask = pipe.encode_prompt(PROMPT, **more)
                return {"encoder_hidden_states": states, "encoder_attention_mask": mask.long()}
            case "hidream":
                t5, _, llama, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
                return {"encoder_hidden_states_t5": t5, "encoder_hidden_states_llama3": llama, "pooled_embeds": pooled}
            case "wan":
                states, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, **more)
                return {"encoder_hidden_states": states}
            case "hunyuan":
                states, pooled, mask = pipe.encode_prompt(PROMPT, **more)
                return {
                    "encoder_hidden_states": states,
                    "pooled_projections": pooled,
                    "encoder_attention_mask": mask.float(),
                }


@pytest.mark.parametrize("name", [*CASES, *TEXT_ALONE])
def test_a_prompt_becomes_what_the_pipeline_makes_of_it(whole, name):
    pipe, denoiser = whole(name)
    length = CASES[name].length if name in CASES else TEXT_ALONE[name]
    expected = encoded(pipe, name, length)
    seen = denoiser.encoder.encode(PROMPT, length)
    assert seen.keys() == expected.keys()
    extent = depth_and_length(*encoders_of(pipe))
    for key, value in expected.items():
        limit = oracle.bound(value, 1.0, torch.float32, *extent)
        oracle.assert_close(f"{name} {key}", torch.from_numpy(seen[key]), value, limit)
        if value.ndim > 1 and "mask" not in key:  # another prompt is not within the bound
            other = torch.from_numpy(denoiser.encoder.encode(OTHER, length)[key])
            assert other.shape != value.shape or (other - value).abs().max() > limit


@pytest.mark.parametrize("name", CASES)
def test_the_picture_is_the_pipelines(whole, name):
    """From prompt to picture, all steps full, noise of the same seed."""
    case, (pipe, denoiser) = CASES[name], whole(name)
    height, width = case.size
    more = {} if case.length is None else {"max_sequence_length": case.length}
    with torch.no_grad():
        expected = pipe(
            prompt=PROMPT,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            **case.asked,
            **more,
        ).images[0]
    negative = None if case.scale is None else OTHER
    given = None if case.picture is None else Given(case.picture)
    request = prompt_request(denoiser, [PROMPT], [SEED], case.size, case.scale, negative, case.length, given=given)
    limit = bound_of_picture(expected, pipe, STEPS * (1 if case.scale is None else 2), case.scale)
    oracle.assert_close(name, drawn(denoiser, request, "F" * STEPS), expected, limit)
    wrong = drawn(denoiser, replace(request, latents=-request.latents), "F" * STEPS)
    assert (wrong - expected).abs().max() > limit


def test_the_text_encoders_run_in_aotinductor(whole, tiny, drafts, once):
    pipe, _ = whole("flux")
    folder = once("parts-inductor", partial(write_pipeline, pipe, "flux", parts=("text",), engine="inductor"))
    denoiser = denoiser_with_parts(drafts("flux", engine="inductor"), folder)
    expected, extent = encoded(pipe, "flux", 16), depth_and_length(*encoders_of(pipe))
    for key, value in denoiser.encoder.encode(PROMPT, 16).items():
        limit = oracle.bound(expected[key], 1.0, torch.float32, *extent)
        oracle.assert_close(f"inductor {key}", torch.from_numpy(value), expected[key], limit)


def test_tensorrt_rtx_builds_the_parts(whole, once):
    """In bfloat16: its strong typing refuses a graph that mixes types."""
    quick = {"gpu-arch": "8.9", "builder-optimization-level": 0}
    asked = {"engine": "tensorrt-rtx", "device": "cuda", "precision": "bf16", "engine_options": quick}
    folder = once("parts-rtx", partial(write_pipeline, whole("flux")[0], "flux", **asked))
    assert all((folder / part / f"{part}.plan").stat().st_size for part in ("text", "decode"))


def test_a_class_becomes_the_picture_of_the_pipeline(whole):
    pipe, denoiser = whole("dit")
    with torch.no_grad():
        asked = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "np"}  # its null class is 1000
        expected = pipe([3], generator=torch.Generator().manual_seed(SEED), **asked)
    request = label_request(denoiser, [3], [SEED], guidance_scale=1.0)
    result = sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS))
    seen = pictures_of(denoiser, request, result.latents)[0] / 255
    depth, length = depth_and_length(*[pipe.transformer] * STEPS, pipe.vae)
    true = torch.from_numpy(expected.images[0])
    gain = 2 * denoiser.manifest.sampling.guidance_scale - 1
    oracle.assert_close(
        "dit", torch.from_numpy(seen), true, oracle.bound(true, gain, torch.float32, depth, length) + 0.5 / 255
    )


def test_a_picture_becomes_what_the_pipeline_makes_of_it(whole):
    """Brought to whole tokens, encoded, packed and put in its places."""
    pipe, denoiser = whole("kontext")
    case = CASES["kontext"]
    request = prompt_request(denoiser, [PROMPT], [SEED], case.size, None, None, 16, given=Given(case.picture))
    processor = pipe.image_processor
    shown = processor.preprocess(processor.resize(Image.fromarray(case.picture), 24, 36), 24, 36)
    with torch.no_grad():
        _, expected, _, ids = pipe.prepare_latents(
            shown, 1, pipe.transformer.config.in_channels // 4, *case.size, torch.float32, "cpu"
        )
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae.encoder))
    seen = torch.from_numpy(request.conditioning["image_latents"])
    oracle.assert_close("kontext", seen, expected, limit)
    assert np.array_equal(request.conditioning["image_ids"], ids.numpy())
    other = prompt_request(denoiser, [PROMPT], [SEED], case.size, None, None, 16, given=Given(255 - case.picture))
    assert (torch.from_numpy(other.conditioning["image_latents"]) - expected).abs().max() > limit
    as_seen = prompt_request(denoiser, [PROMPT], [SEED], length=16, given=Given(case.picture))
    assert (as_seen.height, as_seen.width) == (24, 36)  # a size that nobody asks for is that of the picture
    brought = prompt_request(denoiser, request.conditioning, [SEED], case.size)
    assert np.array_equal(brought.latents, request.latents)  # whoever brings what it becomes needs none


def test_published_sizes_are_those_of_diffusers():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    part = SimpleNamespace(sizes=FAMILIES["flux-kontext"].whole.seen_at, area=None, fitted=None)
    assert sorted((w, h) for h, w in part.sizes) == sorted(PREFERRED_KONTEXT_RESOLUTIONS)
    for height, width in ((512, 512), (300, 900), (1024, 1000), (1, 7), (777, 333), (1080, 1920)):
        _, w, h = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert size_to_see(part, (height, width), 16) == (h, w)
    assert size_to_see(SimpleNamespace(sizes=(), area=None, fitted=None), (50, 15), 16) == (48, 16)


def test_a_picture_is_wanted_where_it_is_edited(whole):
    with pytest.raises(
        ConfigError, match=r"picture is missing for flux-kontext-.*, expected the one that it is to edit"
    ):
        prompt_request(whole("kontext")[1], [PROMPT], [SEED])
    for name, picture, strength, problem in (
        ("kontext", EDITED, 0.5, r"strength is 0.5, expected none, since flux-kontext-\w+ begins with noise"),
        ("hidream", EDITED, None, "picture is given for hidream-.*, expected none, since it draws from text alone"),
        ("flux", None, 0.5, "strength is 0.5, expected a picture that the loop begins with"),
        ("flux", EDITED, 0.0, "strength is 0, expected above 0 and at most 1"),
        ("flux", EDITED, 1.5, "strength is 1.5, expected above 0 and at most 1"),
    ):
        with pytest.raises(ConfigError, match=problem):
            given_picture(whole(name)[1].manifest, picture, strength)


IMAGE_TO_IMAGE = {
    "flux": FluxImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "qwen-image": QwenImageImg2ImgPipeline,
}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_a_loop_begins_with_a_picture_as_the_pipelines(whole, name):
    """What the encoder leaves open and the noise are drawn from one generator; of five steps the last three run."""
    case, (pipe, denoiser), steps, strength = CASES[name], whole(name), 5, 0.5
    height, width = case.size
    picture = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = IMAGE_TO_IMAGE[name]
    wanted = inspect.signature(kind.__init__).parameters
    other = kind(**{key: value for key, value in pipe.components.items() if key in wanted})
    other.set_progress_bar_config(disable=True)
    more = {} if case.length is None else {"max_sequence_length": case.length}
    more |= {"guidance_scale": denoiser.manifest.sampling.guidance_scale} if name == "flux" else {}
    with torch.no_grad():
        expected = other(
            prompt=PROMPT,
            image=Image.fromarray(picture),
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            **case.asked,
            **more,
        ).images[0]
    given = given_picture(denoiser.manifest, picture, strength)
    options, given = steps_that_run(RequestOptions(steps=steps, interval=1), denoiser, given)
    assert options.steps == 3 and given.steps == steps
    negative = None if case.scale is None else OTHER
    asked = (denoiser, [PROMPT], [SEED], case.size, case.scale, negative, case.length)
    request = prompt_request(*asked, given=given)
    limit = bound_of_picture(expected, pipe, 3 * (1 if case.scale is None else 2), case.scale)
    oracle.assert_close(name, drawn(denoiser, request, "FFF"), expected, limit)
    for wrong in (
        prompt_request(*asked, given=given._replace(picture=255 - picture)),
        replace(request, beginning=replace(request.beginning, steps=6)),
    ):
        assert (drawn(denoiser, wrong, "FFF") - expected).abs().max() > limit


def test_steps_run_as_the_pipelines_reckon():
    for steps, strength in product((1, 2, 3, 7, 20, 28, 50), (0.05, 0.3, 0.5, 0.6, 0.99, 1.0)):
        scheduler = SimpleNamespace(timesteps=np.arange(steps), order=1)
        _, run = FluxImg2ImgPipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
        assert steps_at(strength, steps) == run
        known, free = Beginning(np.zeros(1), strength, steps), Beginning(np.zeros(1), strength)
        if run:  # a plan alone says how many run, and so about how many there are
            assert known.of(run) == steps <= free.of(run) and steps_at(strength, free.of(run)) == run
        with pytest.raises(ConfigError, match=f"plan is {run + 1} steps long, expected {run}, which run of {steps} at"):
            known.of(run + 1)


@pytest.mark.parametrize("config", [{}, {"use_dynamic_shifting": True}, {"shift": 3.0, "use_karras_sigmas": True}])
def test_loops_begin_as_the_scheduler_of_diffusers_has_them(config):
    """Ours and, under a config that it does not know, that of diffusers: both beside diffusers' own, driven alone."""
    sampling = SimpleNamespace(scheduler="FlowMatchEulerDiscreteScheduler", config=config)
    made, true = scheduler_of(SimpleNamespace(sampling=sampling)), FlowMatchEulerDiscreteScheduler.from_config(config)
    clean, noise, answer = (normals(64, seed).reshape(1, 4, 4, 4) for seed in range(3))
    mu = 0.7 if config.get("use_dynamic_shifting") else None
    levels = np.linspace(1.0, 0.1, 10)
    made.set(10, levels, mu)
    true.set_timesteps(sigmas=levels, mu=mu)
    true.set_begin_index(6)
    expected = true.scale_noise(torch.from_numpy(clean), true.timesteps[6:7], torch.from_numpy(noise))
    latents = begun(made, noise, clean, 6)
    assert np.array_equal(latents, expected.numpy()) and np.array_equal(made.timesteps, true.timesteps[6:].numpy())
    for step in range(4):
        expected = true.step(torch.from_numpy(answer), true.timesteps[6 + step], expected).prev_sample
        latents = made.advance(answer, step, latents)
        assert np.array_equal(latents, expected.numpy())


def test_other_schedulers_begin_with_noise_alone():
    with pytest.raises(ConfigError, match="DDIMScheduler begins no loop with a picture here, expected a scheduler of"):
        begun(SimpleNamespace(name="DDIMScheduler"), np.zeros(1), np.zeros(1), 0)


def test_prompts_of_two_lengths_are_drawn_together(whole):
    """Shorter ones are filled up and masked: each picture is the one that its prompt gets alone, within the bound."""
    pipe, denoiser = whole("qwen-image")
    forecasts, size = denoiser.forecasts(plan="F" * STEPS), CASES["qwen-image"].size
    together = prompt_request(denoiser, [PROMPT, "b"], [1, 2], size, 3.0, OTHER)
    made = sample(denoiser, together, forecasts).latents
    depth, length = depth_and_length(*[pipe.transformer] * 2 * STEPS)
    for k, prompt in enumerate([PROMPT, "b"]):
        alone = sample(denoiser, prompt_request(denoiser, [prompt], [k + 1], size, 3.0, OTHER), forecasts).latents
        limit = oracle.bound(torch.from_numpy(alone), 5.0, torch.float32, depth, length)
        oracle.assert_close(prompt, torch.from_numpy(made[k : k + 1]), torch.from_numpy(alone), limit)


@pytest.mark.parametrize("name", ["flux3"])
def test_prompts_that_fill_up_alike_are_drawn_together(whole, name):
    """What fills up counts, so that others are refused: each picture is the one that the pipeline makes of its prompt
    alone, guided away from none that anyone gave."""
    (pipe, denoiser), size = whole(name), (28, 20)
    prompts = [PROMPT, "b"]
    request = prompt_request(denoiser, prompts, [1, 2], size, 3.0)
    made = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
    for k, prompt in enumerate(prompts):
        with torch.no_grad():
            (expected,) = pipe(
                prompt=prompt,
                height=size[0],
                width=size[1],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(k + 1),
                text_encoder_out_layers=LAYERS,
                output_type="pt",
            ).images
        limit = bound_of_picture(expected, pipe, 2 * STEPS, 3.0)
        seen = torch.from_numpy(made[k].copy()).movedim(-1, -3) / 255
        oracle.assert_close(prompt, seen, expected, limit)
        assert (torch.from_numpy(made[1 - k].copy()).movedim(-1, -3) / 255 - expected).abs().max() > limit
    with pytest.raises(ConfigError, match=r"prompts are 80 and 160 tokens long, expected all of one length"):
        prompt_request(denoiser, [PROMPT, "y " * 90], [1, 2], size)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_prompts_that_are_kept_are_the_same_bits(whole, name, monkeypatch):
    """The prompt and, under guidance, the one that it leads away from are encoded once for all pictures."""
    case, (_, denoiser) = CASES[name], whole(name)
    negative = None if case.scale is None else OTHER
    asked = (case.size, case.scale, negative, case.length)
    alone = [prompt_request(denoiser, [PROMPT], [seed], *asked) for seed in (1, 2)]
    encode, encoded, cache = denoiser.encoder.encode, [], ConditioningCache()
    monkeypatch.setattr(denoiser.encoder, "encode", lambda *given: (encoded.append(given), encode(*given))[1])
    for seed, expected in zip((1, 2), alone, strict=True):
        request = prompt_request(denoiser, [PROMPT], [seed], *asked, cache=cache)
        for branch, other in zip(request.branches, expected.branches, strict=True):
            assert {n: v.tobytes() for n, v in branch.items()} == {n: v.tobytes() for n, v in other.items()}
    prompts = [PROMPT] if negative is None else [PROMPT, OTHER]
    assert encoded == [(prompt, case.length) for prompt in prompts]
    prompt_request(denoiser, [PROMPT], [1], *asked[:3], 8, cache=cache)
    assert encoded[-1][1] == 8 and cache.counts.misses == 2 * len(prompts)  # another length is another prompt


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  a &amp;amp; b \n c ", "a & b c"),
        ("&lt;b&gt;", "<b>"),
        ("plain", "plain"),
    ],
)
def test_prompts_are_cleaned_as_diffusers_cleans_them(given, expected):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert cleaned(given) == prompt_clean(given) == expected


@pytest.mark.parametrize("prompt", ["", "a", "z" * 300, "a &amp; b", "ÄÖ 漢字 🙂", "{} {0} {name}"])
def test_any_prompt_has_the_tokens_of_transformers(whole, prompt, monkeypatch):
    """Cut off and filled up as the library does it around the same tokenizer."""
    pipe, denoiser = whole("flux")
    given = {}
    monkeypatch.setattr(type(denoiser.encoder.part), "__call__", lambda part, tokens: given.update(tokens))
    denoiser.encoder.encode(prompt, 16)
    for key, tokenizer, length in (("clip", pipe.tokenizer, 77), ("t5", pipe.tokenizer_2, 16)):
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        assert given[key].tolist() == [ids]


class Stop(Exception):
    """Raised by an encoder that was given its tokens."""


PROMPTS = (
    "",
    "A b ",
    "y " * 90,
    "z " * 600,
    """say 'a b' or "c\nd" it's""",
    "\u201cq r\u201dx\u2018s\u2019",
    "'don't",
    "a 'b c",
)


@pytest.mark.parametrize("name", ["pixart", "sana", "ovis-image", "longcat-image", "krea-2", "flux3"])
def test_any_prompt_has_the_tokens_of_its_pipeline(whole, name, monkeypatch):
    """In its template, in lower case, spelled in quotes, cut off and filled up as each pipeline does it."""
    (pipe, denoiser), told, given = whole(name), {}, {}

    def stop(input_ids, attention_mask, **_):
        told.update(ids=input_ids, mask=attention_mask)
        raise Stop

    def asked(prompt, negative, length):
        if name == "flux3":
            embed = pipe.blocks.sub_blocks["text_encoder"]._get_qwen3_vl_prompt_embeds
            return embed(pipe.text_encoder, pipe.tokenizer, prompt, max_sequence_length=length)
        if name == "sana":
            most = {"max_sequence_length": 16}
            instruction = None if negative else inspect.signature(pipe.__call__).parameters["complex_human_instruction"]
            most |= {"complex_human_instruction": instruction and instruction.default}
            return pipe._get_gemma_prompt_embeds(prompt, "cpu", torch.float32, **most)
        return pipe.encode_prompt(prompt, **({} if length is None else {"max_sequence_length": length}))

    monkeypatch.setattr(pipe.text_encoder, "forward", stop)
    monkeypatch.setattr(type(denoiser.encoder.part), "__call__", lambda part, tokens: given.update(tokens))
    for prompt, negative in product(PROMPTS, (False, True)):
        length = {"longcat-image": None, "flux3": 100 if negative else 170}.get(name, 16)  # no multiples of 80
        with pytest.raises(Stop):
            asked(prompt, negative, length)
        denoiser.encoder.encode(prompt, length, negative=negative)
        ids, mask = (given[key] for key in ("t5" if name == "pixart" else "tokens", "mask"))
        if name == "sana":
            total = told["ids"].shape[1]
            assert given["kept"].tolist() == [[0, *range(total - 15, total)]]
            assert not mask[:, total:].any() and negative == (total == 16) == (total < ids.shape[1])
            ids, mask = ids[:, :total], mask[:, :total]
        assert ids.tolist() == told["ids"].tolist(), prompt
        assert mask.tolist() == told["mask"].long().tolist(), prompt


def test_templates_and_lengths_are_those_of_diffusers(whole):
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, SanaPipeline

    for kind, changes in ((PixArtSigmaPipeline, {}), (PixArtAlphaPipeline, FAMILIES["pixart"].by_pipeline)):
        (tokens,) = {"whole": FAMILIES["pixart"].whole, **changes.get(kind.__name__, {})}["whole"].tokens
        assert tokens.length == inspect.signature(kind.__call__).parameters["max_sequence_length"].default
    (tokens,) = FAMILIES["sana"].whole.tokens
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert tokens.template == tokens.dropped + "{}" == "\n".join(told) + "{}"
    (tokens,), pipe = FAMILIES["ovis-image"].whole.tokens, whole("ovis-image")[0]
    assert tokens.chat("a")[0][0]["content"] == pipe.system_prompt + "a" and tokens.dropped == pipe.user_prompt_begin_id
    for name in ("longcat-image", "krea-2"):
        (tokens,), pipe = FAMILIES[name].whole.tokens, whole(name)[0]
        assert tokens.template == pipe.prompt_template_encode_prefix + "{}"
        assert tokens.suffix == pipe.prompt_template_encode_suffix
    assert tokens.dropped == pipe.prompt_template_encode_start_idx


def test_what_cannot_be_asked_is_refused(whole):
    _, denoiser = whole("flux")
    for change, problem in (
        ({"negative": "x"}, "its guidance takes no second prompt"),
        ({"length": 513}, "length of the prompt is 513, expected 1 to 512"),
        ({"size": (30, 32)}, "size height is 30, expected a multiple of 4"),
    ):
        asked = {"size": (32, 32), **change}
        with pytest.raises(ConfigError, match=problem):
            prompt_request(denoiser, [PROMPT], [0], **asked)


# A bundle on disk ---------------------------------------------------------------------------------------------------


def test_run_draws_from_a_prompt(whole_flux, tmp_path, capsys):
    out = tmp_path / "two.png"
    asked = ["--prompt", PROMPT, "--n", "2", "--size", "32x48", "--seed", "3", "--prompt-tokens", "16"]
    assert cli.main(["run", str(whole_flux), *asked, "--plan", "FF", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "encode" in said and "decode" in said
    with load(whole_flux) as denoiser:
        request = prompt_request(denoiser, [PROMPT] * 2, [3, 4], (32, 48), length=16)
        made = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF")).latents)
    files = [tmp_path / f"two-{k}.png" for k in (1, 2)]
    assert [str(file) in said for file in files] == [True, True] and not out.exists()
    for file, one in zip(files, made, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), one)


def test_run_draws_without_the_libraries_of_its_pipeline(whole_bundles, tmp_path):
    """Gemma, DPM-Solver and DC-AE, without torch, diffusers and transformers; to the bits that it has with them."""
    folder, out = whole_bundles("sana"), tmp_path / "a.png"
    absent = "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)\n"
    start = "from taylorseer_export.cli import main; sys.exit(main(sys.argv[1:]))"
    asked = [
        "--prompt",
        PROMPT,
        "--negative-prompt",
        OTHER,
        "--guidance-scale",
        "4",
        "--size",
        "96x160",
        "--plan",
        "FF",
    ]
    command = [sys.executable, "-c", absent + start, "run", str(folder), *asked, "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with load(folder, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT], [0], (96, 160), 4.0, OTHER)
        made = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF")).latents)
    assert np.array_equal(np.asarray(Image.open(out)), made[0])


def test_run_writes_previews_while_it_draws(whole_flux, tmp_path, capsys, monkeypatch):
    told = []

    @contextmanager
    def progress(label, total, quiet=False):
        yield lambda *what: told.append((*what, len(list(tmp_path.iterdir()))))

    monkeypatch.setattr("taylorseer_export.commands.run.progress", progress)
    asked = ["--prompt", PROMPT, "--n", "2", "--size", "32x48", "--seed", "3", "--plan", "FF.F", "--threads", "1"]
    command = ["run", str(whole_flux), *asked, "--out", str(tmp_path / "a.png")]
    assert cli.main([*command, "--previews", "2"]) == 0
    said = capsys.readouterr().out
    notes = ("1 of 2 previews", "2 of 2 previews", "2 of 2 previews", "2 of 2 previews")
    assert told == [(k + 1, 4, note, files) for k, (note, files) in enumerate(zip(notes, (2, 4, 4, 4), strict=True))]
    with load(whole_flux, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT] * 2, [3, 4], (32, 48))
        loop = Loop(denoiser, request, denoiser.forecasts(plan="FF.F"))
        branches = loop.open(denoiser)
        loop.begin(branches)
        made = {step.number: pictures_of(denoiser, request, loop.estimate()) for step in denoise(loop, branches)}
        whole = pictures_of(denoiser, request, loop.latents)
    for picture in (0, 1):
        for k, expected in (("", whole), ("-preview-1", made[0]), ("-preview-2", made[1])):
            file = tmp_path / f"a-{picture + 1}{k}.png"
            assert str(file) in said and np.array_equal(np.asarray(Image.open(file)), expected[picture])
    assert not np.array_equal(made[0], made[1])
    for more, problem in (
        (["--previews", "4"], "--previews is 4 for 4 steps, expected at most 3"),
        (["--previews", "1", "--out", str(tmp_path / "a.safetensors")], "--previews is 1 for latents of flux-whole"),
    ):
        assert cli.main([*command, *more]) == 2
        assert problem in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def test_run_edits_a_picture(whole_kontext, tmp_path, capsys):
    Image.fromarray(CASES["kontext"].picture).save(tmp_path / "given.png")
    run = ["run", str(whole_kontext), "--prompt", PROMPT, "--seed", "3", "--plan", "FF.F", "--threads", "1"]
    out = tmp_path / "edited.png"
    assert cli.main([*run, "--image", str(tmp_path / "given.png"), "--out", str(out)]) == 0
    with load(whole_kontext, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT], [3], given=Given(CASES["kontext"].picture))
        made = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF.F")).latents)
    assert np.array_equal(np.asarray(Image.open(out)), made[0])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for more, problem in (
        ([], "picture is missing for flux-kontext-whole"),
        (["--image", str(tmp_path / "broken.png")], "expected a picture that Pillow reads"),
        (["--image", str(tmp_path / "none.png")], "expected a picture that Pillow reads"),
    ):
        capsys.readouterr()
        assert cli.main([*run, *more, "--out", str(tmp_path / "other.png")]) == 2
        assert problem in capsys.readouterr().err and not (tmp_path / "other.png").exists()


def test_triton_s_model_takes_a_picture(whole_kontext):
    picture = CASES["kontext"].picture
    with load(whole_kontext, threads=1) as denoiser:
        assert contract.Port("image", "UINT8", (-1, -1, 3)) in contract.inputs(denoiser.manifest, "picture")
        values = {"prompt": np.array([PROMPT.encode()], object), "seed": np.array([3]), "image": picture}
        for size, more in (((32, 48), {"height": np.array([32]), "width": np.array([48])}), (None, {})):
            asked = contract.ask(denoiser, "picture", {**values, **more}).request
            expected = prompt_request(denoiser, [PROMPT], [3], size, given=Given(picture))
            assert (asked.height, asked.width) == (expected.height, expected.width)
            for name, value in expected.conditioning.items():
                assert asked.conditioning[name].tobytes() == value.tobytes()
        with pytest.raises(ConfigError, match="input `image` is missing, expected UINT8"):
            contract.ask(denoiser, "picture", {name: value for name, value in values.items() if name != "image"})


def test_measures_draw_from_prompts(whole_flux):
    """What `evaluate` and `calibrate` sample is what `run` draws."""
    with load(whole_flux) as denoiser:
        (group,) = groups(denoiser, 2, 7, [PROMPT, OTHER])
        expected = prompt_request(denoiser, [PROMPT, OTHER], [7, 8])
        assert group.latents.tobytes() == expected.latents.tobytes()
        for name, value in expected.conditioning.items():
            assert group.conditioning[name].tobytes() == value.tobytes()
        with pytest.raises(ConfigError, match="--prompts is missing for flux-whole"):
            groups(denoiser, 2, 7)


def test_every_byte_of_a_part_is_checked(whole_flux, tmp_path):
    for file in ("text/tokenizer.json", "decode/weights.safetensors"):
        copy = tmp_path / file.replace("/", "-")
        shutil.copytree(whole_flux, copy)
        data = bytearray((copy / file).read_bytes())
        data[-1] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(TaylorSeerError, match=f"{file} has SHA-256"):
            load(copy)


def test_a_part_may_lie_elsewhere(whole_flux, tmp_path):
    """On another disk, behind a link."""
    copy = tmp_path / "bundle"
    shutil.copytree(whole_flux, copy)
    shutil.move(copy / "text", tmp_path / "encoders")
    (copy / "text").symlink_to(tmp_path / "encoders")
    with load(whole_flux) as here, load(copy, devices={"text": "cpu"}) as there:
        one, other = (denoiser.encoder.encode(PROMPT, 16) for denoiser in (here, there))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["--without", "text"], "--without is given without --whole"),
        (
            ["--whole", "--without", "text", "--without", "encode", "--without", "decode"],
            "and a part of it; leave --whole out",
        ),
    ],
)
def test_contradictions_are_refused_before_any_work(whole_flux, tmp_path, capsys, change, problem):
    pipeline = whole_flux.parent / "pipeline"
    assert cli.main(["flux", "--model", str(pipeline), "--out", str(tmp_path), *change]) == 2
    assert problem in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: shutil.rmtree(folder / "vae"), "has no folder `vae`"),
        (lambda folder: _edit(folder, text_encoder=["mine", "Encoder"]), "`text_encoder` of"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_before_any_work(whole_flux, tmp_path, capsys, spoil, problem):
    folder = tmp_path / "pipeline"
    shutil.copytree(whole_flux.parent / "pipeline", folder)
    spoil(folder)
    assert cli.main(["flux", "--model", str(folder), "--whole", "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["flux3"])
def test_a_modular_folder_says_its_classes_otherwise(whole_bundles, tmp_path, capsys, family):
    """Also of components that were not loaded when it was saved."""
    index, folder = "modular_model_index.json", tmp_path / "pipeline"
    shutil.copytree(whole_bundles(family).parent / "pipeline", folder)
    asked = [family, "--model", str(folder), "--whole", "--out", str(tmp_path / "out")]
    shutil.rmtree(folder / "vae")
    kinds = {"type_hint": ["diffusers", "AutoencoderKLFlux2"]}
    for entries, problem in (
        ({"vae": [None, None, kinds]}, "has no folder `vae`, expected a whole diffusers pipeline"),
        ({"vae": [None, None, {}]}, "`vae` of"),
        ({"vae": ["mine", "Decoder", kinds]}, "`vae` of"),
    ):
        _edit(folder, index, **entries)
        assert cli.main(asked) == 2 and problem in capsys.readouterr().err
    (folder / index).unlink()
    assert cli.main(asked) == 2 and "has no model_index.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _edit(folder, index="model_index.json", **entries):
    path = folder / index
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_the_transformer_alone_says_how_to_get_the_rest(embedded):
    with load(embedded("videos")) as denoiser, pytest.raises(TaylorSeerError, match=r"has no part `text`.*--whole"):
        prompt_request(denoiser, [PROMPT], size=(5, 32, 32))
