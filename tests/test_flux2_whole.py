"""FLUX.2 whole: what its prompts and the pictures that it goes by become is what the untouched pipelines make of them.

Dev, which draws from text alone, is a case of `test_whole.py`. Here is klein base, which is guided by a second call,
with pictures to go by; that both families take both encoders is the first test.
"""

import json
from dataclasses import replace
from inspect import signature

import numpy as np
import openai
import oracle
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from images_api import client_of, models_over, picture_in, png_of, serving
from PIL import Image
from pipelines_with_parts import OTHER, PROMPT, bound_of_picture, depth_and_length, drawn
from tiny_pipelines import LAYERS, orders

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.components import tokenizer as written
from taylorseer_export.embedded.edits import Given, brought_to, cut_to, given_picture, most_pictures, size_to_see
from taylorseer_export.embedded.requests import pictures_of, prompt_request, size_of
from taylorseer_export.errors import CheckpointError, ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.serve import contract

STEPS, SEEDS, SCALE, LENGTH = 2, (3, 4), 3.0, 48
HOW = {"max_sequence_length": LENGTH, "text_encoder_out_layers": LAYERS}  # as the pipeline is asked
SIZE = (72, 100)  # of neither picture
# Neither is of whole tokens, which have 4 pixels here; the second is turned.
PICTURES = tuple(np.random.default_rng(5).integers(0, 256, (*size, 3), np.uint8) for size in ((67, 90), (85, 66)))
GIVEN = Given(PICTURES[0], others=PICTURES[1:])
SHOWN = [Image.fromarray(picture) for picture in PICTURES]


@pytest.fixture(scope="module")
def klein(whole):
    return whole("flux2-base")


def test_both_families_take_both_encoders():
    """What differs is the pictures. The layers and what Mistral is told are those of diffusers."""
    for guided, pipeline in ((True, Flux2Pipeline), (False, Flux2KleinPipeline)):
        families = [FAMILIES[name] for name in ("flux2", "flux2-edit")]
        text, edit = (replace(family, **family.by_config({"guidance_embeds": guided})) for family in families)
        assert replace(edit.whole, see=None, fitted=None) == text.whole
        assert edit.guidance == text.guidance == ("embedded" if guided else "branches")
        layers = signature(pipeline.encode_prompt).parameters["text_encoder_out_layers"].default
        assert text.whole.encode.args == (layers,)
        if guided:
            assert text.whole.tokens[0].chat("a") == (format_input(["a"])[0], {})


def test_latents_of_dev_are_the_pipelines(whole):
    """Of two prompts and seeds at odd sides, before they are decoded."""
    pipe, denoiser = whole("flux2")
    height, width = 20, 28  # 5 x 7 tokens
    with torch.no_grad():
        expected = pipe(
            prompt=[PROMPT, OTHER],
            height=height,
            width=width,
            num_inference_steps=STEPS,
            guidance_scale=2.5,
            **HOW,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
        ).images
    request = prompt_request(denoiser, [PROMPT, OTHER], SEEDS, (height, width), 2.5, length=LENGTH)
    made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
    extent = depth_and_length(pipe.text_encoder, *[pipe.transformer] * STEPS)
    limit = oracle.bound(expected, 1.0, torch.float32, *extent)
    oracle.assert_close("dev, two prompts", made, expected, limit)
    assert (made.flip(0) - expected).abs().max() > limit


def drawn_of_pictures(pipe, seeds, **more):
    """What the untouched pipeline draws of both pictures, a sample for each seed."""
    height, width = SIZE
    with torch.no_grad():
        return pipe(
            image=SHOWN,
            prompt=PROMPT,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            **HOW,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **more,
        ).images


def test_pictures_are_gone_by_as_in_the_pipeline(klein):
    """Two samples of two pictures to go by, guided away from a text."""
    pipe, denoiser = klein
    with torch.no_grad():
        away, _ = pipe.encode_prompt(OTHER, **HOW)
    expected = drawn_of_pictures(
        pipe, SEEDS, guidance_scale=SCALE, negative_prompt_embeds=away, num_images_per_prompt=2
    )
    asked = (SIZE, SCALE, OTHER, LENGTH)
    request = prompt_request(denoiser, [PROMPT] * 2, SEEDS, *asked, given=GIVEN)
    made = sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS))
    seen = torch.from_numpy(pictures_of(denoiser, request, made.latents)).movedim(-1, 1) / 255
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    oracle.assert_close("klein base, two pictures", seen, expected, limit)
    turned = Given(PICTURES[1], others=PICTURES[:1])
    for wrong in (GIVEN._replace(others=()), turned):
        other = prompt_request(denoiser, [PROMPT], SEEDS[:1], *asked, given=wrong)
        assert (drawn(denoiser, other, "F" * STEPS) - expected[0]).abs().max() > limit
    unguided = prompt_request(denoiser, [PROMPT], SEEDS[:1], *asked[:2], None, LENGTH, given=GIVEN)
    assert unguided.guided and unguided.negative is not None  # away from an empty prompt, as the pipeline does


def test_pictures_whose_keys_are_kept_are_gone_by_as_in_the_pipeline(whole):
    """klein KV, which is distilled: no guidance, and pictures once for a request."""
    pipe, denoiser = whole("flux2-kv")
    (expected,) = drawn_of_pictures(pipe, SEEDS[:1])
    request = prompt_request(denoiser, [PROMPT], SEEDS[:1], SIZE, length=LENGTH, given=GIVEN)
    limit = bound_of_picture(expected, pipe, STEPS)
    oracle.assert_close("klein KV, two pictures", drawn(denoiser, request, "F" * STEPS), expected, limit)
    turned = prompt_request(denoiser, [PROMPT], SEEDS[:1], SIZE, length=LENGTH, given=Given(PICTURES[0]))
    assert (drawn(denoiser, turned, "F" * STEPS) - expected).abs().max() > limit


def test_pictures_become_what_the_pipeline_makes_of_them(klein):
    pipe, denoiser = klein
    request = prompt_request(denoiser, [PROMPT], SEEDS[:1], SIZE, length=LENGTH, given=GIVEN)
    processor = pipe.image_processor
    shown = [
        processor.preprocess(one, height=one.height // 4 * 4, width=one.width // 4 * 4, resize_mode="crop")
        for one in SHOWN
    ]
    with torch.no_grad():
        expected, ids = pipe.prepare_image_latents(shown, 1, None, "cpu", torch.float32)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae.encoder))
    seen = torch.from_numpy(request.conditioning["image_latents"])
    oracle.assert_close("image_latents", seen, expected, limit)
    assert (seen.flip(1) - expected).abs().max() > limit
    assert request.conditioning["image_ids"].dtype == np.int64
    assert np.array_equal(request.conditioning["image_ids"], ids.numpy())
    for branch in request.branches:
        assert branch["image_ids"].shape == ids.shape
    brought = prompt_request(denoiser, request.conditioning, SEEDS[:1], SIZE)
    assert np.array_equal(brought.latents, request.latents)  # whoever brings what they become needs none
    assert size_of(denoiser.manifest, GIVEN) == (64, 88)  # a size that nobody asks for is that of the first


@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (64, 512), (79, 81), (1024, 1024), (1025, 1024), (999, 1501), (360, 2880), (3000, 2000)],
)
def test_pictures_are_fitted_as_diffusers_fits_them(klein, height, width):
    """Bit for bit, in tokens of 16 pixels as those of the published models."""
    part, side = klein[1].manifest.parts["encode"], 16
    line = np.arange(height * width * 3, dtype=np.int64).reshape(height, width, 3)
    picture = (line * 7 // 5 % 251).astype(np.uint8)
    processor = Flux2ImageProcessor(vae_scale_factor=side)
    image = processor.check_image_input(Image.fromarray(picture))
    if image.width * image.height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
    sides = (image.height // side * side, image.width // side * side)
    expected = processor.preprocess(image, *sides, resize_mode="crop")[0]
    size = size_to_see(part, picture.shape, side)
    seen = torch.from_numpy(cut_to(part.fitted, picture, *size).astype(np.float32) / 255).movedim(-1, 0)
    assert size == sides and torch.equal(2 * seen - 1, expected)


def test_pictures_that_are_refused_are_those_that_diffusers_refuses(klein):
    manifest = klein[1].manifest
    for height, width in ((63, 64), (64, 63), (64, 513), (513, 64), (60, 600)):
        with pytest.raises(ValueError, match="too"):
            Flux2ImageProcessor.check_image_input(Image.new("RGB", (width, height)))
        with pytest.raises(
            ConfigError, match=rf"picture is {width}x{height}, expected sides of at least 64 pixels, one"
        ):
            brought_to(manifest, np.zeros((height, width, 3), np.uint8))


def test_more_than_there_may_be_are_refused_before_any_work(klein):
    _, denoiser = klein
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    assert most_pictures(denoiser.manifest) == 8 and given_picture(denoiser.manifest, small, None, [small] * 7)
    with pytest.raises(
        ConfigError, match=r"9 pictures are given for flux2-edit-whole, expected at most 8 pictures; le"
    ):
        given_picture(denoiser.manifest, small, None, [small] * 8)
    with pytest.raises(StepError, match="size `condition_tokens` is 49152, expected 4 to 32768"):
        prompt_request(denoiser, [PROMPT], SEEDS[:1], SIZE, given=Given(large, others=(large, large)))


@pytest.mark.parametrize("prompt", ["", "[IMG] a[IMG]", "z " * 600, "{} {0}", "a\nb  c "])
def test_any_prompt_has_the_tokens_of_the_pipeline(whole, prompt, monkeypatch):
    """In its template, with one beginning, cut off and filled up in front; and klein's with a token at its end."""
    given = {}
    for name in ("flux2", "flux2-base"):
        pipe, denoiser = whole(name)
        told = {}
        monkeypatch.setattr(pipe.text_encoder, "forward", lambda told=told, **values: told.update(values))
        with pytest.raises(AttributeError, match="hidden_states"):
            pipe.encode_prompt(prompt, max_sequence_length=LENGTH)
        monkeypatch.setattr(type(denoiser.encoder.part), "__call__", lambda part, tokens: given.update(tokens))
        denoiser.encoder.encode(prompt, LENGTH)
        assert given["tokens"].tolist() == told["input_ids"].tolist()
        assert given["mask"].tolist() == told["attention_mask"].tolist()


def test_a_chat_template_that_changes_prompts_is_refused(whole_bundles, tmp_path):
    checkpoint = open_checkpoint(str(whole_bundles("flux2").parent / "pipeline"), FAMILIES["flux2"])
    declared = checkpoint.family.whole.tokens[0]
    moved = replace(checkpoint, folder=tmp_path / "transformer")
    tokenizer = orders(512)
    for template in (None, tokenizer.chat_template.replace("].text", "].text | trim"), "no place for it"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(CheckpointError, match="has no chat template that a prompt is put into as it is"):
            written(moved, declared, tmp_path)


def test_what_a_manifest_says_of_fitted_pictures_must_hold(klein):
    for spoil, problem in (
        (lambda part: part.update(sizes=[[64, 64]]), "part encode fits pictures, which goes with constant inputs"),
        (lambda part: part["fitted"].update(area=4096), "has another range than fitted pictures, whose sides are 64"),
    ):
        told = json.loads(klein[1].manifest.model_dump_json())
        spoil(told["parts"]["encode"])
        with pytest.raises(ValueError, match=problem):
            Manifest.model_validate(told, strict=False)


# Through the doors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edited(klein):
    """What it draws in this process of both pictures, and of the first alone."""
    _, denoiser = klein

    def draw(given):
        request = prompt_request(denoiser, [PROMPT], SEEDS[:1], given=given)
        return pictures_of(denoiser, request, sample(denoiser, request, denoiser.forecasts(plan="FF")).latents)[0]

    return draw(GIVEN), draw(Given(PICTURES[0]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    paths = [folder / f"{number}.png" for number in range(len(SHOWN))]
    for path, image in zip(paths, SHOWN, strict=True):
        image.save(path)
    return paths


def test_run_goes_by_pictures(whole_bundles, edited, files, tmp_path, capsys):
    out = tmp_path / "made.png"
    run = ["run", str(whole_bundles("flux2-base")), "--prompt", PROMPT, "--seed", "3", "--plan", "FF", "--threads", "1"]
    for given, expected in ((files, edited[0]), (files[:1], edited[1])):
        assert cli.main([*run, "--image", *map(str, given), "--out", str(out)]) == 0
        assert np.array_equal(np.asarray(Image.open(out)), expected)
    assert not np.array_equal(*edited)
    capsys.readouterr()
    assert cli.main([*run, "--image", *[str(files[0])] * 9, "--out", str(tmp_path / "other.png")]) == 2
    assert "9 pictures are given for flux2-edit-whole, expected at most 8" in capsys.readouterr().err


def test_the_images_api_goes_by_pictures(klein, edited, files):
    with models_over(klein[1], slots=1, queue=1, workers=1) as models, serving(models) as port:
        client, how = client_of(port), {"prompt": PROMPT, "extra_body": {"seed": "3", "plan": "FF"}}
        given = [(path.name, path.read_bytes()) for path in files]
        for image, expected in ((given, edited[0]), (given[0], edited[1])):
            made = client.images.edit(image=image, **how)
            assert np.array_equal(picture_in(made.data[0].b64_json), expected)
        for more, param in (({"image": given[:1] * 9}, "image"), ({"image": given, "mask": given[0]}, "mask")):
            with pytest.raises(openai.BadRequestError, match=r"expected at most 8 pictures, without a mask") as caught:
                client.images.edit(**more, **how)
            assert caught.value.param == param
        with pytest.raises(openai.BadRequestError, match="picture is 8x6, expected sides of at least 64 pixels"):
            client.images.edit(image=("small.png", png_of(6, 8)), **how)


def test_triton_s_model_goes_by_pictures(klein):
    _, denoiser = klein
    ports = {port.name: port for port in contract.inputs(denoiser.manifest, "picture")}
    named = [name for name in ports if name.startswith("image")]
    assert named == ["image", *(f"image_{k}" for k in range(2, 9))]
    assert not ports["image"].optional and ports["image_8"] == contract.Port("image_8", "UINT8", (-1, -1, 3), True)
    values = {"prompt": np.array([PROMPT.encode()], object), "seed": np.array([3])}
    asked = contract.ask(denoiser, "picture", values | contract.pictures_named(PICTURES)).request
    expected = prompt_request(denoiser, [PROMPT], SEEDS[:1], given=GIVEN)
    assert (asked.height, asked.width) == (expected.height, expected.width)
    for branch, other in zip(asked.branches, expected.branches, strict=True):
        assert {n: v.tobytes() for n, v in branch.items()} == {n: v.tobytes() for n, v in other.items()}
