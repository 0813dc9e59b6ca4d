"""Videos and pictures that whole Kandinsky 5 bundles make of a prompt: each is the untouched pipeline's.

Its code rounds turned queries and keys to bfloat16, for which bounds of a whole loop are wide; what stands around the
transformer is therefore held to the pipeline piece by piece too, within what float32 gives.
"""

# Shapes: C channels, F latent frames, H and W latent pixels

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5T2VPipeline
from diffusers.models.transformers import transformer_kandinsky
from harness import eager_denoiser
from images_api import client_of, ended, frames_of, models_over, picture_in, serving
from PIL import Image
from pipelines_with_parts import OTHER, PROMPT, depth_and_length, drawn, encoders_of
from test_families import Unrounded
from tiny_bundles import options_of

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile import export
from taylorseer_export.compile.parts import parts_of
from taylorseer_export.embedded.edits import given_picture
from taylorseer_export.embedded.requests import pictures_of, prompt_request, usual_size
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.places import value_from_fill
from taylorseer_export.runtime.sampling import Loop, sample
from taylorseer_export.serve import contract

# The client of videos says that its maker has ended them; see `test_whole_doors.py`.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]

VIDEO, PICTURE = "kandinsky-5", "kandinsky-5-t2i"
SIZES = {VIDEO: (9, 32, 48), PICTURE: (32, 48)}
PIPELINES = {VIDEO: Kandinsky5T2VPipeline, PICTURE: Kandinsky5T2IPipeline}
STEPS, SEED, SCALE, TOKENS = 2, 3, 2.0, 16


def request_of(denoiser, name, prompt=PROMPT, scale=SCALE, negative=OTHER, length=None):
    return prompt_request(denoiser, [prompt], [SEED], SIZES[name], scale, negative, length)


def of_diffusers(pipe, name, kind, scale=SCALE, negative=OTHER):
    *frames, height, width = SIZES[name]
    more = {"num_frames": frames[0]} if frames else {}
    more |= {} if scale is None else {"guidance_scale": scale}
    with torch.no_grad():
        (made,) = pipe(
            prompt=PROMPT,
            negative_prompt=negative,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type=kind,
            return_dict=False,
            **more,
        )
    return made


def limits(pipe, latents, video, scale):
    """What latents and what is shown of them may be away from the pipeline's, after all calls of the transformer."""
    calls, (*_, rounded) = 2 * STEPS, oracle.extent(pipe.transformer)
    before = [*encoders_of(pipe), *[pipe.transformer] * calls]
    of_latents, of_video = depth_and_length(*before), depth_and_length(*before, pipe.vae.decoder)
    gain = 2 * scale - 1
    limit = oracle.bound(video, gain, torch.float32, *of_video, calls * rounded) + 0.5 / 255
    return oracle.bound(latents, gain, torch.float32, *of_latents, calls * rounded), limit


@pytest.mark.parametrize("name", SIZES)
def test_what_is_drawn_is_the_pipelines(whole, name):
    """From prompt to latents and to what they show, all steps full: away from a prompt, and as where nobody asks."""
    pipe, denoiser = whole(name)
    usual = inspect.signature(PIPELINES[name].__call__).parameters["guidance_scale"].default
    for scale, negative in ((SCALE, OTHER), (None, None)):
        latents = of_diffusers(pipe, name, "latent", scale, negative)
        expected = of_diffusers(pipe, name, "pt", scale, negative)[0]
        limit, shown = limits(pipe, latents, expected, usual if scale is None else scale)
        request = request_of(denoiser, name, scale=scale, negative=negative)
        made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
        oracle.assert_close(f"latents at {scale}", made, latents, limit)
        oracle.assert_close(f"shown at {scale}", drawn(denoiser, request, "F" * STEPS), expected, shown)
        other = replace(request, latents=-request.latents)
        made = torch.from_numpy(sample(denoiser, other, denoiser.forecasts(plan="F" * STEPS)).latents)
        assert (made - latents).abs().max() > limit
        assert scale is None or (drawn(denoiser, other, "F" * STEPS) - expected).abs().max() > shown


@pytest.mark.parametrize("name", SIZES)
def test_without_its_rounding_a_loop_is_as_exact_as_any(whole, whole_bundles, name, monkeypatch):
    """So that nothing hides behind the wide bound; the same request with another prompt, negative prompt, or scales of
    places is not within this one."""
    monkeypatch.setattr(transformer_kandinsky, "torch", Unrounded())
    (pipe, denoiser), folder = whole(name), whole_bundles(name).parent / "pipeline"
    alone = eager_denoiser(export.draft(open_checkpoint(str(folder), FAMILIES[VIDEO]), options_of()))
    expected = of_diffusers(pipe, name, "latent")

    def made(request):
        return torch.from_numpy(sample(alone, request, alone.forecasts(plan="F" * STEPS)).latents)

    request = request_of(denoiser, name)
    extent = depth_and_length(*encoders_of(pipe), *[pipe.transformer] * 2 * STEPS)
    limit = oracle.bound(expected, 2 * SCALE - 1, torch.float32, *extent)
    oracle.assert_close(f"unrounded {name}", made(request), expected, limit)
    scales = {"scale_factor": request.conditioning["scale_factor"] * 2}
    for other in (
        request_of(denoiser, name, prompt="a b"),
        request_of(denoiser, name, negative="y"),
        replace(request, conditioning={**request.conditioning, **scales}),
    ):
        assert (made(other) - expected).abs().max() > limit


PROMPTS = {
    "none": "",
    "usual": PROMPT,
    "entities": "  a &amp;amp; b \n c ",
    "one too many": "a " * (TOKENS - 1) + "b",
    "long": "a b c d " * 30,
    "unknown": "a b " * 4 + "xy " * 12,
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", SIZES)
def test_a_prompt_becomes_what_the_pipeline_makes_of_it(whole, name, prompt):
    """Also one that is too long, which first loses characters at its end."""
    pipe, denoiser = whole(name)
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(PROMPTS[prompt], max_sequence_length=TOKENS)
    expected = {"encoder_hidden_states": states, "pooled_projections": pooled}
    seen = denoiser.encoder.encode(PROMPTS[prompt], TOKENS)
    other = denoiser.encoder.encode("x y", TOKENS)
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        length = max(depth_and_length(*encoders_of(pipe))[1], pipe.prompt_template_encode_start_idx + TOKENS)
        limit = oracle.bound(value, 1.0, torch.float32, depth_and_length(*encoders_of(pipe))[0], length)
        oracle.assert_close(f"{name} {key}", torch.from_numpy(seen[key]), value, limit)
        apart = torch.from_numpy(other[key])
        assert apart.shape != value.shape or (apart - value).abs().max() > limit


@pytest.mark.parametrize("name", SIZES)
def test_tokens_are_those_of_the_pipeline_however_long_the_prompt(whole, name, monkeypatch):
    """Of every length around the longest, where what is cut off is the end of the template or a part of a word."""
    pipe, denoiser = whole(name)
    given, cut, other = [], 0, 0
    plain = pipe.text_encoder.forward
    monkeypatch.setattr(
        pipe.text_encoder, "forward", lambda input_ids, **more: given.append(input_ids) or plain(input_ids, **more)
    )
    monkeypatch.setattr(type(denoiser.encoder.part), "__call__", lambda part, tokens: given.append(tokens["qwen"]))
    for count in range(TOKENS - 5, TOKENS + 20):
        for end in ("", " z" * 3, " " + "y" * 30, " xy" * 12):
            prompt = " ".join("abcdefgh"[k % 8] for k in range(count)) + end
            with torch.no_grad():
                pipe.encode_prompt(prompt, max_sequence_length=TOKENS)
            denoiser.encoder.encode(prompt, TOKENS)
            expected, seen = given[-2:]
            assert seen.tolist() == expected.tolist()
            (every,) = pipe.tokenizer(text=[pipe.prompt_template.format(prompt)], images=None, videos=None)["input_ids"]
            cut += len(every) > TOKENS + pipe.prompt_template_encode_start_idx
            other += every[: TOKENS + pipe.prompt_template_encode_start_idx] != expected[0].tolist()
    assert cut > other > 0  # words that are not known are longer as text of tokens, so that more is cut off


@pytest.mark.parametrize("name", SIZES)
def test_what_the_transformer_is_given_is_what_the_pipeline_gives_it(whole, name, monkeypatch):
    """Noise, channels of a picture that are zeros, scales of places, timesteps and both prompts, call by call."""
    pipe, denoiser = whole(name)
    calls, plain = [], pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda **given: (
            calls.append({k: v.clone() if hasattr(v, "clone") else v for k, v in given.items()}) or plain(**given)
        ),
    )
    of_diffusers(pipe, name, "latent", None, None)
    assert len(calls) == 2 * STEPS
    request = request_of(denoiser, name, scale=None, negative=None)
    loop = Loop(denoiser, request, denoiser.forecasts(plan="F" * STEPS))
    seen = torch.from_numpy(loop.model_input())
    first = calls[0]["hidden_states"]
    oracle.assert_close("noise", seen, first, oracle.bound(first, 1.0, torch.float32, 1, 1))
    channels = pipe.transformer.config.in_visual_dim
    assert seen.shape[-1] == (2 * channels + 1 if name == VIDEO else channels) and not seen[..., channels:].any()
    assert loop.model_timesteps.tolist() == [call["timestep"].item() for call in calls[::2]]
    for call, given in zip(calls[:2], request.branches, strict=True):
        assert given["scale_factor"].tolist() == np.float32(call["scale_factor"]).tolist()
        for key in ("encoder_hidden_states", "pooled_projections"):
            extent = depth_and_length(*encoders_of(pipe))
            length = max(extent[1], given["encoder_hidden_states"].shape[1] + pipe.prompt_template_encode_start_idx)
            limit = oracle.bound(call[key], 1.0, torch.float32, extent[0], length)
            oracle.assert_close(key, torch.from_numpy(given[key]), call[key], limit)
    assert request.branches[0]["encoder_hidden_states"].shape != request.branches[1]["encoder_hidden_states"].shape or (
        np.abs(request.branches[0]["encoder_hidden_states"] - request.branches[1]["encoder_hidden_states"]).max()
        > limit
    )


def test_scales_of_places_are_those_of_the_pipeline():
    """For every size of whole tokens around both ends, and of any shape."""
    tensor = Tensor(name="scale_factor", dtype="float32", shape=(3,), role="constant", fill="scales")
    pipe = object.__new__(Kandinsky5T2VPipeline)
    seen = set()
    for rows in (2, 20, 29, 30, 31, 40, 52, 53, 54, 55, 80, 128):
        for columns in (2, 29, 30, 41, 53, 54, 128):
            expected = pipe._get_scale_factor(16 * rows, 16 * columns)
            made = value_from_fill(tensor, {"rows": rows, "columns": columns})
            assert made.tolist() == np.float32(expected).tolist()
            seen.add(expected)
    assert len(seen) == 2


@pytest.mark.parametrize(("name", "extents"), [(VIDEO, (1, 4, 6)), (VIDEO, (5, 6, 2)), (PICTURE, (1, 6, 10))])
def test_latents_show_what_the_pipeline_shows_of_them(whole, name, extents):
    """Their channels stand last; the VAE's own shift, if it has one, is left out as there."""
    pipe, denoiser = whole(name)
    channels = pipe.transformer.config.in_visual_dim
    latents = torch.randn(1, *extents, channels, generator=torch.Generator().manual_seed(1))
    moved = latents.movedim(-1, 1) / pipe.vae.config.scaling_factor
    with torch.no_grad():
        expected = pipe.vae.decode(moved if name == VIDEO else moved[:, :, 0]).sample[0]
    expected = (expected / 2 + 0.5).clamp(0, 1)
    expected = expected.movedim(1, 0) if name == VIDEO else expected
    request = request_of(denoiser, name)
    made = torch.from_numpy(pictures_of(denoiser, request, latents.numpy())[0].copy()).movedim(-1, -3) / 255
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae.decoder)) + 0.5 / 255
    oracle.assert_close(name, made, expected, limit)
    other = torch.from_numpy(pictures_of(denoiser, request, -latents.numpy())[0].copy()).movedim(-1, -3) / 255
    assert (other - expected).abs().max() > limit


@pytest.mark.parametrize("name", SIZES)
def test_the_published_words_and_numbers_are_the_pipelines(whole, name):
    pipe, denoiser = whole(name)
    text, called = denoiser.manifest.parts["text"], PIPELINES[name].__call__
    asked = inspect.signature(called).parameters
    qwen, clip = text.tokens
    assert (qwen.template, qwen.dropped) == (pipe.prompt_template, pipe.prompt_template_encode_start_idx)
    assert (qwen.length, clip.length) == (asked["max_sequence_length"].default, 77)
    assert f'negative_prompt = "{text.negative}"' in inspect.getsource(called)
    assert denoiser.manifest.sampling.guidance_scale == asked["guidance_scale"].default
    usual = FAMILIES[VIDEO]
    latent = usual.latent_size if name == VIDEO else usual.by_pipeline["Kandinsky5T2IPipeline"]["latent_size"]
    assert [8 * side for side in latent[-2:]] == [asked["height"].default, asked["width"].default]
    assert usual_size(denoiser.manifest) == ((5, 32, 48) if name == VIDEO else (32, 48))


@pytest.mark.parametrize("name", SIZES)
def test_run_draws_it_without_torch(whole, whole_bundles, name, tmp_path):
    """Nor diffusers, nor transformers."""
    denoiser, out = whole(name)[1], tmp_path / ("made.webp" if name == VIDEO else "made.png")
    absent = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers']));"
    start = "from taylorseer_export.cli import main; sys.exit(main(sys.argv[1:]))"
    asked = ["--prompt", PROMPT, "--negative-prompt", OTHER, "--guidance-scale", SCALE, "--seed", SEED, "--plan", "FF"]
    asked += ["--size", "x".join(map(str, SIZES[name])), "--threads", 1, "--out", out]
    asked += ["--previews", 1] if name == PICTURE else []
    command = [sys.executable, "-c", absent + start, "run", whole_bundles(name), *asked]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    request = request_of(denoiser, name)
    (made,) = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF")).latents)
    if name == PICTURE:
        assert np.array_equal(np.asarray(Image.open(out)), made)
        assert np.asarray(Image.open(tmp_path / "made-preview-1.png")).shape == made.shape
    else:
        write_video(tmp_path / "expected.webp", made, 24)
        assert out.read_bytes() == (tmp_path / "expected.webp").read_bytes()


@pytest.mark.parametrize("name", SIZES)
def test_every_door_draws_the_same(whole, whole_bundles, name, tmp_path):
    """The HTTP API, which sends a video as MP4, and what Triton's model reads and says."""
    denoiser, (*frames, height, width) = whole(name)[1], SIZES[name]
    request = request_of(denoiser, name)
    expected = pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF")).latents)[0]
    more = {"seed": SEED, "plan": "FF", "guidance_scale": SCALE, "negative_prompt": OTHER}
    words = {"prompt": PROMPT, "model": "kandinsky-5-whole", "size": f"{width}x{height}"}
    with load(whole_bundles(name), threads=1) as own:
        with models_over(own, slots=1, queue=1, workers=1) as models, serving(models) as port:
            client = client_of(port)
            if name == PICTURE:
                made = client.images.generate(**words, extra_body=more)
                seen = picture_in(made.data[0].b64_json)
            else:
                job = client.videos.create(**words, extra_body={**more, "frames": frames[0]})
                assert ended(client, job.id).status == "completed"
                seen = frames_of(client.videos.download_content(job.id).read())
                write_video(tmp_path / "expected.mp4", expected, 24)
                expected = frames_of((tmp_path / "expected.mp4").read_bytes())
    assert np.array_equal(seen, expected)
    values = {"prompt": PROMPT.encode(), "negative_prompt": OTHER.encode()}
    values = {key: np.array([value], object) for key, value in values.items()}
    values |= {"seed": np.array([SEED]), "guidance_scale": np.array([SCALE]), "plan": np.array([b"FF"], object)}
    values |= {key: np.array([value]) for key, value in contract.sides_named(SIZES[name]).items()}
    asked = contract.ask(denoiser, "picture", values)
    assert np.array_equal(asked.request.latents, request.latents)
    assert ("frames" in {port.name for port in contract.inputs(denoiser.manifest, "picture")}) == (name == VIDEO)


def test_a_picture_may_be_asked_for_as_one_frame(whole):
    denoiser = whole(PICTURE)[1]
    one, other = (prompt_request(denoiser, [PROMPT], [SEED], size) for size in ((32, 48), (1, 32, 48)))
    assert np.array_equal(one.latents, other.latents) and one.latents.shape == (1, 1, 4, 6, 4)
    with pytest.raises(ConfigError, match=r"size is 5x32x48, a latent of 2x4x6, expected \[1, 2\*rows"):
        prompt_request(denoiser, [PROMPT], [SEED], (5, 32, 48))


def test_tensors_need_no_channels_of_a_picture(whole):
    """In place of those of a request that brings none there are zeros, for every door."""
    denoiser = whole(VIDEO)[1]
    request = request_of(denoiser, VIDEO)
    (port,) = (port for port in contract.inputs(denoiser.manifest, "denoiser") if port.name == "condition")
    assert port.optional and not request.joined.value.any()
    values = {**request.branches[0], "latents": request.latents}
    for beside in ({}, {"condition": request.joined.value}):
        asked = contract.ask(denoiser, "denoiser", {**values, **beside, "plan": np.array([b"FF"], object)})
        assert np.array_equal(asked.request.joined.value, request.joined.value)
    with pytest.raises(ConfigError, match=r"input `condition` is \[1, 3, 4, 6, 4\], expected \[1, 3, 4, 6, 5\]"):
        beside = {"condition": request.joined.value[..., 1:]}
        contract.ask(denoiser, "denoiser", {**values, **beside, "plan": np.array([b"FF"], object)})


def test_what_does_not_belong_is_refused(whole, tmp_path):
    video, picture = (whole(name)[1] for name in SIZES)
    for denoiser in (video, picture):
        with pytest.raises(
            ConfigError, match=r"picture is given for kandinsky-5-.*, expected none, since it draws from"
        ):
            given_picture(denoiser.manifest, np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"length of the prompt is 513, expected 1 to 512 \(tokens\)"):
        request_of(video, VIDEO, length=513)
    with pytest.raises(ConfigError, match="size frames is 6, expected a multiple of 4 and 1"):
        prompt_request(video, [PROMPT], [SEED], (6, 32, 48))
    with pytest.raises(ConfigError, match=r"size is 5x32x40, a latent of 2x4x5, expected \[frames, 2\*rows, 2\*col"):
        prompt_request(video, [PROMPT], [SEED], (5, 32, 40))
    with pytest.raises(ConfigError, match="size is 32x48, expected FxHxW"):
        prompt_request(video, [PROMPT], [SEED], (32, 48))


@pytest.mark.parametrize("kind", ["Kandinsky5I2VPipeline", "Kandinsky5I2IPipeline"])
def test_other_pipelines_are_refused_whole_by_name(whole_bundles, tmp_path, kind):
    opened = open_as(whole_bundles(VIDEO).parent / "pipeline", tmp_path, kind)
    with pytest.raises(ConfigError, match=f"--whole is given for kandinsky-5 of {kind}, expected a family whose pipe"):
        parts_of(opened)


def test_a_picture_of_a_model_with_channels_for_one_is_refused(whole_bundles, tmp_path):
    opened = open_as(whole_bundles(VIDEO).parent / "pipeline", tmp_path, "Kandinsky5T2IPipeline")
    with pytest.raises(ConfigError, match="`visual_cond` is true, expected false for Kandinsky5T2IPipeline"):
        opened.family.inputs(opened.config)


def open_as(folder, tmp_path, kind):
    """The checkpoint of a pipeline, as if its index named another one."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    told = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({**told, "_class_name": kind}))
    return open_checkpoint(str(tmp_path), FAMILIES[VIDEO])
