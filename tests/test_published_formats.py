"""Checkpoints in the quantised formats that are published: dequantised as those who publish them do, bit for bit."""

import copy
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from checkpoints import WEIGHTS, edit_json
from harness import allowed, eager_denoiser, run
from published_formats import FORMATS, comfy_fp8, hint, quantised, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layouts import WAN_NAMES, flux_layout
from test_quantised import flux2_layout, one, packed, write
from tiny_bundles import options_of
from tiny_models import flux_inputs, tiny_flux, tiny_qwen_image, tiny_wan

from taylorseer_export import load
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.quantised import plain_order
from taylorseer_export.cli import main
from taylorseer_export.compile import export
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report import verify
from taylorseer_export.runtime.trajectory import random_trajectory


@pytest.fixture(scope="module")
def models():
    """Family -> a tiny model; with as many rows as a tile of scales has, and fewer."""
    return {
        "flux": tiny_flux(double=1, single=1, heads=4),
        "wan": tiny_wan(layers=1, head_dim=16, text_dim=32),
        "qwen-image": tiny_qwen_image(layers=1),
    }


@pytest.fixture(scope="module")
def drafts_of(tmp_path_factory):
    """A model that is traced and split, whatever its weights; once for each family and width."""
    made = {}

    def find(family, model):
        key = family, tuple(sorted((n, tuple(value.shape)) for n, value in model.state_dict().items()))
        if key not in made:
            model.save_pretrained(folder := tmp_path_factory.mktemp(family))
            options = options_of("residual", order=1, latent_size=(2, 4, 4) if family == "wan" else (8, 8))
            checkpoint = open_checkpoint(str(folder), FAMILIES[family])
            made[key] = export.draft(export.trace_model(checkpoint, options), options)
        return made[key]

    return find


def assert_computes_with(draft, checkpoint, model, expected):
    """The graphs over a checkpoint are the untouched model that holds what it stands for, and not the one it is of."""
    denoiser = eager_denoiser(replace(draft, checkpoint=checkpoint))
    data, forecasts = random_trajectory(denoiser, 3), Forecasts(Plan.parse("FF."), 1)
    exact, other = copy.deepcopy(model), copy.deepcopy(model)
    exact.load_state_dict(expected)
    assert verify.compare(exact.double(), denoiser, data, forecasts).ratio < 1
    assert verify.compare(other.double(), denoiser, data, forecasts).ratio > 1


def folder_of(path, model, format):
    """A diffusers folder of a model in a format; what it stands for, and how many of its tensors are quantised."""
    model.save_pretrained(path)
    tensors, metadata, expected, count = quantised(format, model.state_dict())
    save(path / WEIGHTS, tensors, metadata)
    edit_json(path / "config.json", lambda config: config.update(format.config))
    return expected, count


def assert_stands_for(checkpoint, expected, kept):
    """Bit for bit, as it streams to a bundle and as it can be kept; in the precision of the export too."""
    checkpoint.skeleton(torch.float32)
    assert checkpoint.shapes.keys() == expected.keys()
    kept_ones = 0
    for name, value in expected.items():
        seen, whole = checkpoint.tensor(name), checkpoint.quantised(name)
        assert torch.equal(seen.float(), value), name
        if whole is not None:
            assert whole.shape == tuple(value.shape) and whole.scale.ndim in (0, 1, 2)
            assert torch.equal(whole.dequantised(torch.bfloat16), value.to(torch.bfloat16)), name
            kept_ones += 1
    assert kept_ones == kept


@pytest.mark.parametrize("name", FORMATS)
def test_folders(models, drafts_of, tmp_path, name):
    """A tiny FLUX, Wan and Qwen-Image in every format; a replay equals the model that holds these weights."""
    for family, model in models.items():
        expected, count = folder_of(tmp_path / family, model, FORMATS[name])
        assert count > 5
        checkpoint = open_checkpoint(str(tmp_path / family), FAMILIES[family])
        assert_stands_for(checkpoint, expected, count * FORMATS[name].kept)
        how = "tensors, cast to bf16" if name == "cast" else "tensors, dequantised to bf16"
        said = f"weights: {FORMATS[name].said}, {count} of {len(expected)} {how}"
        assert checkpoint.said_of_formats("bf16") == said
        assert_computes_with(drafts_of(family, model), checkpoint, model, expected)


def random_state(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def wan_name(name):
    """As Wan's authors publish a tensor of diffusers."""
    name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
    for ours, theirs in WAN_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("name", ["comfy fp8", "comfy fp8 of before", "comfy nvfp4", "bfl fp8r", "bfl nvfp4"])
def test_files_in_the_authors_layouts(models, tmp_path, name):
    """FLUX.2, whose fused weights are cut, Wan under other names, Qwen-Image under a prefix: with their scales."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    states = {
        "flux2": random_state(flux2_layout()),
        "wan": {wan_name(n): value for n, value in models["wan"].state_dict().items()},
        "qwen-image": {f"model.diffusion_model.{n}": v for n, v in models["qwen-image"].state_dict().items()},
    }
    configs = {family: dict(models[family].config) for family in ("wan", "qwen-image")}
    configs["flux2"] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    configs["flux2"] |= {"in_channels": 128, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 4, 4]}
    for family, state in states.items():
        path, config = tmp_path / f"{family}.safetensors", tmp_path / f"{family}.json"
        config.write_text(json.dumps({key: value for key, value in configs[family].items() if key[0] != "_"}))
        tensors, metadata, expected, count = quantised(FORMATS[name], state)
        prefix = "model.diffusion_model." if family == "qwen-image" else ""
        save(path, {f"{prefix * (n == 'scaled_fp8')}{n}": value for n, value in tensors.items()}, metadata)
        convert = SINGLE_FILE_LOADABLE_CLASSES[FAMILIES[family].model_class]["checkpoint_mapping_fn"]
        checkpoint = open_checkpoint(str(path), FAMILIES[family], config=str(config))
        bare = {n.removeprefix(prefix): value for n, value in expected.items()}
        converted = convert(bare, config=configs[family])
        fused = sum(n.endswith((".qkv.weight",)) for n in state)
        assert_stands_for(checkpoint, converted, count + 2 * fused)
        assert f"{FORMATS[name].said}, {count} of {len(state)} tensors" in checkpoint.said_of_formats("bf16")


def test_flux_as_comfyui_publishes_it(tmp_path):
    """Of its real width: one fused weight has numbers, the rest of the file is holes."""
    path, name = tmp_path / "flux.safetensors", "double_blocks.0.img_attn.qkv"
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = {n: ("BF16", shape) for n, shape in flux_layout().items()}
    write(path, packed(plain, "F8_E4M3", scale_weight=("F32", one)) | {"scaled_fp8": ("F8_E4M3", (0,))})
    weight = torch.randn(plain[f"{name}.weight"][1], generator=torch.Generator().manual_seed(0))
    values, scale, expected = comfy_fp8(weight)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for part, value in (("weight", values), ("scale_weight", scale)):
            file.seek(8 + size + header[f"{name}.{part}"]["data_offsets"][0])
            file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    checkpoint = open_checkpoint(str(path), FAMILIES["flux"], config=str(tmp_path))
    checkpoint.skeleton(torch.bfloat16)
    for part, value in zip(("to_q", "to_k", "to_v"), expected.chunk(3), strict=True):
        place = f"transformer_blocks.0.attn.{part}.weight"
        assert torch.equal(checkpoint.tensor(place), value)
        kept = checkpoint.quantised(place)
        assert kept.scale == scale and torch.equal(kept.dequantised(), value)


def test_tiles_of_scales():
    """For any number of rows and blocks, against the library's own order."""
    from comfy_kitchen.float_utils import to_blocked

    for rows, blocks in ((1, 1), (128, 4), (130, 9), (257, 4)):
        plain = torch.arange(rows * blocks).reshape(rows, blocks)
        assert torch.equal(plain_order(to_blocked(plain, flatten=False), rows, blocks), plain)


def test_an_export(models, tmp_path, capsys):
    """Said on its first line; replays as the eager model that holds the dequantised weights, with a LoRA on top."""
    model, name = models["flux"], "transformer_blocks.0.attn.to_q"
    expected, count = folder_of(tmp_path / "flux", model, FORMATS["comfy fp8"])
    lora = {f"{name}.lora_A.weight": torch.randn(2, 64) / 8, f"{name}.lora_B.weight": torch.randn(64, 2) / 8}
    save_file(lora, tmp_path / "lora.safetensors")
    given = ["--model", tmp_path / "flux", "--lora", tmp_path / "lora.safetensors", "--latent-size", "8x8"]
    assert main(["flux", *map(str, [*given, "--out", tmp_path / "engines"])]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"weights: ComfyUI's scaled fp8, {count} of {len(expected)} tensors, dequantised to fp32"
    expected[f"{name}.weight"] += lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    eager = tiny_flux(double=1, single=1, heads=4)
    eager.load_state_dict(expected)
    inputs = flux_inputs(eager, 6)
    latents, timestep, conditioning = inputs
    denoiser = load(next((tmp_path / "engines").iterdir()))
    for plan in ("FFFFFF", "FFF..F"):
        times = oracle.seen_by(timestep, torch.float32)
        reference = oracle.replay(eager.double(), latents, times, conditioning, plan, 1)
        oracle.assert_close(plan, run(denoiser, inputs, plan, 1), reference, allowed(eager, reference, plan, 1))
    checkpoint = open_checkpoint(str(tmp_path / "flux"), FAMILIES["flux"], loras=[str(tmp_path / "lora.safetensors")])
    assert checkpoint.quantised(f"{name}.weight") is None  # what a LoRA changes cannot be kept


# What is refused


MODULE = "single_transformer_blocks.0.proj_mlp"  # [256, 64]
NAN = torch.tensor(float("nan"))
ZEROS = torch.zeros(256, 64)
FP8 = torch.float8_e4m3fn
# (format, what the file has otherwise, what is said of it, after the module)
WRONG = [
    ("comfy fp8", {"weight": None}, r"comfy_quant` of .* is of a weight `.*weight` that is missing, expected both"),
    ("comfy fp8", {"weight_scale": None}, r"weight` of .* is F8_E4M3 and has no `.*weight_scale`, expected it in fp8"),
    ("comfy fp8", {"weight_scale": ZEROS[:, 0]}, r"weight_scale` of .* is F32 \[256\], expected F32 \[\], as a scale"),
    ("comfy fp8", {"weight_scale": NAN}, r"weight_scale` of .* has 1 of 1 values that are NaN, infinite or negative"),
    ("comfy fp8", {"weight_scale": torch.tensor(-1.0)}, r"weight_scale` of .* has 1 of 1 values that are NaN"),
    ("comfy fp8", {"weight_scale": torch.tensor(1)}, r"weight_scale` of .* is I64 \[\], expected F32 \[\]"),
    ("comfy fp8", {"scale_weight": torch.ones(())}, r"(weight_scale|scale_weight)` and `.*`, expected one of them"),
    ("comfy fp8", {"input_scale": ZEROS[0]}, r"input_scale` of .* is F32 \[64\], expected F32 \[\]"),
    ("comfy fp8", {"weight": ZEROS}, r"weight` of .* is F32, expected F8_E4M3 as `.*` says"),
    (
        "comfy fp8",
        {"comfy_quant": hint(format="int4")},
        r"comfy_quant` of .* says that `.*` is in format int4, expected",
    ),
    ("comfy fp8", {"comfy_quant": hint(format="nvfp4")}, r"weight` of .* is F8_E4M3, expected U8 as `.*` says"),
    ("comfy fp8", {"comfy_quant": hint(format="float8_e4m3fn", codebook=3)}, r"comfy_quant` of .* says codebook 3 of"),
    (
        "comfy fp8",
        {"comfy_quant": ZEROS[0].byte()},
        r"comfy_quant` of .* is not readable JSON \(.*\), expected the form",
    ),
    (
        "comfy fp8",
        {"weight_scale_2": torch.ones(())},
        r"weight_scale_2` of .* is beside a weight in F8_E4M3, expected nv",
    ),
    (
        "comfy int8",
        {"weight_scale_2": torch.ones(())},
        r"weight_scale_2` of .* is beside a weight in I8, expected nvfp4",
    ),
    ("comfy fp8", {"weight": torch.zeros(()).to(FP8)}, r"weight` is \[\], expected \[256, 64\]"),
    (
        "comfy fp8 e5m2",
        {"comfy_quant": hint(format="float8_e4m3fn")},
        r" of .* is float8_e4m3fn by one hint and float8_e5",
    ),
    ("comfy fp8 of before", {"scale_weight": None, "scale_input": None}, r"weight` of .* without a scale, expected `"),
    (
        "comfy nvfp4",
        {"weight_scale_2": None},
        r"weight` of .* is U8 and has no `.*weight_scale_2`, expected it in nvfp4",
    ),
    (
        "comfy nvfp4",
        {"weight_scale": ZEROS[:, :3].to(FP8)},
        r"weight_scale` of .* \[256, 3\], expected F8_E4M3 \[256, 4",
    ),
    (
        "comfy rotated int8",
        {"comfy_quant": hint(format="int8_tensorwise", convrot=True)},
        r"weight` .* groups of 256 as",
    ),
    ("bfl nvfp4", {"input_scale": None}, r"weight` of .* is U8 and has no `.*input_scale`, expected it in nvfp4"),
    (
        "bfl nvfp4",
        {"weight_scale": (ZEROS[:, :4] * NAN).to(FP8)},
        r"weight_scale` of .* has 1024 of 1024 values that ar",
    ),
    ("bfl fp8r", {"weight_scale": ZEROS[0]}, r"weight_scale` of .* is F32 \[64\], expected F32 \[\] or \[256\] or"),
    ("bfl fp8r", {"weight_scale": None}, r"weight` of .* is F8_E4M3 without a scale, expected `.*weight_scale` or"),
    ("bfl fp8r", {"pre_quant_scale": ZEROS[0]}, r"pre_quant_scale` is not known"),
]


def test_what_is_refused(models, tmp_path):
    """One tensor of a file is otherwise: it is named, with what is expected, before anything is written."""
    for name in FORMATS:
        folder_of(tmp_path / name, models["flux"], FORMATS[name])
    for name, changes, text in WRONG:
        path = tmp_path / name / WEIGHTS
        whole = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        otherwise = whole | {f"{MODULE}.{part}": value for part, value in changes.items()}
        save(path, {n: value for n, value in otherwise.items() if value is not None}, metadata)
        with pytest.raises(CheckpointError, match=rf"{re.escape(MODULE)}[.`]*{text}"):
            checkpoint = open_checkpoint(str(path.parent), FAMILIES["flux"])
            checkpoint.skeleton(torch.float32)
            checkpoint.tensor(f"{MODULE}.weight")
        save(path, whole, metadata)


def test_a_layer_that_the_header_alone_names(models, tmp_path):
    """It is one of the transformer, or of a part of a pipeline that was set aside; with hints nvfp4 needs its own."""
    folder_of(tmp_path, models["flux"], FORMATS["bfl nvfp4"])
    other = json.dumps({"layers": {"text_encoders.x": {"format": "nvfp4"}}})
    save(tmp_path / WEIGHTS, load_file(tmp_path / WEIGHTS), {"_quantization_metadata": other})
    with pytest.raises(
        CheckpointError, match=r"weight` of .* is U8 with scales and has no hint, expected one as other"
    ):
        open_checkpoint(str(tmp_path), FAMILIES["flux"])
    folder_of(tmp_path, models["flux"], FORMATS["comfy fp8 e5m2"])
    tensors = load_file(tmp_path / WEIGHTS)
    for layer, text in (
        ("proj_out.more", r"`_quantization_metadata` of .* is of a weight `proj_out.more.weight`"),
        ("vae.x", ""),
    ):
        layers = {name.removesuffix(".weight_scale"): {"format": "float8_e5m2"} for name in tensors if "scale" in name}
        said = json.dumps({"layers": layers | {layer: {"format": "float8_e4m3fn"}}})
        save(tmp_path / WEIGHTS, tensors, {"_quantization_metadata": said})
        with pytest.raises(CheckpointError, match=text) if text else nullcontext():
            open_checkpoint(str(tmp_path), FAMILIES["flux"])


def test_configs_of_modelopt(models, tmp_path, capsys):
    """An algorithm that is not known, scales that are not there, and its own file beside the config."""
    folder_of(tmp_path, models["flux"], FORMATS["cast"])
    for algorithm, text in (("W4A8_AWQ", "quantised by modelopt to W4A8_AWQ"), ("FP8", "is F8_E4M3 without a scale")):
        said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(str(tmp_path), FAMILIES["flux"])
        assert main(["flux", "--model", str(tmp_path), "--dry-run"]) == 2
        assert "Traceback" not in capsys.readouterr().err
    models["flux"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="says that its weights are in ModelOpt's FP8 and has no scales, expec"):
        open_checkpoint(str(tmp_path), FAMILIES["flux"])


# GGUF


KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def blocks(kind, shape, rng):
    """Random blocks of a type whose scales are finite numbers; those of the K types stand where the format has them."""
    import gguf

    size, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    found = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, bytes_), dtype=np.uint8)
    places = {"Q6_K": [bytes_ - 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(kind, [0])
    for place in places:
        halves = rng.normal(size=found.shape[:-1]).astype(np.float16) / 64
        found[..., place : place + 2] = halves[..., None].view(np.uint8)
    return found.reshape(*shape[:-1], -1)


GGUFS = {
    "flux": lambda: tiny_flux(double=1, single=1, heads=16),
    "wan": lambda: tiny_wan(layers=1, heads=16, head_dim=16, text_dim=256),
    "qwen-image": lambda: tiny_qwen_image(layers=1, heads=16),
}


@pytest.mark.parametrize("family", GGUFS)
def test_gguf(drafts_of, tmp_path, family):
    """Every type by diffusers' own arithmetic; Wan's names and sizes as city96 writes them, five sizes among them."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    model, named = GGUFS[family](), wan_name if family == "wan" else str
    rng, expected, count = np.random.default_rng(0), {}, 0
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
    for name, value in model.state_dict().items():
        kind = KINDS[count % len(KINDS)] if value.ndim == 2 and value.shape[-1] == 256 else "F32"
        count += kind != "F32" or (value.ndim == 2 and value.shape[-1] == 256)
        type_ = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            data = value.numpy().astype(np.float32 if kind == "F32" else np.float16)
            expected[name] = torch.from_numpy(data).float()
        elif kind == "BF16":
            data = value.to(torch.bfloat16).view(torch.uint8).numpy()
            expected[name] = value.to(torch.bfloat16).float()
        else:
            data = blocks(kind, tuple(value.shape), rng)
            size, bytes_ = gguf.GGML_QUANT_SIZES[type_]
            rows = torch.from_numpy(data).reshape(-1, bytes_)
            numbers = dequantize_functions[type_](rows, size, bytes_, torch.float32)
            expected[name] = numbers.reshape(value.shape).float()
        if value.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{named(name)}", list(value.shape))
            data = data.reshape(value.shape[0], -1)
        writer.add_tensor(named(name), data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert count >= len(KINDS)
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"), FAMILIES[family], config=str(tmp_path / "model"))
    assert_stands_for(checkpoint, expected, 0)
    assert_computes_with(drafts_of(family, model), checkpoint, model, expected)
    said = checkpoint.said_of_formats("fp16")
    assert said.startswith("weights: GGUF's Q4_0, ") and "GGUF's Q8_0" in said and said.endswith("dequantised to fp16")
    whole = (tmp_path / "model.gguf").read_bytes()
    for length in (len(whole) - 100, 5000, 30, 5):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.gguf (is damaged|ends within) .*; download it again"):
            open_checkpoint(str(tmp_path / "cut.gguf"), FAMILIES[family], config=str(tmp_path / "model"))
