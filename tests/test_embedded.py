"""The embedded models' files, text features and pictures: everything but the drawing itself."""

# The trained ones draw; those of RANDOM have random weights and are there so that every command runs.

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import taylorseer_export
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.embedded.caption import CaptionEncoder
from taylorseer_export.embedded.picture import (
    flux_latents_from_pictures,
    grid,
    pictures_from_dit_latents,
    pictures_from_flux_latents,
    write_png,
)
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families import FAMILIES

ASSETS = Path(taylorseer_export.__file__).parent / "assets"
RANDOM = sorted(set(FAMILIES) - {"dit", "flux"})
TEXT = ASSETS / "flux" / "text"
MEGABYTE = 1024**2


@pytest.fixture(scope="module")
def encoder() -> CaptionEncoder:
    return CaptionEncoder.load(TEXT)


# ---------------------------------------------------------------------------- captions


def test_caption_features_have_the_shapes_the_transformer_wants(encoder):
    config = json.loads((ASSETS / "flux/transformer/config.json").read_text())
    encoded = encoder.encode(["a red circle", "an orange cross below a white square"])
    hidden, pooled = encoded["encoder_hidden_states"], encoded["pooled_projections"]
    assert hidden.shape == (2, encoder.length, config["joint_attention_dim"])
    assert pooled.shape == (2, config["pooled_projection_dim"])
    assert hidden.dtype == pooled.dtype == np.float32


def test_caption_features_follow_their_formula(encoder):
    """Recomputed word by word from the tables, for a caption of three words."""
    encoded = encoder.encode(["a red circle"])
    rows = [encoder.words.index(word) for word in ("a", "red", "circle")]
    pooled = sum(
        encoder.word_table[row] * np.sign(encoder.position_table[place]) for place, row in enumerate(rows)
    ) / np.sqrt(3)
    np.testing.assert_allclose(encoded["pooled_projections"][0], pooled, rtol=1e-5, atol=1e-6)
    hidden = encoded["encoder_hidden_states"][0]
    for place in range(encoder.length):
        row = rows[place] if place < 3 else 0
        expected = encoder.word_table[row] + encoder.position_table[place]
        np.testing.assert_array_equal(hidden[place], expected)


def test_caption_features_are_the_same_every_time(encoder):
    first = encoder.encode(["a blue square left of a red circle"])
    again = CaptionEncoder.load(TEXT).encode(["A blue square, left of a red circle."])
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_caption_features_do_not_depend_on_the_batch(encoder):
    captions = ["a red circle", "a green cross above a blue square"]
    together = encoder.encode(captions)
    for row, caption in enumerate(captions):
        for name, value in encoder.encode([caption]).items():
            np.testing.assert_array_equal(value[0], together[name][row])


def test_word_order_changes_both_features(encoder):
    encoded = encoder.encode(["a red circle left of a blue square", "a blue square left of a red circle"])
    for value in encoded.values():
        assert np.abs(value[0] - value[1]).max() > 0.5


def test_all_table_rows_are_orthogonal(encoder):
    """What makes word + position lossless: no row can be mistaken for a sum of others."""
    rows = np.concatenate((encoder.word_table, encoder.position_table)).astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, encoder.width * np.eye(len(rows)), atol=1e-4)


@pytest.mark.parametrize("caption", ["a pink circle", "a red <pad>"])
def test_unknown_word_is_refused_and_known_words_are_named(encoder, caption):
    unknown = caption.split()[1] if "pink" in caption else "<pad>"
    with pytest.raises(ConfigError) as caught:
        encoder.encode(["a red circle", caption])
    message = str(caught.value)
    assert message.startswith(f"caption word is {unknown!r}, expected a known word")
    for word in encoder.words[1:]:
        assert word in message.split("use only: ")[1].split(", ")


@pytest.mark.parametrize(("caption", "count"), [("", 0), ("a " * 13, 13)])
def test_caption_of_a_wrong_length_is_refused(encoder, caption, count):
    with pytest.raises(ConfigError, match=rf"^caption length is {count}, expected 1 to 12 \(words\)"):
        encoder.encode([caption])


def test_a_caption_that_is_not_in_a_list_is_refused(encoder):
    with pytest.raises(ConfigError, match="expected a list of captions"):
        encoder.encode("a red circle")


def test_missing_and_damaged_text_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocabulary\.json"):
        CaptionEncoder.load(tmp_path)
    (tmp_path / "vocabulary.json").write_text((TEXT / "vocabulary.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing at .*text_embedding\.safetensors"):
        CaptionEncoder.load(tmp_path)
    whole = (TEXT / "text_embedding.safetensors").read_bytes()
    for damaged in (b"", whole[:40], whole[:-100]):
        (tmp_path / "text_embedding.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="unreadable"):
            CaptionEncoder.load(tmp_path)
    (tmp_path / "text_embedding.safetensors").write_bytes(whole)
    (tmp_path / "vocabulary.json").write_text('{"words": ["<pad>", "a"]}')
    with pytest.raises(CheckpointError, match="word table shape"):
        CaptionEncoder.load(tmp_path)


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32), (4, 8)])
def test_flux_latents_round_trip_every_pixel(height, width):
    pictures = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    latents = flux_latents_from_pictures(pictures)
    assert latents.shape == (3, height * width // 16, 48)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(pictures_from_flux_latents(latents, height, width), pictures)


def test_flux_latents_are_laid_out_as_unshuffle_then_pack():
    """One bright subpixel, followed through both steps by hand.

    Pixel (row 6, column 13), green: unshuffle gives channel 1*4 + 0*2 + 1 = 5 at (3, 6); packing
    puts it in token (1, 3) of 8 columns at channel 5*4 + 1*2 + 0 = 22.
    """
    pictures = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    pictures[0, 6, 13, 1] = 255
    latents = flux_latents_from_pictures(pictures)
    assert np.argwhere(latents > 0).tolist() == [[0, 1 * 8 + 3, 22]]


def test_flux_latents_match_torch_and_the_pipeline():
    """Against pixel_unshuffle and the two lines of `FluxPipeline._pack_latents`.

    The lines are repeated here because importing the pipeline takes ten seconds.
    """
    pictures = np.random.default_rng(1).integers(0, 256, (2, 48, 32, 3), dtype=np.uint8)
    values = torch.from_numpy(pictures / np.float32(127.5) - np.float32(1)).permute(0, 3, 1, 2)
    unshuffled = torch.nn.functional.pixel_unshuffle(values, 2)
    packed = unshuffled.view(2, 12, 12, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 12 * 8, 48)
    np.testing.assert_array_equal(flux_latents_from_pictures(pictures), packed.numpy())


def test_pictures_are_clipped_and_rounded():
    latents = np.zeros((1, 1, 16, 16), dtype=np.float16)
    latents[0, 0, 0, :5] = (-7.0, -1.0, 0.5, 1.0, 7.0)
    pictures = pictures_from_dit_latents(latents)
    assert pictures.shape == (1, 16, 16, 3)
    assert pictures.dtype == np.uint8
    assert pictures[0, 0, :5, 0].tolist() == [0, 0, 191, 255, 255]
    assert (pictures == pictures[..., :1]).all()
    bright = pictures_from_flux_latents(np.full((1, 64, 48), 3.0), 32, 32)
    assert (bright == 255).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures_from_flux_latents(np.zeros((1, 64, 48)), 32, 30), "picture width is 30"),
        (lambda: pictures_from_flux_latents(np.zeros((1, 64, 48)), 0, 32), "picture height is 0"),
        (lambda: pictures_from_flux_latents(np.zeros((1, 64, 48)), 48, 32), r"\[B, 96, 48\]"),
        (lambda: flux_latents_from_pictures(np.zeros((32, 32, 3))), "pictures shape is"),
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


def test_every_asset_is_small_enough_to_ship():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.stat().st_size <= 8 * MEGABYTE, path


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
        ("flux", "FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"),
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


@pytest.mark.parametrize("family", RANDOM)
def test_random_models_say_so_and_are_small(family):
    card = json.loads((ASSETS / family / "card.json").read_text())
    assert card["weights"].startswith("random, seed 0") and "no picture" in card["weights"]
    assert sum(path.stat().st_size for path in (ASSETS / family).rglob("*") if path.is_file()) < MEGABYTE / 2


@pytest.mark.parametrize("family", RANDOM)
def test_random_models_are_opened_where_no_model_is_named(family):
    checkpoint = open_checkpoint(None, FAMILIES[family])
    assert checkpoint.embedded
    model = checkpoint.skeleton(torch.float16)  # every tensor fits the config
    assert len(checkpoint.latent_size) == len(FAMILIES[family].latent_size)
    assert set(checkpoint.card) & set(FAMILIES[family].dimensions(model.config)) >= {"text_tokens"}


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
