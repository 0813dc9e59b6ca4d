"""Videos that whole HunyuanVideo bundles make from a picture: each is what the untouched pipeline makes of it.

Both kinds: the picture as channels behind the noise (`hunyuan-channels`), and in the place of the first frame
(`hunyuan-replace`).
"""

# Shapes: C channels, F latent frames, H and W latent pixels

import io
import json
from contextlib import nullcontext

import numpy as np
import oracle
import pytest
import torch
import triton_server
from images_api import alone, asked, client_of, ended, frames_of, models_over, serving
from PIL import Image
from pipelines_with_parts import EDITED, OTHER, PROMPT, bound_of_picture, depth_and_length, drawn, encoders_of
from safetensors.numpy import load_file
from tiny_pipelines import MARKS, letters
from triton_server import Server

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.commands import run
from taylorseer_export.compile.components import numbers
from taylorseer_export.embedded.animating import animated
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import Given, given_picture, shown_to
from taylorseer_export.embedded.requests import pictures_of, prompt_request
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.whole import Tokens
from taylorseer_export.report.card import card
from taylorseer_export.runtime.denoiser import load
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.tensors import NEGATIVE
from taylorseer_export.serve import contract
from taylorseer_export.serve.client import infer
from taylorseer_export.serve.repository import Deployment, write_repository

pytestmark = pytest.mark.slow

STEPS, SEED, SIZE, SCALE = 2, 3, (9, 32, 48), 4.0
# Of each kind: how the pipeline is asked for guidance, the negative prompt of a request, and how often one state of the
# picture is kept.
KINDS = {
    "hunyuan-channels": ({"true_cfg_scale": SCALE, "negative_prompt": OTHER}, OTHER, 2),
    "hunyuan-replace": ({"guidance_scale": SCALE}, None, 4),
}
HEADER = MARKS[2]
PROMPTS = ["", "x", PROMPT, "a " * 300, f"a {HEADER} b", f"a b c {HEADER} " + "d " * 300]


def request_of(denoiser, name, picture, size=SIZE, **more):
    return prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, KINDS[name][1], given=Given(picture), **more)


@pytest.mark.parametrize("name", KINDS)
def test_the_video_is_the_pipelines(whole, name):
    """From prompt and picture to latents and to video, all steps full, noise of the same seed."""
    pipe, denoiser = whole(name)
    (frames, height, width), (how, negative, _) = SIZE, KINDS[name]
    cut = name == "hunyuan-channels"
    asked_for = {"image": Image.fromarray(EDITED), "prompt": PROMPT, "num_inference_steps": STEPS, **how}
    asked_for |= {"height": height, "width": width, "num_frames": frames}
    with torch.no_grad():
        latents, (expected,) = (
            pipe(**asked_for, generator=torch.Generator().manual_seed(SEED), output_type=kind).frames
            for kind in ("latent", "pt")
        )
    calls, scale = (STEPS, None) if negative is None else (2 * STEPS, SCALE)
    request = request_of(denoiser, name, EDITED)
    made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
    extent = depth_and_length(*encoders_of(pipe), *[pipe.transformer] * calls, pipe.vae.encoder)
    limit = oracle.bound(latents, 1.0 if scale is None else 2 * scale - 1, torch.float32, *extent)
    oracle.assert_close("latents", made[:, :, int(cut) :], latents, limit)
    limit = bound_of_picture(expected, pipe, calls, scale)
    oracle.assert_close("video", drawn(denoiser, request, "F" * STEPS), expected, limit)
    assert len(expected) == frames - 4 * cut
    wrong = drawn(denoiser, request_of(denoiser, name, 255 - EDITED), "F" * STEPS)
    assert (wrong - expected).abs().max() > limit


def encoded(pipe, name, picture, prompt):
    """What the pipeline's own `encode_prompt` makes of both, under the transformer's names."""
    with torch.no_grad():
        states, pooled, mask = pipe.encode_prompt(
            Image.fromarray(picture), prompt, image_embed_interleave=KINDS[name][2]
        )
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask.float(),
        "pooled_projections": pooled,
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=["none", "short", "usual", "long", "header", "long header"])
@pytest.mark.parametrize("name", KINDS)
def test_picture_and_prompt_become_what_the_pipeline_makes_of_them(whole, name, prompt):
    pipe, denoiser = whole(name)
    (pixels,) = shown_to(denoiser.manifest.parts["text"], EDITED).values()
    expected = encoded(pipe, name, EDITED, prompt)
    seen = denoiser.encoder.encode(prompt, None, pixels)
    assert seen.keys() == expected.keys()
    extent = depth_and_length(*encoders_of(pipe))
    assert np.array_equal(seen["encoder_attention_mask"], expected["encoder_attention_mask"].numpy())
    for key, value in expected.items():
        limit = oracle.bound(value, 1.0, torch.float32, *extent)
        oracle.assert_close(f"{name} {key}", torch.from_numpy(seen[key]), value, limit)
    states = "encoder_hidden_states"
    limit = oracle.bound(expected[states], 1.0, torch.float32, *extent)
    for picture, text in ((1 - pixels, prompt), (pixels, f"q {prompt}")):
        other = denoiser.encoder.encode(text, None, picture)[states]
        assert (torch.from_numpy(other) - expected[states]).abs().max() > limit


def test_a_negative_prompt_goes_with_a_black_picture(whole):
    pipe, denoiser = whole("hunyuan-channels")
    expected = encoded(pipe, "hunyuan-channels", np.zeros((32, 48, 3), np.uint8), OTHER)
    request = request_of(denoiser, "hunyuan-channels", EDITED)
    for key, value in expected.items():
        limit = oracle.bound(value, 1.0, torch.float32, *depth_and_length(*encoders_of(pipe)))
        oracle.assert_close(key, torch.from_numpy(request.negative[key]), value, limit)
    assert request.guided and request.joined.axis == 1


@pytest.mark.parametrize("shape", [(26, 38), (40, 100), (9, 7), (32, 48)])
@pytest.mark.parametrize("name", KINDS)
def test_a_picture_becomes_what_the_pipeline_makes_of_it(whole, name, shape):
    """The one latent frame that it is, zeros and a mask as the pipeline appends them, and a part of the noise."""
    pipe, denoiser = whole(name)
    frames, height, width = SIZE
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    kind = pipe.transformer.config.image_condition_type
    with torch.no_grad():
        latents, expected = pipe.prepare_latents(
            pipe.video_processor.preprocess(Image.fromarray(picture), height, width),
            1,
            4,
            height,
            width,
            frames,
            torch.float32,
            "cpu",
            torch.Generator().manual_seed(SEED),
            image_condition_type=kind,
        )
    if name == "hunyuan-channels":
        expected[:, :, 1:] = 0
        mask = torch.ones_like(expected[:, :1])
        mask[:, :, 1:] = 0
        expected = torch.cat([expected, mask], 1)
    seen = animated(denoiser, picture, SIZE)
    assert seen.keys() == {"condition"}
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae.encoder))
    oracle.assert_close(f"condition of {shape}", torch.from_numpy(seen["condition"]), expected, limit)
    other = animated(denoiser, 255 - picture, SIZE)["condition"]
    assert (torch.from_numpy(other) - expected).abs().max() > limit
    request = request_of(denoiser, name, picture)
    assert np.array_equal(request.joined.value, seen["condition"])
    limit = oracle.bound(latents, 1.0, torch.float32, 1, 2)
    oracle.assert_close("noise", torch.from_numpy(request.latents), latents, limit)
    wrong = torch.from_numpy(request_of(denoiser, name, 255 - picture).latents)
    assert (wrong - latents).abs().max() > limit


def test_what_is_kept_of_a_prompt_is_of_its_picture(whole, monkeypatch):
    """The same prompt with the same picture is read once, with another picture again; a negative one has none."""
    denoiser, cache, name = whole("hunyuan-channels")[1], ConditioningCache(), "hunyuan-channels"
    pictures = (EDITED, 255 - EDITED)
    expected = [request_of(denoiser, name, picture) for picture in pictures]
    encode, prompts = denoiser.encoder.encode, []
    monkeypatch.setattr(denoiser.encoder, "encode", lambda *given: (prompts.append(given[0]), encode(*given))[1])
    for number in (0, 0, 1):
        request = request_of(denoiser, name, pictures[number], cache=cache)
        for branch, other in zip(request.branches, expected[number].branches, strict=True):
            assert {n: v.tobytes() for n, v in branch.items()} == {n: v.tobytes() for n, v in other.items()}
    assert prompts == [PROMPT, OTHER, PROMPT] and cache.counts[:2] == (3, 3)
    states = "encoder_hidden_states"
    assert not np.array_equal(expected[0].conditioning[states], expected[1].conditioning[states])


def test_frames_that_the_pipeline_cuts_off_are_no_part_of_the_video(whole):
    denoiser = whole("hunyuan-channels")[1]
    request = prompt_request(denoiser, [PROMPT], [SEED], (5, 32, 48), given=Given(EDITED))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(request.latents.shape, np.float32)
    assert pictures_of(denoiser, request, latents).shape == (1, 1, 32, 48, 3)
    with pytest.raises(ConfigError, match="size is 1x32x48, of `frames` 1, expected 2 to 64"):
        prompt_request(denoiser, [PROMPT], [SEED], (1, 32, 48), given=Given(EDITED))
    assert "24 frames per second, the first 4 left out" in card(denoiser.manifest)
    assert "left out" not in card(whole("hunyuan-replace")[1].manifest)


def test_what_does_not_belong_is_refused(whole):
    video, channels, replaces = (whole(name)[1] for name in ("hunyuan", *KINDS))
    for denoiser in (channels, replaces):
        with pytest.raises(ConfigError, match=r"picture is missing for hunyuan-video-.*, expected the one that it is"):
            prompt_request(denoiser, [PROMPT], [SEED], SIZE)
    with pytest.raises(ConfigError, match=r"picture is given for hunyuan-video-.*, expected none, since it draws"):
        given_picture(video.manifest, EDITED)
    with pytest.raises(ConfigError, match=r"strength is 0.5, expected none, since hunyuan-video-.* begins with noise"):
        given_picture(channels.manifest, EDITED, 0.5)
    for denoiser, settings, problem in (
        (
            channels,
            {"negative": OTHER},
            "negative prompt is given for .* without a guidance scale, expected one",
        ),
        (channels, {"guidance_scale": 3.0}, "guidance scale is 3 without `negative_` inputs, expected them"),
        (channels, {"length": 32}, r"length of the prompt is 32, expected 256 \(tokens\), the only one"),
        (replaces, {"negative": OTHER}, "its guidance takes no second prompt"),
        (replaces, {"size": (9, 32, 40)}, "size is 9x32x40, a latent of 3x4x5, expected"),
    ):
        with pytest.raises(ConfigError, match=problem):
            prompt_request(denoiser, [PROMPT], [SEED], **{"size": SIZE, **settings}, given=Given(EDITED))


def test_tensors_take_the_place_of_prompt_and_picture(whole):
    denoiser = whole("hunyuan-channels")[1]
    expected = request_of(denoiser, "hunyuan-channels", EDITED)
    tensors = {**expected.conditioning, "condition": expected.joined.value}
    tensors |= {NEGATIVE + name: value for name, value in expected.negative.items()}
    again = prompt_request(denoiser, tensors, [SEED], SIZE, SCALE)
    assert np.array_equal(again.joined.value, expected.joined.value) and np.array_equal(again.latents, expected.latents)


def _text(told):
    return told["parts"]["text"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda told: _text(told).update(shown=None), "inputs of part text are .*`pixels`.*, its tokenizers make"),
        (
            lambda told: _text(told)["graph"]["inputs"].pop(),
            "inputs of part text are .*, its tokenizers make .*`pix",
        ),
        (lambda told: _text(told)["graph"]["inputs"][-1].update(shape=[1, 4, 48, 48]), "`pixels` of part text is"),
        (lambda told: told["parts"].pop("encode"), "part text is shown a picture as `pixels`, and no part makes a"),
        (
            lambda told: told["parts"]["encode"]["graph"]["outputs"][0].update(shape=[1, 9, 1, "rows", "columns"]),
            "`condition` of graph encode is .*, the graphs take",
        ),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_that_contradicts_itself_is_refused(whole, name, spoil, problem):
    told = json.loads(whole(name)[1].manifest.model_dump_json())
    spoil(told)
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)


# Export --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """A pipeline of the kind with channels, on disk."""
    out = tmp_path_factory.mktemp("pipeline")
    whole("hunyuan-channels")[0].save_pretrained(out)
    return out


def test_export_says_what_is_missing(folder, tmp_path, capsys):
    command = ["hunyuan-video", "--model", str(folder), "--whole", "--out", str(tmp_path)]
    assert cli.main([*command, "--without", "encode"]) == 2
    assert "--without is encode for family hunyuan-video, expected text too" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_without_the_token_that_is_sought_is_refused(folder, tmp_path):
    letters(77).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = open_checkpoint(str(folder), FAMILIES["hunyuan-video"])
    with pytest.raises(CheckpointError, match=r"tokenizer has no special token `<\|end_header_id\|>`, expected it"):
        numbers(checkpoint, Tokens("llama", "tokenizer", 256, sought=(HEADER,)), tmp_path)


@pytest.fixture(scope="module")
def bundle(whole_bundles):
    return whole_bundles("hunyuan-channels")


def test_a_bundle_on_disk_makes_the_video(bundle, tmp_path):
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    command = [
        "run",
        str(bundle),
        "--prompt",
        PROMPT,
        "--image",
        str(tmp_path / "given.png"),
        "--size",
        "9x32x48",
        "--plan",
        "F.F",
    ]
    assert cli.main([*command, "--threads", "1", "--out", str(tmp_path / "made.webp")]) == 0
    with Image.open(tmp_path / "made.webp") as made:
        assert (made.n_frames, made.size) == (5, (48, 32))


# Doors ---------------------------------------------------------------------------------------------------------------


def test_run_animates_a_picture(whole, monkeypatch, tmp_path, capsys):
    denoiser = whole("hunyuan-channels")[1]
    monkeypatch.setattr(run, "open_denoiser", lambda *_, **how: nullcontext(denoiser))
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    command = ["run", "bundle", "--prompt", PROMPT, "--size", "9x32x48", "--plan", "F.", "--n", "2", "--seed", "3"]
    guided = ["--negative-prompt", OTHER, "--guidance-scale", str(SCALE)]
    out = tmp_path / "made.safetensors"
    assert cli.main([*command, *guided, "--image", str(tmp_path / "given.png"), "--out", str(out)]) == 0
    request = prompt_request(denoiser, [PROMPT] * 2, [3, 4], SIZE, SCALE, OTHER, given=Given(EDITED))
    expected = sample(denoiser, request, denoiser.forecasts(plan="F.")).latents
    assert np.array_equal(load_file(out)["latents"], expected)
    capsys.readouterr()
    assert cli.main([*command, "--out", str(tmp_path / "none.webp")]) == 2
    assert "picture is missing for hunyuan-video-" in capsys.readouterr().err and not (tmp_path / "none.webp").exists()


@pytest.mark.parametrize("name", KINDS)
def test_triton_s_models_take_a_picture(whole, name):
    """One that draws takes it beside the prompt; one that denoises in the place of what it becomes."""
    denoiser, negative = whole(name)[1], KINDS[name][1]
    expected = request_of(denoiser, name, EDITED)
    values = {"prompt": np.array([PROMPT.encode()], object), "seed": np.array([SEED]), "image": EDITED}
    values |= {side: np.array([extent]) for side, extent in zip(("frames", "height", "width"), SIZE, strict=True)}
    values["guidance_scale"] = np.array([SCALE])
    values |= {} if negative is None else {"negative_prompt": np.array([negative.encode()], object)}
    assert values.keys() <= {port.name for port in contract.inputs(denoiser.manifest, "picture")}
    for asked_for in (
        contract.ask(denoiser, "picture", values, cache=ConditioningCache()).request,
        contract.ask(denoiser, "denoiser", _tensors(denoiser, expected)).request,
    ):
        assert np.array_equal(asked_for.latents, expected.latents)
        assert np.array_equal(asked_for.joined.value, expected.joined.value)
        for one, other in zip(asked_for.branches, expected.branches, strict=True):
            assert {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in other.items()}
    with pytest.raises(ConfigError, match="input `image` is missing, expected UINT8"):
        contract.ask(denoiser, "picture", {key: value for key, value in values.items() if key != "image"})


def _tensors(denoiser, request):
    """What a model of latents is sent for a request, with its picture."""
    values = {"latents": request.latents, **request.conditioning, "image": EDITED}
    if request.negative is not None:
        values["guidance_scale"] = np.array([SCALE])
        ports = {port.name for port in contract.inputs(denoiser.manifest, "denoiser")}
        values |= {NEGATIVE + name: value for name, value in request.negative.items() if NEGATIVE + name in ports}
    return values


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_openai_client_sends_a_picture(bundle, tmp_path):
    """The video is that of a solo run, and what is told of its length is that of the video."""
    file = io.BytesIO()
    Image.fromarray(EDITED).save(file, "png")
    picture, how = ("a.png", file.getvalue(), "image/png"), {"seed": 3, "plan": "FF", "order": 0}
    with load(bundle, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT], [3], SIZE, given=Given(EDITED))
        write_video(tmp_path / "expected.mp4", alone(denoiser, request, plan="FF", order=0)[0], 24)
        expected = frames_of((tmp_path / "expected.mp4").read_bytes())
        with models_over(denoiser, slots=1, queue=2, workers=1) as models, serving(models) as port:
            client = client_of(port)
            asked_for = {"prompt": PROMPT, "size": "48x32", "input_reference": picture}
            job = client.videos.create(**asked_for, extra_body={**how, "frames": SIZE[0]})
            assert ended(client, job.id).status == "completed"
            assert np.array_equal(frames_of(client.videos.download_content(job.id).read()), expected)
            assert (job.model_extra["taylorseer"]["frames"], job.seconds) == (5, f"{5 / 24:g}")
            short = client.videos.create(**asked_for, seconds="0.2", extra_body=how)  # of 24 frames per second
            assert short.model_extra["taylorseer"]["frames"] == 5 and ended(client, short.id).status == "completed"
            status, _, text = asked(port, "/v1/videos", {"prompt": PROMPT, "size": "48x32", **how})
            assert status == 400 and "input_reference is missing for hunyuan-video-" in text.decode()


@pytest.mark.slow
def test_a_real_triton_makes_the_video(bundle, tmp_path):
    """Frame for frame that of a solo run."""
    if reason := triton_server.missing():
        pytest.skip(reason)
    write_repository(bundle, tmp_path, Deployment(slots=1, workers=1, models=("picture",)))
    asked_for = {"prompt": PROMPT, "image": EDITED, "seed": SEED, "plan": "FF", **contract.sides_named(SIZE)}
    with load(bundle, threads=1) as denoiser:
        request = prompt_request(denoiser, [PROMPT], [SEED], SIZE, given=Given(EDITED))
        expected, _ = alone(denoiser, request, plan="FF")
        name = f"{denoiser.manifest.family}-{denoiser.manifest.name}"
    with Server(tmp_path) as server:
        made = infer(server.wait_ready().http, name, asked_for, "http", timeout=120)
    assert np.array_equal(made["video"], expected) and made["frame_rate"].tolist() == [24]
