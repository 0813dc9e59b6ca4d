"""Videos that whole bundles make after those of a pose and a face: each is what the untouched pipeline makes."""

# Shapes: F frames

import json
import wave
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_animate
from PIL import Image
from pipelines_with_parts import EDITED, OTHER, PROMPT, depth_and_length, encoders_of
from safetensors.numpy import load_file

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.memory import video_bytes
from taylorseer_export.commands import run
from taylorseer_export.embedded.driving import driven_by, with_videos
from taylorseer_export.embedded.edits import Given
from taylorseer_export.embedded.picture import on_black
from taylorseer_export.embedded.requests import frame_rate, pictures_of, prompt_request, size_of, usual_size
from taylorseer_export.embedded.video import read_video, write_video
from taylorseer_export.errors import ConfigError
from taylorseer_export.report.card import card
from taylorseer_export.runtime.driven import forth_and_back
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve import contract
from taylorseer_export.serve.api.prompts import check_draws

pytestmark = pytest.mark.slow

STEPS, SEED, SECTION, SIDES = 2, 3, 5, (32, 48)  # a section is of two latent frames, behind that of the character


def film(seed, frames, height, width):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


VIDEOS = {"pose": film(1, 8, 40, 52), "face": film(2, 8, 11, 9)}  # neither of the sizes that they are brought to
SCENE = {"background": film(3, 8, 36, 48), "mask": film(4, 8, 32, 40)}


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    """Of letters, which ftfy would leave as they are; this pipeline alone cannot do without it."""
    monkeypatch.setattr(pipeline_wan_animate, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def given_of(frames, **changed):
    """The picture with the first frames of the videos, some of them others or more of them."""
    return Given(EDITED, videos={name: video[:frames] for name, video in {**VIDEOS, **changed}.items()})


def asked_of(pipe, frames, scale, scene):
    """(what the pipeline makes, what it calls the transformer with)."""
    given = given_of(frames, **scene).videos
    videos = {f"{name}_video": [Image.fromarray(one) for one in video] for name, video in given.items()}
    calls = []
    note = pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    try:
        with torch.no_grad():
            made = pipe(
                image=Image.fromarray(EDITED),
                prompt=PROMPT,
                negative_prompt=OTHER if scale != 1.0 else None,
                height=SIDES[0],
                width=SIDES[1],
                segment_frame_length=SECTION,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                mode="replace" if scene else "animate",
                generator=torch.Generator().manual_seed(SEED),
                output_type="pt",
                **videos,
            )
    finally:
        note.remove()
    return made.frames[0], calls


def request_of(denoiser, frames, scale=1.0, given=None, seeds=(SEED,)):
    size, negative = (frames, *SIDES), OTHER if scale != 1.0 else None
    return prompt_request(
        denoiser, [PROMPT] * len(seeds), seeds, size, scale, negative, given=given or given_of(frames)
    )


def bound(expected, pipe, loops, scale, picture=0.5 / 255):
    """As `bound_of_picture`, for each section, which begins with what the VAE makes of the last one and back."""
    depth, length = depth_and_length(*encoders_of(pipe), *[pipe.transformer] * 2 * STEPS, pipe.vae, pipe.vae)
    return loops * oracle.bound(expected, 2 * scale - 1, torch.float32, depth, length) + picture


@pytest.mark.parametrize(
    ("frames", "scale", "scene"), [(SECTION, 4.0, {}), (8, 1.0, {}), (8, 4.0, {}), (8, 1.0, SCENE)]
)
def test_the_video_is_the_pipelines(whole, frames, scale, scene):
    """From prompt, picture and videos to video, all steps full, noise of the same seed; of one section and of two.

    What a section is given is compared too: pixels of a video would hide what is smaller than they are.
    """
    pipe, denoiser = whole("wan-animate")
    expected, calls = asked_of(pipe, frames, scale, scene)
    request = request_of(denoiser, frames, scale, given_of(frames, **scene))
    branches = 1 if scale == 1.0 else 2
    assert request.loops == len(calls) // (STEPS * branches) == (1 if frames == SECTION else 2)
    given = []
    made = sample(
        denoiser,
        request,
        denoiser.forecasts(plan="F" * STEPS),
        on_step=lambda loop: loop.step % STEPS == 1 and given.append((loop.conditioning, loop.model_input())),
    )
    assert made.executed == "F" * STEPS * request.loops
    seen = torch.from_numpy(pictures_of(denoiser, request, made.latents)[0].copy()).movedim(-1, -3) / 255
    limit = bound(expected, pipe, request.loops, scale)
    oracle.assert_close("video", seen, expected, limit)
    for number in range(request.loops):
        conditioning, model_input = given[number]  # after its first step
        for branch, own in enumerate(conditioning):
            call = calls[(number * STEPS + 1) * branches + branch]
            assert np.array_equal(own["face_pixel_values"], call["face_pixel_values"].numpy())
            values = {name: own[name] for name in ("pose_hidden_states", "encoder_hidden_states_image")}
            values["hidden_states"] = model_input
            mask = call["hidden_states"][:, 4:8].numpy()
            assert np.abs(model_input[:, 4:8] - mask).max() <= 2**-23  # of bytes, which are taken from 255 or from 1
            for name, value in values.items():
                limit = bound(call[name], pipe, number + 1, scale, 0.0)
                oracle.assert_close(f"{name} of section {number}", torch.from_numpy(value), call[name], limit)


def test_all_that_is_given_counts(whole):
    """Each frame of each video, and the picture; with two samples each is what it is alone."""
    pipe, denoiser = whole("wan-animate")
    plan = denoiser.forecasts(plan="F.")
    usual = sample(denoiser, request_of(denoiser, 8), plan).latents
    expected = torch.from_numpy(usual[0])
    limit = bound(expected, pipe, 2, 1.0, 0)
    behind = {"pose": VIDEOS["pose"].copy(), "face": VIDEOS["face"].copy()}
    for video in behind.values():
        video[6:] = 255 - video[6:]
    for name, video in behind.items():
        other = sample(denoiser, request_of(denoiser, 8, given=given_of(8, **{name: video})), plan).latents
        assert np.array_equal(other[:, :, :3], usual[:, :, :3])  # the second section alone
        assert np.abs(other[:, :, 3:] - usual[:, :, 3:]).max() > limit
    both = sample(denoiser, request_of(denoiser, 8, seeds=(4, SEED)), plan)
    assert both.executed == "F.F."
    oracle.assert_close("second sample", torch.from_numpy(both.latents[1]), expected, limit)
    assert pictures_of(denoiser, request_of(denoiser, 8), both.latents).shape == (2, 8, *SIDES, 3)


def test_frames_and_pictures_are_brought_to_size_as_the_pipeline_does(whole):
    pipe, denoiser = whole("wan-animate")
    for count, length in ((2, 5), (3, 9), (5, 5), (5, 21)):
        assert forth_and_back(count, length) == pipe.pad_video_frames(list(range(count)), length)
    for shape in ((26, 38), (40, 100), (9, 7), (32, 48), (64, 96), (31, 48)):
        picture = film(7, 1, *shape)[0]
        expected = pipe.vae_image_processor.preprocess(Image.fromarray(picture), *SIDES, resize_mode="fill")
        made = 2 * torch.from_numpy(on_black(picture, *SIDES)).float().permute(2, 0, 1)[None] / 255 - 1
        assert torch.equal(made, expected), shape
    assert on_black(film(7, 1, 1, 999)[0], *SIDES).any()  # of less than a row, in its own shape
    manifest = denoiser.manifest
    assert usual_size(manifest) == (SECTION, *SIDES) and frame_rate(manifest) == 30
    wide = given_of(8, pose=film(1, 8, 20, 80))
    assert size_of(manifest, wide) == (8, 32, 64) and size_of(manifest, given_of(7))[0] == 7


def test_what_does_not_belong_is_refused(whole):
    denoiser = whole("wan-animate")[1]
    plain = denoiser.manifest.model_copy(update={"parts": {}})
    name = f"wan-animate-{denoiser.manifest.name}"
    for videos, said in (
        ({}, f"video of a pose is missing for {name}, expected it beside the picture, .* with --pose"),
        ({"pose": VIDEOS["pose"]}, f"video of a face is missing for {name}, .* with --face"),
        ({**VIDEOS, "face": VIDEOS["face"][:7]}, "video of a face has 7 frames, expected 8 as that of the pose; cut"),
        ({**VIDEOS, "mask": SCENE["mask"]}, "video of a background is missing for"),
        (
            {**VIDEOS, **SCENE, "mask": SCENE["mask"][:3]},
            "video of a mask has 3 frames, expected 8 as that of the pose",
        ),
        ({n: video[:1] for n, video in VIDEOS.items()}, "video of a pose has 1 frame, expected at least 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            prompt_request(denoiser, [PROMPT], [SEED], (8, *SIDES), given=Given(EDITED, videos=videos))
    with pytest.raises(ConfigError, match=f"picture is missing for {name}, expected the one that it is to animate"):
        with_videos(denoiser.manifest, None, VIDEOS)
    with pytest.raises(ConfigError, match=r"video of a face is given for wan-.*, expected none, since no video drives"):
        with_videos(plain, Given(EDITED), VIDEOS)
    assert with_videos(plain, None, {}) is None
    for size, said in (
        ((9, *SIDES), "size frames is 9, expected 2 to 8, as the videos have that drive it; change it"),
        ((1, *SIDES), "size frames is 1, expected 2 to 8"),
        ((8, 30, 48), "size height is 30, expected a multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            prompt_request(denoiser, [PROMPT], [SEED], size, given=given_of(8))
    bare = denoiser.manifest.model_copy(update={"parts": {"encode": denoiser.manifest.parts["encode"]}})
    for manifest, groups, said in (
        (bare, (), r"video of 8 frames is 2 sections, each of which begins .*, expected a bundle with its decoder"),
        (
            denoiser.manifest,
            (object(),),
            "video of 8 frames is 2 sections, asked of several ranks, expected one section",
        ),
    ):
        other = SimpleNamespace(manifest=manifest, share=SimpleNamespace(groups=groups))
        with pytest.raises(ConfigError, match=said):
            driven_by(other, manifest.parts["encode"].driven, given_of(8), (8, *SIDES), [SEED], False)


def test_run_reads_videos(whole, monkeypatch, tmp_path, capsys):
    """A folder of pictures and a file; what is missing or cannot be read is one sentence."""
    denoiser = whole("wan-animate")[1]
    monkeypatch.setattr(run, "open_denoiser", lambda *_, **how: nullcontext(denoiser))
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    (tmp_path / "pose").mkdir()
    for k, frame in enumerate(VIDEOS["pose"]):
        Image.fromarray(frame).save(tmp_path / "pose" / f"{k + 5}.png")
    first, *others = map(Image.fromarray, VIDEOS["face"])
    first.save(tmp_path / "face.webp", save_all=True, append_images=others, lossless=True, duration=40)
    wanted = ["run", "bundle", "--prompt", PROMPT, "--plan", "F.", "--seed", str(SEED), "--size", "8x32x48"]
    image, face = ["--image", str(tmp_path / "given.png")], ["--face", str(tmp_path / "face.webp")]
    pose, out = ["--pose", str(tmp_path / "pose")], ["--out", str(tmp_path / "made.safetensors")]
    assert cli.main([*wanted, *image, *pose, *face, *out]) == 0, capsys.readouterr().err
    expected = sample(denoiser, request_of(denoiser, 8), denoiser.forecasts(plan="F.")).latents
    assert np.array_equal(load_file(tmp_path / "made.safetensors")["latents"], expected)
    assert "plan      F.F. (2 of 4 steps full, as planned)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    Image.fromarray(EDITED).save(tmp_path / "pose" / "of-another-size.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", None))
        sound.writeframes(bytes(16000))
    out = ["--out", str(tmp_path / "none.webp")]
    for more, said in (
        ([*image, *face], "video of a pose is missing for wan-animate"),
        ([*face], "video of a pose is missing for wan-animate"),
        ([*image, "--pose", str(tmp_path / "empty"), *face], "empty with no frame, expected frames of one size"),
        ([*image, *pose, *face], "pose with 26x38, 40x52, expected frames of one size; mend it"),
        ([*image, *face, "--pose", str(tmp_path / "no.gif")], "no.gif, expected a video, or a folder of its frames"),
        ([*image, *face, "--pose", str(tmp_path / "broken.mp4")], "broken.mp4, expected a video, or a folder"),
        ([*image, *face, "--pose", str(tmp_path / "sound.wav")], "(there is sound alone); check the file"),
        ([*image, *face, "--pose", str(tmp_path / "nowhere")], "No such file or directory"),
    ):
        assert cli.main([*wanted, *more, *out]) == 2
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told and not (tmp_path / "none.webp").exists(), told


def test_an_mp4_is_read_frame_by_frame(tmp_path):
    calm = np.repeat(np.arange(20, 220, 20, dtype=np.uint8)[:, None, None, None], 3, 3).repeat(32, 1).repeat(48, 2)
    write_video(tmp_path / "calm.mp4", calm, 16)
    seen = read_video(tmp_path / "calm.mp4", "--pose")
    assert seen.shape == calm.shape and np.abs(seen.astype(int) - calm).max() <= 4  # of limited range, and lossy


def test_servers_say_that_they_take_no_videos(whole):
    manifest = whole("wan-animate")[1].manifest
    with pytest.raises(ConfigError, match=r"makes videos that others drive, expected .* with `taylorseer-export run`"):
        check_draws(manifest)
    assert contract.roles(manifest) == ("denoiser",)
    assert "image" not in {port.name for port in contract.inputs(manifest, "denoiser")}


def test_the_card_says_it(whole):
    part = whole("wan-animate")[1].manifest.parts["encode"]
    told = card(whole("wan-animate")[1].manifest)
    assert "videos of a pose and a face drive it" in told and "condition [1, 8, 2, rows, columns]" in told
    assert video_bytes(part, {"rows": 4, "columns": 6}) > 4 * 32 * 48 * (3 + 3 + 4 + 3 * 4 + 4 * 4)


def _named(graph, side, name):
    return next(t for t in graph[side] if t["name"] == name)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda part: part["driven"].update(pose="x"), "part encode takes .*, expected .*, `scene`, `x`"),
        (lambda part: part.update(driven=None), "expected `picture`, `pixels`"),
        (lambda part: part["driven"].update(ahead=2), r"`condition` of graph encode is \[1, 8, 2, rows, columns\]"),
        (lambda part: part["driven"].update(face="pose_hidden_states"), "expected 5 frames of the face, of one size"),
        (lambda part: _named(part["later"], "inputs", "pose")["shape"].__setitem__(2, 2), r"`pose` of graph later is"),
        (lambda part: _named(part["later"], "outputs", "pose_hidden_states").update(name="x"), "`x` of graph later is"),
        (lambda part: _named(part["later"], "inputs", "scene").update(name="x"), "takes `pose`, `x`, expected"),
        (lambda part: part.update(cropped=64), "goes with a graph `later` and a picture that is not cut"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(whole, spoil, problem):
    told = json.loads(whole("wan-animate")[1].manifest.model_dump_json())
    spoil(told["parts"]["encode"])
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)
