"""Videos that whole bundles make from a picture: each is what the untouched pipeline makes of it."""

# Shapes: C channels, F latent frames, H and W latent pixels

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from pipelines_with_parts import EDITED, OTHER, PROMPT, bound_of_picture, depth_and_length, drawn

from taylorseer_export.embedded.edits import Given, animated
from taylorseer_export.embedded.requests import prompt_request

STEPS, SEED, SIZE, SCALE = 2, 3, (9, 32, 48), 4.0


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    """Of letters, which ftfy would leave as they are; this pipeline alone cannot do without it."""
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def asked_of(pipe, picture, **more):
    frames, height, width = SIZE
    with torch.no_grad():
        return pipe(
            image=Image.fromarray(picture),
            prompt=PROMPT,
            negative_prompt=OTHER,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            **more,
        ).frames[0]


def test_the_video_is_the_pipelines(whole):
    """From prompt and picture to video, all steps full, noise of the same seed."""
    pipe, denoiser = whole("wan-image")
    expected = asked_of(pipe, EDITED)
    seen = drawn(denoiser, request_of(denoiser, EDITED), "F" * STEPS)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    oracle.assert_close("video", seen, expected, limit)
    wrong = drawn(denoiser, request_of(denoiser, 255 - EDITED), "F" * STEPS)
    assert (wrong - expected).abs().max() > limit


def request_of(denoiser, picture, size=SIZE, seeds=(SEED,)):
    return prompt_request(denoiser, [PROMPT], seeds, size, SCALE, OTHER, given=Given(picture))


# Wider and higher than the video, and smaller than what the image encoder sees.
SHAPES = [(26, 38), (40, 100), (9, 7), (32, 48)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_becomes_what_the_pipeline_makes_of_it(whole, shape):
    """Brought to the size of the video, and to that of the image encoder; a mask, then the latents, frame by frame."""
    pipe, denoiser = whole("wan-image")
    frames, height, width = SIZE
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    with torch.no_grad():
        _, condition = pipe.prepare_latents(
            pipe.video_processor.preprocess(image, height, width), 1, 4, height, width, frames, torch.float32, "cpu"
        )
        states = pipe.encode_image(image, "cpu")
    seen = animated(denoiser, picture, SIZE)
    assert seen.keys() == {"condition", "encoder_hidden_states_image"}
    other = animated(denoiser, 255 - picture, SIZE)
    for name, expected, module in (
        ("condition", condition, pipe.vae.encoder),
        ("encoder_hidden_states_image", states, pipe.image_encoder),
    ):
        limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(module))
        oracle.assert_close(f"{name} of {shape}", torch.from_numpy(seen[name]), expected, limit)
        assert (torch.from_numpy(other[name]) - expected).abs().max() > limit
