"""Writers of checkpoints in the quantised formats that are published, by the quantisers of those who publish them.

ComfyUI's are comfy-kitchen's, in its backend of plain torch; BFL's and ModelOpt's are diffusers' own, in float32. Each
format makes, of a module and its weight, the tensors that a file has and the weight that they stand for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file


def _kitchen():
    from comfy_kitchen.backends.eager import quantization

    return quantization


def _bfl():
    from diffusers.quantizers.bfl import utils

    return utils


def hint(**entries):
    """A layer's format as ComfyUI has it beside the weight: JSON in bytes."""
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def comfy_fp8(weight, dtype=torch.float8_e4m3fn):
    scale = weight.abs().max() / torch.finfo(dtype).max
    values = _kitchen().quantize_per_tensor_fp8(weight, scale, dtype)
    return values, scale, _kitchen().dequantize_per_tensor_fp8(values, scale, torch.float32)


def hinted_fp8(module, weight):
    values, scale, expected = comfy_fp8(weight)
    said = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    parts = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5), "comfy_quant": hint(**said)}
    return parts, expected


def old_fp8(module, weight):
    values, scale, expected = comfy_fp8(weight)
    return {"weight": values, "scale_weight": scale[None], "scale_input": torch.ones(1)}, expected


def e5m2(module, weight):
    values, scale, expected = comfy_fp8(weight, torch.float8_e5m2)
    return {"weight": values, "weight_scale": scale}, expected


def comfy_nvfp4(module, weight):
    second = weight.abs().max() / (448 * 6)
    values, scale = _kitchen().quantize_nvfp4(weight, second)
    expected = _kitchen().dequantize_nvfp4(values, second, scale, torch.float32)
    return {"weight": values, "weight_scale": scale, "weight_scale_2": second}, expected


def mxfp8(module, weight):
    values, scale = _kitchen().quantize_mxfp8(weight)
    expected = _kitchen().dequantize_mxfp8(values, scale, torch.float32)
    return {"weight": values, "weight_scale": scale.view(torch.uint8), "comfy_quant": hint(format="mxfp8")}, expected


def int8(module, weight):
    values, scale = _kitchen().quantize_int8_tensorwise(weight)
    expected = _kitchen().dequantize_int8_simple(values, scale)
    return {"weight": values, "weight_scale": scale, "comfy_quant": hint(format="int8_tensorwise")}, expected


def rotated_int8(module, weight):
    values, scale = _kitchen().quantize_int8_convrot_weight(weight, 16)
    said = hint(format="int8_tensorwise", convrot=True, convrot_groupsize=16)
    expected = _kitchen().dequantize_int8_convrot_weight(values, scale, 16)
    return {"weight": values, "weight_scale": scale, "comfy_quant": said}, expected


def fp8r(module, weight):
    values, scale = _bfl().quantize_fp8r(weight)
    return {"weight": values, "weight_scale": scale}, _bfl().dequantize_fp8r(values, scale)


def bfl_nvfp4(module, weight):
    values, scale, second = _bfl().quantize_nvfp4(weight)
    parts = {"weight": values, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.tensor(0.25)}
    return parts, _bfl().dequantize_nvfp4(values, scale, second)


def modelopt_fp8(module, weight):
    values, scale, expected = comfy_fp8(weight)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, expected


def cast(module, weight):
    values = weight.to(torch.float8_e4m3fn)
    return {"weight": values}, values.float()


@dataclass(frozen=True)
class Format:
    """One published format.

    Attributes:
        write: (module, weight) -> its tensors by their last name, and the weight in float32.
        said: How the first line of an export calls it.
        hinted: What the header says of each layer, if it does.
        marker: What stands beside the weights.
        config: What ModelOpt puts into config.json.
        kept: Whether an engine can take it as it is.
    """

    write: Callable
    said: str
    hinted: dict | None = None
    marker: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    kept: bool = True


def modelopt(algorithm):
    return {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"]}}


FORMATS = {
    "comfy fp8": Format(hinted_fp8, "ComfyUI's scaled fp8"),
    "comfy fp8 of before": Format(
        old_fp8, "ComfyUI's scaled fp8", marker={"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    ),
    "comfy fp8 e5m2": Format(e5m2, "ComfyUI's scaled fp8", hinted={"format": "float8_e5m2"}),
    "comfy nvfp4": Format(comfy_nvfp4, "ComfyUI's nvfp4", hinted={"format": "nvfp4"}),
    "comfy mxfp8": Format(mxfp8, "ComfyUI's mxfp8"),
    "comfy int8": Format(int8, "ComfyUI's int8"),
    "comfy rotated int8": Format(rotated_int8, "ComfyUI's int8 in rotated groups", kept=False),
    "fp8 without a maker": Format(e5m2, "scaled fp8"),
    "bfl fp8r": Format(fp8r, "BFL's fp8r"),
    "bfl nvfp4": Format(bfl_nvfp4, "BFL's nvfp4"),
    "modelopt fp8": Format(modelopt_fp8, "ModelOpt's fp8", config=modelopt("FP8")),
    "modelopt nvfp4": Format(bfl_nvfp4, "ModelOpt's nvfp4", config=modelopt("NVFP4")),
    "cast": Format(cast, "plain float8_e4m3fn"),
}


def quantised(format, state):
    """A state dict in a format: the tensors of the file, the header's metadata, the weights, how many are quantised.

    Matrices whose sides divide by 32 are; the others stay as they are.
    """
    tensors, expected, layers = dict(format.marker), {}, {}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module == name or value.ndim != 2 or any(side % 32 for side in value.shape):
            tensors[name] = expected[name] = value
            continue
        parts, expected[name] = format.write(module, value)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        layers[module] = format.hinted
    said = {"format_version": "1.0", "layers": layers}
    metadata = {"_quantization_metadata": json.dumps(said)} if format.hinted else {}
    return tensors, metadata, expected, len(layers)


def save(path, tensors, metadata):
    """Write a file; ties between tensors are cut."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
