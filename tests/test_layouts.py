"""Checkpoints as they come: variants, single files, original layouts, and LoRAs added while the weights stream."""

import dataclasses
import json
import shutil

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from checkpoints import INDEX, WEIGHTS, assert_holds, edit_json, opened
from safetensors.torch import load_file, save_file

from taylorseer_export.checkpoint import checkpoint, files
from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.original import Converted
from taylorseer_export.cli import main
from taylorseer_export.compile.export import describe
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES
from taylorseer_export.report.verify import checkpoint_of
from taylorseer_export.runtime.denoiser import Denoiser

FLUX = FAMILIES["flux"]
WIDTH = 3072  # of FLUX; diffusers' converter has it as a constant


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny("dit").folder, tmp_path / "dit")


# Variants


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variant(tiny, tmp_path, shards, variant):
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    tiny("dit").model.save_pretrained(tmp_path, **shards)
    other = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=half)
    other.save_pretrained(tmp_path, variant=variant, **shards)
    assert_holds(opened(tmp_path), tiny("dit").model)
    checkpoint = open_checkpoint(str(tmp_path), FAMILIES["dit"], variant=variant)
    assert_holds(checkpoint, other)
    assert (len(set(checkpoint.files.values())) > 1) == bool(shards)
    assert checkpoint.sha256() != opened(tmp_path).sha256()


def test_a_variant_that_is_not_there(tiny, folder):
    with pytest.raises(CheckpointError, match=r"has no weights of variant fp16, expected .*; leave --variant out"):
        open_checkpoint(str(folder), FAMILIES["dit"], variant="fp16")
    tiny("dit").model.save_pretrained(folder, variant="bf16", max_shard_size="100KB")
    with pytest.raises(CheckpointError, match=r"has no weights of variant fp16, .*; use --variant bf16$"):
        open_checkpoint(str(folder), FAMILIES["dit"], variant="fp16")


@pytest.mark.parametrize("given", [{"variant": "fp16"}, {"config": "somewhere"}])
def test_a_variant_of_nothing(given):
    with pytest.raises(CheckpointError, match="--variant or --config is given without --model, expected it too"):
        open_checkpoint(None, FAMILIES["dit"], **given)


# Single files


@pytest.mark.parametrize("config", ["config.json", "."])
def test_a_file_in_the_layout_of_diffusers(tiny, folder, tmp_path, config):
    shutil.move(folder / WEIGHTS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"), FAMILIES["dit"], config=str(folder / config))
    assert_holds(checkpoint, tiny("dit").model)
    assert checkpoint.converted is None
    assert checkpoint.skeleton(torch.float32).config["num_layers"] == 3


def test_shards_with_the_config_elsewhere(tiny, folder, tmp_path):
    tiny("dit").model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (tmp_path / "shards" / "config.json").unlink()
    assert (tmp_path / "shards" / INDEX).is_file()
    assert_holds(open_checkpoint(str(tmp_path / "shards"), FAMILIES["dit"], config=str(folder)), tiny("dit").model)


def test_a_file_that_misses_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out_2.bias"]
    save_file(tensors, folder / WEIGHTS)
    checkpoint = open_checkpoint(str(folder / WEIGHTS), FAMILIES["dit"], config=str(folder))
    with pytest.raises(CheckpointError, match=r"1 tensors that do not fit its config \(`proj_out_2.bias` is missing\)"):
        checkpoint.skeleton(torch.float32)


def test_a_file_alone(folder):
    text = (
        r"has no config and its tensors are those of none of dit-xl-2-256, dit-xl-2-512, expected --config with it; "
        r"pass the config.json of facebook/DiT-XL-2-256's transformer or its like"
    )
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(folder / WEIGHTS), FAMILIES["dit"])
    with pytest.raises(CheckpointError, match="--variant is fp16 for one file, expected a folder of several; leave it"):
        open_checkpoint(str(folder / WEIGHTS), FAMILIES["dit"], variant="fp16", config=str(folder))


@pytest.mark.parametrize("config", ["nothing", "config.json"])
def test_a_config_that_is_none(folder, tmp_path, config):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        open_checkpoint(str(folder / WEIGHTS), FAMILIES["dit"], config=str(tmp_path / config))


# Original layouts


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def flux_layout(double=1, single=1):
    """Names and shapes of FLUX.1-dev as its authors publish it, with fewer blocks."""
    shapes = {
        **linear("img_in", WIDTH, 64),
        **linear("txt_in", WIDTH, 4096),
        **linear("time_in.in_layer", WIDTH, 256),
        **linear("time_in.out_layer", WIDTH, WIDTH),
        **linear("vector_in.in_layer", WIDTH, 768),
        **linear("vector_in.out_layer", WIDTH, WIDTH),
        **linear("guidance_in.in_layer", WIDTH, 256),
        **linear("guidance_in.out_layer", WIDTH, WIDTH),
        **linear("final_layer.linear", 64, WIDTH),
        **linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH),
    }
    for name in (f"double_blocks.{k}.{side}" for k in range(double) for side in ("img", "txt")):
        shapes |= linear(f"{name}_mod.lin", 6 * WIDTH, WIDTH) | linear(f"{name}_attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{name}_attn.proj", WIDTH, WIDTH) | linear(f"{name}_mlp.0", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{name}_mlp.2", WIDTH, 4 * WIDTH)
        shapes |= {f"{name}_attn.norm.{side}_norm.scale": (128,) for side in ("query", "key")}
    for name in (f"single_blocks.{k}" for k in range(single)):
        shapes |= linear(f"{name}.modulation.lin", 3 * WIDTH, WIDTH) | linear(f"{name}.linear1", 7 * WIDTH, WIDTH)
        shapes |= linear(f"{name}.linear2", WIDTH, 5 * WIDTH)
        shapes |= {f"{name}.norm.{side}_norm.scale": (128,) for side in ("query", "key")}
    return shapes


def write_sparse(path, shapes, filled):
    """A bfloat16 safetensors file, zeros but for the `filled` tensors; its holes take no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, values in filled.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(values.view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(file in FLUX's own layout, config.json, its tensors that are not zero)"""
    folder, shapes = tmp_path_factory.mktemp("original"), flux_layout()
    rng = torch.Generator().manual_seed(0)
    names = (
        "single_blocks.0.linear1.bias",
        "double_blocks.0.txt_attn.qkv.weight",
        "final_layer.adaLN_modulation.1.bias",
        "img_in.weight",
    )
    filled = {name: torch.randn(shapes[name], generator=rng).bfloat16() for name in names}
    write_sparse(folder / "flux1.safetensors", shapes, filled)
    (folder / "config.json").write_text(json.dumps({"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}))
    return folder / "flux1.safetensors", folder / "config.json", filled


def test_flux_as_its_authors_publish_it(original):
    path, config, filled = original
    checkpoint = open_checkpoint(str(path), FLUX, config=str(config))
    skeleton = checkpoint.skeleton(torch.bfloat16)  # refuses tensors that do not fit
    assert len(checkpoint.shapes) == len(skeleton.state_dict())
    q, k, v, mlp = filled["single_blocks.0.linear1.bias"].split([WIDTH, WIDTH, WIDTH, 4 * WIDTH])
    text = filled["double_blocks.0.txt_attn.qkv.weight"].chunk(3)
    shift, scale = filled["final_layer.adaLN_modulation.1.bias"].chunk(2)
    expected = {
        "single_transformer_blocks.0.attn.to_q.bias": q,
        "single_transformer_blocks.0.attn.to_k.bias": k,
        "single_transformer_blocks.0.attn.to_v.bias": v,
        "single_transformer_blocks.0.proj_mlp.bias": mlp,
        "transformer_blocks.0.attn.add_q_proj.weight": text[0],
        "transformer_blocks.0.attn.add_v_proj.weight": text[2],
        "norm_out.linear.bias": torch.cat([scale, shift]),
        "x_embedder.weight": filled["img_in.weight"],
        "proj_out.bias": torch.zeros(64).bfloat16(),
    }
    assert {n: torch.equal(checkpoint.tensor(n), value) for n, value in expected.items()} == dict.fromkeys(
        expected, True
    )


@pytest.fixture
def published(tmp_path, monkeypatch):
    """(name, **entries) -> the config of one more published FLUX, of which there are no others."""
    for module in (files, checkpoint):
        monkeypatch.setattr(module, "PUBLISHED", tmp_path)

    def publish(name, **entries):
        given = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, **entries}
        (tmp_path / f"{name}.json").write_text(json.dumps(given))

    return publish


def test_a_file_that_is_one_published_model(original, published):
    """By all its tensors, whatever the file is called; models of one config are one."""
    path, config, filled = original
    for name in ("small", "edit"):
        published(name, guidance_embeds=True)
    published("without-guidance")
    published("deeper", guidance_embeds=True, num_single_layers=2)
    published("narrow", guidance_embeds=True, joint_attention_dim=2048)
    found = open_checkpoint(str(path), FLUX)
    told = open_checkpoint(str(path), FLUX, config=str(config))
    assert found.taken == ("edit", "small") and not told.taken and found.config_file is None
    assert found.shapes == told.shapes and found.config["guidance_embeds"]
    assert torch.equal(found.tensor("x_embedder.weight"), filled["img_in.weight"])
    found.skeleton(torch.bfloat16)


def test_a_file_that_may_be_several_published_models(original, published):
    published("small", guidance_embeds=True)
    published("turned", guidance_embeds=True, axes_dims_rope=[32, 48, 48])
    text = (
        r"no config and its tensors fit those of small and turned, expected --config with it; pass one of those names"
    )
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(original[0]), FLUX)
    named = open_checkpoint(str(original[0]), FLUX, config="turned")
    assert named.config["axes_dims_rope"] == [32, 48, 48] and named.config_file == "turned"
    published("small", guidance_embeds=True, num_layers=2)
    assert open_checkpoint(str(original[0]), FLUX).taken == ("turned",)
    published("turned", num_layers=2)
    with pytest.raises(CheckpointError, match=r"are those of none of small, turned, expected --config with it"):
        open_checkpoint(str(original[0]), FLUX)


def test_flux_with_the_prefix_of_another_tool(original, tmp_path):
    """ComfyUI saves the transformer under a name of its own."""
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in flux_layout().items()}
    write_sparse(tmp_path / "flux.safetensors", shapes, {})
    open_checkpoint(str(tmp_path / "flux.safetensors"), FLUX, config=str(original[1])).skeleton(torch.bfloat16)
    assert (
        Converted("FluxTransformer2DModel", {}, shapes).shapes.keys()
        == open_checkpoint(str(original[0]), FLUX, config=str(original[1])).shapes.keys()
    )


def reference_state(name, **config):
    """Names and shapes of a diffusers model."""
    with init_empty_weights():
        model = getattr(diffusers, name).from_config(config)
    return {n: tuple(value.shape) for n, value in model.state_dict().items()}


def test_conversion_covers_flux():
    expected = reference_state("FluxTransformer2DModel", num_layers=2, num_single_layers=3, guidance_embeds=True)
    assert Converted("FluxTransformer2DModel", {}, flux_layout(2, 3)).shapes == expected


def hunyuan_layout():
    """Names and shapes of HunyuanVideo as its authors publish it, with one block of each kind."""
    shapes = {
        "img_in.proj.weight": (WIDTH, 16, 1, 2, 2),
        "img_in.proj.bias": (WIDTH,),
        **linear("txt_in.input_embedder", WIDTH, 4096),
        **linear("txt_in.t_embedder.mlp.0", WIDTH, 256),
        **linear("txt_in.t_embedder.mlp.2", WIDTH, WIDTH),
        **linear("txt_in.c_embedder.linear_1", WIDTH, 4096),
        **linear("txt_in.c_embedder.linear_2", WIDTH, WIDTH),
        **linear("vector_in.in_layer", WIDTH, 768),
        **linear("vector_in.out_layer", WIDTH, WIDTH),
        **linear("final_layer.linear", 64, WIDTH),
        **linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH),
    }
    for name in ("time_in", "guidance_in"):
        shapes |= linear(f"{name}.mlp.0", WIDTH, 256) | linear(f"{name}.mlp.2", WIDTH, WIDTH)
    refiner = "txt_in.individual_token_refiner.blocks.0"
    shapes |= {f"{refiner}.{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    shapes |= linear(f"{refiner}.self_attn_qkv", 3 * WIDTH, WIDTH) | linear(f"{refiner}.self_attn_proj", WIDTH, WIDTH)
    shapes |= linear(f"{refiner}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{refiner}.mlp.fc2", WIDTH, 4 * WIDTH)
    shapes |= linear(f"{refiner}.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    for name in ("double_blocks.0.img", "double_blocks.0.txt"):
        shapes |= linear(f"{name}_mod.linear", 6 * WIDTH, WIDTH) | linear(f"{name}_attn_qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{name}_attn_proj", WIDTH, WIDTH) | linear(f"{name}_mlp.fc1", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{name}_mlp.fc2", WIDTH, 4 * WIDTH)
        shapes |= {f"{name}_attn_{side}_norm.weight": (128,) for side in "qk"}
    shapes |= linear("single_blocks.0.linear1", 7 * WIDTH, WIDTH) | linear("single_blocks.0.linear2", WIDTH, 5 * WIDTH)
    shapes |= linear("single_blocks.0.modulation.linear", 3 * WIDTH, WIDTH)
    return shapes | {f"single_blocks.0.{side}_norm.weight": (128,) for side in "qk"}


def test_conversion_covers_hunyuan_video():
    blocks = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    expected = reference_state("HunyuanVideoTransformer3DModel", **blocks)
    assert Converted("HunyuanVideoTransformer3DModel", {}, hunyuan_layout()).shapes == expected


# Name in diffusers -> name as Wan's authors publish it; longer ones first.
WAN_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "norm2": "norm3",
    "proj_out": "head.head",
}


@pytest.mark.parametrize("shards", [False, True])
def test_wan_as_its_authors_publish_it(tiny, tmp_path, shards):
    """Also in shards, with an index and a config.json that is not diffusers' own."""
    tensors = {}
    for name, value in tiny("wan").model.state_dict().items():
        if name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
        for ours, theirs in WAN_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = value
    given = tmp_path / "wan.safetensors"
    if shards:
        given, half = tmp_path / "shards", len(tensors) // 2
        given.mkdir()
        (given / "config.json").write_text('{"_class_name": "WanModel"}')
        parts = {"a.safetensors": list(tensors)[:half], "b.safetensors": list(tensors)[half:]}
        for file, names in parts.items():
            save_file({name: tensors[name] for name in names}, given / file)
        index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
        (given / INDEX).write_text(json.dumps(index))
    else:
        save_file(tensors, given)
    checkpoint = open_checkpoint(str(given), FAMILIES["wan"], config=str(tiny("wan").folder))
    checkpoint.skeleton(torch.float32)
    state = tiny("wan").model.state_dict()
    assert checkpoint.shapes.keys() == state.keys()
    assert [name for name, value in state.items() if not torch.equal(checkpoint.tensor(name), value)] == []


def test_a_layout_that_no_converter_knows(original, folder, tmp_path):
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    text = r"`some.weight`, … are not converted by diffusers' convert_flux_transformer_checkpoint_to_diffusers .*origin"
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tmp_path / "x.safetensors"), FLUX, config=str(original[1]))
    with pytest.raises(
        CheckpointError, match=r"are in no layout of DiTTransformer2DModel, expected diffusers' \(it ha"
    ):
        open_checkpoint(str(tmp_path / "x.safetensors"), FAMILIES["dit"], config=str(folder))


def test_an_original_of_other_blocks(original, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 2, "num_single_layers": 1}))
    checkpoint = open_checkpoint(str(original[0]), FLUX, config=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"`transformer_blocks.1.norm1.linear.weight` is missing"):
        checkpoint.skeleton(torch.bfloat16)


def test_a_converter_that_writes_in_place(monkeypatch):
    from diffusers.loaders import single_file_model

    table = {"Toy": {"checkpoint_mapping_fn": lambda checkpoint: {n: t.mul_(2) for n, t in checkpoint.items()}}}
    monkeypatch.setattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", table)
    with pytest.raises(CheckpointError, match=r"the converter changes tensors in place \(aten.mul_.*save_pretrained"):
        Converted("Toy", {}, {"a": (2,)})


# LoRA


MODULES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj", "pos_embed.proj")


def pairs(model, modules=MODULES, rank=2, prefix="", seed=0):
    """Random A and B for modules of a model, under peft's names."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        out, *into = model.get_submodule(module).weight.shape
        up = (out, rank, *[1] * (len(into) - 1))
        found[f"{prefix}{module}.lora_A.weight"] = torch.randn(rank, *into, generator=rng)
        found[f"{prefix}{module}.lora_B.weight"] = torch.randn(up, generator=rng)
    return found


def fused(model, lora, scale, prefix=""):
    """The state dict with the updates added: row by row, in float64."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    for name in [n for n in lora if n.endswith("lora_A.weight")]:
        down, up = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        weight = state[name.removeprefix(prefix).replace("lora_A.", "")]
        for row in range(len(weight)):
            weight[row] += scale * torch.einsum("r,r...->...", up[row].flatten(), down)
    return state


def assert_fused(checkpoint, expected):
    """Float32 of the weights, within a few roundings of their largest value."""
    for name, value in expected.items():
        limit = 8 * 2.0**-24 * value.abs().max().item()
        assert (checkpoint.tensor(name).double() - value).abs().max().item() <= limit, name


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("given", "scale"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0)])
def test_lora(tiny, tmp_path, prefix, given, scale):
    model, lora = tiny("dit").model, pairs(tiny("dit").model, prefix=prefix)
    save_file(lora, tmp_path / "lora.safetensors")
    checkpoint = open_checkpoint(
        str(tiny("dit").folder), FAMILIES["dit"], loras=[f"{tmp_path}/lora.safetensors{given}"]
    )
    assert_fused(checkpoint, fused(model, lora, scale, prefix))
    loaded = checkpoint.load(torch.float64).state_dict()
    assert all(torch.equal(loaded[name], checkpoint.tensor(name).double()) for name in loaded)


def test_the_comparison_of_fused_weights_can_fail(tiny, tmp_path):
    lora = pairs(tiny("dit").model)
    save_file(lora, tmp_path / "lora.safetensors")
    checkpoint = open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=[f"{tmp_path}/lora.safetensors:0.999"])
    with pytest.raises(AssertionError):
        assert_fused(checkpoint, fused(tiny("dit").model, lora, 1.0))


def test_loras_add_up(tiny, tmp_path):
    model = tiny("dit").model
    first, second = pairs(model, seed=1), pairs(model, MODULES[:1], rank=3, seed=2)
    for name, lora in (("first", first), ("second", second)):
        save_file(lora, tmp_path / f"{name}.safetensors")
    given = [f"{tmp_path}/first.safetensors", f"{tmp_path}/second.safetensors:0.5"]
    checkpoint = open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=given)
    one, two, plain = fused(model, first, 1.0), fused(model, second, 0.5), model.state_dict()
    assert_fused(checkpoint, {name: one[name] + two[name] - plain[name].double() for name in plain})


def test_alpha(tiny, tmp_path):
    model, lora = tiny("dit").model, pairs(tiny("dit").model, rank=4)
    expected = fused(model, lora, 0.25)
    save_file(lora | {f"{m}.alpha": torch.tensor(1.0) for m in MODULES}, tmp_path / "alpha.safetensors")
    settings = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 1, "proj": 1}}
    save_file(lora, tmp_path / "settings.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    settings = {"lora_alpha": 0.5, "use_rslora": True}
    save_file(lora, tmp_path / "root.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    for name in ("alpha", "settings", "root"):
        given = [f"{tmp_path}/{name}.safetensors"]
        assert_fused(open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=given), expected)


def test_names_that_diffusers_converts(tiny, tmp_path):
    """kohya's, of a model in the layout of its authors: fused query, key and value, alpha beside them."""
    model, rng = tiny("flux").model, torch.Generator().manual_seed(0)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    down, up = torch.randn(2, width, generator=rng), torch.randn(3 * width, 2, generator=rng)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    kohya = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    checkpoint = open_checkpoint(str(tiny("flux").folder), FLUX, loras=[f"{tmp_path}/kohya.safetensors:3"])
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for side, part in zip("qkv", up.double().chunk(3), strict=True):
        expected[f"transformer_blocks.0.attn.to_{side}.weight"] += 3 * 0.5 * part @ down.double()
    assert_fused(checkpoint, expected)


def test_it_is_what_diffusers_fuses(tiny, tmp_path):
    model = diffusers.FluxTransformer2DModel.from_pretrained(tiny("flux").folder)
    modules = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out")
    lora = pairs(model, modules, prefix="transformer.")
    save_file(lora, tmp_path / "lora.safetensors")
    model.load_lora_adapter(lora, prefix="transformer")
    model.fuse_lora(lora_scale=0.5)
    model.unload_lora()
    checkpoint = open_checkpoint(str(tiny("flux").folder), FLUX, loras=[f"{tmp_path}/lora.safetensors:0.5"])
    assert_fused(checkpoint, {name: value.double() for name, value in model.state_dict().items()})


def test_the_hash_covers_loras_and_their_scales(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_file(pairs(tiny("dit").model, seed=seed), tmp_path / f"{name}.safetensors")

    def digest(*loras):
        given = [f"{tmp_path}/{lora}" for lora in loras]
        return open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=given).sha256()

    a, b = "a.safetensors", "b.safetensors"
    seen = [
        digest(),
        digest(a),
        digest(b),
        digest(f"{a}:0.5"),
        digest(a, b),
        digest(a, f"{b}:0.5"),
        digest(f"{a}:0.5", b),
    ]
    assert len(set(seen)) == len(seen)
    assert digest(a) == digest(f"{a}:1")


def test_the_manifest_says_what_was_added(tiny, drafts, tmp_path):
    """So that `verify` opens the same weights again, and a bundle says how it is rebuilt."""
    save_file(pairs(tiny("dit").model), tmp_path / "lora.safetensors")
    given = f"{tmp_path}/lora.safetensors:0.5"
    checkpoint = open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=[given])
    draft = drafts("dit")
    draft = dataclasses.replace(draft, checkpoint=dataclasses.replace(draft.checkpoint, loras=checkpoint.loras))
    manifest = describe(draft, "added", draft.checkpoint.sha256())
    assert manifest.model.loras == (given,)
    assert f" --lora {given} " in manifest.command()
    again = checkpoint_of(Denoiser(manifest, None))
    weight = f"{MODULES[0]}.weight"
    assert torch.equal(again.tensor(weight), checkpoint.tensor(weight))
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"loras": ()})})
    with pytest.raises(CheckpointError, match=r"expected .*…, those the bundle was made from; pass the right --model"):
        checkpoint_of(Denoiser(manifest, None))


@pytest.mark.parametrize("options", [["--lora", "none.safetensors"], ["--variant", "fp16"], ["--config", "none"]])
def test_bad_options_are_one_sentence(capsys, options):
    assert main(["dit", *options, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("taylorseer-export: --") and said.count("\n") == 1


def without(lora, name):
    return {n: value for n, value in lora.items() if n != name}


A_OF_Q = "transformer_blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda lora: lora | {"text_encoder.x.weight": torch.ones(1)},
            r"has 1 tensors that are no low-rank pair of th",
        ),
        (lambda lora: lora | {"x.lora_magnitude_vector": torch.ones(1)}, r"\(x.lora_magnitude_vector\), expected only"),
        (lambda lora: without(lora, A_OF_Q), r"\(transformer_blocks.0.attn1.to_q.lora_A.weight missing\)"),
        (lambda lora: {"x.alpha": torch.tensor(1.0)}, r"\(x.alpha alone\)"),
        (
            lambda lora: lora | {f"blocks.0.q.lora_{s}.weight": torch.ones(2, 2) for s in "AB"},
            r"has 1 updates that do not fit the checkpoint \(`blocks.0.q.weight` is not known\), expected pairs",
        ),
        (
            lambda lora: lora | {A_OF_Q: torch.ones(2, 5)},
            r"\(`transformer_blocks.0.attn1.to_q.weight` is \[32, 32\], its pair \[32, 2\] x \[2, 5\]\)",
        ),
        (lambda lora: lora | {A_OF_Q: torch.ones(3, 32)}, r"its pair \[32, 2\] x \[3, 32\]"),
    ],
)
def test_a_lora_that_does_not_fit(tiny, tmp_path, change, text):
    save_file(change(pairs(tiny("dit").model)), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=[f"{tmp_path}/lora.safetensors"])


def test_a_lora_of_another_family(tiny, tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    text = (
        r"is not converted by diffusers' FluxLoraLoaderMixin \(ValueError: .*x.lora_down.weight\), expected a LoRA of"
    )
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tiny("flux").folder), FLUX, loras=[f"{tmp_path}/lora.safetensors"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("none.safetensors", r"--lora .*none.safetensors is missing, expected a safetensors file; check the path"),
        ("none.safetensors:1", r"--lora .*none.safetensors is missing"),
        ("bad.safetensors", r"bad.safetensors is damaged .*; download it again"),
        ("bad.safetensors:nan", r"has scale nan, expected a finite number; write FILE:0.8"),
    ],
)
def test_a_lora_that_cannot_be_read(tiny, tmp_path, given, text):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tiny("dit").folder), FAMILIES["dit"], loras=[f"{tmp_path}/{given}"])


def test_edits_leave_the_session_model_alone(tiny, folder):
    edit_json(folder / "config.json", lambda config: config.update(num_layers=1))
    assert json.loads((tiny("dit").folder / "config.json").read_text())["num_layers"] == 3
