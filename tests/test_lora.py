"""LoRA files as they come: no tensor of one goes unread, in any spelling and family."""

import dataclasses
import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from test_layouts import assert_fused

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.lora_names import named_in_model
from taylorseer_export.cli import main
from taylorseer_export.compile.export import describe
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES
from taylorseer_export.report.verify import checkpoint_of
from taylorseer_export.runtime.denoiser import Denoiser

RANK = 4
SPELLINGS = {"peft": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}
FLUX_QKV = [f"transformer_blocks.0.attn.to_{side}" for side in "qkv"]
FLUX_TEXT = [f"transformer_blocks.0.attn.add_{side}_proj" for side in "qkv"]
FLUX = {"double_blocks.0.img_attn.qkv": FLUX_QKV, "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"]}
HUNYUAN = {"double_blocks.0.img_attn_qkv": FLUX_QKV, "double_blocks.0.txt_attn_qkv": FLUX_TEXT}
FLUX2 = {
    "double_blocks.0.img_attn.qkv": FLUX_QKV,
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.linear_out"],
    "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
}
SAME = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0")

# Family -> module as ComfyUI and ai-toolkit name it after `diffusion_model.` -> the modules that its rows make.
COMFY = {
    "flux": FLUX,
    "flux-kontext": FLUX,
    "flux2": FLUX2,
    "flux2-edit": FLUX2,
    "flux2-kv": FLUX2,
    "chroma": FLUX,
    "krea-2": {
        "blocks.0.attn.wq": ["transformer_blocks.0.attn.to_q"],
        "txtfusion.refiner_blocks.0.mlp.down": ["text_fusion.refiner_blocks.0.ff.down"],
    },
    "z-image": {name: [name] for name in ("layers.0.attention.to_q", "context_refiner.0.feed_forward.w2")},
    "framepack": HUNYUAN,
    "hidream": {"caption_projection.0.linear": ["caption_projection.0.linear"]},
    "hunyuan-video": HUNYUAN | {"double_blocks.0.img_attn_proj": ["transformer_blocks.0.attn.to_out.0"]},
    "ltx-2": {
        "transformer_blocks.0.attn1.to_q": ["transformer_blocks.0.attn1.to_q"],
        "audio_patchify_proj": ["audio_proj_in"],
    },
    "qwen-image": {name: [name] for name in SAME},
    "qwen-image-edit": {name: [name] for name in SAME},
    "sd3": {name: [name] for name in SAME},
    "wan": {
        "blocks.0.self_attn.q": ["blocks.0.attn1.to_q"],
        "blocks.1.cross_attn.o": ["blocks.1.attn2.to_out.0"],
        "blocks.0.ffn.0": ["blocks.0.ffn.net.0.proj"],
    },
}
OWN_KANDINSKY = "visual_transformer_blocks.0.self_attention.to_query"
COMFY["cogvideox"] = {"transformer_blocks.0.attn1.to_q": ["transformer_blocks.0.attn1.to_q"]}
COMFY["kandinsky-5"] = {OWN_KANDINSKY: [OWN_KANDINSKY]}
COMFY["ltx-2-image"] = COMFY["ltx-2"]
COMFY |= dict.fromkeys(("wan-5b-image", "wan-vace", "wan-animate"), COMFY["wan"])
# Family -> a module by its own name, of every family.
OWN = {
    "dit": "transformer_blocks.0.attn1.to_q",
    "framepack": "transformer_blocks.0.attn.to_q",
    "wan": "blocks.0.attn1.to_q",
    "wan-5b-image": "blocks.0.attn1.to_q",
    "wan-vace": "vace_blocks.0.attn1.to_q",
    "wan-animate": "face_adapter.0.to_q",
    "cogvideox": "transformer_blocks.0.attn1.to_q",
    "kandinsky-5": OWN_KANDINSKY,
    "flux3": "mode_blocks.image.0.attn.to_q",
    "pixart": "transformer_blocks.0.attn1.to_q",
    "sana": "transformer_blocks.0.attn1.to_q",
    "ltx-2": "transformer_blocks.0.attn1.to_q",
    "ltx-2-image": "transformer_blocks.0.attn1.to_q",
    "hidream": "caption_projection.0.linear",
    "z-image": "layers.0.attention.to_q",
}
OWN = {family: OWN.get(family, "transformer_blocks.0.attn.to_q") for family in FAMILIES}
KOHYA = {  # as trainers name them with underscores
    "flux": ("lora_unet_double_blocks_0_img_attn_qkv", FLUX_QKV),
    "flux-kontext": ("lora_unet_double_blocks_0_txt_attn_qkv", FLUX_TEXT),
    "qwen-image": ("lora_unet_transformer_blocks_0_attn_to_out_0", ["transformer_blocks.0.attn.to_out.0"]),
}


@pytest.fixture
def opened(tmp_path):
    """(family, tensors) -> the embedded model with that LoRA."""

    def open_(family, tensors, scale=1.0, metadata=None, **options):
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, tmp_path / "lora.safetensors", metadata)
        return open_checkpoint(None, FAMILIES[family], loras=[f"{tmp_path}/lora.safetensors:{scale}"], **options)

    return open_


def weights(family):
    """The embedded model's tensors, in float64."""
    checkpoint = open_checkpoint(None, FAMILIES[family])
    return {name: checkpoint.tensor(name).double() for name in checkpoint.shapes}


def made(family, modules, spelling="peft", prefix="diffusion_model.", alpha=None, seed=0):
    """(tensors of a file, {weight: (B, A) in float64}) for modules whose rows make those of the model."""
    base, rng = weights(family), torch.Generator().manual_seed(seed)
    file, expected = {}, {}
    down, up = SPELLINGS[spelling]
    for module, targets in modules.items():
        into = base[f"{targets[0]}.weight"].shape[1]
        sizes = [base[f"{target}.weight"].shape[0] for target in targets]
        a, b = torch.randn(RANK, into, generator=rng), torch.randn(sum(sizes), RANK, generator=rng)
        file |= {f"{prefix}{module}.{down}.weight": a, f"{prefix}{module}.{up}.weight": b}
        if alpha is not None:
            file[f"{prefix}{module}.alpha"] = torch.tensor(float(alpha))
        for target, rows in zip(targets, b.split(sizes), strict=True):
            expected[f"{target}.weight"] = (rows.double(), a.double())
    return file, expected


def test_every_family_with_a_loader_is_here():
    assert set(COMFY) >= {name for name, family in FAMILIES.items() if family.lora_loader}


@pytest.mark.parametrize("family", COMFY)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 1, 8])
def test_names_as_comfyui_writes_them(opened, family, spelling, alpha):
    """`diffusion_model.<name>` of the authors or of diffusers, with and without alpha."""
    file, expected = made(family, COMFY[family], spelling, alpha=alpha)
    base = weights(family)
    for name, (up, down) in expected.items():
        base[name] += 0.5 * ((alpha or RANK) / RANK) * up @ down
    assert_fused(opened(family, file, 0.5), base)


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_s_own_names(opened, family, prefix):
    file, expected = made(family, {OWN[family]: [OWN[family]]}, prefix=prefix)
    base = weights(family)
    for name, (up, down) in expected.items():
        base[name] += up @ down
    assert_fused(opened(family, file), base)


@pytest.mark.parametrize("family", KOHYA)
def test_names_as_kohya_writes_them(opened, family):
    module, targets = KOHYA[family]
    for alpha in (None, 2):
        file, expected = made(family, {module: targets}, "kohya", prefix="", alpha=alpha)
        base = weights(family)
        for name, (up, down) in expected.items():
            base[name] += ((alpha or RANK) / RANK) * up @ down
        assert_fused(opened(family, file), base)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_s_own_names_with_underscores_for_dots(opened, family, prefix):
    """As kohya's trainers and musubi's write them for models that nobody else has names for."""
    name = OWN[family]
    file, expected = made(family, {name: [name]}, "kohya", "", alpha=2)
    base = weights(family)
    for weight, (up, down) in expected.items():
        base[weight] += 2 / RANK * up @ down
    joined = {f"{prefix}{n.removesuffix(end).replace('.', '_')}{end}": value for n, value in file.items()
              for end in (".lora_down.weight", ".lora_up.weight", ".alpha") if n.endswith(end)}  # fmt: skip
    assert_fused(opened(family, joined), base)


def test_a_name_that_two_modules_would_have_is_nobody_s():
    shapes = ("blocks.0.to_q.weight", "blocks.0_to.q.weight", "blocks.1.to_q.weight")
    assert named_in_model("lora_unet_blocks_0_to_q", shapes) == "lora_unet_blocks_0_to_q"
    assert named_in_model("lora_unet_blocks_1_to_q", shapes) == "blocks.1.to_q"


# Numbers, and what says how strong they are


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_that_are_none_are_refused(opened, family):
    """In any row of any part: a picture of them would be black."""
    name = OWN[family]
    file, _ = made(family, {name: [name]})
    magnitude = torch.ones(len(file[f"diffusion_model.{name}.lora_B.weight"]))
    file[f"diffusion_model.{name}.dora_scale"] = magnitude
    for part in file:
        for bad in (float("nan"), float("inf")):
            broken = {n: value.clone() for n, value in file.items()}
            broken[part].view(-1)[-1] = bad
            with pytest.raises(
                CheckpointError, match=r"has 1 tensors with values that are NaN or infinite \(diffusion_"
            ):
                opened(family, broken)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shapes", [((RANK,), (RANK,)), ((), ()), ((0, 8), (8, 0))])
def test_pairs_that_are_no_matrices_are_refused(opened, family, shapes):
    for module, (down, up) in ((f"transformer.{OWN[family]}", SPELLINGS["peft"]), ("lora_unet_x", SPELLINGS["kohya"])):
        file = {f"{module}.{down}.weight": torch.ones(shapes[0]), f"{module}.{up}.weight": torch.ones(shapes[1])}
        with pytest.raises(CheckpointError, match=r"has 2 tensors that are no low-rank pair of the transformer"):
            opened(family, file)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_alpha": "x"}, r"lora_adapter_metadata: an alpha is 'x'\), expected peft's settings; download it again"),
        ({"lora_alpha": float("nan")}, "an alpha is 'nan'"),
        ({"lora_alpha": None}, "an alpha is 'None'"),
        ({"lora_alpha": 8, "alpha_pattern": [1]}, "alpha_pattern is a list"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": "4"}}, "an alpha is '4'"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_(q": 4}}, r"alpha_pattern has 'to_\(q', which is no pattern"),
        ([["lora_alpha", 8]], "it holds a list"),
    ],
)
def test_settings_that_say_no_strength_are_refused(opened, settings, expected):
    file, _ = made("dit", {OWN["dit"]: [OWN["dit"]]})
    named = {f"transformer.{k}": v for k, v in settings.items()} if isinstance(settings, dict) else settings
    with pytest.raises(CheckpointError, match=expected):
        opened("dit", file, metadata={"lora_adapter_metadata": json.dumps(named)})


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [("attn1.to_q", 2), ("to_q", 2), (r"transformer_blocks\.\d+\.attn1\.to_[qk]", 2), ("to_k", 8), ("n1.to_q", 8)],
)
def test_alphas_of_modules_are_patterns_as_peft_reads_them(opened, pattern, alpha):
    from peft.utils.other import get_pattern_key

    settings = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 2}}
    known = {pattern: 2}
    assert known.get(get_pattern_key(known, OWN["dit"]), 8) == alpha
    file, expected = made("dit", {OWN["dit"]: [OWN["dit"]]})
    base = weights("dit")
    for weight, (up, down) in expected.items():
        base[weight] += alpha / RANK * up @ down
    assert_fused(opened("dit", file, metadata={"lora_adapter_metadata": json.dumps(settings)}), base)


def test_an_alpha_that_diffusers_drops(opened):
    """Its converter of kohya's names takes the pair of the last layer and not its alpha."""
    file, expected = made("flux", {"lora_unet_final_layer_linear": ["proj_out"]}, "kohya", prefix="", alpha=1)
    base = weights("flux")
    ((name, (up, down)),) = expected.items()
    base[name] += up @ down / RANK
    assert_fused(opened("flux", file), base)


def test_rows_that_change_places(opened):
    """The halves of the last modulation: diffusers' converter would swap those of A, in its rank, as well."""
    module = {"final_layer.adaLN_modulation.1": ["norm_out.linear"], **HUNYUAN}
    file, expected = made("hunyuan-video", module)
    base = weights("hunyuan-video")
    for name, (up, down) in expected.items():
        shift, scale = up.chunk(2)
        base[name] += (torch.cat([scale, shift]) if name.startswith("norm_out") else up) @ down
    assert_fused(opened("hunyuan-video", file), base)


# DoRA


def dora(base, expected, magnitudes, factor):
    """m (W + s BA) / |W + s BA|, row by row."""
    found = dict(base)
    for name, (up, down) in expected.items():
        total = base[name] + factor * up @ down
        found[name] = torch.stack([m * row / row.norm() for m, row in zip(magnitudes[name], total, strict=True)])
    return found


@pytest.mark.parametrize("family", sorted({*COMFY, *OWN}))
@pytest.mark.parametrize("spelling", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_magnitudes(opened, family, spelling, scale):
    """Also of rows that go to several modules; the scale stands inside the norm, as in peft."""
    modules = COMFY.get(family) or {OWN[family]: [OWN[family]]}
    file, expected = made(family, modules, "kohya" if spelling == "dora_scale" else "peft", alpha=2)
    rng, magnitudes = torch.Generator().manual_seed(1), {}
    for module, targets in modules.items():
        sizes = [len(expected[f"{target}.weight"][0]) for target in targets]
        m = torch.rand(sum(sizes), generator=rng) + 0.5
        file[f"diffusion_model.{module}.{spelling}"] = m[:, None] if spelling == "dora_scale" else m
        for target, part in zip(targets, m.split(sizes), strict=True):
            magnitudes[f"{target}.weight"] = part.double()
    assert_fused(opened(family, file, scale), dora(weights(family), expected, magnitudes, scale * 2 / RANK))


def test_magnitudes_under_kohya_s_names(opened):
    for family, (module, targets) in KOHYA.items():
        file, expected = made(family, {module: targets}, "kohya", prefix="", alpha=RANK)
        m = torch.rand(sum(len(up) for up, _ in expected.values()), 1, generator=torch.Generator().manual_seed(1)) + 0.5
        file[f"{module}.dora_scale"] = m
        parts = m.flatten().double().split([len(up) for up, _ in expected.values()])
        wanted = dora(weights(family), expected, dict(zip(expected, parts, strict=True)), 1.0)
        assert_fused(opened(family, file), wanted)


def test_magnitudes_of_columns(opened):
    """[1, in], as LyCORIS may write them; of rows that go to several modules their norm is that of none."""
    name = OWN["sd3"]
    file, expected = made("sd3", {name: [name]})
    base = weights("sd3")
    ((weight, (up, down)),) = expected.items()
    m = torch.rand(1, base[weight].shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    total = base[weight] + up @ down
    base[weight] = m.double() * total / total.norm(dim=0, keepdim=True)
    assert_fused(opened("sd3", file | {f"diffusion_model.{name}.dora_scale": m}), base)
    file, _ = made("flux", FLUX)
    columns = file["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"].shape[1]
    wrong = {"diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(1, columns)}
    with pytest.raises(CheckpointError, match=r"`transformer_blocks.0.attn.to_q.weight` has rows \d+, its magnitude"):
        opened("flux", file | wrong)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_magnitudes_as_peft_merges_them(tmp_path, scale):
    """peft on diffusers' own model, of linear modules and of a convolution."""
    from peft import LoraConfig, get_peft_model_state_dict

    base = open_checkpoint(None, FAMILIES["sd3"])
    model = diffusers.SD3Transformer2DModel.from_pretrained(base.folder)
    targets = ["attn.to_q", "pos_embed.proj"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=2, use_dora=True, init_lora_weights=False, target_modules=targets))
    state = get_peft_model_state_dict(model)
    for name in state:
        if "magnitude" in name:
            state[name] = state[name] * (1 + torch.rand_like(state[name]))
    own = {"lora_A.": "lora_A.default.", "lora_B.": "lora_B.default.", "vector": "vector.default.weight"}
    for name, value in state.items():
        for short, long in own.items():
            name = name.replace(short, long)
        model.get_parameter(name).data.copy_(value)
    settings = {"lora_alpha": 2, "use_dora": True}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    model.fuse_lora(lora_scale=scale)
    merged = {name.replace(".base_layer", ""): value.double() for name, value in model.state_dict().items()}
    found = open_checkpoint(None, FAMILIES["sd3"], loras=[f"{tmp_path}/lora.safetensors:{scale}"])
    changed = [name for name in base.shapes if not torch.equal(found.tensor(name), base.tensor(name))]
    assert len([name for name in state if "magnitude" in name]) == len(changed) > 1
    assert_fused(found, {name: merged[name] for name in base.shapes})


def test_the_comparison_of_magnitudes_can_fail(opened):
    name = OWN["dit"]
    file, expected = made("dit", {name: [name]})
    m = torch.ones(len(expected[f"{name}.weight"][0]))
    wanted = dora(weights("dit"), expected, {f"{name}.weight": m.double()}, 1.0)
    with pytest.raises(AssertionError):
        assert_fused(opened("dit", file), wanted)
    with pytest.raises(AssertionError):
        assert_fused(opened("dit", file | {f"diffusion_model.{name}.dora_scale": m * 1.001}), wanted)


def test_a_dora_without_magnitudes(opened):
    file, _ = made("dit", {OWN["dit"]: [OWN["dit"]]})
    settings = {"lora_adapter_metadata": json.dumps({"use_dora": True})}
    with pytest.raises(CheckpointError, match=r"says it is a DoRA and has no magnitudes, expected them; download it"):
        opened("dit", file, metadata=settings)


# Differences


def test_differences_are_added(opened):
    """Wan's, as extracted from full models: of biases and norms, beside pairs and alone; alpha is not theirs."""
    file, expected = made("wan", COMFY["wan"], "kohya", alpha=1)
    base, rng = weights("wan"), torch.Generator().manual_seed(3)
    for name, (up, down) in expected.items():
        base[name] += 0.5 * up @ down / RANK
    alone = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.1.self_attn.k.diff_b": "blocks.1.attn1.to_k.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.ffn.2.diff": "blocks.1.ffn.net.2.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff_b": "proj_out.bias",
    }
    for given, name in alone.items():
        value = torch.randn(base[name].shape, generator=rng)
        file[f"diffusion_model.{given}"] = value
        base[name] += 0.5 * value.double()
    assert_fused(opened("wan", file, 0.5), base)


@pytest.mark.parametrize("family", ["flux", "hunyuan-video"])
def test_differences_of_biases_follow_the_rows_of_their_pair(opened, family):
    modules = COMFY[family]
    file, expected = made(family, modules, alpha=8)
    base = weights(family)
    for name, (up, down) in expected.items():
        base[name] += 8 / RANK * up @ down
    (module, targets), *_ = modules.items()
    for part, factor in (("diff_b", 1.0), ("lora_B.bias", 8 / RANK)):
        value = torch.randn(sum(len(base[f"{t}.bias"]) for t in targets), generator=torch.Generator().manual_seed(4))
        wanted = dict(base)
        for target, rows in zip(targets, value.chunk(len(targets)), strict=True):
            wanted[f"{target}.bias"] = base[f"{target}.bias"] + factor * rows.double()
        assert_fused(opened(family, file | {f"diffusion_model.{module}.{part}": value}), wanted)


def test_differences_that_go_nowhere(opened):
    file, _ = made("flux", FLUX)
    for stranger in ("diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff", "diffusion_model.nothing.diff_b"):
        with pytest.raises(CheckpointError, match=rf"has a difference that is of no tensor .*`{stranger}`.*remove it"):
            opened("flux", file | {stranger: torch.ones(8)})


# What is refused by name

UNREAD = (
    "lokr_w1",
    "lokr_w2_a",
    "lokr_t2",
    "hada_w1_a",
    "hada_t1",
    "lora_mid.weight",
    "reshape_weight",
    "set_weight",
    "w_norm",
    "b_norm",
    "diff_m",
    "oft_blocks",
    "a1.weight",
    "lora_A.bias",
    "dora_scale_2",
    "bias",
    "weight",
    "lora_embedding_A",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_not_applied_is_refused_by_name(opened, family, alone):
    """Beside a pair of its module, and on a module of its own."""
    name = OWN[family]
    file, _ = made(family, {name: [name]})
    for unread in UNREAD:
        stranger = f"diffusion_model.{'other.' * alone}{name}.{unread}"
        with pytest.raises(CheckpointError) as error:
            opened(family, file | {stranger: torch.ones(2, 2)})
        assert "has 1 tensors that are no low-rank pair of the transformer" in str(error.value)
        assert stranger in str(error.value)


@pytest.mark.parametrize("family", COMFY)
def test_a_module_that_the_loader_leaves_unread(opened, family):
    """Whatever diffusers does with it: drop it in silence, pass it on, or stop."""
    file, _ = made(family, COMFY[family])
    for stranger in ("diffusion_model.other.module", "lora_unet_other_module", "transformer.other.module"):
        more = {f"{stranger}.lora_A.weight": torch.ones(2, 8), f"{stranger}.lora_B.weight": torch.ones(8, 2)}
        with pytest.raises(CheckpointError, match=r"that do not fit the checkpoint|is not converted by"):
            opened(family, file | more)


def test_a_quantised_lora(opened):
    name = OWN["flux"]
    file, _ = made("flux", {name: [name]})
    with pytest.raises(CheckpointError, match=r"is in ComfyUI's scaled fp8 \(1 tensors like .*scale_weight"):
        opened("flux", file | {f"{name}.lora_A.scale_weight": torch.tensor(1.0)})
    ints = {n: value.to(torch.int8) if n.endswith("lora_B.weight") else value for n, value in file.items()}
    with pytest.raises(CheckpointError, match=r"has 1 tensors that are no low-rank pair .*lora_B.weight"):
        opened("flux", ints)


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_an_alpha_that_is_no_number(opened, value):
    name = OWN["dit"]
    file, _ = made("dit", {name: [name]}, prefix="")
    with pytest.raises(CheckpointError, match=rf"has 1 tensors that are no low-rank pair .*\({name}.alpha\)"):
        opened("dit", file | {f"{name}.alpha": value})


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "7", "null", "{"])
def test_settings_that_are_no_map(opened, text):
    file, _ = made("dit", {OWN["dit"]: [OWN["dit"]]})
    with pytest.raises(CheckpointError, match=r"is damaged \(lora_adapter_metadata: .*download it again"):
        opened("dit", file, metadata={"lora_adapter_metadata": text})


# Text encoders

ENCODERS = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
    "text_encoders.clip_l.transformer.text_model.x.dora_scale",
    "text_encoders.t5xxl.transformer.x.diff_b",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_of_text_encoders(opened, family):
    """Refused with the way to leave them out; left out, what remains is as without them."""
    name = OWN[family]
    file, _ = made(family, {name: [name]})
    more = file | {encoder: torch.ones(()) if encoder.endswith("alpha") else torch.ones(2, 2) for encoder in ENCODERS}
    with pytest.raises(CheckpointError, match=r"has 6 tensors that are no .*--lora-skip text-encoder leaves those"):
        opened(family, more)
    found, plain = opened(family, more, lora_skip=("text-encoder",)), opened(family, file)
    assert found.loras[0].skipped == {"text-encoder": 6} and plain.loras[0].skipped == {}
    assert all(torch.equal(found.tensor(n), plain.tensor(n)) for n in found.shapes)


def test_a_file_of_text_encoders_alone(opened):
    file = {f"text_encoder.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(CheckpointError, match=r"has 0 tensors that are no low-rank pair"):
        opened("flux", file, lora_skip=("text-encoder",))


@pytest.mark.slow
def test_the_command_says_what_is_left_out_and_the_manifest_repeats_it(tmp_path, capsys, drafts):
    name = OWN["dit"]
    file, _ = made("dit", {name: [name]})
    path = tmp_path / "lora.safetensors"
    save_file(file | {f"text_encoder.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, path)
    given = ["dit", "--lora", str(path), "--dry-run"]
    assert main(given) == 2 and "--lora-skip text-encoder" in capsys.readouterr().err
    assert main([*given, "--lora-skip", "text-encoder"]) == 0
    assert f"left out: 2 tensors of text-encoder in {path}, by --lora-skip text-encoder" in capsys.readouterr().out
    assert main(["dit", "--lora-skip", "text-encoder", "--dry-run"]) == 2
    assert "--lora-skip is given without --lora" in capsys.readouterr().err

    checkpoint = open_checkpoint(None, FAMILIES["dit"], loras=[str(path)], lora_skip=("text-encoder",))
    draft = dataclasses.replace(drafts("dit"), checkpoint=checkpoint)
    manifest = describe(draft, "added", checkpoint.sha256())
    assert manifest.model.lora_skip == ("text-encoder",)
    assert f" --lora {path} --lora-skip text-encoder " in manifest.command()
    again = checkpoint_of(Denoiser(manifest, None))
    assert torch.equal(again.tensor(f"{name}.weight"), checkpoint.tensor(f"{name}.weight"))
