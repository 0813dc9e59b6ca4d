"""CogVideoX from a prompt: what a whole bundle draws is what the untouched pipeline draws."""

# Shapes: F latent frames

import numpy as np
import oracle
import pytest
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from PIL import Image
from pipelines_with_parts import (
    EDITED,
    OTHER,
    PROMPT,
    bound_of_picture,
    denoiser_with_parts,
    drawn,
    filmed,
    write_pipeline,
)
from tiny_bundles import options_of
from tiny_models import tiny_cogvideox
from tiny_pipelines import whole_cogvideox

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.export import draft
from taylorseer_export.embedded.edits import Given
from taylorseer_export.embedded.requests import prompt_request, usual_size
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.places import turns

STEPS, SEED, SCALE = 2, 3, 4.0
SIZE = (17, 32, 48)


def asked_of(pipe, size=SIZE, **more):
    return filmed(pipe, size, STEPS, SCALE, SEED, **more)


def test_a_video_is_the_pipelines(whole):
    """17 frames: three latent frames at first, then two."""
    pipe, denoiser = whole("cogvideox")
    expected = asked_of(pipe)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    request = prompt_request(denoiser, [PROMPT], [SEED], SIZE, SCALE, OTHER)
    seen = drawn(denoiser, request, "F" * STEPS)
    assert seen.shape == expected.shape == (17, 3, *SIZE[1:])
    oracle.assert_close("video", seen, expected, limit)
    turned = prompt_request(denoiser, [OTHER], [SEED], SIZE, SCALE, PROMPT)
    assert (drawn(denoiser, turned, "F" * STEPS) - expected).abs().max() > limit


def test_a_video_from_a_picture_is_the_pipelines(whole):
    """CogVideoX 1.5: latents that the encoder leaves open are drawn before the noise, and a latent frame ahead of the
    others, which fills up a token, is not decoded."""
    pipe, denoiser = whole("cogvideox-image")
    size = (9, 32, 48)
    expected = asked_of(pipe, size, image=Image.fromarray(EDITED))
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    for picture, same in ((EDITED, True), (255 - EDITED, False)):
        request = prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, OTHER, given=Given(picture))
        assert request.latents.shape[1] == 4
        seen = drawn(denoiser, request, "F" * STEPS)
        if same:
            oracle.assert_close("video", seen, expected, limit)
        else:
            assert (seen - expected).abs().max() > limit
    with pytest.raises(ConfigError, match="picture is missing"):
        prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, OTHER)


@pytest.mark.parametrize("within", [None, (30, 45)])
@pytest.mark.parametrize("sides", [(3, 30, 45), (1, 1, 1), (13, 17, 45), (5, 40, 30), (2, 45, 2)])
def test_places_turn_as_in_the_pipeline(within, sides):
    frames, *grid = sides
    if within is None:
        theirs = get_3d_rotary_pos_embed(64, None, grid, frames, grid_type="slice", max_size=(64, 64))
    else:
        crop = get_resize_crop_region_for_grid(tuple(grid), *within[::-1])
        theirs = get_3d_rotary_pos_embed(64, crop, grid, frames)
    found = turns(sides, 64, within).reshape(2, -1, 64)
    # Places, powers and their product are rounded, four times in float32; a cosine moves no more than its angle.
    most = max(frames, *(within or grid)) + 1
    bound = 4 * 2.0**-24 * most + 2.0**-23
    np.testing.assert_allclose(found, np.stack([table.numpy() for table in theirs]), rtol=0, atol=bound)
    other = turns(sides, 64, (7, 9)).reshape(2, -1, 64)
    assert abs(other - found).max() > bound


def test_frames_that_its_decoder_does_not_take(whole):
    """An even number of latent frames, of which diffusers would make other frames than were asked for."""
    denoiser = whole("cogvideox")[1]
    for frames in (1, 5, 13, 10):
        wanted = rf"size frames is {frames}, expected 9, 17, 25 and so on, which its decoder takes; change it"
        with pytest.raises(ConfigError, match=wanted):
            prompt_request(denoiser, [PROMPT], [SEED], (frames, 32, 48), SCALE, OTHER)


def test_latents_that_its_decoder_does_not_take(whole):
    denoiser = whole("cogvideox")[1]
    for frames in (1, 2, 4):
        said = rf"latents have {frames} latent frames, expected 3, 5, 7 and so on, as many as the decoder takes"
        with pytest.raises(StepError, match=said):
            denoiser.decoder(np.zeros((1, 4, frames, 4, 6), np.float32), lambda pictures: None)


def test_a_size_that_nobody_asks_for(whole):
    assert usual_size(whole("cogvideox")[1].manifest) == usual_size(whole("cogvideox-image")[1].manifest) == (9, 32, 48)


def test_pipelines_that_go_by_other_videos_are_not_exported_whole():
    for name in ("CogVideoXFunControlPipeline", "CogVideoXVideoToVideoPipeline"):
        assert FAMILIES["cogvideox"].by_pipeline[name] == {"whole": None}


def one_size():
    """CogVideoX 2B: a table of places, of video and of text, in the place of turns."""
    return tiny_cogvideox(1, turned=False, layers=1, frames=9)


def test_a_model_with_a_table_of_places_is_the_pipelines(once):
    folder = once(
        "parts-cogvideox-table", lambda folder: write_pipeline(whole_cogvideox(one_size()), "cogvideox", folder)
    )
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES["cogvideox"])
    denoiser = denoiser_with_parts(draft(checkpoint, options_of()), folder)
    pipe, size = whole_cogvideox(one_size()), usual_size(denoiser.manifest)
    expected = asked_of(pipe, size, max_sequence_length=6)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    request = prompt_request(denoiser, [PROMPT], [SEED], None, SCALE, OTHER)
    oracle.assert_close("video", drawn(denoiser, request, "F" * STEPS), expected, limit)
    turned = prompt_request(denoiser, [OTHER], [SEED], None, SCALE, PROMPT)
    assert (drawn(denoiser, turned, "F" * STEPS) - expected).abs().max() > limit
