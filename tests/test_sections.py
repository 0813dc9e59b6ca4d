"""Videos that whole bundles make section by section: each is what the untouched pipeline makes, loop after loop."""

# Shapes: N samples, C channels, F latent frames, H and W latent pixels

import base64
import copy
import io
import json
from contextlib import nullcontext
from threading import Event

import numpy as np
import oracle
import pytest
import torch
import triton_server
from images_api import SECONDS, alone, asked, client_of, ended, frames_of, models_over, serving
from PIL import Image
from pipelines_with_parts import (
    EDITED,
    PROMPT,
    bound_of_picture,
    denoiser_with_parts,
    depth_and_length,
    drawn,
    write_pipeline,
)
from safetensors.numpy import load_file
from tiny_bundles import options_of
from tiny_models import MODELS, tiny_framepack
from tiny_pipelines import whole_framepack
from triton_server import Server

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.commands import run
from taylorseer_export.compile.export import draft
from taylorseer_export.embedded.animating import in_sections
from taylorseer_export.embedded.edits import Given, given_picture
from taylorseer_export.embedded.requests import frame_rate, pictures_of, prompt_request, size_of, usual_size
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.card import card
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import Loop, sample
from taylorseer_export.runtime.sections import course_of, sections_of, window_of
from taylorseer_export.serve import contract
from taylorseer_export.serve.api import videos
from taylorseer_export.serve.api.fleet import open_models
from taylorseer_export.serve.client import infer
from taylorseer_export.serve.contract import sides_named
from taylorseer_export.serve.repository import Deployment, write_repository
from taylorseer_export.serve.service import Limits, Service

pytestmark = pytest.mark.slow

STEPS, SEED, SCALE, LENGTH, WINDOW, SIDES = 2, 3, 4.0, 200, 2, (128, 192)
DIRECTIONS = {"backward": "inverted_anti_drifting", "forward": "vanilla"}


@pytest.fixture(scope="module")
def sectioned(once):
    """Direction -> (the pipeline, a denoiser with its parts)."""
    latent = {"latent_size": (WINDOW, SIDES[0] // 8, SIDES[1] // 8)}
    pipe = whole_framepack(tiny_framepack())
    folder = once("parts-framepack-sections", lambda folder: write_pipeline(pipe, "framepack", folder, **latent))
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES["framepack"])
    backward = denoiser_with_parts(draft(checkpoint, options_of(**latent, guards=("cg",))), folder)
    forward, parts = copy.copy(backward), dict(backward.manifest.parts)
    sections = FAMILIES["framepack"].variant("FramePack_F1_I2V_HY_20250503").whole.sections
    assert (sections.direction, sections_of(backward.manifest).direction) == ("forward", "backward")
    changed = sections_of(backward.manifest).model_copy(update={"direction": sections.direction})
    parts["encode"] = parts["encode"].model_copy(update={"sections": changed})
    forward.manifest = backward.manifest.model_copy(update={"parts": parts})
    forward.bundle = Bundle(folder, forward.manifest)
    return {"backward": (pipe, backward), "forward": (pipe, forward)}


def size_of_sections(count):
    return (4 * WINDOW * count + 1, *SIDES)


def request_of(denoiser, count, picture=EDITED, seeds=(SEED,)):
    prompts = [PROMPT] * len(seeds)
    return prompt_request(denoiser, prompts, seeds, size_of_sections(count), SCALE, None, LENGTH, given=Given(picture))


def asked_of(pipe, direction, count, steps=STEPS, seed=SEED, **more):
    """What the pipeline makes of as many sections."""
    height, width = SIDES
    with torch.no_grad():
        made = pipe(
            image=Image.fromarray(EDITED),
            prompt=PROMPT,
            height=height,
            width=width,
            num_frames=count * (4 * (WINDOW - 1) + 1),
            latent_window_size=WINDOW,
            num_inference_steps=steps,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(seed),
            sampling_type=DIRECTIONS[direction],
            **{"output_type": "pt", "max_sequence_length": LENGTH, **more},
        ).frames
    return made[0] if more.get("output_type", "pt") == "pt" else made


@pytest.mark.parametrize(("direction", "count"), [("backward", 1), ("backward", 3), ("forward", 2)])
def test_the_video_is_the_pipelines(sectioned, direction, count):
    """From prompt and picture to video, all steps full, noise of the same seed; neighbours are blended."""
    pipe, denoiser = sectioned[direction]
    expected = asked_of(pipe, direction, count)
    seen = drawn(denoiser, request_of(denoiser, count), "F" * STEPS)
    assert seen.shape[0] == size_of_sections(count)[0]
    limit = bound_of_picture(expected, pipe, count * STEPS)
    oracle.assert_close("video", seen, expected, limit)
    other = drawn(denoiser, request_of(denoiser, count, 255 - EDITED), "F" * STEPS)
    assert (other - expected).abs().max() > limit
    if count > 1:
        plain = sectioned["forward" if direction == "backward" else "backward"][1]
        assert (drawn(plain, request_of(plain, count), "F" * STEPS) - expected).abs().max() > limit


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("count", [1, 4, 6])
def test_each_section_is_given_what_the_pipeline_gives_it(sectioned, direction, count):
    """Frames of the past and places, number by number; those of sections far behind are nearer than they are."""
    pipe, denoiser = sectioned[direction]
    calls = []
    note = pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    so_far = asked_of(pipe, direction, count, steps=1, output_type="latent")
    note.remove()
    assert len(calls) == len(so_far) == count
    picture = calls[0]["latents_clean"][:, :, :1].numpy()
    course = course_of(denoiser.manifest, sections_of(denoiser.manifest), count, picture)
    made = picture[:, :, :0]
    for number, call in enumerate(calls):
        given = course.inputs(number, made)
        assert len(given) == 7
        for name, value in given.items():
            assert np.array_equal(value, call[name].numpy()), f"{name} of section {number}"
        latents = so_far[number].numpy()
        made = latents if direction == "backward" and number + 1 < count else latents[:, :, 1:]
    assert np.array_equal(course.video(made), so_far[-1].numpy())


# Wider and higher than the video, and smaller than what the image encoder sees.
@pytest.mark.parametrize(
    ("shape", "sides"), [((26, 38), SIDES), ((140, 300), (192, 128)), ((9, 7), SIDES), (SIDES, SIDES)]
)
def test_a_picture_becomes_what_the_pipeline_makes_of_it(whole, shape, sides):
    """Of a bundle of any size: brought to that of the video, then to that of the image encoder; latents are drawn."""
    pipe, denoiser = whole("framepack")
    window = window_of(denoiser.manifest)
    assert window == WINDOW
    size = (4 * 2 * window + 1, *sides)
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    with torch.no_grad():
        image = pipe.video_processor.preprocess(Image.fromarray(picture), *sides)
        states = pipe.encode_image(image, "cpu")
        generator = torch.Generator().manual_seed(SEED)
        latents = pipe.prepare_image_latents(image, torch.float32, "cpu", generator)
        noise = torch.cat([torch.randn(1, 4, window, *latents.shape[3:], generator=generator) for _ in range(2)], 2)
    made, course, drawn_noise = in_sections(denoiser, picture, size, [SEED])
    other = in_sections(denoiser, 255 - picture, size, [SEED])
    for name, value, unlike, expected, module in (
        ("image_embeds", made["image_embeds"], other[0]["image_embeds"], states, pipe.image_encoder),
        ("latents", course.picture, other[1].picture, latents, pipe.vae.encoder),
    ):
        limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(module))
        oracle.assert_close(f"{name} of {shape}", torch.from_numpy(value), expected, limit)
        assert (torch.from_numpy(unlike) - expected).abs().max() > limit
    oracle.assert_close("noise", torch.from_numpy(drawn_noise), noise, oracle.bound(noise, 1.0, torch.float32, 1, 8))


def test_every_section_forecasts_from_its_own_full_steps(sectioned):
    """The drop-in makes a request of each section; a loop over all of them is the same, and counts all steps."""
    pipe, denoiser = sectioned["backward"]
    untouched, plan = pipe.transformer, "F..F."
    dropin = denoiser.as_transformer(plan=plan, order=1)
    try:
        pipe.transformer = dropin
        expected = asked_of(pipe, "backward", 2, len(plan), output_type="latent")[-1]
    finally:
        pipe.transformer = untouched
    request, steps, previews = request_of(denoiser, 2), [], []
    forecasts = denoiser.forecasts(plan=plan, order=1)
    made = sample(
        denoiser, request, forecasts, on_step=lambda loop: steps.append(loop.step) or previews.append(loop.estimate())
    )
    assert made.planned == made.executed == 2 * plan and len(made.milliseconds) == len(steps) == 2 * len(plan)
    assert steps == list(range(1, 11))
    assert [seen.shape[2] for seen in previews] == [1 + WINDOW] * 5 + [1 + 2 * WINDOW] * 5
    assert np.array_equal(previews[-1], made.latents)
    assert np.array_equal(previews[4][:, :, 1:], made.latents[:, :, 1 + WINDOW :])  # the last frames are made first
    depth, length = depth_and_length(*[untouched] * 2 * len(plan))
    limit = oracle.bound(expected, 3.0, torch.float32, depth, length)  # weights of a forecast at order 1 sum to so much
    oracle.assert_close("latents", torch.from_numpy(made.latents), expected, limit)
    plain = sample(denoiser, request, denoiser.forecasts(plan="FFFFF")).latents
    assert (torch.from_numpy(plain) - expected).abs().max() > limit


def test_every_loop_begins_in_the_same_slots(sectioned):
    """What ran before stays counted."""
    denoiser = sectioned["backward"][1]
    loop = Loop(denoiser, request_of(denoiser, 2), Forecasts(Plan("F."), 0))
    branches = loop.open(denoiser)
    loop.begin(branches)
    for step in range(4):
        assert loop.begins == (step in (0, 2)) and branches.executed == "F.F."[:step]
        if step == 2:
            loop.begin(branches)
        loop.accept(branches.step(loop.model_input()))
    assert not loop.begins and branches.executed == str(loop.plan) == "F.F." and branches.errors == ()
    loop.check_executed(branches.executed)


def test_a_guard_is_asked_in_every_section(sectioned):
    """What it measured and what it made full is told of all steps; it forgets at the start of each loop."""
    denoiser = sectioned["backward"][1]
    request = request_of(denoiser, 2)
    for threshold, ran in ((1e9, "F..F"), (1e-9, "FFFF")):
        made = sample(denoiser, request, denoiser.forecasts(plan="F..F", order=0, guard="cg", threshold=threshold))
        assert (made.planned, made.executed) == (2 * "F..F", 2 * ran)
        assert [error == error for error in made.errors] == 2 * [False, True, True, False]
    full = sample(denoiser, request, denoiser.forecasts(plan="FFFF")).latents
    limit = oracle.bound(
        torch.from_numpy(full), 1.0, torch.float32, *depth_and_length(sectioned["backward"][0].transformer)
    )
    oracle.assert_close("latents", torch.from_numpy(made.latents), torch.from_numpy(full), limit)


def test_two_samples_are_two_requests(sectioned):
    denoiser = sectioned["backward"][1]
    both = sample(denoiser, request_of(denoiser, 2, seeds=(3, 4)), denoiser.forecasts(plan="F.")).latents
    for k, seed in enumerate((3, 4)):
        one = sample(denoiser, request_of(denoiser, 2, seeds=(seed,)), denoiser.forecasts(plan="F.")).latents
        expected = torch.from_numpy(one[0])
        depth, length = depth_and_length(*[sectioned["backward"][0].transformer] * 4)
        limit = oracle.bound(expected, 1.0, torch.float32, depth, length)
        oracle.assert_close(f"seed {seed}", torch.from_numpy(both[k]), expected, limit)


def test_a_video_is_as_long_as_its_sections(sectioned):
    denoiser = sectioned["backward"][1]
    manifest = denoiser.manifest
    assert window_of(manifest) == WINDOW and frame_rate(manifest) == 30
    assert usual_size(manifest) == size_of_sections(4) == size_of(manifest, Given(EDITED))
    for frames in (1, 5, 12, 18):
        with pytest.raises(ConfigError, match=f"size frames is {frames}, expected 9, 17, 25 and so on .* of 8 frames"):
            prompt_request(denoiser, [PROMPT], [SEED], (frames, *SIDES), given=Given(EDITED))
    with pytest.raises(ConfigError, match=r"picture is missing for framepack-.*, expected the one that it is to"):
        prompt_request(denoiser, [PROMPT], [SEED], size_of_sections(2))
    with pytest.raises(ConfigError, match=r"strength is 0.5, expected none, since framepack-.* begins with noise"):
        given_picture(manifest, EDITED, 0.5)
    first = request_of(denoiser, 2)  # whoever brings what a section is given runs that section
    one = prompt_request(denoiser, {n: v for n, v in first.conditioning.items() if n != "guidance"}, [SEED])
    assert one.course is None and one.latents.shape[2] == WINDOW
    assert pictures_of(denoiser, one, one.latents).shape[1] == 4 * (WINDOW - 1) + 1


def test_the_card_says_it(sectioned):
    told = card(sectioned["backward"][1].manifest)
    assert "a video is several loops, its last frames first; 4 of them as a rule" in told
    assert "30 frames per second" in told


def _of(part, name):
    return next(t for t in part["graph"]["outputs"] if t["name"] == name)


def _places(parts, number, name):
    parts["encode"]["sections"]["past"][number][1] = name


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda parts: parts["encode"]["sections"].update(new="places"), "`places` of sections is None"),
        (lambda parts: parts["encode"]["sections"]["past"][1].reverse(), "of sections holds 0 frames"),
        (lambda parts: _places(parts, 0, "encoder_attention_mask"), r"they hand the denoiser \[2\]"),
        (lambda parts: _places(parts, 1, "indices_latents_clean"), "`indices_latents_clean` twice"),
        (lambda parts: parts["encode"]["sections"].update(past=[]), "at least 1 item"),
        (lambda parts: parts["encode"].update(sections=None), "a loop begins with mean and deviation"),
        (lambda parts: _of(parts["encode"], "mean").update(name="x"), "videos in sections begin with mean"),
        (lambda parts: _of(parts["encode"], "mean").update(shape=[1, 4, 2, 16, 24]), "`mean` of part encode is"),
        (lambda parts: parts["decode"].update(tiles=None, frame_rate=None), "part decode has no tiles"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(sectioned, spoil, problem):
    told = json.loads(sectioned["backward"][1].manifest.model_dump_json())
    spoil(told["parts"])
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)


# Doors ---------------------------------------------------------------------------------------------------------------


def test_run_makes_a_video_of_a_picture(sectioned, monkeypatch, tmp_path, capsys):
    denoiser = sectioned["backward"][1]
    monkeypatch.setattr(run, "open_denoiser", lambda *_, **how: nullcontext(denoiser))
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    wanted = ["--prompt", PROMPT, "--size", "17x128x192", "--plan", "F.", "--n", "2", "--seed", "3"]
    wanted += ["--guidance-scale", "4", "--prompt-tokens", str(LENGTH)]
    command = ["run", "bundle", *wanted, "--image", str(tmp_path / "given.png"), "--out"]
    assert cli.main([*command, str(tmp_path / "made.safetensors")]) == 0
    request = request_of(denoiser, 2, seeds=(3, 4))
    expected = sample(denoiser, request, denoiser.forecasts(plan="F."))
    assert np.array_equal(load_file(tmp_path / "made.safetensors")["latents"], expected.latents)
    assert "plan      F.F. (2 of 4 steps full, as planned)" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "made.webp")]) == 0
    for k, frames in enumerate(pictures_of(denoiser, request, expected.latents)):
        write_video(tmp_path / "expected.webp", frames, 30)
        assert (tmp_path / f"made-{k + 1}.webp").read_bytes() == (tmp_path / "expected.webp").read_bytes()
    wanted[3] = "18x128x192"
    assert cli.main(["run", "bundle", *wanted, "--image", str(tmp_path / "given.png")]) == 2
    assert "size frames is 18, expected 9, 17, 25 and so on" in capsys.readouterr().err


@pytest.fixture
def written(monkeypatch):
    """Id of a job -> the frames that are written for it, and their rate: x264 need not write them twice alike."""
    found = {}

    def note(path, frames, rate):
        found[path.stem] = frames, rate
        write_video(path, frames, rate)

    monkeypatch.setattr(videos, "write_video", note)
    return found


def reference():
    """The picture as a job is given it."""
    file = io.BytesIO()
    Image.fromarray(EDITED).save(file, "png")
    return {"image_url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}


class Leaving:
    """A caller that leaves after a step; never if None."""

    def __init__(self, after=None):
        self.after, self.left, self.answered = after, False, Event()
        self.latents = self.executed = self.error = None

    def cancelled(self):
        return self.left

    def advanced(self, loop):
        self.left = loop.step == self.after

    def finished(self, loop, executed):
        self.latents, self.executed = loop.latents, executed
        self.answered.set()

    def failed(self, error):
        self.error = error
        self.answered.set()


def test_who_leaves_is_counted_in_steps_of_all_loops(sectioned):
    """At the first step of the second section; the slot that was left serves the next as a new one would."""
    denoiser = sectioned["backward"][1]
    request, forecasts = request_of(denoiser, 2), denoiser.forecasts(plan="F.")
    service = Service(denoiser, Limits(slots=1, queue=1, workers=1))
    try:
        for caller in (Leaving(2), Leaving()):
            service.submit(request, forecasts, caller)
            assert caller.answered.wait(SECONDS)
            if caller.after is not None:
                assert str(caller.error).startswith("request is cancelled after 2 of 4 steps")
        assert caller.executed == "F.F." and caller.error is None
        assert np.array_equal(caller.latents, sample(denoiser, request, forecasts).latents)
        counts = service.snapshot()
        assert (counts["planned.full"], counts["executed.full"], counts["steps.full"]) == (2, 2, 3)
    finally:
        service.close()


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_videos_api_counts_all_steps(sectioned, written):
    """Two jobs at a time, each the bits of a run alone, whose sections take turns in slots of one size."""
    denoiser = sectioned["backward"][1]
    how = {"plan": "F.", "order": 0, "guidance_scale": SCALE, "input_reference": reference()}
    with models_over(denoiser, slots=2, queue=2, workers=2) as models, serving(models) as port:
        client = client_of(port)
        (listed,) = client.models.list().data
        assert listed.model_extra["taylorseer"]["time_scale"] == 4 * WINDOW
        jobs = {}
        for seed, count in ((3, 2), (4, 3)):
            body = {"prompt": PROMPT, "size": "192x128", "frames": 8 * count + 1, "seed": seed, **how}
            status, _, text = asked(port, "/v1/videos", body, {"authorization": "Bearer none"})
            assert status == 200, text
            jobs[seed, count] = json.loads(text)["id"]
        for (seed, count), name in jobs.items():
            done = ended(client, name)
            told = done.model_extra["taylorseer"]
            assert done.status == "completed" and told["planned"] == told["executed"] == "F." * count, done
            size = size_of_sections(count)
            request = prompt_request(denoiser, [PROMPT], [seed], size, SCALE, given=Given(EDITED))
            frames, rate = written[name]
            assert np.array_equal(frames, alone(denoiser, request, plan="F.", order=0)[0]) and rate == 30
            assert len(frames_of(client.videos.download_content(name).read())) == size[0]
        body = {"prompt": PROMPT, "size": "192x128", "frames": 18, **how}
        status, _, text = asked(port, "/v1/videos", body)
        assert status == 400 and "expected 9, 17, 25 and so on" in json.loads(text)["error"]["message"]


def test_triton_s_picture_model_takes_the_picture(sectioned):
    denoiser = sectioned["backward"][1]
    ports = {port.name: port for port in contract.inputs(denoiser.manifest, "picture")}
    assert ports["image"] == contract.Port("image", "UINT8", (-1, -1, 3))
    values = {"prompt": np.array([PROMPT.encode()], object), "seed": np.array([SEED]), "image": EDITED}
    frames, height, width = size_of_sections(2)
    values |= {"frames": np.array([frames]), "height": np.array([height]), "width": np.array([width])}
    asked_for = contract.ask(denoiser, "picture", {**values, "plan": np.array([b"F."], object)})
    assert str(asked_for.request.planned(asked_for.forecasts.plan)) == "F.F."
    expected = prompt_request(denoiser, [PROMPT], [SEED], size_of_sections(2), given=Given(EDITED))
    assert np.array_equal(asked_for.request.latents, expected.latents)
    assert np.array_equal(asked_for.request.course.picture, expected.course.picture)
    loop = Loop(denoiser, asked_for.request, asked_for.forecasts)
    told = contract.preview(denoiser, "picture", loop, 1.0, pictured=False)
    assert told["planned"].tolist() == [b"F.F."]
    # What runs one loop of tensors knows nothing of sections.
    assert "image" not in {port.name for port in contract.inputs(denoiser.manifest, "denoiser")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_real_server_makes_the_video_and_tells_its_steps(whole_bundles, tmp_path, written):
    """Engines, Triton over them, and the videos API before that: what the pipeline makes, in the bits of a run here."""
    if reason := triton_server.missing():
        pytest.skip(reason)
    folder, pipe, size = whole_bundles("framepack"), whole_framepack(MODELS["framepack"][1]()), size_of_sections(2)
    with load(folder, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, given=Given(EDITED))
        made = sample(denoiser, request, denoiser.forecasts(plan="FF"))
        video = pictures_of(denoiser, request, made.latents)[0]
    expected = asked_of(pipe, "backward", 2, max_sequence_length=256)
    seen = torch.from_numpy(video.copy()).movedim(-1, -3) / 255
    oracle.assert_close("video", seen, expected, bound_of_picture(expected, pipe, 2 * STEPS))
    write_repository(folder, tmp_path, Deployment(slots=1, workers=1, models=("picture", "picture-stream")))
    values = {"prompt": PROMPT, "image": EDITED, "seed": SEED, "plan": "FF", "guidance_scale": SCALE} | sides_named(
        size
    )
    with Server(tmp_path) as server:
        triton, told = server.wait_ready(), []
        answer = infer(triton.http, "framepack-whole", values, "http", timeout=120)
        assert answer["executed"].tolist() == [b"FFFF"] and answer["frame_rate"].tolist() == [30]
        assert np.array_equal(answer["video"], video)
        more = {**values, "previews": 0, "progress": True}
        streamed = infer(
            triton.grpc, "framepack-whole-stream", more, "stream", 120, lambda done, told_: told.append((done, told_))
        )
        assert np.array_equal(streamed["video"], video)
        models = open_models([triton.grpc], ["framepack-whole"])
        with serving(models) as port:
            body = {"prompt": PROMPT, "size": "192x128", "frames": size[0], "input_reference": reference()}
            body |= {name: values[name] for name in ("seed", "plan", "guidance_scale")}
            status, _, text = asked(port, "/v1/videos", body, {"authorization": "Bearer none"})
            assert status == 200, text
            done = ended(client_of(port), json.loads(text)["id"])
            assert (done.status, done.model_extra["taylorseer"]["executed"]) == ("completed", "FFFF"), done
            assert np.array_equal(written[done.id][0], video)
        models.close()
    assert [done for done, _ in told] == [0, 1, 2, 3, 4]
    assert {outputs["planned"][0] for _, outputs in told} == {b"FFFF"}
