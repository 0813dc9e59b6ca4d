"""Videos that whole HunyuanVideo 1.5 bundles make, from text and from a picture: each is the untouched pipeline's."""

import json

import numpy as np
import oracle
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from pipelines_with_parts import EDITED, OTHER, PROMPT, bound_of_picture, depth_and_length, drawn, encoders_of
from tiny_pipelines import tiny_hunyuan_15_vae

from taylorseer_export import cli
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.parts import parts_of, refuse_missing
from taylorseer_export.embedded.animating import animated
from taylorseer_export.embedded.edits import Given, given_picture
from taylorseer_export.embedded.patches import sides_of_shape
from taylorseer_export.embedded.picture import covering
from taylorseer_export.embedded.requests import pictures_of, prompt_request
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.parts import quoted
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.tiles import TileDecoder
from taylorseer_export.serve import contract

pytestmark = pytest.mark.slow

TEXT, PICTURE = "hunyuan-1.5", "hunyuan-1.5-i2v"
STEPS, SEED, SCALE, FRAMES = 2, 3, 4.0, 5
SIGN = 'a small sign "ab c" and “é中” and "ab c"'
PROMPTS = ["", PROMPT, SIGN, '""', '"' + "x" * 300 + '"', "a " * 1200]


def size_of(name):
    """(frames, height, width): of a video from the picture as its pipeline chooses."""
    return (FRAMES, 32, 48) if name == TEXT else (FRAMES, *sides_of_shape(64, 16, *EDITED.shape[:2]))


def request_of(denoiser, name, prompt=SIGN, negative=OTHER, scale=SCALE, picture=EDITED, **more):
    given = None if name == TEXT else Given(picture)
    return prompt_request(denoiser, [prompt], [SEED], size_of(name), scale, negative, given=given, **more)


def extent_of(*modules, tokens):
    """As `depth_and_length`, of modules whose attention sums over so many tokens, which are more than any layer has."""
    depth, length = depth_and_length(*modules)
    return depth, max(length, tokens)


def of_diffusers(pipe, name, kind, scale=SCALE, **asked):
    _, height, width = size_of(name)
    more = {"height": height, "width": width} if name == TEXT else {"image": Image.fromarray(EDITED)}
    pipe.guider = ClassifierFreeGuidance(guidance_scale=scale)
    generator = torch.Generator().manual_seed(SEED)
    asked |= {"num_frames": FRAMES, "num_inference_steps": STEPS, "generator": generator, "output_type": kind}
    with torch.no_grad():
        return pipe(prompt=SIGN, **asked, **more).frames


@pytest.mark.parametrize("name", [TEXT, PICTURE])
def test_the_video_is_the_pipelines(whole, name):
    """From prompt and picture to latents and to video, all steps full: with a negative prompt, and as the folder's own
    guider has it where nobody asks, away from an empty one."""
    pipe, denoiser = whole(name)
    assert denoiser.manifest.sampling.guidance_scale == 6.0
    extent = depth_and_length(*encoders_of(pipe), *[pipe.transformer] * 2 * STEPS, pipe.vae.encoder)
    for scale, asked, given in ((SCALE, OTHER, (OTHER, SCALE)), (6.0, None, (None, None))):
        latents = of_diffusers(pipe, name, "latent", scale, negative_prompt=asked)
        request = request_of(denoiser, name, SIGN, *given)
        made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
        limit = oracle.bound(latents, 2 * scale - 1, torch.float32, *extent)
        oracle.assert_close(f"latents at {scale}", made, latents, limit)
    expected = of_diffusers(pipe, name, "pt", negative_prompt=OTHER)[0]
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    request = request_of(denoiser, name)
    oracle.assert_close("video", drawn(denoiser, request, "F" * STEPS), expected, limit)
    latents = of_diffusers(pipe, name, "latent", negative_prompt=OTHER)
    limit = oracle.bound(latents, 2 * SCALE - 1, torch.float32, *extent)
    wrong = [request_of(denoiser, name, PROMPT), request_of(denoiser, name, negative="y")]
    wrong += [] if name == TEXT else [request_of(denoiser, name, picture=255 - EDITED)]
    for other in wrong:
        made = sample(denoiser, other, denoiser.forecasts(plan="F" * STEPS)).latents
        assert (torch.from_numpy(made) - latents).abs().max() > limit


@pytest.mark.parametrize("prompt", PROMPTS, ids=["none", "usual", "sign", "empty sign", "long sign", "long"])
def test_a_prompt_becomes_what_the_pipeline_makes_of_it(whole, prompt):
    pipe, denoiser = whole(TEXT)
    with torch.no_grad():
        made = pipe.encode_prompt(prompt, dtype=torch.float32)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    expected = dict(zip([*names, *(f"{name}_2" for name in names)], made, strict=True))
    seen = denoiser.encoder.encode(prompt)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        limit = oracle.bound(value, 1.0, torch.float32, *extent_of(*encoders_of(pipe), tokens=256))
        if "mask" in name or not value.any():
            assert np.array_equal(seen[name], value.numpy())
        else:
            oracle.assert_close(name, torch.from_numpy(seen[name]), value, limit)
    other = denoiser.encoder.encode(f'"q" b {prompt}')
    for name in ("encoder_hidden_states", "encoder_hidden_states_2"):
        assert (torch.from_numpy(other[name]) - expected[name]).abs().max() > limit


def test_what_is_in_quotes():
    assert quoted("none") is None and quoted('a "b" “c” "b"') == 'Text "b". Text "c". '


@pytest.mark.parametrize("shape", [(26, 38), (40, 100), (9, 7), (64, 64)])
def test_a_picture_becomes_what_the_pipeline_makes_of_it(whole, shape):
    """Cut to the size that its shape gives, its one latent frame with zeros and a mask behind it, and what is seen."""
    pipe, denoiser = whole(PICTURE)
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = pipe.video_processor.calculate_default_height_width(*shape, pipe.target_size)
    image = pipe.video_processor.resize(Image.fromarray(picture), height, width, resize_mode="crop")
    latents = torch.zeros(1, 4, 2, height // 16, width // 16)
    with torch.no_grad():
        embeds = pipe.encode_image(image, 1, "cpu", torch.float32)
        made = pipe.prepare_cond_latents_and_mask(latents, image, 1, height, width, torch.float32, "cpu")
    expected = {"image_embeds": embeds, "condition": torch.cat(made, 1)}
    request = prompt_request(denoiser, [PROMPT], [SEED], guidance_scale=1.0, given=Given(picture))
    assert (request.height, request.width) == (height, width)
    seen = animated(denoiser, picture, (5, height, width))
    other = animated(denoiser, 255 - picture, (5, height, width))
    of_each = {
        "image_embeds": extent_of(pipe.image_encoder, tokens=729),
        "condition": depth_and_length(pipe.vae.encoder),
    }
    for name, extent in of_each.items():
        limit = oracle.bound(expected[name], 1.0, torch.float32, *extent)
        oracle.assert_close(f"{name} of {shape}", torch.from_numpy(seen[name]), expected[name], limit)
        assert (torch.from_numpy(other[name]) - expected[name]).abs().max() > limit


def test_sizes_and_cuts_are_those_of_diffusers(whole):
    """For all shapes and both published sizes, also where rounding leaves a row or column out."""
    processor, rng = whole(PICTURE)[0].video_processor, np.random.default_rng(0)
    for height, width in [(480, 848), (1, 9), (9, 1), (640, 640), *rng.integers(1, 3000, (60, 2)).tolist()]:
        for side in (640, 960, 64):
            try:
                expected = processor.calculate_default_height_width(height, width, side)
            except ValueError:
                continue
            assert sides_of_shape(side, 16, height, width) == tuple(expected)
    for _ in range(40):
        shape, (height, width) = rng.integers(1, 60, 2).tolist(), rng.integers(1, 60, 2).tolist()
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        try:
            expected = processor.resize(Image.fromarray(picture), height, width, resize_mode="crop")
        except ValueError:
            continue
        assert np.array_equal(covering(picture, height, width), np.asarray(expected))


def test_large_videos_are_decoded_in_the_tiles_of_diffusers(whole):
    pipe, denoiser = whole(TEXT)
    latents, vae = torch.randn(1, 4, 2, 20, 17, generator=torch.Generator().manual_seed(0)), tiny_hunyuan_15_vae(4)
    assert isinstance(denoiser.decoder, TileDecoder)
    vae.enable_tiling()
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        alone = (pipe.vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    made = []
    denoiser.decoder(latents.numpy(), made.append)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(vae))
    oracle.assert_close("tiles", torch.from_numpy(np.concatenate(made, 2)), expected, limit)
    assert (alone - expected).abs().max() > limit


def test_what_does_not_belong_is_refused(whole):
    text, pictured = (whole(name)[1] for name in (TEXT, PICTURE))
    with pytest.raises(ConfigError, match=r"picture is missing for hunyuan-video-1.5-.*, expected the one that"):
        prompt_request(pictured, [PROMPT], [SEED])
    with pytest.raises(ConfigError, match=r"picture is given for hunyuan-video-1.5-.*, expected none, since it draws"):
        given_picture(text.manifest, EDITED)
    with pytest.raises(ConfigError, match=r"2 pictures are given for .*-1.5-.*, expected one picture; leave"):
        given_picture(pictured.manifest, EDITED, None, [EDITED])
    with pytest.raises(ConfigError, match=r"length of the prompt is 32, expected 1000 \(tokens\), the only one"):
        request_of(text, TEXT, length=32)
    with pytest.raises(ConfigError, match="size width is 40, expected a multiple of 16"):
        prompt_request(text, [PROMPT], [SEED], (5, 32, 40))


@pytest.mark.parametrize(
    ("entry", "value"), [("guidance_rescale", 0.5), ("stop", 0.8), ("_class_name", "AutoGuidance")]
)
def test_other_guidance_is_refused(whole_bundles, tmp_path, entry, value):
    folder = whole_bundles(TEXT).parent / "pipeline"
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / "guider").unlink()
    (tmp_path / "guider").mkdir()
    told = json.loads((folder / "guider" / "guider_config.json").read_text())
    (tmp_path / "guider" / "guider_config.json").write_text(json.dumps({**told, entry: value}))
    checkpoint = open_checkpoint(str(tmp_path), FAMILIES["hunyuan-video-1.5"])
    with pytest.raises(CheckpointError, match=f"`{entry}` of .*guider is {value}, expected .*, the only guidance of"):
        refuse_missing(checkpoint, parts_of(checkpoint))


def test_every_door_takes_a_picture(whole, whole_bundles, tmp_path):
    """`run`, and what Triton's model reads: a size that nobody asks for is that of the picture's shape."""
    denoiser = whole(PICTURE)[1]
    request = prompt_request(denoiser, [SIGN], [SEED], given=Given(EDITED))
    made = sample(denoiser, request, denoiser.forecasts(plan="FF")).latents
    write_video(tmp_path / "expected.webp", pictures_of(denoiser, request, made)[0], 24)
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    words = ["--prompt", SIGN, "--image", tmp_path / "given.png", "--seed", SEED, "--plan", "FF", "--threads", 1]
    out = tmp_path / "made.webp"
    assert cli.main([str(word) for word in ["run", whole_bundles(PICTURE), *words, "--out", out]]) == 0
    assert out.read_bytes() == (tmp_path / "expected.webp").read_bytes()
    values = {"prompt": np.array([SIGN.encode()], object), "image": EDITED, "seed": np.array([SEED])}
    asked = contract.ask(denoiser, "picture", {**values, "plan": np.array([b"FF"], object)})
    assert np.array_equal(asked.request.joined.value, request.joined.value)
    assert asked.request.latents.shape == request.latents.shape


def test_the_published_words_are_the_pipelines(whole):
    from taylorseer_export.families import hunyuan_video_15

    for pipe in (whole(TEXT)[0], whole(PICTURE)[0]):
        assert pipe.system_message == hunyuan_video_15._SYSTEM
    assert isinstance(pipe, HunyuanVideo15ImageToVideoPipeline)
