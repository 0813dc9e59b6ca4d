"""Pictures that whole Qwen-Image-Edit bundles edit: each is what the untouched pipeline makes of them.

Both pipelines: that of one picture, and `Plus` of several, whose text encoder sees smaller ones. Published models see
a megapixel; here both sides are told fewer pixels, and the rule itself is held to diffusers' own below.
"""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as one_picture
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as several
from images_api import client_of, models_over, picture_in, serving
from PIL import Image
from pipelines_with_parts import OTHER, PROMPT, bound_of_picture, depth_and_length, drawn
from tiny_bundles import WHOLE_AREAS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from taylorseer_export import cli
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.compile.parts import parts_of
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import Given, given_picture, size_to_see
from taylorseer_export.embedded.patches import cut, sides_in_tokens, sides_of_area
from taylorseer_export.embedded.requests import pictures_of, prompt_request
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.sampling import sample
from taylorseer_export.runtime.tensors import NEGATIVE
from taylorseer_export.serve import contract

pytestmark = pytest.mark.slow

EDIT, PLUS = "qwen-image-edit", "qwen-image-edit-2511"
STEPS, SEED, SIZE, SCALE = 2, 3, (32, 48), 3.0
# None of whole tokens, of the size that is drawn, or of the shape of another.
PICTURES = tuple(
    np.random.default_rng(k).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for k, shape in enumerate([(26, 38), (90, 41), (200, 200)])
)
CASES = {"one": (EDIT, PICTURES[:1]), "one of several": (PLUS, PICTURES[1:2]), "two": (PLUS, PICTURES[:2])}


@pytest.fixture(autouse=True)
def _fewer_pixels(monkeypatch):
    """The pipelines bring pictures to as many pixels as the bundles do."""
    reckoned, (area, _) = one_picture.calculate_dimensions, WHOLE_AREAS[EDIT]
    monkeypatch.setattr(one_picture, "calculate_dimensions", lambda _, ratio: reckoned(area, ratio))
    for name, pixels in zip(("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"), WHOLE_AREAS[PLUS], strict=True):
        monkeypatch.setattr(several, name, pixels)


def request_of(denoiser, pictures, prompt=PROMPT, negative=OTHER, scale=SCALE, size=SIZE, **more):
    given = Given(pictures[0], others=tuple(pictures[1:]))
    return prompt_request(denoiser, [prompt], [SEED], size, scale, negative, given=given, **more)


def shown(pictures, name):
    images = [Image.fromarray(picture) for picture in pictures]
    return images[0] if name == EDIT else images


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_the_pipelines(whole, case):
    """From prompt and pictures to latents and to the picture, guided, all steps full, noise of the same seed."""
    name, pictures = CASES[case]
    pipe, denoiser = whole(name)
    asked = {"image": shown(pictures, name), "prompt": PROMPT, "negative_prompt": OTHER, "true_cfg_scale": SCALE}
    asked |= {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS}
    with torch.no_grad():
        latents, (expected,) = (
            pipe(**asked, generator=torch.Generator().manual_seed(SEED), output_type=kind).images
            for kind in ("latent", "pt")
        )
    request = request_of(denoiser, pictures)
    made = torch.from_numpy(sample(denoiser, request, denoiser.forecasts(plan="F" * STEPS)).latents)
    extent = depth_and_length(pipe.text_encoder, *[pipe.transformer] * 2 * STEPS, pipe.vae.encoder)
    limit = oracle.bound(latents, 2 * SCALE - 1, torch.float32, *extent)
    oracle.assert_close("latents", made, latents[None] if latents.ndim == 2 else latents, limit)
    limit = bound_of_picture(expected, pipe, 2 * STEPS, SCALE)
    oracle.assert_close(case, drawn(denoiser, request, "F" * STEPS), expected, limit)
    for wrong in (
        request_of(denoiser, [255 - pictures[0], *pictures[1:]]),
        request_of(denoiser, pictures, negative="y"),
        *([request_of(denoiser, pictures[::-1])] if len(pictures) > 1 else []),
    ):
        other = sample(denoiser, wrong, denoiser.forecasts(plan="F" * STEPS)).latents
        assert (torch.from_numpy(other) - latents).abs().max() > oracle.bound(
            latents, 2 * SCALE - 1, torch.float32, *extent
        )


@pytest.mark.parametrize("case", CASES)
def test_pictures_and_prompt_become_what_the_pipeline_makes_of_them(whole, case):
    """States of both, for a prompt and for a negative one; latents of the pictures and their shapes, in their order."""
    name, pictures = CASES[case]
    pipe, denoiser = whole(name)
    images = [Image.fromarray(picture) for picture in pictures]
    area, smaller = WHOLE_AREAS[name]
    sizes = [[sides_of_area(pixels, *p.shape[:2]) for p in pictures] for pixels in (smaller, area)]
    seen = [pipe.image_processor.resize(image, *size) for image, size in zip(images, sizes[0], strict=True)]
    encoded = [
        pipe.image_processor.preprocess(image, *size).unsqueeze(2) for image, size in zip(images, sizes[1], strict=True)
    ]
    request = request_of(denoiser, pictures)
    with torch.no_grad():
        for prompt, given in ((PROMPT, request.conditioning), (OTHER, request.negative)):
            expected, mask = pipe.encode_prompt(prompt, seen if name == PLUS else seen[0])
            assert mask is None and given["encoder_hidden_states_mask"].all()
            limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.text_encoder))
            states = torch.from_numpy(given["encoder_hidden_states"])
            oracle.assert_close(f"states of {prompt}", states, expected, limit)
        channels = pipe.transformer.config.in_channels // 4
        prepare = partial(pipe.prepare_latents, batch_size=1, num_channels_latents=channels, dtype=torch.float32)
        more = {"height": 32, "width": 48, "device": "cpu", "generator": None}
        _, expected = prepare(encoded if name == PLUS else encoded[0], **more)
    limit = oracle.bound(expected, 1.0, torch.float32, *depth_and_length(pipe.vae.encoder))
    made = torch.from_numpy(request.conditioning["image_latents"])
    oracle.assert_close("latents of pictures", made, expected, limit)
    shapes = [(1, 2, 3), *((1, height // 16, width // 16) for height, width in sizes[1])]
    assert request.conditioning["img_shapes"].tolist() == [[list(each) for each in shapes]]
    other = request_of(denoiser, [255 - pictures[0], *pictures[1:]]).conditioning
    assert (torch.from_numpy(other["image_latents"]) - expected).abs().max() > limit


SHAPES = [(512, 512), (1, 7), (300, 900), (1024, 1000), (777, 333), (1080, 1920), (57, 57), (28, 2000), (4000, 3000)]


@pytest.mark.parametrize("name", [EDIT, PLUS])
def test_pictures_are_cut_as_the_processor_cuts_them(whole, name):
    """Sizes by the published areas and by the processor; patches, their places and windows, and how many tokens."""
    pipe, denoiser = whole(name)
    patches = denoiser.manifest.parts["text"].patches
    published = {"one": 1024 * 1024, "several": 384 * 384}
    assert FAMILIES[EDIT].whole.area == 1024 * 1024 and FAMILIES[EDIT].whole.read.area == published["several"]
    for height, width in SHAPES:
        for area in published.values():
            expected = several.calculate_dimensions(area, width / height)
            assert sides_of_area(area, height, width) == expected[::-1]
            assert size_to_see(SimpleNamespace(area=area), (height, width), 16) == expected[::-1]
        least = {"min_pixels": patches.least, "max_pixels": patches.most}
        assert sides_in_tokens(patches, height, width) == smart_resize(height, width, 28, **least)
    made = cut(patches, PICTURES[:2])
    areas = [sides_of_area(patches.area, *picture.shape[:2]) for picture in PICTURES[:2]]
    seen = [pipe.image_processor.resize(Image.fromarray(p), *a) for p, a in zip(PICTURES[:2], areas, strict=True)]
    true = pipe.processor.image_processor(seen, return_tensors="pt")
    grid, rows = true["image_grid_thw"], torch.from_numpy(made.inputs["patches"]).unflatten(1, (3, -1))
    processor = pipe.processor.image_processor
    mean, deviation = (torch.tensor(of).view(1, 3, 1) for of in (processor.image_mean, processor.image_std))
    values = ((rows - mean) / deviation).flatten(1)
    limit = oracle.bound(true["pixel_values"], 1.0, torch.float32, 1, 2)
    oracle.assert_close("patches", values, true["pixel_values"], limit)
    assert made.counts == tuple((grid.prod(1) // 4).tolist())
    pictures, windows, *places = torch.from_numpy(made.inputs["places"]).unbind(1)
    assert torch.equal(torch.stack(places, 1), get_vision_position_ids(grid, 2))
    assert pictures.bincount().tolist() == grid.prod(1).tolist()
    index, ends = get_vision_window_index(grid, 2, 112, 14)
    own = windows.view(-1, 4)[index].flatten()  # sorted as the original sorts them: runs of one window
    runs = own.split((ends[1:] - ends[:-1]).tolist())
    assert [len(run.unique()) for run in runs] == [1] * len(own.unique()) and len(runs) > 2


def test_what_does_not_belong_is_refused(whole):
    edit, plus = (whole(name)[1] for name in (EDIT, PLUS))
    with pytest.raises(ConfigError, match=r"picture is missing for qwen-image-edit-.*, expected the one that it is to"):
        prompt_request(plus, [PROMPT], [SEED], SIZE)
    for denoiser, pictures, problem in (
        (edit, PICTURES[:2], "2 pictures are given for qwen-image-edit-.*, expected one picture; leave the rest out"),
        (
            plus,
            PICTURES[:1] * 5,
            "5 pictures are given for qwen-image-edit-.*, expected at most 4 pictures; leave the rest out",
        ),
        (plus, [np.zeros((2, 900, 3), np.uint8)], "picture is 2x900, which is brought to a side of .*, expected 32 to"),
    ):
        with pytest.raises(ConfigError, match=problem):
            given_picture(denoiser.manifest, pictures[0], None, pictures[1:])
        with pytest.raises(ConfigError, match=problem):
            request_of(denoiser, pictures)
    for more, problem in (
        ({"length": 32}, "length of the prompt is 32, expected none, since prompts beside pictures are not cut off"),
        ({"prompt": "a <|image_pad|>"}, r"prompt holds <\|image_pad\|>, expected none, since it stands for a token"),
        ({"prompt": "a" * 4100}, "prompt and pictures are .* tokens, expected at most 4096; shorten the prompt"),
        ({"negative": None}, "guidance scale is 3 without `negative_` inputs, expected them"),
    ):
        with pytest.raises(ConfigError, match=problem):
            request_of(plus, PICTURES[:1], **more)


def test_what_is_kept_of_a_prompt_is_of_its_pictures(whole, monkeypatch):
    """Also of the negative one, which sees them here."""
    denoiser, cache = whole(PLUS)[1], ConditioningCache()
    encode, prompts = denoiser.encoder.encode, []
    monkeypatch.setattr(denoiser.encoder, "encode", lambda *given: (prompts.append(given[0]), encode(*given))[1])
    for pictures in (PICTURES[:1], PICTURES[:1], PICTURES[1:2]):
        kept = request_of(denoiser, pictures, cache=cache)
        for branch, other in zip(kept.branches, request_of(denoiser, pictures).branches, strict=True):
            assert {n: v.tobytes() for n, v in branch.items()} == {n: v.tobytes() for n, v in other.items()}
    assert cache.counts[:2] == (2, 4)


def test_tensors_take_the_place_of_prompt_and_pictures(whole):
    denoiser = whole(PLUS)[1]
    expected = request_of(denoiser, PICTURES[:2])
    words = [name for name in expected.conditioning if name.startswith("encoder_hidden_states")]
    tensors = {**expected.conditioning, **{NEGATIVE + name: expected.negative[name] for name in words}}
    again = prompt_request(denoiser, tensors, [SEED], SIZE, SCALE)
    for branch, other in zip(again.branches, expected.branches, strict=True):
        assert all(np.array_equal(branch[name], value) for name, value in other.items())


def test_every_door_takes_pictures(whole, whole_bundles, tmp_path):
    """`run`, the images API and what Triton's model reads: the same bits. A size that nobody asks for is the last's."""
    name, pictures = PLUS, PICTURES[:2]
    denoiser = whole(name)[1]
    request = request_of(denoiser, pictures, negative=None, scale=None, size=None)
    assert (request.height, request.width) == sides_of_area(WHOLE_AREAS[name][0], *pictures[1].shape[:2])
    made = sample(denoiser, request, denoiser.forecasts(plan="FF")).latents
    expected = pictures_of(denoiser, request, made)[0]
    files = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(path)
    words = ["--prompt", PROMPT, "--image", *files, "--seed", SEED, "--plan", "FF", "--threads", 1]
    out = tmp_path / "made.png"
    assert cli.main([str(word) for word in ["run", whole_bundles(name), *words, "--out", out]]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), expected)
    values = {"prompt": np.array([PROMPT.encode()], object), "seed": np.array([SEED])}
    values |= contract.pictures_named(pictures)
    asked = contract.ask(denoiser, "picture", {**values, "plan": np.array([b"FF"], object)})
    assert np.array_equal(asked.request.conditioning["image_latents"], request.conditioning["image_latents"])
    with models_over(denoiser, slots=1, queue=1, workers=1) as models, serving(models) as port:
        given = [(path.name, path.read_bytes()) for path in files]
        answer = client_of(port).images.edit(image=given, prompt=PROMPT, extra_body={"seed": SEED, "plan": "FF"})
    assert np.array_equal(picture_in(answer.data[0].b64_json), expected)


def test_a_pipeline_says_how_many_pictures(whole_bundles, tmp_path):
    folder = whole_bundles(EDIT) / ".." / "pipeline"
    for kind, count in (("QwenImageEditPipeline", 1), ("QwenImageEditPlusPipeline", 4)):
        index = tmp_path / kind
        index.mkdir()
        told = {**json.loads((folder / "model_index.json").read_text()), "_class_name": kind}
        (index / "model_index.json").write_text(json.dumps(told))
        for path in folder.iterdir():
            if path.is_dir():
                (index / path.name).symlink_to(path.resolve())
        assert open_checkpoint(str(index), FAMILIES[EDIT]).family.whole.read.pictures == count
    (index / "model_index.json").write_text(json.dumps({**told, "_class_name": "QwenImageEditInpaintPipeline"}))
    with pytest.raises(ConfigError, match="--whole is given for qwen-image-edit of QwenImageEditInpaintPipel"):
        parts_of(open_checkpoint(str(index), FAMILIES[EDIT]))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda told: told["parts"]["text"].update(patches=None), "inputs of part text are .*, its tokenizers make"),
        (lambda told: told["parts"].pop("encode"), "part text is shown pictures as `patches`, and there is no part"),
        (lambda told: told["parts"]["text"]["patches"].update(side=12), "`patches` and `places` of part text are"),
        (lambda told: told["parts"]["text"]["patches"].update(merged=1), "`patches` of part text has 4.* rows"),
        (lambda told: told["parts"]["text"]["patches"].update(most=9), "pictures of part text have 3136 to 9 pixels"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(whole, spoil, problem):
    told = json.loads(whole(PLUS)[1].manifest.model_dump_json())
    spoil(told)
    with pytest.raises(ValueError, match=problem):
        Manifest.model_validate(told, strict=False)
