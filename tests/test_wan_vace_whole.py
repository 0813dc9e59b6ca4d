"""Wan VACE from a prompt, a video with a mask, and pictures: what a whole bundle draws is what the pipeline draws."""

# Shapes: F latent frames

import numpy as np
import oracle
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_vace
from PIL import Image
from pipelines_with_parts import EDITED, OTHER, PROMPT, bound_of_picture, depth_and_length, drawn, filmed

from taylorseer_export import cli
from taylorseer_export.embedded.controlling import MASK, VIDEO, control, controlled_of, on_white
from taylorseer_export.embedded.driving import with_videos
from taylorseer_export.embedded.edits import Given, given_picture
from taylorseer_export.embedded.requests import prompt_request, size_of, usual_size
from taylorseer_export.embedded.video import read_video
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES

STEPS, SEED, SCALE, SIZE = 2, 3, 4.0, (9, 32, 48)
FRAMES, SIDES = SIZE[0], SIZE[1:]
RNG = np.random.default_rng(11)
FILM = RNG.integers(0, 256, (FRAMES, *SIDES, 3), np.uint8)
# Grey levels too: a latent frame is told of them, and what is anew is above the middle.
SEEN = np.repeat(RNG.integers(0, 256, (FRAMES, *SIDES, 1), np.uint8), 3, -1)
PICTURES = (EDITED, 255 - EDITED[:, ::-1, ::-1][:40, :24])


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    monkeypatch.setattr(pipeline_wan_vace, "prompt_clean", str.strip)


def asked_of(pipe, **more):
    return filmed(pipe, SIZE, STEPS, SCALE, SEED, max_sequence_length=32, **more)


def pictured(frames):
    return [Image.fromarray(frame) for frame in frames]


def given(denoiser, pictures=(), **videos):
    first, *others = (*pictures, None)
    one = given_picture(denoiser.manifest, first, None, [each for each in others if each is not None])
    return with_videos(denoiser.manifest, one, videos)


CASES = {
    "text": ({}, (), {}),
    "video": ({"video": pictured(FILM)}, (), {VIDEO: FILM}),
    "mask": ({"video": pictured(FILM), "mask": pictured(SEEN)}, (), {VIDEO: FILM, MASK: SEEN}),
    "pictures": ({"reference_images": [pictured(PICTURES)]}, PICTURES, {}),
    "all": (
        {"video": pictured(FILM), "mask": pictured(SEEN), "reference_images": pictured(PICTURES)[0]},
        PICTURES[:1],
        {VIDEO: FILM, MASK: SEEN},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_video_is_the_pipelines(whole, case):
    pipe, denoiser = whole("wan-vace")
    asked, pictures, videos = CASES[case]
    expected = asked_of(pipe, **asked)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    request = prompt_request(
        denoiser, [PROMPT], [SEED], SIZE, SCALE, OTHER, 32, given=given(denoiser, pictures, **videos)
    )
    assert request.latents.shape[2] == 3 + len(pictures) and request.ahead == len(pictures)
    seen = drawn(denoiser, request, "F" * STEPS)
    assert seen.shape == expected.shape == (FRAMES, 3, *SIDES)
    oracle.assert_close(case, seen, expected, limit)


def of_pipeline(pipe, **asked):
    """`control_hidden_states` as the pipeline makes them."""
    frames, height, width = SIZE
    with torch.no_grad():
        video, mask, pictures = pipe.preprocess_conditions(
            asked.get("video"), asked.get("mask"), asked.get("reference_images"), 1, height, width, frames,
            torch.float32, torch.device("cpu"),
        )  # fmt: skip
        latents = pipe.prepare_video_latents(video, mask, pictures, None, torch.device("cpu"))
        return torch.cat([latents, pipe.prepare_masks(mask, pictures)], 1)


@pytest.mark.parametrize("case", CASES)
def test_what_it_goes_by_is_what_the_pipeline_makes_of_it(whole, case):
    """To the rounding of the encoder; each of the other cases is another."""
    pipe, denoiser = whole("wan-vace")
    by, made = controlled_of(denoiser.manifest), {}
    for name, (_, pictures, videos) in CASES.items():
        made[name] = torch.from_numpy(control(denoiser, by, given(denoiser, pictures, **videos), SIZE))
    expected = of_pipeline(pipe, **CASES[case][0])
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae))
    oracle.assert_close(case, made[case], expected, limit)
    for name, other in made.items():
        assert name == case or other.shape != expected.shape or (other - expected).abs().max() > limit


def test_sizes_that_nobody_asks_for(whole):
    """With a video that one's shape, and as many of its frames as make whole latent frames."""
    manifest = whole("wan-vace")[1].manifest
    assert size_of(manifest, None) == size_of(manifest, Given(EDITED)) == usual_size(manifest)
    longer = np.zeros((12, 64, 64, 3), np.uint8)
    frames, height, width = size_of(manifest, Given(np.zeros((0, 0, 3), np.uint8), videos={VIDEO: longer}))
    assert frames == 9 and height == width


def test_what_it_does_not_go_by_is_refused(whole):
    denoiser = whole("wan-vace")[1]
    for said, pictures, videos in (
        ("mask is given for wan-vace-whole without a video", (), {MASK: SEEN}),
        ("mask has 8 frames, expected 9 as the video", (), {VIDEO: FILM, MASK: SEEN[:8]}),
        ("video of a pose is given for wan-vace-whole, expected a video and a mask", (), {"pose": FILM}),
        ("9 pictures are given for wan-vace-whole, expected at most 8 pictures", (EDITED,) * 9, {}),
    ):
        with pytest.raises(ConfigError, match=said):
            given(denoiser, pictures, **videos)
    short = given(denoiser, video=FILM[:5])
    with pytest.raises(ConfigError, match="size frames is 9, expected at most 5, as the video has that it goes by"):
        prompt_request(denoiser, [PROMPT], [SEED], SIZE, SCALE, OTHER, 32, given=short)
    with pytest.raises(ConfigError, match="picture is 4x38, expected sides of at least 8 pixels"):
        on_white(EDITED[:4], *SIDES)
    with pytest.raises(ConfigError, match=r"video of a video is given for .*, expected pose, face, background, mask;"):
        with_videos(whole("wan-animate")[1].manifest, Given(EDITED), {VIDEO: FILM})
    with pytest.raises(ConfigError, match=r"video of a video is given for .*, expected none"):
        with_videos(whole("wan-image")[1].manifest, Given(EDITED), {VIDEO: FILM})


def test_of_two_transformers_none_is_exported_whole():
    assert FAMILIES["wan-vace"].by_config({"boundary_ratio": 0.9})["whole"] is None


def test_the_command_line_goes_by_a_video_and_pictures(whole_bundles, tmp_path):
    for name, frames in (("film", FILM), ("mask", SEEN)):
        (tmp_path / name).mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / name / f"{number}.png")
    Image.fromarray(EDITED).save(tmp_path / "shown.png")
    command = ["run", str(whole_bundles("wan-vace")), "--prompt", PROMPT, "--steps", "2", "--size", "9x32x48"]
    command += [
        "--video",
        str(tmp_path / "film"),
        "--mask",
        str(tmp_path / "mask"),
        "--image",
        str(tmp_path / "shown.png"),
    ]
    assert cli.main([*command, "--out", str(tmp_path / "made.webp")]) == 0
    assert read_video(tmp_path / "made.webp", "--video").shape == (FRAMES, *SIDES, 3)
