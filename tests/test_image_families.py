"""What a family of pictures has of its own: HiDream's experts and squares, Qwen's rotation, rows of pictures, FLUX.2's
places."""

# Shapes: B batch, T tokens

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from harness import open_slot
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.files import PUBLISHED
from taylorseer_export.checkpoint.recognise import family_of
from taylorseer_export.compile.export import sampling_of
from taylorseer_export.errors import CheckpointError, ConfigError, StepError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.runtime.clock import _shift_by_steps
from taylorseer_export.runtime.places import value_from_fill
from taylorseer_export.runtime.trajectory import random_trajectory

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_experts_equal_the_loop_over_routed_tokens(tiny, dtype):
    """HiDream's own experts against the form that is traced: random tokens, and one expert that gets none."""
    layer = copy.deepcopy(tiny("hidream").model.single_stream_blocks[0].block.ff_i).to(dtype)
    model = copy.deepcopy(tiny("hidream").model)
    model.single_stream_blocks[0].block.ff_i = layer
    x = torch.randn(2, 9, 32, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for idle in (None, 1):
        if idle is not None:  # its score is the lowest for every token
            x[..., 0] = 5.0
            layer.gate.weight.data[:, 0] = torch.tensor([0.0, -9.0, 0.0, 0.0])
        routed = layer.gate(x)[0]
        assert (routed == 1).any() == (idle is None)
        with torch.no_grad():
            expected = layer(x)
            with FAMILIES["hidream"].patched(model):
                seen = layer(x)
                assert "moe_infer" in vars(layer)
        assert "moe_infer" not in vars(layer)
        unit = torch.finfo(dtype).eps
        assert_close(f"experts in {dtype}", seen, expected, 8 * unit * expected.abs().max().item())
        assert not torch.equal(layer.shared_experts(x), expected)


def test_qwen_rotates_as_its_complex_tables_do(tiny):
    """One layer's query under the original tables and under the traced form: odd sides, two frames, pictures."""
    model = tiny("qwen-image").model
    code = sys.modules[type(model).__module__]

    def turned(rows, tables):
        return [code.apply_rotary_emb_qwen(x, t, use_real=False) for x, t in zip(rows, tables, strict=True)]

    one, odd, two, wide = (1, 4, 4), (1, 3, 5), (2, 2, 3), (1, 2, 9)
    for pictures in ([one], [odd], [two], [one, odd], [wide, one], [odd, two, one, wide]):
        sizes = torch.tensor([pictures] * 2)
        count = int(sizes[0].prod(1).sum())
        rows = [torch.randn(2, n, 2, 16, generator=torch.Generator().manual_seed(n)) for n in (count, 7)]
        shape = {"max_txt_seq_len": 7, "device": rows[0].device}
        expected = turned(rows, model.pos_embed([pictures] * 2, **shape))
        with FAMILIES["qwen-image"].patched(model):
            seen = turned(rows, model.pos_embed((sizes, count), **shape))
        for made, other in zip(seen, expected, strict=True):
            assert_close(str(pictures), made, other, 4 * 2.0**-24 * other.abs().max().item())


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        ("qwen-image", {"zero_cond_t": True}, r"`zero_cond_t` is true, expected false; export Qwen-Image-Edit-2511 as"),
        (
            "qwen-image",
            {"use_layer3d_rope": True},
            r"`use_layer3d_rope` is true, expected false; no family covers",
        ),
        (
            "qwen-image-edit",
            {"use_additional_t_cond": True},
            r"`use_additional_t_cond` is true, expected false; no f",
        ),
        (
            "qwen-image-edit",
            {"guidance_embeds": True},
            r"`guidance_embeds` is true, expected false; no family cov",
        ),
    ],
)
def test_another_variant_of_qwen_is_refused(family, config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FAMILIES[family].inputs({"in_channels": 4, "joint_attention_dim": 4, **config})


@pytest.mark.parametrize(
    ("family", "pipeline", "sentence"),
    [
        (
            "qwen-image",
            "QwenImageEditPipeline",
            r"is of QwenImageEditPipeline, .*; export it as family qwen-image-ed",
        ),
        (
            "qwen-image",
            "QwenImageEditPlusPipeline",
            r"expected one that no other family declares for family qwen-im",
        ),
        ("qwen-image-edit", "QwenImagePipeline", r"expected QwenImageEditPipeline or .*; check --model and the family"),
        ("qwen-image-edit", "QwenImageEditPlusPipeline", None),
        ("qwen-image", "QwenImageImg2ImgPipeline", None),
    ],
)
def test_a_folder_of_another_pipeline_is_refused(tiny, tmp_path, family, pipeline, sentence):
    """Of one class and one config both; and the family is told by the pipeline where none is named."""
    shutil.copytree(tiny("qwen-image").folder, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    for folder in (tmp_path, tmp_path / "transformer"):
        if sentence is None:
            assert open_checkpoint(str(folder), FAMILIES[family]).family.name == family
            assert family_of(str(folder)).name == family
            continue
        with pytest.raises(CheckpointError, match=sentence):
            open_checkpoint(str(folder), FAMILIES[family])


def test_hidream_takes_squares_only():
    config = {"patch_size": 2}
    assert FAMILIES["hidream"].latent_sizes(config, 8, 8) == {"side": 4}
    with pytest.raises(ConfigError, match=r"latent size is 8x6, expected a square.*change --size"):
        FAMILIES["hidream"].latent_sizes(config, 8, 6)


@pytest.mark.parametrize("name", ["hidream"])
def test_hidream_in_a_bundle_takes_squares_only(eager, tiny, name):
    inputs = tiny(name).inputs(1, side=4)
    with pytest.raises(StepError, match=r"dimension 3 \(`2\*side`\) is 6 elements, expected 8 elements"):
        open_slot(eager(name), (inputs[0][..., :6], *inputs[1:]))


@pytest.mark.parametrize("key", ["image_latents", "image_ids"])
def test_kontext_without_its_condition(eager, tiny, key):
    latents, timestep, conditioning = tiny("kontext").inputs(1)
    rest = {n: v for n, v in conditioning.items() if n != key}
    with pytest.raises(StepError, match=rf"input `{key}` is missing, expected float32 .*; pass it with the condit"):
        open_slot(eager("kontext"), (latents, timestep, rest))


def test_random_inputs_of_qwen_agree_with_each_other(eager):
    """What `verify` and `bench` make up: the sizes multiply to the tokens there are, and a step runs."""
    data = random_trajectory(eager("qwen-image"), 2, {"image_tokens": 6, "text_tokens": 4})
    assert data.conditioning["img_shapes"].tolist() == [[[1, 3, 2]]]
    slot = eager("qwen-image").slot(eager("qwen-image").sizes(data.latents.shape[1:], data.conditioning))
    slot.start(data.conditioning, Forecasts(Plan("F."), 0), data.timesteps)
    assert all(np.isfinite(slot.step(latent)).all() for latent in data.latents)


def test_random_inputs_of_pictures_agree_with_each_other(eager):
    """The latent's sizes first, then those of pictures that share the other tokens."""
    denoiser, sizes = eager("qwen-image-edit"), {"image_tokens": 6, "condition_tokens": 16, "text_tokens": 4}
    for pictures, expected in ((2, [[1, 4, 4]]), (3, [[1, 4, 2]] * 2), (4, [[1, 5, 1]] * 2 + [[1, 3, 2]])):
        data = random_trajectory(denoiser, 2, {**sizes, "pictures": pictures})
        assert data.conditioning["img_shapes"].tolist() == [[[1, 3, 2], *expected]]
        slot = denoiser.slot(denoiser.sizes(data.latents.shape[1:], data.conditioning))
        slot.start(data.conditioning, Forecasts(Plan("F."), 0), data.timesteps)
        assert all(np.isfinite(slot.step(latent)).all() for latent in data.latents)


@pytest.mark.parametrize(
    ("name", "shapes", "sentence"),
    [
        ("qwen-image", [[1, 4, 3]], r"`img_shapes` is 1x4x3, expected 16 tokens of the latent; correct the sizes"),
        (
            "qwen-image-edit",
            [[1, 4, 4], [1, 3, 5], [1, 2, 2]],
            r"is 1x4x4 and 1x3x5 and 1x2x2, .* and 23 of the pict",
        ),
    ],
)
def test_sizes_of_pictures_that_have_other_tokens(eager, tiny, name, shapes, sentence):
    latents, timestep, conditioning = tiny(name).inputs(1)
    with pytest.raises(StepError, match=sentence):
        open_slot(eager(name), (latents, timestep, conditioning | {"img_shapes": torch.tensor([shapes])}))


@pytest.mark.parametrize("key", ["image_latents", "img_shapes"])
def test_an_edit_without_its_pictures(eager, tiny, key):
    latents, timestep, conditioning = tiny("qwen-image-edit").inputs(1)
    rest = {n: v for n, v in conditioning.items() if n != key}
    with pytest.raises(StepError, match=rf"input `{key}` is missing, expected .*; pass it with the condit"):
        open_slot(eager("qwen-image-edit"), (latents, timestep, rest))


def test_sd3_s_lines_sum_up_to_its_table(tiny):
    """Cut from the middle as the model does it, bit for bit; a table that is no such sum is refused."""
    model = copy.deepcopy(tiny("sd3").model)
    checkpoint = open_checkpoint(str(tiny("sd3").folder), FAMILIES["sd3"])
    for name in ("rows", "columns"):
        model.pos_embed.register_buffer(name, checkpoint.tensor(f"pos_embed.{name}"))
    for height, width in ((56, 56), (2, 6), (10, 14)):
        expected = model.pos_embed.cropped_pos_embed(height, width)
        with FAMILIES["sd3"].patched(model):
            assert torch.equal(model.pos_embed.cropped_pos_embed(height, width), expected)
    table = model.pos_embed.pos_embed.clone()
    table[0, 5, 3] += 1
    for part in FAMILIES["sd3"].derived(model.config).values():
        with pytest.raises(CheckpointError, match=r"`pos_embed.pos_embed` is not the sum of .*; check --model"):
            part.make(table)


def test_sd3_s_graphs_hold_the_lines_alone(drafts):
    made = drafts("sd3")
    assert {"pos_embed.rows", "pos_embed.columns"} <= made.stored.keys()
    assert "pos_embed.pos_embed" not in made.stored
    assert made.read("pos_embed.rows").shape == made.stored["pos_embed.rows"][1]


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("dev", "embedded"), ("klein-base-4b", "branches"), ("klein-4b", "none"), ("mine", "branches")],
)
def test_how_flux2_is_guided(tmp_path, name, guidance):
    """By its config, and where that is of klein, by the name: what was distilled has the config of its base."""
    folder = tmp_path / f"FLUX.2-{name}"
    folder.mkdir()
    shutil.copy(PUBLISHED / f"flux.2-{'dev' if name == 'dev' else 'klein-base-4b'}.json", folder / "config.json")
    checkpoint = open_checkpoint(str(folder), FAMILIES["flux2"], weightless=True)
    assert sampling_of(checkpoint).guidance == guidance


@pytest.mark.parametrize("family", ["flux2", "flux2-edit"])
@pytest.mark.parametrize(
    ("name", "distilled", "guidance"),
    [("mine", True, "none"), ("klein-4b", False, "branches"), ("mine", None, "branches")],
)
def test_the_index_of_a_pipeline_says_whether_klein_is_distilled(tmp_path, family, name, distilled, guidance):
    """More surely than its name: a hub's cache calls the folder by a hash."""
    folder = tmp_path / name
    (folder / "transformer").mkdir(parents=True)
    shutil.copy(PUBLISHED / "flux.2-klein-base-4b.json", folder / "transformer" / "config.json")
    (folder / "model_index.json").write_text(json.dumps({} if distilled is None else {"is_distilled": distilled}))
    checkpoint = open_checkpoint(str(folder), FAMILIES[family], weightless=True)
    assert sampling_of(checkpoint).guidance == guidance and checkpoint.family.whole.negative == ""


@given(st.integers(4, 20000), st.integers(1, 200))
def test_flux2_s_shift_is_the_pipeline_s(tokens, steps):
    assert _shift_by_steps(tokens, steps) == compute_empirical_mu(tokens, steps)


def test_places_of_flux2_s_tokens_are_the_pipeline_s(eager):
    """Of the noise, of the text, and of one picture to go by."""
    constants = eager("flux2-edit").constants
    sizes = {"batch": 2, "image_tokens": 6, "text_tokens": 5, "condition_tokens": 8}
    made = {n: value_from_fill(constants[n], sizes, (2, 3)) for n in ("img_ids", "txt_ids", "image_ids")}
    picture = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 3, 4, 2)])
    expected = {
        "img_ids": Flux2Pipeline._prepare_latent_ids(torch.zeros(2, 3, 2, 3)),
        "txt_ids": Flux2Pipeline._prepare_text_ids(torch.zeros(2, 5, 3)),
        "image_ids": picture.repeat(2, 1, 1),
    }
    for name, ids in expected.items():
        assert made[name].dtype == np.int64 and np.array_equal(made[name], ids.numpy()), name


def test_keys_and_values_of_pictures_are_made_once(drafts, tiny):
    """klein KV: a full step computes as much as without pictures, and reads keys and values of every attention."""
    model, (prepare, full, forecast) = tiny("flux2-kv").model, drafts("flux2-kv").split.graphs
    attentions = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    kept = [t for t in prepare.outputs if "condition_tokens" in t.shape]
    assert len(kept) == 2 * attentions and {t.role for t in kept} == {"constant"}
    assert {t.name for t in full.inputs if "condition_tokens" in t.shape} == {t.name for t in kept}
    assert not any("condition_tokens" in t.shape for t in forecast.inputs)
    assert full.operators()["linear"] == drafts("flux2").split.full.operators()["linear"]
    # Of the last block only keys and values are wanted; of the text nothing, whose rows were left out.
    assert prepare.operators()["scaled_dot_product_attention"] == attentions - 1
    sizes = [
        size
        for n in prepare.module.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
        for size in n.meta["val"].shape
    ]
    assert sizes and not any(isinstance(size, int) and size == 0 for size in sizes)
    with pytest.raises(
        ConfigError, match=r"`guidance_embeds` is true, expected false as of FLUX.2 klein KV, .*; use fam"
    ):
        FAMILIES["flux2-kv"].inputs({**model.config, "guidance_embeds": True})


@pytest.mark.parametrize("change", [{"axes_dims_rope": [16, 56, 56]}, {"patch_size": 2}])
def test_a_config_that_is_none_of_flux2_is_refused(change):
    config = {"axes_dims_rope": [32] * 4, "patch_size": 1, **change}
    with pytest.raises(
        ConfigError, match=r"`axes_dims_rope` and `patch_size` are .*, expected 4 numbers and 1 as of FLUX"
    ):
        FAMILIES["flux2"].inputs(config)


@pytest.mark.parametrize(
    ("family", "sibling"),
    [
        ("flux2", "flux-kontext"),
        ("flux", "flux2"),
        ("chroma", "flux2"),
        ("z-image", "chroma"),
        ("longcat-image", "ovis-image"),
        ("qwen-image-2.1", "qwen-image"),
        ("qwen-image", "qwen-image-2.1"),
    ],
)
def test_a_checkpoint_of_a_sibling_is_refused(family, sibling):
    folder = open_checkpoint(None, FAMILIES[sibling]).root
    classes = [FAMILIES[name].model_class for name in (sibling, family)]
    with pytest.raises(
        CheckpointError, match=rf"is of class {classes[0]}, expected {classes[1]} for family {family}; "
    ):
        open_checkpoint(str(folder), FAMILIES[family])


@pytest.mark.parametrize("change", [{"siglip_feat_dim": 1152}, {"all_patch_size": (4,)}])
def test_another_variant_of_z_image_is_refused(change):
    config = {"all_patch_size": (2,), "all_f_patch_size": (1,), "siglip_feat_dim": None, **change}
    with pytest.raises(
        ConfigError, match=r"`siglip_feat_dim` and `all_patch_size` are .*; pass the text-to-image model"
    ):
        FAMILIES["z-image"].inputs(config)


@pytest.mark.parametrize(("height", "width", "words"), [(4, 8, (32, 33)), (5, 3, (1, 31)), (3, 11, (34, 7))])
def test_z_image_in_one_tensor_is_z_image_in_lists(tiny, height, width, words):
    """Where picture and text need no padding, some, and nearly all; samples of other lengths beside each other."""
    family, model = FAMILIES["z-image"], copy.deepcopy(tiny("z-image").model).double()
    draw = torch.Generator().manual_seed(height)
    inputs = {
        "x": torch.randn(2, 4, 2 * height, 2 * width, generator=draw, dtype=torch.float64),
        "t": torch.tensor([0.4, 0.4]),
        "cap_feats": torch.randn(2, max(words), 24, generator=draw, dtype=torch.float64),
        "cap_mask": (torch.arange(max(words)) < torch.tensor(words)[:, None]).long(),
    }
    with torch.no_grad():
        expected = family.forward(model, inputs)
        with family.patched(model):
            seen = model(**inputs, return_dict=False)[0]
    assert_close("in one tensor", seen, expected, 64 * 2.0**-24 * expected.abs().max().item())


def test_latents_in_lists_say_what_is_wrong(eager, tiny):
    transformer, (latents, _, given) = eager("z-image").as_transformer(), tiny("z-image").inputs(1, batch=2)
    pictures, words, time = list(latents[0].unsqueeze(2)), list(given["cap_feats"]), torch.tensor([0.5, 0.5])
    assert [one.shape for one in transformer(pictures, time, words).sample] == [one.shape for one in pictures]
    for arguments, sentence in (
        ((latents[0], time, words), r"latents are Tensor, expected a list of tensors \[C, 1, H, W\]"),
        (
            ([pictures[0], pictures[1][..., :4]], time, words),
            r"latents are \[4, 1, 8, 4\], \[4, 1, 8, 8\], expected .* one size",
        ),
        (
            (pictures, time, given["cap_feats"]),
            r"`cap_feats` is no list of tensors \[T, D\], expected one for each sample",
        ),
        (
            (pictures, time, words, None),
            r"3 arguments follow the latents by place, expected at most 2 \(t, cap_feats\)",
        ),
    ):
        with pytest.raises(StepError, match=sentence):
            transformer(*arguments)


def test_a_mask_of_chroma_that_hides_some_of_the_picture_is_refused(eager, tiny):
    (latents, _, given) = tiny("chroma").inputs(1)
    transformer, text = eager("chroma").as_transformer(), given.pop("attention_mask")
    rest = {"timestep": torch.tensor([0.5]), **given}
    for mask in (text, torch.cat([text, torch.zeros(1, 16)], 1)):
        with pytest.raises(
            StepError, match=r"`attention_mask` is \[1, .*, expected a number for each of 6 tokens of text"
        ):
            transformer(latents[0], attention_mask=mask, **rest)


@pytest.mark.parametrize(
    ("folder", "distilled", "guidance"),
    [("Krea-2-Raw", False, "branches"), ("mine", True, "none"), ("Krea-2-Turbo", None, "none")],
)
def test_how_krea_2_is_guided(tmp_path, folder, distilled, guidance):
    """By its pipeline's config, or by the name where that of the transformer is all there is; and its sigmas shift."""
    inner = tmp_path / folder / ("transformer" if distilled is not None else "")
    inner.mkdir(parents=True)
    shutil.copy(PUBLISHED / "krea-2-raw.json", inner / "config.json")
    if distilled is not None:
        index = {"_class_name": "Krea2Pipeline", "is_distilled": distilled}
        (tmp_path / folder / "model_index.json").write_text(json.dumps(index))
    family = open_checkpoint(str(inner), FAMILIES["krea-2"], weightless=True).family
    assert (family.guidance, family.defaults.steps) == (guidance, 28 if guidance == "branches" else 8)
    assert family.pipeline.shift == ("tokens" if guidance == "branches" else 1.15)


def test_places_of_krea_2_that_are_not_the_pipeline_s_are_refused(eager, tiny):
    latents, _, given = tiny("krea-2").inputs(1)
    places, rest = given.pop("position_ids"), {"timestep": torch.tensor([0.5]), **given}
    for other in (places, torch.cat([torch.ones(6, 3), places])):
        with pytest.raises(StepError, match=r"`position_ids` is \[.*, expected zeros for each of 6 tokens of text and"):
            eager("krea-2").as_transformer()(latents[0], position_ids=other, **rest)


@pytest.mark.parametrize("change", [{"causal_condition": False}, {"patch_size": 2}])
def test_a_config_that_is_none_of_qwen_image_21_is_refused(change):
    config = {"causal_condition": True, "patch_size": 1, **change}
    with pytest.raises(
        ConfigError, match=r"`causal_condition` and `patch_size` are .*, expected true and 1 as of Qwen"
    ):
        FAMILIES["qwen-image-2.1"].inputs(config)


def test_noise_levels_of_a_pipeline_s_own_are_refused(tmp_path):
    """Qwen-Image 2.1 as distilled brings some."""
    (tmp_path / "transformer").mkdir()
    shutil.copy(PUBLISHED / "qwen-image-2.1.json", tmp_path / "transformer" / "config.json")
    index = {"_class_name": "QwenImage21Pipeline", "sample_sigmas": [1.0, 0.5]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"`sample_sigmas` of the pipeline has 2 noise levels, expected none; no b"):
        open_checkpoint(str(tmp_path / "transformer"), FAMILIES["qwen-image-2.1"], weightless=True)


def test_words_of_qwen_image_21_are_known_before_the_first_step(drafts):
    """Their keys and values of every layer are constants that `prepare` makes, and no step reads the words."""
    pieces = drafts("qwen-image-2.1").split
    made = {t.name for t in pieces.prepare.outputs if t.role == "constant" and "text_tokens" in t.shape}
    assert len(made) >= 2 * 2 and made <= {t.name for t in pieces.full.inputs}
    assert not any(t.name.startswith("encoder_hidden_states") for t in pieces.full.inputs if t.dtype == "float32")


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        (
            "pixart",
            {"use_additional_conditions": True},
            r"`use_additional_conditions` is True, expected false: a model",
        ),
        ("pixart", {"sample_size": 128}, r"`use_additional_conditions` is None, expected false: a model that is told"),
        (
            "sana",
            {"guidance_embeds": True},
            r"`guidance_embeds` and `timestep_scale` are True and None, expected false",
        ),
        (
            "sana",
            {"timestep_scale": 1000.0},
            r"are None and 1000\.0, .*: that is Sana-Sprint, whose 1 to 4 steps leave",
        ),
    ],
)
def test_a_sibling_of_pixart_or_sana_is_refused(family, change, sentence):
    config = {"sample_size": 64, "in_channels": 4, "patch_size": 1, "caption_channels": 4, **change}
    with pytest.raises(ConfigError, match=sentence):
        FAMILIES[family].inputs(config)


def test_a_sana_with_places_has_one_size():
    config = {"sample_size": 64, "in_channels": 4, "patch_size": 2, "caption_channels": 4, "interpolation_scale": 1.0}
    changed = FAMILIES["sana"].by_config(config)
    assert changed["latent_sizes"](config, 64, 64) == {} and "rows" not in FAMILIES["sana"].dimensions(config)
    with pytest.raises(ConfigError, match=r"latent size is 64x32, expected 64x64"):
        changed["latent_sizes"](config, 64, 32)


def test_places_of_flux3_s_tokens_are_the_pipeline_s(eager):
    constants, sizes = eager("flux3").constants, {"batch": 1, "image_tokens": 6, "text_tokens": 5}
    made = {n: value_from_fill(constants[n], sizes, (2, 3)) for n in ("img_ids", "txt_ids")}
    expected = Flux3TextRoPEInputsStep._prepare_text_ids(torch.zeros(1, 5, 3))
    assert np.array_equal(made["img_ids"], _prepare_image_ids(2, 3, 0.5).numpy())
    assert np.array_equal(made["txt_ids"], expected.numpy())


def test_places_of_longcat_image_s_tokens_are_the_pipeline_s(eager):
    constants, sizes = eager("longcat-image").constants, {"batch": 1, "image_tokens": 6, "text_tokens": 5}
    made = {n: value_from_fill(constants[n], sizes, (2, 3)) for n in ("img_ids", "txt_ids")}
    picture = prepare_pos_ids(1, "image", start=(512, 512), height=2, width=3)
    assert np.array_equal(made["img_ids"], picture.numpy())
    assert np.array_equal(made["txt_ids"], prepare_pos_ids(0, "text", num_token=5).numpy())
