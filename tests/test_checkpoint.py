"""Checkpoints: what is found, and what each kind of damage is called."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import DIT, INDEX, WEIGHTS, assert_holds, edit_json, opened, rewrite
from safetensors import safe_open

from taylorseer_export.checkpoint import files
from taylorseer_export.checkpoint.checkpoint import EMBEDDED, open_checkpoint
from taylorseer_export.checkpoint.files import PUBLISHED
from taylorseer_export.compile import export
from taylorseer_export.compile.export import PRECISIONS
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the single-file checkpoint."""
    return shutil.copytree(tiny("dit").folder, tmp_path / "dit")


@pytest.fixture
def shards(tiny, tmp_path):
    tiny("dit").model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    return tmp_path / "shards"


# What is found


def test_single_file(tiny, folder):
    checkpoint = opened(folder)
    assert_holds(checkpoint, tiny("dit").model)
    assert checkpoint.folder == checkpoint.root == folder
    assert not checkpoint.embedded
    assert checkpoint.config["num_layers"] == 3
    assert not any(key.startswith("_") for key in checkpoint.config)


def test_sharded(tiny, shards):
    checkpoint = opened(shards)
    assert len(set(checkpoint.files.values())) > 2
    assert_holds(checkpoint, tiny("dit").model)
    assert {p.shape for p in checkpoint.skeleton(torch.float32).parameters()} == {
        p.shape for p in tiny("dit").model.parameters()
    }


@pytest.mark.parametrize("variant", ["diffusion_pytorch_model.fp16.safetensors", "extra.safetensors"])
def test_a_variant_beside_the_weights_is_left_alone(tiny, folder, variant):
    """As on the hub, where transformer/ may hold half-precision weights too."""
    (folder / variant).write_bytes(b"not the weights")
    (folder / f"{variant}.index.json").write_text('{"weight_map": {"proj_out_1.bias": "gone.safetensors"}}')
    assert_holds(opened(folder), tiny("dit").model)


def test_weights_of_another_name(tiny, folder):
    shutil.move(folder / WEIGHTS, folder / "model.safetensors")
    assert_holds(opened(folder), tiny("dit").model)


def test_pipeline_folder(tiny, folder, tmp_path):
    shutil.move(folder, tmp_path / "pipeline" / "transformer")
    checkpoint = opened(tmp_path / "pipeline")
    assert_holds(checkpoint, tiny("dit").model)
    assert (checkpoint.root, checkpoint.folder) == (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer")


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_embedded_is_the_default(name):
    checkpoint = open_checkpoint(None, FAMILIES[name])
    assert checkpoint.embedded
    assert checkpoint.reference == EMBEDDED
    parameters = dict(checkpoint.skeleton(torch.float32).named_parameters())
    assert parameters.keys() == checkpoint.files.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_skeleton_has_shapes_and_no_numbers(folder, dtype):
    from torch._subclasses.fake_tensor import FakeTensor

    parameters = list(opened(folder).skeleton(dtype).parameters())
    assert parameters
    assert all(isinstance(p, FakeTensor) and p.dtype == dtype for p in parameters)


def test_load_is_the_model(tiny, folder):
    loaded = opened(folder).load(torch.float32).state_dict()
    expected = tiny("dit").model.state_dict()
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []


def test_hash_is_that_of_the_weight_files(shards):
    read = []
    checkpoint = opened(shards)
    seen = checkpoint.sha256(read.append)
    files = sorted(shards.glob("*.safetensors"))
    assert seen == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    assert sum(read) == sum(f.stat().st_size for f in files)
    with files[0].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert opened(shards).sha256() != seen


def test_the_comparison_can_fail(tiny, folder):
    rewrite(folder, lambda tensors: tensors["proj_out_2.bias"].add_(1e-6))
    with pytest.raises(AssertionError, match=r"proj_out_2\.bias"):
        assert_holds(opened(folder), tiny("dit").model)


# What is refused


@pytest.mark.parametrize("reference", ["/no/such/folder", "./none", "nothing", "a/b/c", "~/none"])
def test_no_such_path(reference):
    fix = r"expected an existing diffusers folder or a hub id like facebook/DiT-XL-2-256; check the path"
    with pytest.raises(CheckpointError, match=fix):
        opened(reference)


def test_unreachable_hub_id(monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    fix = r"hub id nobody/nothing could not be fetched \(ConnectionError\).*`hf auth login`, or download it and pass"
    with pytest.raises(CheckpointError, match=fix):
        opened("nobody/nothing")


def test_hub_id_is_fetched_without_pictures_and_text_models(monkeypatch, tiny, folder):
    import huggingface_hub

    asked = {}

    def fetch(reference, allow_patterns):
        asked[reference] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_holds(opened("somebody/dit"), tiny("dit").model)
    assert list(asked) == ["somebody/dit"]
    assert not any("text_encoder" in p or p == "*" for p in asked["somebody/dit"])


def test_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json.* of a DiTTransformer2DModel; check --model"):
        opened(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"dit"', "\xff"])
def test_unreadable_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json is not readable JSON.*download it again"):
        opened(folder)


def test_a_class_that_this_diffusers_has_not(folder):
    newer = replace(FAMILIES["flux"], model_class="Flux9Transformer2DModel")
    with pytest.raises(CheckpointError, match=r"^diffusers is [\d.]+, expected one with Flux9Transformer2DModel"):
        open_checkpoint(str(folder), newer)


def test_wrong_class(folder):
    fix = r"is of class DiTTransformer2DModel, expected FluxTransformer2DModel for family flux; check --model"
    with pytest.raises(CheckpointError, match=fix):
        opened(folder, FAMILIES["flux"])


def test_config_that_builds_nothing(folder):
    edit_json(folder / "config.json", lambda c: c.update(num_layers="three"))
    with pytest.raises(CheckpointError, match=r"does not describe a DiTTransformer2DModel.*download the check"):
        opened(folder).skeleton(torch.float32)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        CheckpointError, match=r"a config without weights, expected both; add --dry-run to see its card"
    ):
        opened(folder)
    for named in (folder, folder / "config.json"):
        alone = open_checkpoint(str(named), FAMILIES["dit"], weightless=True)
        assert alone.weightless and not alone.files
        assert alone.skeleton(torch.float32).config.num_layers == alone.config["num_layers"]


def test_ambiguous_weights(folder):
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    shutil.move(folder / WEIGHTS, folder / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 safetensors files and no index, expected diffusion_pytorch_mod"):
        opened(folder)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(folder, size):
    os.truncate(folder / WEIGHTS, size if size >= 0 else (folder / WEIGHTS).stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"is damaged .*expected a complete safetensors file; download it again"):
        opened(folder)


def test_weights_larger_than_memory(folder, monkeypatch):
    """Their header is read all the same; a tensor is not, where the machine does not let torch map the file."""

    def refuse(path, framework):
        if framework == "pt":
            raise RuntimeError("unable to mmap 34211689442 bytes from file <x>: Cannot allocate memory (12)")
        return safe_open(path, framework=framework)

    monkeypatch.setattr(files, "safe_open", refuse)
    checkpoint = opened(folder)
    checkpoint.skeleton(torch.float32)
    with pytest.raises(CheckpointError, match=r"cannot be mapped \(unable to mmap 342.*swap.*save it in shards"):
        checkpoint.tensor("proj_out_2.bias")


def test_missing_shard(shards):
    victim = sorted(shards.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"shard .*{victim.name} is missing.*{INDEX} lists; download it again"):
        opened(shards)


def test_truncated_shard(shards):
    os.truncate(sorted(shards.glob("*.safetensors"))[1], 100)
    with pytest.raises(CheckpointError, match=r"is damaged .*download it again"):
        opened(shards).skeleton(torch.float32)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_unreadable_index(shards, text):
    (shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json is not readable JSON.*download it again"):
        opened(shards)


def test_index_without_a_tensor(shards):
    """The shard holds it but the index does not say so: nothing would find it later."""
    edit_json(shards / INDEX, lambda index: index["weight_map"].pop("proj_out_2.bias"))
    with pytest.raises(CheckpointError, match=r"`proj_out_2.bias` is missing"):
        opened(shards).skeleton(torch.float32)


def test_index_that_names_the_wrong_shard(shards):
    def swap(index):
        here = index["weight_map"]["proj_out_2.bias"]
        index["weight_map"]["proj_out_2.bias"] = next(f for f in index["weight_map"].values() if f != here)

    edit_json(shards / INDEX, swap)
    with pytest.raises(CheckpointError, match=r"`proj_out_2.bias` is missing"):
        opened(shards).skeleton(torch.float32)


def test_tensors_that_do_not_fit(folder):
    def change(tensors):
        del tensors["proj_out_1.weight"]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["proj_out_2.bias"] = torch.zeros(3)

    rewrite(folder, change)
    text = (
        r"has 3 tensors that do not fit its config \(`proj_out_1.weight` is missing; `extra.weight` is not known; "
        r"`proj_out_2.bias` is \[3\], expected \[32\]\).*check --model and the family"
    )
    with pytest.raises(CheckpointError, match=text):
        opened(folder).skeleton(torch.float32)


def test_many_misfits_are_counted(folder):
    rewrite(folder, dict.clear)
    with pytest.raises(CheckpointError, match=r"; and \d+ more\)"):
        opened(folder).skeleton(torch.float32)


@pytest.mark.parametrize(
    ("family", "reference", "steps"),
    [
        ("flux", "black-forest-labs/FLUX.1-schnell", 4),
        ("flux", "/models/FLUX.1-schnell/transformer", 4),
        ("flux", "flux1-schnell.safetensors", 4),
        ("flux", "/home/dev/FLUX.1-dev", 50),
        ("hidream", "HiDream-ai/HiDream-I1-Dev", 28),
        ("hidream", "/home/dev/HiDream-I1-Fast/transformer/config.json", 16),
        ("hidream", "/home/dev/HiDream-I1-Full", 50),
        ("flux2", "black-forest-labs/FLUX.2-dev", 50),
        ("flux2", "black-forest-labs/FLUX.2-klein-base-4B", 50),
        ("flux2", "black-forest-labs/FLUX.2-klein-4B", 4),
        ("flux2-edit", "/models/FLUX.2-klein-9B", 4),
        ("wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 40),
        ("wan", "", 50),
    ],
)
def test_a_variant_is_told_by_the_model_s_own_name(family, reference, steps):
    assert FAMILIES[family].variant(reference).defaults.steps == steps


def test_a_variant_has_its_own_pixels_and_shift():
    five, large = (FAMILIES["wan"].variant(f"Wan-AI/Wan2.2-{name}-Diffusers") for name in ("TI2V-5B", "T2V-A14B"))
    assert [(f.latent_scale, f.scheduler_config["flow_shift"]) for f in (five, large)] == [(16, 5.0), (8, 3.0)]


def test_videos_from_pictures_have_guidance_of_their_own():
    names = ("hunyuanvideo", "hunyuanvideo-i2v", "hunyuanvideo-i2v-token-replace")
    made = [open_checkpoint(str(PUBLISHED / f"{k}.json"), FAMILIES["hunyuan-video"], weightless=True) for k in names]
    assert [(one.family.guidance, one.family.guidance_scale) for one in made] == [
        ("embedded", 6.0),
        ("branches", 1.0),
        ("embedded", 1.0),
    ]


# Entries of a config that the model itself does not read


@pytest.mark.parametrize("family", ["dit", "flux", "wan"])
@pytest.mark.parametrize("size", ["x", 1e308, [1], [8, "8"], [0, 8], {}, -8, True])
def test_sizes_that_are_none(tmp_path, family, size):
    embedded = open_checkpoint(None, FAMILIES[family])
    checkpoint = replace(embedded, reference="x", folder=tmp_path, config={**embedded.config, "sample_size": size})
    if not size:  # is no size at all, and the family's own holds
        assert checkpoint.latent_size == FAMILIES[family].latent_size
        return
    with pytest.raises(
        CheckpointError, match=r"sample_size of .*config.json is .*, expected [23] whole numbers \(latent"
    ):
        assert checkpoint.latent_size


def test_one_side_of_a_picture_is_both_and_a_video_keeps_its_frames(tmp_path):
    for family, expected in (("dit", (16, 16)), ("wan", (FAMILIES["wan"].latent_size[0], 16, 16))):
        embedded = open_checkpoint(None, FAMILIES[family])
        config = {**embedded.config, "sample_size": 16}
        assert replace(embedded, reference="x", folder=tmp_path, config=config).latent_size == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"shift": float("nan")}, r"`config` of \w+ of .* is not usable \(Out of range float values are not JSON"),
        (
            {"num_train_timesteps": 0},
            r"config of \w+ of .* is not usable \(num_train_timesteps is '0', no whole number",
        ),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is "),
        ({"_class_name": ["x"]}, r"scheduler of .* is `\['x'\]`, expected one of diffusers that this version knows"),
    ],
)
def test_a_scheduler_that_no_manifest_can_hold_is_refused_before_anything_is_traced(
    folder, monkeypatch, config, expected
):
    checkpoint = open_checkpoint(str(folder), DIT)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(export, "trace", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(CheckpointError, match=expected):
        export.trace_model(checkpoint, export.Options(1, 4, 2))


def test_a_config_that_no_manifest_can_hold(drafts):
    draft = drafts("dit", layout="derivatives", order=1)
    config = {**draft.checkpoint.config, "other": float("nan")}
    with pytest.raises(CheckpointError, match=r"`config` of model .* is not usable \(Out of range float values"):
        export.describe(replace(draft, checkpoint=replace(draft.checkpoint, config=config)), "x")


# Weights


@pytest.mark.parametrize(
    ("value", "precision", "expected"),
    [
        (
            float("nan"),
            "fp32",
            r"has 1 of \d+ values that are NaN or infinite, expected .* check the checkpoint, and --lo",
        ),
        (float("inf"), "bf16", r"has 1 of \d+ values that are NaN or infinite, expected finite numbers"),
        (1e5, "fp16", r"has 1 of \d+ values that are beyond the range of float16, .*; export with --precision bf16$"),
        (1e5, "bf16", None),
    ],
)
def test_weights_are_finite_in_the_precision_they_are_stored_in(folder, value, precision, expected):
    """One number of a class that nothing but a request for it reads: no check on typical inputs sees it."""
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"

    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name][-1, -1] = value

    rewrite(folder, change)
    checkpoint, dtype = open_checkpoint(str(folder), DIT), PRECISIONS[precision]
    stored = {name: (dtype, checkpoint.shapes[name])}
    draft = export.Draft(checkpoint, export.Options(1, 4, 2, precision=precision), None, {}, {}, stored, {})
    if expected is None:
        assert draft.read(name).isfinite().all()
        return
    with pytest.raises(CheckpointError, match=expected):
        draft.read(name)
