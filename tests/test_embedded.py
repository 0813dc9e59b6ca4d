"""The embedded models' files and pictures; of FLUX also what it draws."""

# The trained ones draw; those of RANDOM have random weights and are there so that every command runs.

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import taylorseer_export
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.embedded.caption import captions
from taylorseer_export.embedded.picture import grid, pictures_from_dit_latents, plain, write_picture, write_png
from taylorseer_export.errors import ConfigError
from taylorseer_export.families import FAMILIES
from taylorseer_export.serve.api.formats import Output, encoded

ASSETS = Path(taylorseer_export.__file__).parent / "assets"
RANDOM = sorted(set(FAMILIES) - {"dit", "flux"})
MEGABYTE = 1024**2


# ---------------------------------------------------------------------------- pictures


def test_pictures_are_clipped_and_rounded():
    latents = np.zeros((1, 1, 16, 16), dtype=np.float16)
    latents[0, 0, 0, :5] = (-7.0, -1.0, 0.5, 1.0, 7.0)
    pictures = pictures_from_dit_latents(latents)
    assert pictures.shape == (1, 16, 16, 3)
    assert pictures.dtype == np.uint8
    assert pictures[0, 0, :5, 0].tolist() == [0, 0, 191, 255, 255]
    assert (pictures == pictures[..., :1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures_from_dit_latents(np.zeros((1, 3, 16, 16))), "DiT latents shape is"),
        (lambda: write_png("x.png", np.zeros((4, 4, 3)), 2), "float64"),
        (lambda: write_png("x.png", np.zeros((4, 4, 3), np.uint8), 0), "scale is 0"),
        (lambda: grid([]), "grid row length is"),
        (lambda: grid([[]]), "grid row length is"),
    ],
)
def test_wrong_pictures_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_png_enlarges_every_pixel_to_a_square(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "picture.png", picture, 3)
    with image.open(tmp_path / "picture.png") as read:
        enlarged = np.asarray(read)
    np.testing.assert_array_equal(enlarged, picture.repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_transparency_is_kept_or_on_white(tmp_path, kind):
    """By the command line and by the images API: a clear pixel is white where a format has none."""
    image = pytest.importorskip("PIL.Image")
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[4:, :, 3] = 255  # black, above it is clear
    write_picture(tmp_path / f"one.{kind}", plain(picture))
    write_picture(tmp_path / f"table.{kind}", grid([[picture]], 1, (), ()))
    sent = io.BytesIO(base64.b64decode(encoded(picture, Output(kind))))
    for file in (tmp_path / f"one.{kind}", tmp_path / f"table.{kind}", sent):
        with image.open(file) as read:
            left = (read.width - 8) // 2, (read.height - 8) // 2
            seen = np.asarray(read)[left[1] : left[1] + 8, left[0] : left[0] + 8].astype(int)
        if kind == "jpeg":
            assert seen.shape[-1] == 3 and (seen[:4] > 127).all() and (seen[4:] < 128).all()  # it loses something
        else:
            np.testing.assert_array_equal(seen[..., 3], picture[..., 3])


def test_grid_has_the_promised_size_and_places():
    pytest.importorskip("PIL")
    dark, light = np.zeros((8, 6, 3), np.uint8), np.full((8, 6, 3), 200, np.uint8)
    table = np.asarray(grid([[dark, light, dark], [light, dark, light]], 2))
    assert table.shape == (2 * (8 * 2 + 4) + 4, 3 * (6 * 2 + 4) + 4, 3)
    assert (table[:4] == 255).all()
    assert (table[4:20, 4:16] == 0).all()
    assert (table[4:20, 20:32] == 200).all()
    assert (table[24:40, 4:16] == 200).all()


def test_grid_labels_add_margins_and_must_fit():
    pytest.importorskip("PIL")
    cell = np.zeros((32, 32, 3), np.uint8)
    bare = grid([[cell], [cell]], 2)
    labelled = grid([[cell], [cell]], 2, ["seed 0", "seed 11"], ["a red circle left of a square"])
    assert labelled.width > bare.width
    assert labelled.height > bare.height
    margin = np.asarray(labelled)[:, : labelled.width - bare.width]
    assert (margin < 100).any(), "the row labels are not there"
    with pytest.raises(ConfigError, match="number of row labels is 1, expected 0 or 2"):
        grid([[cell], [cell]], 2, ["only one"])
    with pytest.raises(ConfigError, match="grid row length is"):
        grid([[cell], [cell, cell]])
    with pytest.raises(ConfigError, match="grid picture size is"):
        grid([[cell, cell[:4]]])


# ---------------------------------------------------------------------------- shipped files


def packed(path):
    """Bytes that a file has in a package: matrices that are zeros but for a corner take no space."""
    return len(zlib.compress(path.read_bytes(), 1))


def test_every_asset_is_small_enough_to_ship():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert packed(path) <= 8 * MEGABYTE, path
    assert sum(path.stat().st_size for path in files if path.is_relative_to(ASSETS / "flux")) <= 16 * MEGABYTE


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_cards_tell_how_to_sample_and_to_train_again(family):
    card = json.loads((ASSETS / family / "card.json").read_text())
    assert card["num_inference_steps"] == 50
    assert card["parameters"] > 1_000_000
    assert {"seed", "training_steps", "threads", "tool"} <= set(card["training"])


@pytest.mark.parametrize(
    ("family", "transformer", "scheduler"),
    [
        ("dit", "DiTTransformer2DModel", "DDIMScheduler"),
        *((name, FAMILIES[name].model_class, FAMILIES[name].scheduler) for name in RANDOM),
    ],
)
def test_folders_load_as_the_diffusers_classes(family, transformer, scheduler):
    diffusers = pytest.importorskip("diffusers")
    folder = ASSETS / family
    card = json.loads((folder / "card.json").read_text())
    model = getattr(diffusers, transformer).from_pretrained(folder / "transformer", local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    getattr(diffusers, scheduler).from_pretrained(folder / "scheduler", local_files_only=True)


@pytest.fixture(scope="module")
def flux():
    """The shipped pipeline as any user of diffusers loads it."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(ASSETS / "flux", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_flux_folder_is_a_pipeline_of_trained_parts(flux):
    card = json.loads((ASSETS / "flux" / "card.json").read_text())
    parts = [flux.transformer, flux.vae, flux.text_encoder, flux.text_encoder_2]
    assert sum(p.numel() for part in parts for p in part.parameters()) == card["parameters"]
    assert all(torch.isfinite(p).all() for part in parts for p in part.parameters())
    assert card["caption_accuracy"]["all"] >= 0.9 and card["autoencoder_psnr_db"] >= 30
    assert {"seed", "training_steps", "threads", "tool"} <= set(card["vae_training"])


@pytest.mark.slow
@pytest.mark.parametrize("length", [32, 512])
def test_the_untouched_pipeline_follows_captions(flux, length):
    """At the bundle's number of tokens and at the pipeline's own; read from the pixels, without the caption."""
    shapes = pytest.importorskip("assets.shapes")
    scenes = [shapes.random_scene(np.random.default_rng(seed), 64, 64) for seed in range(6)]
    asked = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": length, "output_type": "np"}
    drawn = flux([caption for caption, _ in scenes], generator=torch.Generator().manual_seed(0), **asked).images
    right = [
        shapes.agrees(np.rint(255 * picture), things, caption)["all"]
        for picture, (caption, things) in zip(drawn, scenes, strict=True)
    ]
    # Of captions that are followed at a rate of 0.9 fewer than four of six are in one of eighty draws.
    assert sum(right) >= 4
    rendered = [np.rint(shapes.render(things, 64, 64)) for _, things in scenes]
    for shift in range(1, len(scenes)):
        others = scenes[shift:] + scenes[:shift]
        wrong = [
            shapes.agrees(p, things, caption)["all"] for p, (caption, things) in zip(rendered, others, strict=True)
        ]
        assert not any(wrong), "the reader takes any picture for any caption"


def test_captions_are_words_that_the_model_knows(flux):
    made = captions(32, 5)
    assert len(set(made)) > 24
    for tokenizer in (flux.tokenizer, flux.tokenizer_2):
        for caption in made:
            ids = tokenizer(caption, add_special_tokens=False).input_ids
            assert len(ids) == len(caption.split()) and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("family", RANDOM)
def test_random_models_say_so_and_are_small(family):
    card = json.loads((ASSETS / family / "card.json").read_text())
    assert card["weights"].startswith("random, seed 0") and "no picture" in card["weights"]
    # Of Z-Image, most is a timestep embedder, whose width no config changes.
    limit = MEGABYTE if family == "z-image" else MEGABYTE / 2
    assert sum(packed(path) for path in (ASSETS / family).rglob("*") if path.is_file()) < limit


@pytest.mark.parametrize("family", RANDOM)
def test_random_models_are_opened_where_no_model_is_named(family):
    checkpoint = open_checkpoint(None, FAMILIES[family])
    assert checkpoint.embedded
    model = checkpoint.skeleton(torch.float16)  # every tensor fits the config
    assert len(checkpoint.latent_size) == len(FAMILIES[family].latent_size)
    sizes = FAMILIES[family].dimensions(model.config)
    assert set(checkpoint.card) & set(sizes) >= {"text_tokens"} & set(sizes)


def test_random_models_are_what_the_tool_makes(tmp_path):
    """The smallest again, from its seed: the bits of torch's generator on a CPU are the same everywhere."""
    random_tiny = pytest.importorskip("assets.random_tiny")
    from safetensors.numpy import load_file

    random_tiny.write("hunyuan-video", tmp_path)
    for file in ("transformer/config.json", "scheduler/scheduler_config.json", "card.json"):
        shipped, again = (json.loads((root / file).read_text()) for root in (ASSETS / "hunyuan-video", tmp_path))
        versions = {"_diffusers_version", "torch"}
        assert {k: v for k, v in again.items() if k not in versions} == {
            k: v for k, v in shipped.items() if k not in versions
        }
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shipped, again = (load_file(root / weights) for root in (ASSETS / "hunyuan-video", tmp_path))
    assert shipped.keys() == again.keys()
    for name, value in shipped.items():  # sums may be taken in another order on another CPU
        np.testing.assert_allclose(again[name].astype(np.float32), value, rtol=2.0**-10, err_msg=name)


def test_embedded_weights_are_stored_as_float16():
    for family in FAMILIES:
        path = ASSETS / family / "transformer" / "diffusion_pytorch_model.safetensors"
        blob = path.read_bytes()
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        header.pop("__metadata__", None)
        assert {entry["dtype"] for entry in header.values()} == {"F16"}
