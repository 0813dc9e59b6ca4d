"""No tensor of a checkpoint goes unread: formats that are not read are refused by name, in every family and layout."""

import json
import re
import shutil

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from test_checkpoint import INDEX, WEIGHTS, edit_json
from test_layouts import WAN_NAMES, WIDTH, flux_layout, hunyuan_layout, linear

from taylorseer_export.checkpoint.checkpoint import open_checkpoint
from taylorseer_export.checkpoint.files import PUBLISHED, Header
from taylorseer_export.checkpoint.formats import refuse_quantised, set_aside
from taylorseer_export.checkpoint.original import Converted, Unread
from taylorseer_export.checkpoint.packed import is_part
from taylorseer_export.cli import main
from taylorseer_export.errors import CheckpointError
from taylorseer_export.families import FAMILIES

BITS = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "BOOL": 8,
    "F4": 4,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
}
BITS |= {"I32": 32, "F64": 64, "I64": 64, "F6_E2M3": 6, "C64": 64}
CONVERTED = (
    "chroma",
    "krea-2",
    "z-image",
    "flux",
    "flux-kontext",
    "flux2",
    "flux2-edit",
    "flux2-kv",
    "flux3",
    "hidream",
    "hunyuan-video",
    "ltx-2",
    "ltx-2-image",
    "qwen-image",
    "qwen-image-edit",
    "qwen-image-2.1",
    "sd3",
    "wan",
    "wan-5b-image",
    "wan-vace",
    "wan-animate",
)


def write(path, tensors):
    """A safetensors file of zeros: {name: (dtype, shape)}. Its holes take no space on disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + BITS[dtype] * torch.Size(shape).numel() // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def linears(tensors):
    """The modules with a matrix."""
    matrices = [name for name, (_, shape) in tensors.items() if len(shape) == 2]
    return [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]


def packed(tensors, dtype, **beside):
    """Every matrix in `dtype`, with one of `beside` for each: {name in place of weight: (dtype, shape)}."""
    modules = linears(tensors)
    found = {
        n: (dtype if n.removesuffix(".weight") in modules else kind, shape) for n, (kind, shape) in tensors.items()
    }
    return found | {
        f"{module}.{name.replace('__', '.')}": (kind, shape(tensors[f"{module}.weight"][1]))
        for module in modules
        for name, (kind, shape) in beside.items()
    }


def one(shape):
    return ()


def rows(shape):
    return (shape[0],)


# Sentence -> how a file in that format is told from the plain one. Those that are read are in test_published_formats.
FORMATS = {
    "ModelOpt's format": lambda t: packed(t, "BF16", weight_quantizer___amax=("F32", one)),
    "MXFP8 or MXFP4": lambda t: packed(t, "F8_E4M3", weight_scale=("F8_E8M0", rows)),
    "block-scaled fp8": lambda t: packed(t, "F8_E4M3", weight_scale_inv=("F32", rows)),
    "int8 with scales": lambda t: packed(t, "I8", weight_scale=("F32", rows)),
    "bitsandbytes": lambda t: packed(t, "U8", weight__absmax=("F32", rows), weight__quant_map=("F32", rows)),
    "bitsandbytes (": lambda t: packed(t, "I8", SCB=("F32", rows)),
    "torchao": lambda t: packed(t, "I8", weight_qdata=("I8", rows), weight_scale=("F32", rows)),
    "optimum-quanto": lambda t: packed(t, "I8", weight___scale=("F32", rows)),
    "GPTQ or AWQ": lambda t: packed(t, "BF16", qweight=("I32", rows), qzeros=("I32", rows)),
    "Nunchaku's SVDQuant": lambda t: packed(t, "BF16", qweight=("I8", rows), wscales=("BF16", rows)),
    "a format with F4": lambda t: packed(t, "F4"),
    "a format with F8_E8M0": lambda t: packed(t, "F8_E8M0"),
}


def plain(family):
    """(config.json, {name: (dtype, shape)}) of a family's embedded model, which every family has."""
    checkpoint = open_checkpoint(None, FAMILIES[family])
    return checkpoint.folder / "config.json", {name: ("BF16", shape) for name, shape in checkpoint.shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [False, True])
def test_quantised_formats_are_refused_by_name(tmp_path, family, shards):
    """As a diffusers folder and in shards, before anything is read; the same file without it is accepted."""
    config, tensors = plain(family)
    shutil.copy(config, tmp_path / "config.json")

    def written(found):
        if shards:
            names = sorted(found)
            files = {name: f"{k % 2}.safetensors" for k, name in enumerate(names)}
            for file in set(files.values()):
                write(tmp_path / file, {name: found[name] for name in names if files[name] == file})
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
        else:
            write(tmp_path / WEIGHTS, found)
        return open_checkpoint(str(tmp_path), FAMILIES[family])

    written(tensors).skeleton(torch.float32)
    for kind, quantised in FORMATS.items():
        with pytest.raises(CheckpointError) as error:
            written(quantised(tensors))
        said = str(error.value)
        assert f" is in {kind}" in said or f", {kind}" in said, (kind, said)
        assert said.endswith("plain float8; pass the checkpoint that it was made from")


def sd3_layout():
    """Names and shapes of SD3 as its authors publish it, with two blocks."""
    width = 64
    shapes = {
        "pos_embed": (1, 16, width),
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("y_embedder.mlp.0", width, 128),
        **linear("y_embedder.mlp.2", width, width),
        **linear("context_embedder", width, 32),
        **linear("final_layer.linear", 64, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for block, side in ((k, side) for k in range(2) for side in ("x_block", "context_block")):
        name, last = f"joint_blocks.{block}.{side}", (block, side) == (1, "context_block")
        shapes |= linear(f"{name}.attn.qkv", 3 * width, width)
        shapes |= linear(f"{name}.adaLN_modulation.1", (2 if last else 6) * width, width)
        if not last:
            shapes |= linear(f"{name}.attn.proj", width, width)
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
    return shapes


def flux2_layout():
    """Names and shapes of FLUX.2 as its authors publish it, with one block of each kind."""
    width = 64
    parts = {
        "img_in": (width, 128),
        "txt_in": (width, 32),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "guidance_in.in_layer": (width, 256),
        "guidance_in.out_layer": (width, width),
        "double_stream_modulation_img.lin": (6 * width, width),
        "double_stream_modulation_txt.lin": (6 * width, width),
        "single_stream_modulation.lin": (3 * width, width),
        "single_blocks.0.linear1": (9 * width, width),
        "single_blocks.0.linear2": (width, 4 * width),
        "final_layer.linear": (128, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    blocks = ["single_blocks.0"]
    for block in (f"double_blocks.0.{side}" for side in ("img", "txt")):
        parts |= {f"{block}_attn.qkv": (3 * width, width), f"{block}_attn.proj": (width, width)}
        parts |= {f"{block}_mlp.0": (6 * width, width), f"{block}_mlp.2": (width, 3 * width)}
        blocks.append(f"{block}_attn")
    norms = {f"{block}.norm.{side}_norm.scale": (16,) for block in blocks for side in ("query", "key")}
    return norms | {f"{name}.weight": shape for name, shape in parts.items()}


def chroma_layout():
    """Names and shapes of Chroma as its authors publish it, with one block of each kind: FLUX's without modulation."""
    of_flux = ("time_in", "vector_in", "guidance_in", "_mod.", "modulation")
    shapes = {name: shape for name, shape in flux_layout().items() if not any(part in name for part in of_flux)}
    network = {
        "in_proj": (64, 64),
        "out_proj": (WIDTH, 64),
        "layers.0.in_layer": (64, 64),
        "layers.0.out_layer": (64, 64),
    }
    for name, sides in network.items():
        shapes |= linear(f"distilled_guidance_layer.{name}", *sides)
    return shapes | {"distilled_guidance_layer.norms.0.scale": (64,)}


def z_image_layout():
    """Those of the embedded Z-Image under the names of its authors."""
    shapes = {}
    for name, (_, shape) in plain("z-image")[1].items():
        for ours, theirs in {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"}.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"attention\.norm_([qk])", r"attention.\1_norm", name).replace(
            "attention.to_out.0", "attention.out"
        )
        if ".to_k." in name or ".to_v." in name:
            continue
        fused = ".to_q." in name
        shapes[name.replace(".to_q.", ".qkv.")] = (3 * shape[0], *shape[1:]) if fused else shape
    return shapes


def ltx_2_layout():
    """Those of the embedded LTX-2 under the names of its authors."""
    names = {
        r"^(audio_)?proj_in": r"\1patchify_proj",
        r"^(audio_)?time_embed": r"\1adaln_single",
        r"^av_cross_attn_(video|audio)_(\w+)": r"av_ca_\1_\2_adaln_single",
        r"_ca_(video|audio)_(a2v|v2a)": r"_ca_\2",
        r"(video|audio)_a2v_cross_attn_scale_shift_table": r"scale_shift_table_a2v_ca_\1",
        r"norm_([qk])\.": r"\1_norm.",
    }
    found = {}
    for name, (_, shape) in plain("ltx-2")[1].items():
        for pattern, theirs in names.items():
            name = re.sub(pattern, theirs, name)
        found[f"model.diffusion_model.{name}"] = shape
    return found


def krea_2_layout():
    """Those of the embedded Krea 2 under the names of its authors."""
    names = {
        r"^img_in": "first",
        r"^time_embed\.linear_1": "tmlp.0",
        r"^time_embed\.linear_2": "tmlp.2",
        r"^time_mod_proj": "tproj.1",
        r"^txt_in\.norm\.weight": "txtmlp.0.scale",
        r"^txt_in\.linear_1": "txtmlp.1",
        r"^txt_in\.linear_2": "txtmlp.3",
        r"^text_fusion": "txtfusion",
        r"^transformer_blocks": "blocks",
        r"^final_layer\.linear": "last.linear",
        r"^final_layer\.norm\.weight": "last.norm.scale",
        r"^final_layer\.scale_shift_table": "last.modulation.lin",
        r"attn\.to_([qkv])\.": r"attn.w\1.",
        r"attn\.to_out\.0": "attn.wo",
        r"attn\.to_gate": "attn.gate",
        r"attn\.norm_([qk])\.weight": r"attn.qknorm.\1norm.scale",
        r"\.ff\.": ".mlp.",
        r"\.norm1\.weight": ".prenorm.scale",
        r"\.norm2\.weight": ".postnorm.scale",
        r"\.scale_shift_table": ".mod.lin",
    }
    shapes = {}
    for name, (_, shape) in plain("krea-2")[1].items():
        flat = "transformer_blocks" in name and name.endswith("scale_shift_table")
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        shapes[name] = (shape[0] * shape[1],) if flat else shape
    return shapes


def flux3_layout():
    """Those of the embedded FLUX.3 under the names of its authors."""
    names = {
        r"^x_embedders": "emb_in",
        r"^context_embedder": "txt_in",
        r"^mode_blocks": "content_mode_blocks",
        r"^single_transformer_blocks": "single_blocks",
        r"^timestep_embedder\.linear_1": "time_in.in_layer",
        r"^timestep_embedder\.linear_2": "time_in.out_layer",
        r"^proj_out": "final_layer.image.linear",
        r"^norm_out\.linear": "final_layer.image.adaLN_modulation.1",
        r"(modulations\.\w+)\.linear": r"\1.lin",
        r"attn\.to_([qkv])\.": r"\1_proj.",
        r"attn\.to_out\.0": "attn_out",
        r"attn\.norm_q\.weight": "norm.query_norm.scale",
        r"attn\.norm_k\.weight": "norm.key_norm.scale",
        r"ff\.linear_in": "mlp_in",
        r"ff\.linear_out": "mlp_out",
    }
    shapes = {}
    for name, (_, shape) in plain("flux3")[1].items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        shapes[name] = shape
    return shapes


def wan_layout(family):
    shapes = {}
    for name, (_, shape) in plain(family)[1].items():
        if name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation" if "blocks" in name else "head.modulation")
        for ours, theirs in WAN_NAMES.items():
            name = name.replace(ours, theirs)
        shapes[name] = shape
    return shapes


# Of a block of Animate's motion encoder, whose layers have no names.
MOTION = {"conv1.weight": "conv1.0.weight", "conv1.act_fn.bias": "conv1.1.bias", "conv2.weight": "conv2.1.weight"}
MOTION |= {"conv2.act_fn.bias": "conv2.2.bias", "conv_skip.weight": "skip.1.weight"}


def wan_animate_layout():
    """Keys and values of a face are one matrix, and biases of the motion encoder have the shape of pictures."""
    shapes, convs = {}, "motion_encoder.enc.net_app.convs"
    for name, shape in wan_layout("wan-animate").items():
        if name.startswith("face_adapter"):
            name = re.sub(r"face_adapter\.(\d+)\.norm_([qk])", r"face_adapter.fuser_blocks.\1.\2_norm", name)
            name = re.sub(r"face_adapter\.(\d+)\.to_(q|out)", r"face_adapter.fuser_blocks.\1.linear_\2", name)
            name = name.replace("linear_q", "linear1_q").replace("linear_out", "linear2")
            if ".to_v." in name:
                continue
            if ".to_k." in name:
                name = re.sub(r"face_adapter\.(\d+)\.to_k", r"face_adapter.fuser_blocks.\1.linear1_kv", name)
                shape = (2 * shape[0], *shape[1:])
        elif name.startswith("motion_encoder"):
            name = name.replace("motion_encoder.motion_network", "motion_encoder.enc.fc")
            name = name.replace("motion_encoder.motion_synthesis_weight", "motion_encoder.dec.direction.weight")
            name = name.replace("motion_encoder.conv_in.weight", f"{convs}.0.0.weight")
            name = name.replace("motion_encoder.conv_in.act_fn.bias", f"{convs}.0.1.bias")
            name = name.replace("motion_encoder.conv_out.weight", f"{convs}.8.weight")
            if found := re.fullmatch(r"motion_encoder\.res_blocks\.(\d+)\.(.*)", name):
                name = f"{convs}.{int(found[1]) + 1}.{MOTION[found[2]]}"
            if name.startswith(convs) and name.endswith("bias"):
                shape = (1, *shape, 1, 1)
        else:
            name = re.sub(r"(face_encoder\.conv\d(_local)?)\.", r"\1.conv.", name)
        shapes[name] = shape
    return shapes


def original(family):
    """Names and shapes in the layout of the family's authors, with few blocks."""
    known = {"flux": flux_layout, "flux-kontext": flux_layout, "hunyuan-video": hunyuan_layout, "sd3": sd3_layout}
    known |= {"chroma": chroma_layout, "krea-2": krea_2_layout, "ltx-2": ltx_2_layout, "z-image": z_image_layout}
    known |= {"wan-animate": wan_animate_layout, "ltx-2-image": ltx_2_layout}
    known |= {"flux2": flux2_layout, "flux2-edit": flux2_layout, "flux2-kv": flux2_layout, "flux3": flux3_layout}
    if family in ("hidream", "qwen-image", "qwen-image-edit", "qwen-image-2.1"):
        return {f"model.diffusion_model.{n}": s for n, (_, s) in plain(family)[1].items()}
    return known[family]() if family in known else wan_layout(family)


def test_every_family_with_a_converter_is_here():
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known = {n for n, family in FAMILIES.items() if family.model_class in SINGLE_FILE_LOADABLE_CLASSES}
    assert known == {*CONVERTED, "sana"}  # whose converter leaves two tensors unread, so that its layout is refused


@pytest.mark.parametrize("family", CONVERTED)
def test_what_a_converter_leaves_over_is_refused(family):
    """A tensor more than the model has either stays in the result, which the model refuses, or is named as unread."""
    name, shapes = FAMILIES[family].model_class, original(family)
    whole = Converted(name, {}, shapes)
    assert frozenset().union(*whole.sources.values()) == shapes.keys()
    for stranger in ("img_in.mystery", "some.other.weight_scale", "lora_bias", "model.diffusion_model.scale"):
        more = shapes | {stranger: (1,)}
        try:
            found = Converted(name, {}, more)
        except Unread as error:
            assert f"1 of {len(more)} tensors are left unread by diffusers' " in str(error) and stranger in str(error)
        else:
            assert len(found.shapes.keys() - whole.shapes.keys()) == 1


def test_part_of_a_tensor_is_not_left_unread(monkeypatch):
    from diffusers.loaders import single_file_model

    table = {"Toy": {"checkpoint_mapping_fn": lambda checkpoint: {"a": checkpoint["a"].split([2, 4])[0]}}}
    monkeypatch.setattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", table)
    with pytest.raises(Unread, match=r"^4 of 6 numbers of the tensors are left unread by diffusers' <lambda>"):
        Converted("Toy", {}, {"a": (6,)})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_two_names_for_one_tensor(prefix):
    """The converter strips a prefix; of two tensors that then have one name it would keep the last."""
    shapes = flux_layout()
    with pytest.raises(Unread, match=r"^1 of \d+ tensors are left unread .*img_in.bias"):
        Converted("FluxTransformer2DModel", {}, shapes | {"model.diffusion_model.img_in.bias": shapes["img_in.bias"]})


@pytest.fixture
def flux_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}))
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_quantised_formats_of_one_file_in_the_authors_layout(tmp_path, flux_config, prefix):
    """With a config and without one, where no published model would be found."""
    path = tmp_path / "flux.safetensors"
    tensors = {f"{prefix}{name}": ("BF16", shape) for name, shape in flux_layout().items()}
    for kind, quantised in FORMATS.items():
        write(path, quantised(tensors))
        for config in (str(flux_config), None):
            with pytest.raises(CheckpointError) as error:
                open_checkpoint(str(path), FAMILIES["flux"], config=config)
            assert kind in str(error.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_plain_float8(tmp_path, flux_config, prefix):
    """A cast says all there is; its numbers arrive as they are, cut and joined. With a marker its scales are lost."""
    path = tmp_path / "flux.safetensors"
    tensors = packed({f"{prefix}{n}": ("BF16", s) for n, s in flux_layout().items()}, "F8_E4M3")
    write(path, tensors | {f"{prefix}scaled_fp8": ("F8_E4M3", (0,))})
    with pytest.raises(CheckpointError, match=r"` of .* is F8_E4M3 without a scale, expected `.*weight_scale` or `"):
        open_checkpoint(str(path), FAMILIES["flux"], config=str(flux_config))
    write(path, tensors)
    rng = torch.Generator().manual_seed(0)
    name = f"{prefix}final_layer.adaLN_modulation.1.weight"
    value = torch.randn(tensors[name][1], generator=rng).to(torch.float8_e4m3fn)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        file.seek(8 + size + header[name]["data_offsets"][0])
        file.write(value.view(torch.uint8).numpy().tobytes())
    checkpoint = open_checkpoint(str(path), FAMILIES["flux"], config=str(flux_config))
    checkpoint.skeleton(torch.bfloat16)
    assert checkpoint.files.keys() == tensors.keys() and checkpoint.aside == {}
    shift, scale = value.float().chunk(2)
    assert torch.equal(checkpoint.tensor("norm_out.linear.weight").float(), torch.cat([scale, shift]))


@pytest.mark.slow
def test_a_file_with_a_whole_pipeline(tmp_path, flux_config, capsys):
    """Text encoders, scales of theirs included, and VAE are set aside, and the command says so."""
    path, prefix = tmp_path / "flux.safetensors", "model.diffusion_model."
    tensors = {f"{prefix}{name}": ("BF16", shape) for name, shape in flux_layout().items()}
    others = {
        "text_encoders.clip_l.logit_scale": ("F32", ()),
        "text_encoders.t5xxl.transformer.x.weight": ("F8_E4M3", (4, 4)),
        "text_encoders.t5xxl.transformer.x.scale_weight": ("F32", ()),
        "vae.decoder.conv_in.weight": ("BF16", (4, 4, 3, 3)),
    }
    write(path, tensors | others)
    checkpoint = open_checkpoint(str(path), FAMILIES["flux"], config=str(flux_config))
    checkpoint.skeleton(torch.bfloat16)
    assert checkpoint.aside == {"text_encoders": 3, "vae": 1}
    assert checkpoint.files.keys() == tensors.keys()
    assert main(["flux", "--model", str(path), "--config", str(flux_config), "--latent-size", "8x8", "--dry-run"]) == 0
    said = f"set aside: 3 tensors of text_encoders and 1 tensors of vae in {path}, no part of the transformer"
    assert said in capsys.readouterr().out
    write(path, {name.removeprefix(prefix): value for name, value in (tensors | others).items()})
    with pytest.raises(CheckpointError):  # nothing says that the file is a whole pipeline
        open_checkpoint(str(path), FAMILIES["flux"], config=str(flux_config))


def test_one_tensor_too_many_is_named_without_a_config(tmp_path, monkeypatch, flux_config):
    from taylorseer_export.checkpoint import checkpoint, files

    flux_config.write_text(flux_config.read_text().replace("{", '{"_class_name": "FluxTransformer2DModel", '))
    for module in (files, checkpoint):
        monkeypatch.setattr(module, "PUBLISHED", tmp_path)
    tensors = {name: ("BF16", shape) for name, shape in flux_layout().items()}
    write(tmp_path / "flux.safetensors", tensors | {"img_in.mystery": ("F32", ())})
    with pytest.raises(Unread, match=r"1 of \d+ tensors are left unread by .* \(`img_in.mystery`"):
        open_checkpoint(str(tmp_path / "flux.safetensors"), FAMILIES["flux"])


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "I64", "BOOL"])
@pytest.mark.parametrize("family", FAMILIES)
def test_integer_weights_are_refused(tmp_path, family, dtype):
    """Without scales they are numbers of another size; one tensor is enough."""
    config, tensors = plain(family)
    name = next(reversed(tensors))
    shutil.copy(config, tmp_path / "config.json")
    write(tmp_path / WEIGHTS, tensors | {name: (dtype, tensors[name][1])})
    text = rf"has 1 tensors that do not fit its config \(`{name}` is {dtype}, expected floating point\)"
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tmp_path), FAMILIES[family]).skeleton(torch.float32)


def test_integer_weights_in_the_authors_layout(tmp_path, flux_config):
    tensors = {name: ("BF16", shape) for name, shape in flux_layout().items()}
    name = "double_blocks.0.img_attn.qkv.weight"
    write(tmp_path / "flux.safetensors", tensors | {name: ("I8", tensors[name][1])})
    checkpoint = open_checkpoint(str(tmp_path / "flux.safetensors"), FAMILIES["flux"], config=str(flux_config))
    with pytest.raises(CheckpointError, match=r"has 3 tensors .*`transformer_blocks.0.attn.to_q.weight` is I8, expect"):
        checkpoint.skeleton(torch.bfloat16)


def test_dtypes_that_hold_no_weights(tmp_path):
    config, tensors = plain("dit")
    shutil.copy(config, tmp_path / "config.json")
    for dtype in ("F4", "F6_E2M3", "F8_E8M0", "C64"):
        write(tmp_path / WEIGHTS, packed(tensors, dtype))
        with pytest.raises(CheckpointError, match=rf"is in a format with {dtype} \(\d+ tensors like .*plain float8"):
            open_checkpoint(str(tmp_path), FAMILIES["dit"])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_published_models_are_in_no_quantised_format(path):
    """No name of a real model is taken for a scale."""
    config = json.loads(path.read_text())
    with init_empty_weights():
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    found = {name: Header(tuple(value.shape), "BF16") for name, value in model.state_dict().items()}
    refuse_quantised(path, found)
    assert set_aside(found) == {} and not any(map(is_part, found))


@pytest.mark.parametrize("family", CONVERTED)
def test_authors_layouts_are_in_no_quantised_format(family):
    shapes = original(family)
    refuse_quantised(family, {name: Header(shape, "F8_E4M3") for name, shape in shapes.items()})
    assert set_aside(shapes) == {} and not any(map(is_part, shapes))


def test_what_diffusers_itself_drops(tmp_path):
    """Wan's class drops `norm_added_q`, which nothing of it reads."""
    config, tensors = plain("wan")
    shutil.copy(config, tmp_path / "config.json")
    write(tmp_path / WEIGHTS, tensors | {"blocks.0.attn2.norm_added_q.weight": ("BF16", (4,))})
    checkpoint = open_checkpoint(str(tmp_path), FAMILIES["wan"])
    checkpoint.skeleton(torch.float32)
    assert checkpoint.shapes == {name: shape for name, (_, shape) in tensors.items()}


# Files that are something else


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\3\4\0\0", "a PyTorch pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "a PyTorch pickle"),
        (b"\x80\x04\x95", "a PyTorch pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html>\n<html>", "a web page, not the file itself"),
        (b"\0" * 8, None),
    ],
)
def test_a_file_of_another_kind(tmp_path, start, what):
    """At each door: weights, a file of a folder, a LoRA."""
    name = "flux1.safetensors"
    (tmp_path / name).write_bytes(start + b"\0" * 100)
    folder = shutil.copytree(plain("flux")[0].parent, tmp_path / "folder")
    next(folder.glob("*.safetensors")).write_bytes(start + b"\0" * 100)
    text = rf"is {what}, expected safetensors; pass the checkpoint that it was made from" if what else "is damaged"
    for reference in (tmp_path / name, folder):
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(str(reference), FAMILIES["flux"])
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(None, FAMILIES["flux"], loras=[str(tmp_path / name)])


@pytest.mark.parametrize(("name", "what"), [("flux.gguf", "a GGUF file"), ("pytorch_model.bin", "a PyTorch pickle")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_weights_of_another_kind_alone(tmp_path, family, name, what):
    shutil.copy(plain(family)[0], tmp_path / "config.json")
    (tmp_path / name).write_bytes({"a GGUF file": b"GGUF\3\0\0\0", "a PyTorch pickle": b"PK\3\4"}[what])
    with pytest.raises(CheckpointError, match=rf"{name} is {what}, expected safetensors; pass the "):
        open_checkpoint(str(tmp_path), FAMILIES[family])
    assert open_checkpoint(str(tmp_path), FAMILIES[family], weightless=True).weightless


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "quanto", "modelopt", None])
def test_a_config_of_quantised_weights(tmp_path, family, method):
    """Whatever the tensors look like, plain float8 among them."""
    config, tensors = plain(family)
    shutil.copy(config, tmp_path / "config.json")
    write(tmp_path / WEIGHTS, packed(tensors, "F8_E4M3"))
    open_checkpoint(str(tmp_path), FAMILIES[family])
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": method, "bits": 4}))
    by = method or "a method it does not name"
    text = rf"config.json is of weights quantised by {by} \(quantization_config\), expected ModelOpt's FP8, "
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tmp_path), FAMILIES[family])


def test_an_index_whose_map_is_none(tmp_path):
    config, tensors = plain("dit")
    shutil.copy(config, tmp_path / "config.json")
    write(tmp_path / "a.safetensors", tensors)
    places = dict.fromkeys(tensors, "a.safetensors")
    wrong = [["a"], "a", 7, None, True, dict.fromkeys(tensors, 3), {n: [f] for n, f in places.items()}, {"a": {}}]
    for value in wrong:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": value}))
        with pytest.raises(CheckpointError, match=r"weight_map of .* is .*, expected a map of tensor names to files"):
            open_checkpoint(str(tmp_path), FAMILIES["dit"])
    for file in ("../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", ""):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places | {"proj_out_2.bias": file}}))
        with pytest.raises(CheckpointError, match=r"names shard .*, expected the name of a file beside it"):
            open_checkpoint(str(tmp_path), FAMILIES["dit"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    open_checkpoint(str(tmp_path), FAMILIES["dit"]).skeleton(torch.float32)


def test_scales_that_the_index_leaves_out(tmp_path):
    """They lie in the shards; an index without them would let them go unread."""
    config, tensors = plain("dit")
    shutil.copy(config, tmp_path / "config.json")
    scaled = packed(tensors, "F8_E5M2", weight_scale=("F32", one))
    write(tmp_path / "a.safetensors", scaled)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    text = rf"holds {len(scaled) - len(tensors)} tensors that .* does not place in it \(`.*weight_scale` is missing\)"
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(str(tmp_path), FAMILIES["dit"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_of_any_depth(tmp_path, text):
    folder = shutil.copytree(plain("dit")[0].parent, tmp_path / "dit")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is not readable JSON \(.*\), expected a diffusers config"):
        open_checkpoint(str(folder), FAMILIES["dit"])


def test_refusals_are_one_line_of_text(tmp_path, capsys):
    """Whatever a file or a path is called: no line breaks, no escape codes, no marks that turn the direction."""
    folder = shutil.copytree(plain("dit")[0].parent, tmp_path / "dit")
    weights = next(folder.glob("*.safetensors"))
    save_file(load_file(weights) | {"a\nb\x1b[31mred\u202e\x07": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder), FAMILIES["dit"]).skeleton(torch.float32)
    assert r"`a b\x1b[31mred\u202e\x07` is not known" in str(error.value)
    for bad in ("no\x1b]0;title\x07", "no\r\n\nsuch", "\udcff"):
        assert main(["dit", "--model", bad, "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said[:-1].isprintable()
    edit_json(folder / "config.json", lambda config: config.update(_class_name="\x1b[2J"))
    with pytest.raises(CheckpointError, match=r"is of class \\x1b\[2J, expected"):
        open_checkpoint(str(folder), FAMILIES["dit"])
