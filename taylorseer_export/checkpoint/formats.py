"""Quantised formats by the names and dtypes of their tensors, and what of a file is no part of the transformer.

A checkpoint is read as it stands: one tensor of the model from the tensors of the files that make it. Whatever a
format keeps beside its weights (scales, zero points, codebooks) would go unread, and the weights would be off by it.
Formats whose scales are read are in `packed`; the others are told here, and all of them where a LoRA has one. They are
told by names that their authors publish: ComfyUI's scaled fp8, NVIDIA ModelOpt, BFL, bitsandbytes, torchao,
optimum-quanto, GPTQ, AWQ and Nunchaku.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from taylorseer_export.checkpoint.files import Header
from taylorseer_export.errors import CheckpointError

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"})

# Pattern of a tensor's name -> the format that has it; the first that is found names the file.
_FORMATS = {
    r"(^|\.)(wscales|wtscale|wcscales|smooth_factor(_orig)?)$": "Nunchaku's SVDQuant",
    r"(^|[._])(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"(^|\.)(weight\.)?(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$|\.weight_format$": "bitsandbytes",
    r"(^|[._])weight_scale_2$": "NVFP4",
    r"(^|\.)(weight|input|output)_quantizer\.": "ModelOpt's format",
    r"(^|[._])weight_(qdata|zero_point)$|\.weight(:|\.(qdata|tensor_impl|int_data|zero_point)\b)": "torchao",
    r"\.(weight|bias)\._(data|scale|shift)$": "optimum-quanto's format",
    r"(^|[._])weight_scale_inv$": "block-scaled fp8",
    r"(^|[._])(scale_weight|scale_input|comfy_quant)$": "ComfyUI's scaled fp8",
}
_SCALE = re.compile(r"(^|[._])(?P<part>weight_scale|input_scale)$")
_MARKER = re.compile(r"(^|\.)scaled_fp8$")
ONE_WITH_ALL = "model.diffusion_model."  # the transformer, in a file that has the other parts of a pipeline too
_OTHER_PARTS = ("text_encoders.", "cond_stage_model.", "conditioner.", "first_stage_model.", "vae.")


def set_aside(names: Iterable[str], ignored: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """What is rightly left unread -> the names of its tensors.

    - the text encoders and the VAE of a file that holds a whole pipeline: a bundle is the transformer alone;
    - `scaled_fp8`, a mark without numbers that says that scales may follow: those are refused where they do;
    - what diffusers' own class of the model drops.

    Args:
        names: Tensors of the files.
        ignored: Patterns of names that the model's class drops (`_keys_to_ignore_on_load_unexpected`).
    """
    names = list(names)
    whole = any(name.startswith(ONE_WITH_ALL) for name in names)
    found: dict[str, list[str]] = {}
    for name in names:
        part = next((part for part in _OTHER_PARTS if whole and name.startswith(part)), None)
        if part is not None:
            found.setdefault(part, []).append(name)
        elif _MARKER.search(name):
            found.setdefault("scaled_fp8", []).append(name)
        elif any(re.search(pattern, name) for pattern in ignored):
            found.setdefault("ignored", []).append(name)
    return {what: tuple(of) for what, of in found.items()}


def parts_of_a_pipeline(aside: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Of what was set aside, the parts that a reader should hear of -> their number of tensors."""
    return {part.rstrip("."): len(names) for part, names in aside.items() if part in _OTHER_PARTS}


def refuse_quantised(where: object, found: Mapping[str, Header], also: str = "") -> None:
    """A file in a quantised format, by name.

    Args:
        where: The file or folder, to be named.
        found: Tensor name -> header, of what is to be read.
        also: Quantised formats that are read there, for the error.

    Raises:
        CheckpointError: Its tensors are those of a quantised format, or in a dtype that holds no weights.
    """
    kind, names = _format(found)
    if not names:
        names = [name for name, header in found.items() if header.dtype not in FLOATS | INTEGERS]
        kind = "a format with {}".format(" and ".join(sorted({found[name].dtype for name in names})))
    if names:
        raise CheckpointError(
            f"{where} is in {kind} ({len(names)} tensors like {_some(names)}), expected {also}weights that need no "
            "scales, in float32, float16, bfloat16 or plain float8; pass the checkpoint that it was made from"
        )


def _format(found: Mapping[str, Header]) -> tuple[str, list[str]]:
    """The format, and the tensors that tell it; none for weights as they are."""
    for pattern, kind in _FORMATS.items():
        names = [name for name in found if re.search(pattern, name)]
        if names:
            return kind, names
    scales = [name for name in found if _SCALE.search(name)]
    if not scales:
        return "", []
    of = [found[_weight_of(name)] for name in scales if _weight_of(name) in found]
    if any(found[name].dtype == "F8_E8M0" for name in scales):
        return "MXFP8 or MXFP4", scales
    if any(header.dtype in ("U8", "F4") for header in of):
        return "NVFP4", scales
    if any(header.dtype == "I8" for header in of):
        return "int8 with scales", scales
    if any(len(found[name].shape) == 1 and found[name].shape[0] > 1 for name in scales):
        return "fp8 with a scale for each row, as BFL's fp8r", scales
    if any(name.endswith("input_scale") for name in scales):
        return "ModelOpt's FP8 or ComfyUI's scaled fp8", scales
    return "scaled fp8, as ComfyUI's", scales


def _weight_of(scale: str) -> str:
    """`a.weight_scale` or `a.input_scale` -> `a.weight`."""
    return _SCALE.sub(lambda match: f"{match[1]}weight", scale)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return f"{shown}, …" if len(names) > 3 else shown
