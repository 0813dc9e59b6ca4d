"""Videos that whole bundles make from a picture: each is what the untouched pipeline makes of it."""

# Shapes: C channels, F latent frames, H and W latent pixels

import base64
import io
import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import openai
import oracle
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan import pipeline_wan_i2v
from images_api import alone, asked, client_of, frames_of, models_over, serving, until
from PIL import Image
from pipelines_with_parts import (
    EDITED,
    OTHER,
    PROMPT,
    bound_of_picture,
    denoiser_with_parts,
    depth_and_length,
    drawn,
    write_pipeline,
)
from safetensors.numpy import load_file
from test_videos import PLAIN, STATISTICS
from tiny_bundles import options_of
from tiny_models import tiny_wan
from tiny_pipelines import wan_image_pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Filter, Manifest
from taylorseer_export.bundle.memory import video_bytes
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.commands import run
from taylorseer_export.compile.components import look
from taylorseer_export.compile.export import draft
from taylorseer_export.embedded.animating import animated
from taylorseer_export.embedded.edits import Given, given_picture
from taylorseer_export.embedded.picture import seen_by_encoder
from taylorseer_export.embedded.requests import prompt_request, size_of, usual_size
from taylorseer_export.embedded.video import write_video
from taylorseer_export.errors import CheckpointError, ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.families.whole import Shown, scaled
from taylorseer_export.report.card import card
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.tensors import NEGATIVE
from taylorseer_export.serve import contract

STEPS, SEED, SIZE, SCALE = 2, 3, (9, 32, 48), 4.0


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    """Of letters, which ftfy would leave as they are; this pipeline alone cannot do without it."""
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def asked_of(pipe, picture, size=SIZE, **more):
    frames, height, width = size
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


def test_a_video_whose_first_frame_is_the_picture_is_the_pipelines(whole):
    """Wan 2.2 5B: latents of the picture in the place of the first frame's, whose tokens have timestep 0."""
    pipe, denoiser = whole("wan-5b-image")
    size = (9, 64, 96)
    expected = asked_of(pipe, EDITED, size, max_sequence_length=32)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    for picture, same in ((EDITED, True), (255 - EDITED, False)):
        request = prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, OTHER, 32, given=Given(picture))
        seen = drawn(denoiser, request, "F" * STEPS)
        if same:
            oracle.assert_close("video", seen, expected, limit)
        else:
            assert (seen - expected).abs().max() > limit
    with pytest.raises(ConfigError, match="picture"):
        prompt_request(denoiser, [PROMPT], [SEED], size, SCALE, OTHER, 32)


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


def test_frame_by_frame_is_what_diffusers_makes():
    """Of a VAE whose levels are as wide as the published ones' beside each other."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**PLAIN, **STATISTICS).eval()
    picture = torch.rand(1, 3, 24, 16)
    video = torch.cat([2 * picture - 1, torch.zeros(1, 3, 24, 16)])[[0, *[1] * 12]].transpose(0, 1)[None]
    caches, made, given = None, [], {"picture": picture}
    with torch.no_grad():
        expected = scaled(vae, vae.encode(video).latent_dist.mode())
        for _ in range(4):
            one, caches = (
                FAMILIES["wan"]
                .by_config({"in_channels": 12, "out_channels": 4})["whole"]
                .animate({"vae": vae}, given, caches)
            )
            made, given = [*made, one["condition"]], {}
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(vae))
    oracle.assert_close("condition", torch.cat(made, 2)[:, 4:], expected, limit)
    assert {cache.shape[2] for cache in caches} == {2}


@pytest.mark.parametrize(
    ("change", "size", "edge"),
    [
        ({}, (32, 32), 32),
        ({"crop_size": {"height": 20, "width": 30}}, (20, 30), 32),
        ({"do_center_crop": False, "size": {"height": 20, "width": 30}, "resample": 2}, (20, 30), None),
        ({"do_normalize": False}, None, None),
        ({"rescale_factor": 1.0}, None, None),
        ({"do_center_crop": False}, None, None),
        ({"crop_size": {"height": 33, "width": 30}}, None, None),
    ],
)
def test_an_image_processor_is_read_as_it_works(tmp_path, change, size, edge):
    """What is no resizing, cutting and normalising alone is refused; what is read does the same to a picture."""
    usual = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).to_dict()
    (tmp_path / "image_processor").mkdir()
    (tmp_path / "image_processor" / "preprocessor_config.json").write_text(json.dumps({**usual, **change}))
    index = {"image_processor": ["transformers", "CLIPImageProcessorPil"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    checkpoint, declared = SimpleNamespace(root=tmp_path), Shown("pixels", "image_processor")
    if size is None:
        with pytest.raises(CheckpointError, match=r"image_processor does not load as .*, expected an image processor"):
            look(checkpoint, declared)
        return
    made = look(checkpoint, declared)
    assert (made.size, made.shown.edge) == (size, edge)
    expected = CLIPImageProcessorPil.from_pretrained(tmp_path / "image_processor")(Image.fromarray(EDITED)).pixel_values
    seen = seen_by_encoder(EDITED, made.size, made.shown.edge, made.shown.filter).transpose(2, 0, 1).astype(np.float32)
    mean, deviation = (np.array(of, np.float32)[:, None, None] for of in (made.mean, made.deviation))
    true = torch.from_numpy(np.asarray(expected[0]))
    limit = oracle.bound(true, 1.0, torch.float32, 1, 3)
    oracle.assert_close("pixels", torch.from_numpy((seen / 255 - mean) / deviation), true, limit)
    assert tuple(Image.Resampling(k).name.lower() for k in range(6)) == Filter.__args__


def test_it_is_made_of_any_number_of_frames_in_memory_that_does_not_grow(whole, monkeypatch):
    """Longer videos begin with what shorter ones are, and nothing of another video is left."""
    denoiser = whole("wan-image")[1]
    runner, sizes = denoiser.picture_encoder._frames._runner, []
    made = runner.buffer
    monkeypatch.setattr(runner, "buffer", lambda shape, dtype: sizes.append(4 * math.prod(shape)) or made(shape, dtype))
    short = animated(denoiser, EDITED, (1, 48, 32))["condition"]  # another size than any other test's
    first = list(sizes)
    long = animated(denoiser, EDITED, (21, 48, 32))["condition"]
    assert sizes == first and sum(first) == video_bytes(denoiser.picture_encoder.described, {"rows": 6, "columns": 4})
    assert long.shape == (1, 8, 6, 6, 4) and np.array_equal(long[:, :, :1], short)
    animated(denoiser, 255 - EDITED, (9, 48, 32))
    assert np.array_equal(animated(denoiser, EDITED, (21, 48, 32))["condition"], long)
    assert (long[:, :4, 0] == 1).all() and (long[:, :4, 1:] == 0).all()  # the mask
    for k in range(2, 6):  # a later frame has more of the picture behind it than the one before
        assert not np.array_equal(long[:, 4:, k], long[:, 4:, 1])


def test_without_an_image_encoder_it_is_the_pipelines(wan22):
    """Wan 2.2: what follows the noise along the channels is all that the transformer has of the picture."""
    pipe, denoiser = wan22
    assert [t.name for t in denoiser.manifest.parts["encode"].graph.inputs] == ["picture"]
    expected = asked_of(pipe, EDITED, max_sequence_length=32)
    request = prompt_request(denoiser, [PROMPT], [SEED], SIZE, SCALE, OTHER, 32, given=Given(EDITED))
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    oracle.assert_close("video", drawn(denoiser, request, "F" * STEPS), expected, limit)


@pytest.fixture(scope="module")
def wan22(once):
    def write(folder):
        model = tiny_wan(seed=2, in_channels=12)
        return write_pipeline(wan_image_pipeline(model), "wan", folder)

    folder = once("parts-wan22", write)
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES["wan"])
    pipe = wan_image_pipeline(tiny_wan(seed=2, in_channels=12))
    return pipe, denoiser_with_parts(draft(checkpoint, options_of()), folder)


def test_a_size_that_nobody_asks_for_has_the_shape_of_the_picture(whole):
    manifest = whole("wan-image")[1].manifest
    frames, height, width = usual = usual_size(manifest)
    assert size_of(manifest, None) == usual
    for shape in ((480, 832), (1000, 1000), (300, 900), (3, 1), (1, 500)):
        made = size_of(manifest, Given(np.zeros((*shape, 3), np.uint8)))
        ratio = shape[0] / shape[1]
        # As the example of diffusers' pipeline reckons, within what the transformer takes.
        expected = [round(np.sqrt(height * width * r)) // 16 * 16 for r in (ratio, 1 / ratio)]
        most = [16 * manifest.dimensions[name].maximum for name in ("rows", "columns")]
        assert made == (frames, *(min(max(side, 32), end) for side, end in zip(expected, most, strict=True)))


def test_a_bundle_of_one_size_has_that_size_for_every_picture(whole, once):
    """What it makes of a picture is what a bundle of any size makes of it at this size."""
    fixed = {"latent_size": (3, 4, 6)}
    write = partial(write_pipeline, whole("wan-image")[0], "wan", parts=("encode",), **fixed)
    folder = once("parts-wan-image-fixed", write)
    checkpoint = open_checkpoint(str(folder / "pipeline"), FAMILIES["wan"])
    denoiser = denoiser_with_parts(draft(checkpoint, options_of(**fixed)), folder)
    assert size_of(denoiser.manifest, Given(EDITED)) == usual_size(denoiser.manifest) == SIZE
    seen, expected = animated(denoiser, EDITED, SIZE), animated(whole("wan-image")[1], EDITED, SIZE)
    for name, value in expected.items():
        limit = oracle.bound(torch.from_numpy(value), 1.0, torch.float32, *depth_and_length(whole("wan-image")[0].vae))
        oracle.assert_close(name, torch.from_numpy(seen[name]), torch.from_numpy(value), limit)
    with pytest.raises(StepError, match="size `rows` of part `encode` is 6, expected 4 to 4"):
        animated(denoiser, EDITED, (9, 48, 32))


def test_pictures_that_do_not_belong_are_refused(whole):
    video, picture = whole("wan")[1], whole("wan-image")[1]
    with pytest.raises(
        ConfigError, match=r"picture is given for wan-.*, expected none, since it draws from text alone"
    ):
        given_picture(video.manifest, EDITED)
    with pytest.raises(ConfigError, match=r"strength is 0.5, expected none, since wan-.* begins with noise"):
        given_picture(picture.manifest, EDITED, 0.5)
    with pytest.raises(ConfigError, match=r"picture is missing for wan-.*, expected the one that it is to animate"):
        prompt_request(picture, [PROMPT], [SEED], SIZE)
    with pytest.raises(ConfigError, match=r"length of the prompt is 32, expected 512 \(tokens\), the only one"):
        prompt_request(picture, [PROMPT], [SEED], SIZE, length=32, given=Given(EDITED))
    tensors = request_of(picture, EDITED).conditioning | {"condition": animated(picture, EDITED, SIZE)["condition"]}
    again = prompt_request(picture, tensors, [SEED], SIZE)  # whoever brings what it becomes needs none
    assert np.array_equal(again.joined.value, request_of(picture, EDITED).joined.value)


def test_run_animates_a_picture(whole, monkeypatch, tmp_path, capsys):
    denoiser = whole("wan-image")[1]
    monkeypatch.setattr(run, "open_denoiser", lambda *_, **how: nullcontext(denoiser))
    Image.fromarray(EDITED).save(tmp_path / "given.png")
    asked = ["--prompt", PROMPT, "--size", "9x32x48", "--plan", "F.", "--n", "2", "--seed", "3"]
    out = tmp_path / "made.safetensors"
    assert cli.main(["run", "bundle", *asked, "--image", str(tmp_path / "given.png"), "--out", str(out)]) == 0
    request = prompt_request(denoiser, [PROMPT] * 2, [3, 4], SIZE, given=Given(EDITED))
    expected = sample(denoiser, request, denoiser.forecasts(plan="F.")).latents
    assert np.array_equal(load_file(out)["latents"], expected)
    capsys.readouterr()
    assert cli.main(["run", "bundle", *asked, "--out", str(tmp_path / "none.webp")]) == 2
    assert "picture is missing for wan-" in capsys.readouterr().err and not (tmp_path / "none.webp").exists()


def test_the_card_states_the_memory(whole):
    told = card(whole("wan-image")[1].manifest)
    assert "condition [1, 8, 1, rows, columns]" in told and told.count("of buffers for a video of any length") == 2


def _caches(part, side, **change):
    part["later"][side] = [{**t, **change} if t["name"].startswith("cache") else t for t in part["later"][side]]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda part: part["graph"]["inputs"].pop(), "part encode takes `picture`, expected `picture`, `pixels`"),
        (lambda part: part.update(shown=None), "part encode takes `picture`, `pixels`, expected `picture`"),
        (lambda part: part.update(later=None), "makes none in graph later, expected `condition`"),
        (lambda part: part["later"]["inputs"].pop(), "graph later has .* of role cache_in"),
        (lambda part: part["later"]["outputs"].pop(), "graph later has .* of role cache_out"),
        (lambda part: _caches(part, "inputs", dtype="float16"), "cache_in_0` is float16 .* the first latent frame"),
        (lambda part: _caches(part, "inputs", role="picture"), "graph later of part encode takes .*, expected caches"),
        (lambda part: _of(part, "condition").update(name="mean"), "makes `mean` in graph encode, expected `condition`"),
        (lambda part: _of(part, "condition").update(shape=[1, 12, 1, "rows", "columns"]), "the graphs take"),
        (lambda part: _of(part, "encoder_hidden_states_image").update(name="x"), "`x` is made by part encode, and no"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(whole, spoil, problem):
    told = json.loads(whole("wan-image")[1].manifest.model_dump_json())
    spoil(told["parts"]["encode"])
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)


def _of(part, name):
    return next(t for t in part["graph"]["outputs"] if t["name"] == name)


# Doors ---------------------------------------------------------------------------------------------------------------


def test_triton_s_model_takes_a_picture_in_the_place_of_what_it_becomes(whole):
    denoiser = whole("wan-image")[1]
    ports = {port.name: port for port in contract.inputs(denoiser.manifest, "denoiser")}
    assert ports["image"] == contract.Port("image", "UINT8", (-1, -1, 3), True)
    assert ports["condition"].optional and ports["encoder_hidden_states_image"].optional
    assert not ports["encoder_hidden_states"].optional and "image" not in {
        port.name for port in contract.inputs(whole("wan")[1].manifest, "denoiser")
    }
    expected = request_of(denoiser, EDITED, seeds=(3, 4))
    text = "encoder_hidden_states"
    values = {"latents": expected.latents, text: expected.conditioning[text], NEGATIVE + text: expected.negative[text]}
    asked = contract.ask(denoiser, "denoiser", {**values, "image": EDITED}).request
    assert np.array_equal(asked.joined.value, expected.joined.value)
    for one, other in zip(asked.branches, expected.branches, strict=True):
        assert {name: value.tobytes() for name, value in one.items()} == {n: v.tobytes() for n, v in other.items()}
    for more, problem in (
        ({}, "input `condition` is missing, expected it, or as `image` the picture that it is made of"),
        ({"image": EDITED, "condition": expected.joined.value}, "input `condition` is given beside `image`"),
        ({"image": EDITED, "latents": expected.latents[0]}, r"input `latents` is \[4, 3, 4, 6\], expected \["),
        ({"image": EDITED, "latents": expected.latents[..., :1, :]}, "size of `latents` is 9x8x48"),
    ):
        with pytest.raises(ConfigError, match=problem):
            contract.ask(denoiser, "denoiser", {**values, **more})


HOW = {"seed": 3, "frames": 9, "plan": "FF", "order": 0, "guidance_scale": 1.0}


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_openai_client_sends_a_picture(whole, tmp_path):
    """As a file of a form, and as a URL that holds it; each is the video of a solo run."""
    denoiser = whole("wan-image")[1]
    request = prompt_request(denoiser, [PROMPT], [3], SIZE, 1.0, given=Given(EDITED))
    write_video(tmp_path / "expected.mp4", alone(denoiser, request, plan="FF", order=0)[0], 16)
    expected = frames_of((tmp_path / "expected.mp4").read_bytes())
    file = io.BytesIO()
    Image.fromarray(EDITED).save(file, "png")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    with models_over(denoiser, slots=1, queue=2, workers=1) as models, serving(models) as port:
        client = client_of(port)
        picture = ("a.png", file.getvalue(), "image/png")
        asked_for = {"prompt": PROMPT, "model": "wan-whole", "extra_body": HOW}
        job = client.videos.create(input_reference=picture, size="48x32", **asked_for)
        body = {"prompt": PROMPT, "size": "48x32", "input_reference": {"image_url": data}, **HOW}
        status, _, text = asked(port, "/v1/videos", body, {"authorization": "Bearer none"})  # as the client
        assert status == 200, text
        for name in (job.id, json.loads(text)["id"]):
            until(lambda name=name: client.videos.retrieve(name).status in ("completed", "failed"))
            assert np.array_equal(frames_of(client.videos.download_content(name).read()), expected)
        _, height, width = size_of(denoiser.manifest, Given(EDITED))
        status, _, text = asked(port, "/v1/videos", {**body, "size": None, "frames": 1, "plan": "F"})
        assert status == 200 and json.loads(text)["size"] == f"{width}x{height}"
        for more, said in (
            ({"input_reference": None}, "input_reference is missing for wan-whole, expected the picture that it is to"),
            ({"input_reference": {"image_url": "https://a/b.png"}}, "since nothing is fetched here"),
            ({"input_reference": {"file_id": "file-1"}}, "expected a file of a form, or"),
            ({"input_reference": {"image_url": "data:image/png;base64,eA=="}}, "input_reference is not readable"),
        ):
            status, _, text = asked(port, "/v1/videos", {**body, **more})
            problem = json.loads(text)["error"]
            assert status == 400 and said in problem["message"] and problem["param"] == "input_reference", text
        (listed,) = client.models.list().data
        assert listed.model_extra["taylorseer"]["takes_pictures"] is True


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_model_of_text_alone_takes_no_picture(whole):
    file = io.BytesIO()
    Image.fromarray(EDITED).save(file, "png")
    with models_over(whole("wan")[1], slots=1) as models, serving(models) as port:
        with pytest.raises(openai.BadRequestError, match="input_reference is given to wan-whole, expected text alone"):
            client_of(port).videos.create(prompt=PROMPT, input_reference=("a.png", file.getvalue(), "image/png"))
