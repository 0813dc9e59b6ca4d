"""Whole requests on ranks: guidance, guards, previews and LoRAs as in one process, and faults that end all of them."""

# Shapes: S steps, B batch

import re
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from harness import allowed, eager_denoiser
from images_api import client_of, models_over, picture_in, serving
from oracle import assert_close
from ranks import denoisers_on_ranks, following, sound
from test_lora_at_load import pairs, written
from test_low_rank import TARGETS, with_loras
from tiny_bundles import options_of, trace_of
from tiny_pipelines import flux_pipeline
from torch import distributed

from taylorseer_export.bundle.manifest import Sections
from taylorseer_export.bundle.store import Bundle, open_bundle
from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import describe, draft
from taylorseer_export.embedded.requests import pictures_of, prompt_request
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Guard
from taylorseer_export.runtime.denoiser import Denoiser, load
from taylorseer_export.runtime.denoiser import _hash as hash_of
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.following import follow
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.sampling import Loop, denoise, preview_steps, sample
from taylorseer_export.runtime.sections import course_of
from taylorseer_export.runtime.share import whole_of
from taylorseer_export.runtime.tensors import NEGATIVE, tensor_request
from taylorseer_export.runtime.trajectory import random_conditioning
from taylorseer_export.serve.api import loaded

PLAN, GUARDED, ORDER, PREVIEWS = "FF.F..", "FF......", 2, 2
GUARDS = ("fbcache",)
# Model -> (mode, what its export changes, sizes of a request: an odd number of rows for each of 2 ranks).
MADE = {
    "flux": ("gather", {"lora_rank": 4}, {"image_tokens": 10}),
    "qwen-image": ("gather", {}, {"image_tokens": 10}),
    "wan": ("ulysses", {}, {"frames": 3, "rows": 2, "columns": 3}),
}


@pytest.fixture(scope="module")
def shared(tiny):
    """Model -> draft of what one of two ranks runs."""

    def make(name):
        mode, changes, _ = MADE[name]
        how = {"engine": "inductor", "parallel": mode, "degree": 2, "guards": GUARDS}
        options = options_of("module", "snapshots", ORDER, **how, **changes)
        return draft(trace_of(name, tiny(name).folder, options), options)

    return cache(make)


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Two LoRAs of FLUX."""
    folder, model = tmp_path_factory.mktemp("lora"), tiny("flux").model
    made = [pairs(model, TARGETS, seed) for seed in range(2)]
    return [written(folder / f"{k}.safetensors", given, alpha=None) for k, given in enumerate(made)]


def one_of(made):
    """What one process knows of a bundle that is shared out, without engines."""
    return Denoiser(whole_of(describe(made, "eager")), EagerRunner({}, {}))


def request_of(one, name, seeds=(3, 4)):
    """A sample for each seed; guided where that takes a second prediction, by a negative prompt of another length."""
    sizes = MADE[name][2]
    texts = {n: t.shape.index("text_tokens") for n, t in one.constants.items() if "text_tokens" in t.shape}
    typical = {n: dimension.typical for n, dimension in one.manifest.dimensions.items()}
    tensors = random_conditioning(one, {**typical, "text_tokens": 4, **sizes, "batch": 1}, guided=True)
    if one.manifest.sampling.guidance == "branches":
        twins = {n: tensors.get(NEGATIVE + n, tensors[n]) for n in texts}
        tensors |= {NEGATIVE + n: value.take(range(3), texts[n]) for n, value in twins.items()}
    return tensor_request(one, tensors, seeds, sizes, (2, 5) if "image_tokens" in sizes else None, 3.0)


def drawn(denoiser, request):
    """What a rank makes: predictions of its rows [S], previews, latents, and the steps that ran."""
    loop = Loop(denoiser, request, denoiser.forecasts(plan=PLAN, order=ORDER))
    branches, predictions, previews = loop.open(denoiser), [], []
    loop.begin(branches)
    for step in denoise(loop, branches):
        predictions.append(step.noise_pred)
        if loop.step in preview_steps(len(PLAN), request.previews):
            previews.append(loop.estimate())
    return predictions, previews, loop.latents, branches.executed


@pytest.mark.parametrize(("name", "ranks"), [("flux", 2), ("qwen-image", 2), ("wan", 2), ("wan", 4)])
def test_a_request_on_ranks_is_that_of_one_process(shared, tiny, files, name, ranks):
    """With previews; FLUX with a LoRA, the others guided: on 4 ranks each two of them run one branch.

    Predictions are the model's within the bound; what is made of them is what one process makes, to the bit.
    """
    made, model = shared(name), tiny(name).model
    one = one_of(made)
    request, teller = replace(request_of(one, name), previews=PREVIEWS), model
    if name == "flux":
        request, teller = replace(request, lora=one.adapter(f"{files[0]}:0.7")), with_loras(model, {files[0]: 0.7})
    assert len(request.branches) == (1 if name == "flux" else 2)
    seen = sound(denoisers_on_ranks(made, lambda denoiser: drawn(denoiser, request), guidance=ranks == 4))
    loop = Loop(one, request, one.forecasts(plan=PLAN, order=ORDER))
    given, answers, previews = [], [], []
    for parts in zip(*(predictions for predictions, *_ in seen), strict=True):
        given.append(loop.model_input())
        rows = [k for k, size in enumerate(parts[0].shape) if k and size != given[-1].shape[k]]
        answers.append(np.concatenate(parts, rows[0]) if rows else parts[0])
        loop.accept(answers[-1])
        if loop.step in preview_steps(len(PLAN), PREVIEWS):
            previews.append(loop.estimate())
    assert len(seen) == ranks and len(previews) == PREVIEWS
    for _, shown, latents, executed in seen:
        assert np.array_equal(latents, loop.latents) and executed == PLAN
        assert np.array_equal(shown, previews)
    given, times = torch.from_numpy(np.stack(given)), torch.from_numpy(loop.model_timesteps.astype(np.float32))
    branches = [{n: torch.from_numpy(value) for n, value in branch.items()} for branch in request.branches]
    expected = torch.cat([oracle.replay(teller, given, times, branch, PLAN, ORDER) for branch in branches], 1)
    assert_close(name, torch.from_numpy(np.stack(answers)), expected, allowed(model, expected, PLAN, ORDER))


def test_a_video_in_sections_on_ranks_is_that_of_one_process(tiny):
    """FramePack: each section is told what all ranks made before it, where all call alike and where rank 0 leads.

    Predictions of a section are the model's within the bound; what is made of them is what one process makes.
    """
    changes = {"engine": "inductor", "parallel": "gather", "degree": 2}
    options = options_of("residual", "snapshots", ORDER, **changes)
    made, model = draft(trace_of("framepack", tiny("framepack").folder, options), options), tiny("framepack").model
    one, sizes = one_of(made), {"frames": 2, "rows": 2, "columns": 3, "text_tokens": 5, "batch": 1}
    tensors = random_conditioning(one, {**{n: d.typical for n, d in one.manifest.dimensions.items()}, **sizes})
    asked = tensor_request(one, tensors, [3], sizes)
    (_, channels, _, *sides), count = asked.latents.shape, 2
    picture = np.random.default_rng(5).normal(size=(1, channels, 1, *sides)).astype(np.float32)
    described = Sections(**asdict(FAMILIES["framepack"].whole.sections))
    course = replace(course_of(one.manifest, described, count, picture), window=sizes["frames"])
    request = replace(asked, latents=np.concatenate([asked.latents, -asked.latents], 2), course=course)

    def led(denoiser):
        with denoiser:
            forecasts = denoiser.forecasts(plan=PLAN, order=ORDER)
            return "followed" if follow(denoiser) else sample(denoiser, request, forecasts)

    seen = sound(denoisers_on_ranks(made, lambda denoiser: drawn(denoiser, request)))
    result, other = sound(denoisers_on_ranks(made, led))
    assert other == "followed" and result.executed == PLAN * count
    loop, told = Loop(one, request, one.forecasts(plan=PLAN, order=ORDER)), []
    for parts in zip(*(predictions for predictions, *_ in seen), strict=True):
        if loop.begins:
            told.append((loop.conditioning[0], loop.model_timesteps, [], []))
        told[-1][2].append(loop.model_input())
        told[-1][3].append(np.concatenate(parts, 3))  # rows
        loop.accept(told[-1][3][-1])
    for latents in (result.latents, *(latents for _, _, latents, _ in seen)):
        assert np.array_equal(latents, loop.latents)
    assert loop.latents.shape[2] == 1 + count * sizes["frames"] and len(told) == count
    for number, (given, times, inputs, answers) in enumerate(told):
        constants = {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}
        expected = oracle.replay(
            model, torch.from_numpy(np.stack(inputs)), torch.from_numpy(times.astype(np.float32)), constants, PLAN,
            ORDER, "residual",
        )  # fmt: skip
        bound = allowed(model, expected, PLAN, ORDER)
        assert_close(f"section {number}", torch.from_numpy(np.stack(answers)), expected, bound)


def test_a_lora_is_sent_once_and_its_strength_each_time(shared, files):
    """By rank 0 to those that follow; one of a request that failed is sent again."""
    made = shared("flux")
    one = one_of(made)
    style, other = map(one.adapter, files)
    plain = request_of(one, "flux")
    asked = [replace(plain, lora=lora) for lora in (style, style.at(0.5), other, None, other)]
    broken = {**plain.conditioning, "img_ids": np.full_like(plain.conditioning["img_ids"], np.nan)}

    def work(denoiser):
        with denoiser:
            if follow(denoiser):
                return None
            made = []
            for number, request in enumerate(asked):
                if number == 2:
                    with pytest.raises(StepError, match="`img_ids` has "):
                        drawn(denoiser, replace(request, conditioning=broken))
                before = denoiser.share.group.sent
                made.append((drawn(denoiser, request)[2], denoiser.share.group.sent - before))
            loop = Loop(denoiser, plain, denoiser.forecasts(plan="F."))
            branches = loop.open(denoiser)
            loop.begin(branches)
            next(denoise(loop, branches))
            with pytest.raises(ConfigError, match="a preview after step 1 that the request does not ask for is asked"):
                loop.estimate()
            return made

    led, _ = denoisers_on_ranks(made, work, timeout=10.0)
    assert not isinstance(led, Exception), led
    alike, _ = sound(denoisers_on_ranks(made, lambda denoiser: [drawn(denoiser, one)[2] for one in asked]))
    for (latents, _), expected in zip(led, alike, strict=True):
        assert np.array_equal(latents, expected)
    assert len({latents.tobytes() for latents in alike}) == 4
    assert [sent > style.matrices.nbytes for _, sent in led] == [True, False, True, False, False]


@pytest.mark.parametrize(("name", "ranks"), [("flux", 2), ("wan", 2), ("wan", 4)])
def test_ranks_decide_once_and_alike(shared, drafts, name, ranks):
    """As one process: by all rows, and where guidance makes two calls by the conditional one. 16 bytes a decision."""
    alone = eager_denoiser(drafts(name, "module", "snapshots", ORDER, guards=GUARDS))
    request = request_of(alone, name)

    def run(denoiser, threshold):
        guard = Guard("fbcache", threshold)
        before = [group.sent for group in denoiser.share.groups]
        result = sample(denoiser, request, denoiser.forecasts(plan=GUARDED, order=ORDER, guard=guard))
        return result, [group.sent - so_far for group, so_far in zip(denoiser.share.groups, before, strict=True)]

    threshold = middle(run(alone, 1e30)[0].errors)
    expected, _ = run(alone, threshold)
    assert 0 < expected.executed[2:].count("F") < 6
    seen = sound(denoisers_on_ranks(shared(name), lambda denoiser: run(denoiser, threshold), guidance=ranks == 4))
    full, asked, bytes_ = expected.executed.count("F"), GUARDED.count("."), expected.latents.nbytes
    calls = len(request.branches)
    for result, (sent,) in seen:
        assert result.executed == expected.executed
        np.testing.assert_array_equal(result.errors, seen[0][0].errors)
        if ranks == 2:  # steps, decisions, and its own rows at the end
            assert sent == 8 * calls * full + 16 * asked + bytes_ // 2
        else:  # decisions, and its own rows of its branch in each step; its half holds steps together
            assert sent == (ranks - 1) * (16 * asked + len(GUARDED) * bytes_ // 2)


def middle(errors):
    """A threshold that some of these are above and some below."""
    return float(np.median([error for error in errors if error == error]))


def test_a_pipeline_on_ranks_is_guarded_as_in_one_process(shared, drafts, tiny):
    """The slots of its first loop serve the next one."""
    options = {"height": 16, "width": 16, "max_sequence_length": 6, "output_type": "latent"}

    def paint(pipe, denoiser, threshold):
        pipe.transformer = denoiser.as_transformer(plan=GUARDED, guard="fbcache", threshold=threshold)
        slots = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(0)
            pipe("cat", num_inference_steps=len(GUARDED), generator=generator, **options)
            ((_, idle),) = pipe.transformer._callers.idle
            slots += idle.values()
        assert slots[0] is slots[1]
        return slots[0].executed, slots[0].errors

    alone = eager_denoiser(drafts("flux", "module", "snapshots", ORDER, guards=GUARDS))
    first, *pipes = [flux_pipeline(tiny("flux").model) for _ in range(3)]
    threshold = middle(paint(first, alone, 1e30)[1])
    expected, _ = paint(first, alone, threshold)
    assert 0 < expected[2:].count("F") < 6
    work = sound(denoisers_on_ranks(shared("flux"), lambda d: paint(pipes[d.share.rank], d, threshold)))
    assert [executed for executed, _ in work] == [expected] * 2
    np.testing.assert_array_equal(work[0][1], work[1][1])


def test_a_server_on_ranks_draws_what_rank_0_samples(shared, whole_flux, files):
    """One request with a guard, previews and a LoRA of its own."""
    made, bundle = shared("flux"), open_bundle(whole_flux)
    own = describe(made, "eager")
    parts = {name: getattr(own, name) for name in ("parallel", "dimensions", "graphs", "state", "lora")}
    manifest, modules = bundle.manifest.model_copy(update=parts), eager_modules(made)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with following(manifest, modules, store.port):
        denoiser = Denoiser(
            manifest, EagerRunner(modules, manifest.graphs), bundle, group=Group(store, 0, 2, timeout=20.0)
        )
        denoiser.share.owned = True
        with denoiser:
            assert not follow(denoiser)
            style, shown = denoiser.adapter(files[0]), []
            request = prompt_request(denoiser, ["cat"], [3], (16, 16))
            request = replace(request, lora=style.at(0.5), previews=PREVIEWS)

            def sampled(threshold, seen=lambda loop: None):
                forecasts = denoiser.forecasts(plan=GUARDED, guard=Guard("fbcache", threshold))
                return sample(denoiser, request, forecasts, on_step=seen)

            def preview(loop):
                if loop.step in preview_steps(len(GUARDED), PREVIEWS):
                    shown.append(loop.estimate())

            threshold = middle(sampled(1e30).errors)
            result = sampled(threshold, preview)
            assert 0 < result.executed[2:].count("F") < 6
            pictures = [pictures_of(denoiser, request, latents)[0] for latents in (*shown, result.latents)]
            limits = {"slots": 1, "batch": 1, "workers": 1}
            with models_over(denoiser, loras={"style": style}, **limits) as models, serving(models) as port:
                how = {"seed": 3, "plan": GUARDED, "guard": "fbcache", "threshold": threshold, "lora": "style:0.5"}
                ask = client_of(port).images.generate
                events = [*ask(prompt="cat", size="16x16", stream=True, partial_images=PREVIEWS, extra_body=how)]
    assert len(events) == len(pictures) == PREVIEWS + 1
    for event, picture in zip(events, pictures, strict=True):
        assert np.array_equal(picture_in(event.b64_json), picture)
    assert events[-1].model_extra["taylorseer"]["executed"] == result.executed


def test_a_server_on_ranks_loads_one_model(drafts, monkeypatch):
    one = eager_denoiser(drafts("flux", "module", "snapshots", ORDER, guards=GUARDS))
    monkeypatch.setattr(loaded, "load", lambda *given, **more: one)
    said = r"--lora is given for flux-eager on 2 ranks, expected one that takes a LoRA with each request, .*-rank"
    with pytest.raises(ConfigError, match=said):
        loaded.load_models([Path("a")], loras={"style": "a.safetensors"}, group=SimpleNamespace(size=2))


# Faults: what rank 1 does wrong -> what rank 0 says, and what rank 1 says.


def dies(denoiser, request, files):
    def leave(loop):
        if denoiser.share.rank and loop.step == 2:
            raise KeyError("left")

    sample(denoiser, request, denoiser.forecasts(plan=PLAN), on_step=leave)


def is_late(denoiser, request, files):
    def wait(loop):
        if denoiser.share.rank and loop.step == 2:
            time.sleep(1.5 * denoiser.share.group.timeout)

    sample(denoiser, request, denoiser.forecasts(plan=PLAN), on_step=wait)


def has_another_plan(denoiser, request, files):
    sample(denoiser, request, denoiser.forecasts(plan="FF.F"[: 4 - denoiser.share.rank]))


def has_another_bundle(denoiser, request, files):
    manifest = denoiser.share.contract.manifest
    name = "another" if denoiser.share.rank else manifest.name
    load(Bundle(Path("a"), manifest.model_copy(update={"name": name})), group=denoiser.share.group)


def has_another_lora(denoiser, request, files):
    bundle = Bundle(Path("a"), denoiser.share.contract.manifest)
    load(bundle, lora=files[denoiser.share.rank], group=denoiser.share.group)


def has_another_lora_of_a_request(denoiser, request, files):
    """Of the same name, as on two machines."""
    lora = replace(denoiser.adapter(files[denoiser.share.rank]), given=("style.safetensors",))
    sample(denoiser, replace(request, lora=lora), denoiser.forecasts(plan=PLAN))


def has_another_scale(denoiser, request, files):
    request = replace(request, guidance_scale=3.0 + denoiser.share.rank)
    sample(denoiser, request, denoiser.forecasts(plan=PLAN))


def is_at_another_step(denoiser, request, files):
    """As where guards would decide otherwise: what a slot of one rank begins is not compared."""
    share, loop = denoiser.share, Loop(denoiser, request, denoiser.forecasts(plan=PLAN))
    slot = denoiser.slot(loop.sizes, own=True)
    forecasts = denoiser.forecasts(plan="FF..F" if share.rank else "FF.F.")
    slot.start(share.conditioning(request.conditioning), forecasts, loop.model_timesteps[:5])
    for _ in range(5):
        slot.step(share.latents(loop.model_input()))


def has_another_shape(denoiser, request, files):
    if denoiser.share.rank:
        request = request_of(denoiser, "flux", (3,))
    sample(denoiser, request, denoiser.forecasts(plan=PLAN))


def test_the_order_in_which_a_lora_is_read_is_no_difference():
    """It is another in each process."""
    one, other = np.zeros(3, np.float32), np.ones((2, 2), np.float32)
    assert hash_of({"a": one, "b": other}) == hash_of({"b": other, "a": one}) != hash_of({"a": one, "b": -other})


GONE = r"rank 1 of 2 has died or is late after \d\.\d s at step 3 .*, expected all 2 ranks within 2 s"
FAULTS = {
    dies: (GONE, "'left'"),
    is_late: (GONE.replace(r"\d\.\d s", r"[23]\.\d s"), r"rank 1 of 2 has died or is late after [01]\.\d s at step 3"),
    has_another_plan: ("`plan` of rank 1 is .*'FF.'.*, expected .*'FF.F'.* as of rank 0",) * 2,
    has_another_bundle: (r"`bundle` of rank 1 is \w{64}, expected \w{64} as of rank 0; start all ranks alike",) * 2,
    has_another_lora: (r"`lora` of rank 1 is \w{64}, expected \w{64} as of rank 0; start all ranks alike",) * 2,
    has_another_lora_of_a_request: (r"`lora` of rank 1 is style.safetensors of strength 1.0 \(numbers \d+\), expected",)
    * 2,
    has_another_scale: ("`guidance_scale` of rank 1 is 4.0, expected 3.0 as of rank 0",) * 2,
    is_at_another_step: ("rank 1 is at step 4, expected step 3 as rank 0; run one plan on all ranks",) * 2,
    has_another_shape: (r"`latents` of rank 1 is float32 \[1, 10, 16\] \d+, expected float32 \[2, 10, 16\] \d+ as",)
    * 2,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_rank_that_differs_ends_all_in_one_sentence_that_names_it(shared, files, fault):
    made = shared("flux")
    request = request_of(one_of(made), "flux")
    seen = denoisers_on_ranks(made, lambda denoiser: fault(denoiser, request, files), timeout=2.0)
    for error, said in zip(seen, FAULTS[fault], strict=True):
        assert isinstance(error, Exception) and re.search(said, str(error)), error
