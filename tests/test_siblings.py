"""Checkpoints that are nearly what was asked for: one sentence with the fix, and exit 2, before anything is traced."""

import json
import shutil
from pathlib import Path

import pytest

import taylorseer_export
from taylorseer_export import cli
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.families import FAMILIES

PACKAGE = Path(taylorseer_export.__file__).parent
PUBLISHED = PACKAGE / "families" / "configs"


def pipeline(folder, config, scheduler=None, index=None, **changes):
    """A pipeline's folder without weights: what `--dry-run` takes."""
    (folder / "transformer").mkdir(parents=True)
    entries = json.loads(Path(config).read_text()) | changes
    (folder / "transformer" / "config.json").write_text(json.dumps(entries))
    if index:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": index}))
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        usual = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(usual))
    return folder


def refused(capsys, family, folder):
    assert cli.main([family, "--model", str(folder), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("family", "config", "index", "expected"),
    [
        ("qwen-image", "qwen-image-edit", "QwenImageEditPipeline", "export it as family qwen-image-edit"),
        ("qwen-image", "qwen-image-edit-2511", None, "export Qwen-Image-Edit-2511 as family qwen-image-edit"),
        ("qwen-image-edit", "qwen-image", "QwenImagePipeline", "is of QwenImagePipeline, expected QwenImageEdit"),
        ("flux", "flux.1-kontext-dev", "FluxKontextPipeline", "export it as family flux-kontext"),
        ("flux", "flux.2-dev", None, "is of class Flux2Transformer2DModel, expected FluxTransformer2DModel for family"),
        ("wan-5b-image", "wan2.2-t2v-a14b", None, "`out_channels` are 16 and 16, expected 48 both"),
        (
            "cogvideox",
            "wan2.1-t2v-14b",
            None,
            "is of class WanTransformer3DModel, expected CogVideoXTransformer3DModel",
        ),
        ("kandinsky-5", "wan2.1-t2v-14b", None, "is of class WanTransformer3DModel, expected Kandinsky5Transformer3"),
        ("wan-vace", "wan2.1-t2v-14b", None, "is of class WanTransformer3DModel, expected WanVACETransformer3DModel"),
        ("wan-animate", "wan2.1-i2v-14b-480p", None, "WanTransformer3DModel, expected WanAnimateTransformer3DModel"),
        ("z-image", "flux.1-dev", None, "is of class FluxTransformer2DModel, expected ZImageTransformer2DModel"),
    ],
)
def test_a_sibling_is_refused_and_its_family_named(tmp_path, capsys, family, config, index, expected):
    folder = pipeline(tmp_path / "model", PUBLISHED / f"{config}.json", index=index)
    assert expected in refused(capsys, family, folder)


@pytest.mark.parametrize(("option", "said"), [("use_layer3d_rope", "Layered"), ("guidance_embeds", "as an input")])
def test_a_model_that_no_family_covers_is_refused(tmp_path, capsys, option, said):
    folder = pipeline(tmp_path / "model", PUBLISHED / "qwen-image.json", **{option: True})
    error = refused(capsys, "qwen-image", folder)
    assert f"config entry `{option}` is true, expected false; no family covers" in error and said in error


def test_sparse_attention_is_refused_by_name(tmp_path, capsys):
    published = PUBLISHED / "kandinsky-5.0-t2v-lite-5s.json"
    error = refused(capsys, "kandinsky-5", pipeline(tmp_path / "model", published, attention_type="nabla"))
    assert "`attention_type` is nabla, expected regular; its sparse attention chooses blocks" in error


def test_a_distilled_model_under_the_name_of_its_base_is_refused(tmp_path, capsys):
    """Z-Image-Turbo has class and config of Z-Image: its scheduler tells, if its name does not."""
    folder = pipeline(tmp_path / "mine", PUBLISHED / "z-image.json", {"shift": 3.0}, "ZImagePipeline")
    error = refused(capsys, "z-image", folder)
    assert "has shift 3.0, as that of a z-image `turbo`, expected shift 6.0; give its folder a name with the" in error
    turbo = Path(shutil.move(folder, tmp_path / "my-turbo"))
    assert open_checkpoint(str(turbo), FAMILIES["z-image"], weightless=True).family.guidance == "none"
    base = pipeline(tmp_path / "base", PUBLISHED / "z-image.json", {"shift": 6.0}, "ZImagePipeline")
    assert open_checkpoint(str(base), FAMILIES["z-image"], weightless=True).family.guidance != "none"


def test_a_config_that_the_class_does_not_know_is_refused(tmp_path, capsys):
    """diffusers drops such an entry with a warning; it may change what the model computes."""
    folder = pipeline(tmp_path / "model", PUBLISHED / "flux.1-dev.json", zero_cond_t=True, is_tp=False)
    error = refused(capsys, "flux", folder)
    assert "config.json has `zero_cond_t`, which FluxTransformer2DModel of diffusers" in error
    assert "does not know, expected a config of that class; upgrade diffusers, or remove what means" in error


def test_entries_that_never_meant_anything_are_no_news(tmp_path):
    """As the published Qwen-Image has one, which its class once took and never read."""
    folder = pipeline(tmp_path / "model", PUBLISHED / "qwen-image.json", pooled_projection_dim=768)
    assert open_checkpoint(str(folder), FAMILIES["qwen-image"], weightless=True).config["num_layers"] == 60
