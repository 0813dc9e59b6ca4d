"""Weights that files hold in a quantised format: which tensors make one, told by their names, dtypes and shapes.

    ComfyUI    X.weight beside X.weight_scale or X.scale_weight, and X.input_scale or X.scale_input. Its format stands
               in `X.comfy_quant`, JSON in bytes, or for all layers in the header's `_quantization_metadata`; files from
               before that have fp8 alone, marked by `scaled_fp8`. Block scales of its nvfp4 and mxfp8 lie in the tiles
               that tensor cores read, and the first of two 4-bit values in the high half of its byte.
    BFL        fp8r, with a scale for each row, and nvfp4; X.weight_scale, X.weight_scale_2, X.input_scale
    ModelOpt   fp8 and nvfp4 under the same names, with `quantization_config` in config.json or hf_quant_config.json

Where nothing says ComfyUI, block scales are in plain order and the first of two values is in the low half, as diffusers
reads BFL's and ModelOpt writes. Every scale has its weight, every fp8 weight of a file with scales has its scale, and a
scale of another shape, or that is NaN, infinite or negative, is refused: left out, it would turn the picture white.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from taylorseer_export.checkpoint.files import Header, json_object, opened
from taylorseer_export.checkpoint.formats import ONE_WITH_ALL, refuse_quantised
from taylorseer_export.checkpoint.quantised import BLOCK, Quantised, plain_order
from taylorseer_export.errors import CheckpointError

FP8 = ("F8_E4M3", "F8_E5M2")
ALSO_READ = "fp8 and nvfp4 as ComfyUI, BFL or ModelOpt write them, ComfyUI's mxfp8 and int8, GGUF, or "
# Last part of a tensor's name -> what of a quantised weight it is.
_ROLES = {
    "weight_scale": "scale",
    "scale_weight": "scale",
    "weight_scale_2": "second",
    "input_scale": "input",
    "scale_input": "input",
    "comfy_quant": "hint",
}
# Format that ComfyUI names -> ours, and the dtype of its weights.
_HINTS = {
    "float8_e4m3fn": ("fp8", "F8_E4M3"),
    "float8_e5m2": ("fp8", "F8_E5M2"),
    "int8_tensorwise": ("int8", "I8"),
    "mxfp8": ("mxfp8", "F8_E4M3"),
    "nvfp4": ("nvfp4", "U8"),
}
# What else a hint may say: how products are taken, and what the weight was before.
_NO_MATTER = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}
_METADATA = "_quantization_metadata"


class Part(NamedTuple):
    """A tensor of a file."""

    name: str
    path: Path
    header: Header

    def read(self) -> torch.Tensor:
        with opened(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class Packed:
    """One weight in a quantised format.

    Attributes:
        label: The format, as a reader would call it.
        format: Of `quantised.FORMATS`.
        weight: Its values.
        parts: `scale`, and where the format has them `second` and `input` -> the tensor.
        comfy: Whether it is laid out as ComfyUI does.
        rotation: As in `Quantised`.
    """

    label: str
    format: str
    weight: Part
    parts: Mapping[str, Part]
    comfy: bool = False
    rotation: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = self.weight.header.shape
        return (*shape[:-1], 2 * shape[-1]) if self.format == "nvfp4" and shape else shape

    @property
    def header(self) -> Header:
        """Of what it is read as."""
        return Header(self.shape, "F32")

    @property
    def paths(self) -> set[Path]:
        return {part.path for part in (self.weight, *self.parts.values())}

    def quantised(self) -> Quantised:
        """It, read from its files and brought to the plain layout.

        Raises:
            CheckpointError: A scale is NaN, infinite or negative.
        """
        values, scale = self.weight.read(), self._scale("scale")
        if self.format in BLOCK:
            rows, columns = self.shape
            if self.comfy:
                scale = plain_order(scale, rows, columns // BLOCK[self.format])
                values = (values << 4) | (values >> 4) if self.format == "nvfp4" else values
        else:
            scale = scale.float().reshape([] if scale.numel() == 1 else [-1])
        second, given = (self._scale(role).float().reshape([]) if role in self.parts else None for role in _SCALARS)
        return Quantised(self.format, values, scale, second, given, self.rotation)

    def kept(self) -> Quantised | None:
        """It, where an engine can take it as it is: a rotated weight is one of another model."""
        return None if self.rotation else self.quantised()

    def dequantised(self) -> torch.Tensor:
        """The weight in float32."""
        return self.quantised().dequantised()

    def check(self, where: object) -> None:
        """Refuse scales of another dtype or shape.

        Raises:
            CheckpointError: One is.
        """
        (rows, *_), columns = self.shape or (1,), (self.shape or (1,))[-1]
        if self.rotation and columns % self.rotation:
            raise CheckpointError(
                f"`{self.weight.name}` of {where} is {list(self.shape)}, expected rows that divide into groups of "
                f"{self.rotation} as its hint says; download it again"
            )
        if self.format in BLOCK:
            block = BLOCK[self.format]
            if len(self.shape) != 2 or columns % block:
                raise CheckpointError(
                    f"`{self.weight.name}` of {where} is {list(self.shape)} in {self.label}, expected a matrix whose "
                    f"rows divide into blocks of {block}; pass the checkpoint that it was made from"
                )
            shape = (rows, columns // block)
            shape = (_padded(rows, 128), _padded(shape[1], 4)) if self.comfy else shape
            dtypes = ("F8_E4M3",) if self.format == "nvfp4" else ("F8_E8M0", "U8")
            self._expect(where, "scale", dtypes, [shape])
        else:
            one, each = [(), (1,), (1, 1)], [(rows,), (rows, *[1] * (len(self.shape) - 1))]
            self._expect(where, "scale", _NUMBERS, one if self.comfy and self.format == "fp8" else one + each)
        for role in _SCALARS:
            if role in self.parts:
                self._expect(where, role, _NUMBERS, [(), (1,), (1, 1)])

    def _expect(self, where: object, role: str, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
        part = self.parts[role]
        if part.header.dtype not in dtypes or part.header.shape not in shapes:
            kinds = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes if shape not in ((1,), (1, 1))))
            raise CheckpointError(
                f"`{part.name}` of {where} is {part.header.dtype} {list(part.header.shape)}, expected {dtypes[0]} "
                f"{kinds}, as a scale of `{self.weight.name}` in {self.label}; download it again, or pass the "
                "checkpoint that it was made from"
            )

    def _scale(self, role: str) -> torch.Tensor:
        part = self.parts[role]
        found = part.read()
        if self.format == "mxfp8" and role == "scale":
            found = found.view(torch.float8_e8m0fnu)
        refuse_bad_scale(part, found)
        return found


_SCALARS = ("second", "input")
_NUMBERS = ("F32", "F16", "BF16")


def refuse_bad_scale(part: Part, scale: torch.Tensor) -> None:
    """Refuse a scale that no weight can have been divided by.

    Raises:
        CheckpointError: One is NaN, infinite or negative; names it.
    """
    numbers = scale.float()
    bad = int((~(numbers.isfinite() & (numbers >= 0))).sum())
    if bad:
        raise CheckpointError(
            f"`{part.name}` of {part.path} has {bad} of {scale.numel()} values that are NaN, infinite or negative, "
            "expected scales; download it again, or pass the checkpoint that it was made from"
        )


def is_fp8(dtype: str) -> bool:
    """Whether a dtype, by its name in safetensors, is one of weights in eight bits of floating point."""
    return dtype.startswith("F8_E") and dtype != "F8_E8M0"


def is_part(name: str) -> bool:
    """Whether a name is that of a scale or a hint."""
    return name.rpartition(".")[2] in _ROLES


def packed_weights(
    where: object,
    files: Mapping[str, Path],
    headers: Mapping[str, Header],
    marked: bool = False,
    algorithm: str | None = None,
) -> dict[str, Packed]:
    """The quantised weights among the tensors of safetensors files, by their names there.

    Args:
        where: The file or folder, to be named.
        files: Tensor name -> file, of all that is to be read.
        headers: Tensor name -> header, of the same.
        marked: Whether a `scaled_fp8` stands among them.
        algorithm: What ModelOpt's config says that they are in.

    Raises:
        CheckpointError: A scale has no weight or a weight no scale, a scale is of another shape or no number, a hint
            names a format that is not known, or the config speaks of scales where there are none.
    """
    modules: dict[str, dict[str, Part]] = {}
    for name in headers:
        module, _, last = name.rpartition(".")
        if role := _ROLES.get(last):
            part, parts = Part(name, files[name], headers[name]), modules.setdefault(module, {})
            if role in parts:
                raise CheckpointError(
                    f"{where} has `{parts[role].name}` and `{name}`, expected one of them; download it again"
                )
            parts[role] = part
    hints, hinted = _hints(where, set(files.values()), headers, modules)
    found = {}
    for module in (*modules, *(module for module in hints if module not in modules)):
        one = _packed(
            where, module, files, headers, modules.get(module, {}), hints.get(module), (marked, algorithm, hinted)
        )
        one.check(where)
        found[one.weight.name] = one
    scaleless = [n for n, header in headers.items() if is_fp8(header.dtype) and n not in found and not is_part(n)]
    if scaleless and (found or marked or algorithm):
        module = scaleless[0].removesuffix(".weight")
        raise CheckpointError(
            f"`{scaleless[0]}` of {where} is {headers[scaleless[0]].dtype} without a scale, expected "
            f"`{module}.weight_scale` or `{module}.scale_weight`, since the file says that its fp8 weights have some "
            f"({len(scaleless)} have none); download it again, or pass the checkpoint that it was made from"
        )
    if algorithm and not found:
        raise CheckpointError(
            f"{where} says that its weights are in ModelOpt's {algorithm} and has no scales, expected them; download "
            "it again, or pass the checkpoint that it was made from"
        )
    _check_numbers(found.values())
    return found


def _packed(
    where: object,
    module: str,
    files: Mapping[str, Path],
    headers: Mapping[str, Header],
    parts: Mapping[str, Part],
    hint: Mapping[str, Any] | None,
    said: tuple[bool, str | None, bool],
) -> Packed:
    """The weight of one module, from parts and hint; `said`: the mark, the config, whether other layers have hints."""
    name, (marked, algorithm, hinted) = f"{module}.weight", said
    seen = parts["hint"].name if "hint" in parts else next((part.name for part in parts.values()), _METADATA)
    if name not in headers:
        raise CheckpointError(
            f"`{seen}` of {where} is of a weight `{name}` that is missing, expected both; download it again"
        )
    weight = Part(name, files[name], headers[name])
    dtype, rotation = weight.header.dtype, 0
    if hint is not None:
        kind, expected = _HINTS[hint["format"]]
        rotation = int(hint.get("convrot_groupsize", 256)) if hint.get("convrot") else 0
    else:
        kind, expected = "nvfp4" if dtype == "U8" else "fp8", "F8_E4M3"
        unsaid = dtype == "I8" or (dtype in FP8 and "scale" in parts and parts["scale"].header.dtype == "F8_E8M0")
        if unsaid:  # several tools write these, in orders and rotations of their own
            refuse_quantised(where, {n: headers[n] for n in (name, *(p.name for p in parts.values()))}, ALSO_READ)
        expected = dtype if dtype in (*FP8, "U8") else expected
        if dtype == "U8" and (hinted or marked):
            raise CheckpointError(
                f"`{name}` of {where} is U8 with scales and has no hint, expected one as other layers have; download "
                "it again"
            )
    if dtype != expected:
        raise CheckpointError(
            f"`{name}` of {where} is {dtype}, expected {expected} as `{seen}` says; download it again, or pass the "
            "checkpoint that it was made from"
        )
    needed = {"nvfp4": ("scale", "second")}.get(kind, ("scale",))
    if kind == "nvfp4" and hint is None:
        needed = (*needed, "input")  # BFL's and ModelOpt's have it; without it nothing tells in which order scales are
    for role in needed:
        if role not in parts:
            missing = {"scale": "weight_scale", "second": "weight_scale_2", "input": "input_scale"}[role]
            raise CheckpointError(
                f"`{name}` of {where} is {dtype} and has no `{module}.{missing}`, expected it in {kind}; download it "
                "again, or pass the checkpoint that it was made from"
            )
    if kind != "nvfp4" and "second" in parts:
        raise CheckpointError(
            f"`{parts['second'].name}` of {where} is beside a weight in {dtype}, expected nvfp4 in U8; download "
            "it again"
        )
    comfy = hint is not None or marked or parts["scale"].name.endswith(".scale_weight")
    kept = {role: part for role, part in parts.items() if role != "hint"}
    return Packed(_label(kind, comfy, rotation, kept["scale"], algorithm), kind, weight, kept, comfy, rotation)


def _label(kind: str, comfy: bool, rotation: int, scale: Part, algorithm: str | None) -> str:
    if comfy:
        return f"ComfyUI's {'scaled ' * (kind == 'fp8')}{kind}{' in rotated groups' * bool(rotation)}"
    if algorithm:
        return f"ModelOpt's {kind}"
    return {"nvfp4": "BFL's nvfp4"}.get(kind, "BFL's fp8r" if math.prod(scale.header.shape) > 1 else "scaled fp8")


def _hints(
    where: object, paths: Iterable[Path], headers: Mapping[str, Header], modules: Mapping[str, Mapping[str, Part]]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Module -> what ComfyUI says of its weight, in tensors and headers, which agree; and whether it says anything."""
    found: dict[str, dict[str, Any]] = {}
    given: list[tuple[str, str, Any]] = []
    hinted = False
    for path in sorted(paths):
        names = {
            parts["hint"].name: m for m, parts in modules.items() if "hint" in parts and parts["hint"].path == path
        }
        with opened(path) as file:
            given += [(names[n], n, _json(where, n, bytes(file.get_tensor(n)))) for n in names]
            text = (file.metadata() or {}).get(_METADATA)
        if text is not None:
            layers = _json(where, _METADATA, text.encode()).get("layers")
            if not isinstance(layers, dict):
                raise CheckpointError(
                    f"{_METADATA} of {path} has no map of layers, expected one of layers to formats; download it again"
                )
            hinted = hinted or bool(layers)
            given += [(m, _METADATA, hint) for layer, hint in layers.items() if (m := _module(layer, headers))]
    for module, name, hint in given:
        _check_hint(where, module, name, hint)
        if module in found and found[module]["format"] != hint["format"]:
            raise CheckpointError(
                f"`{module}` of {where} is {found[module]['format']} by one hint and {hint['format']} by another, "
                "expected one format; download it again"
            )
        found[module] = {**found.get(module, {}), **hint}
    return found, hinted or bool(found)


def _module(layer: str, headers: Mapping[str, Header]) -> str | None:
    """The module that a header means by a layer; None for that of a part of the pipeline that was set aside."""
    for module in (layer, f"{ONE_WITH_ALL}{layer}", layer.removeprefix(ONE_WITH_ALL)):
        if f"{module}.weight" in headers:
            return module
    return layer if layer.split(".", 1)[0] in {name.split(".", 1)[0] for name in headers} else None


def _check_hint(where: object, module: str, name: str, hint: Any) -> None:
    if not isinstance(hint, dict) or hint.get("format") not in _HINTS:
        seen = str(hint.get("format") if isinstance(hint, dict) else hint)[:40]
        raise CheckpointError(
            f"`{name}` of {where} says that `{module}` is in format {seen}, expected {', '.join(_HINTS)}; pass the "
            "checkpoint that it was made from"
        )
    matters = {key for key, value in hint.items() if value} - _NO_MATTER
    size = hint.get("convrot_groupsize", 256)
    rotated = hint["format"] == "int8_tensorwise" and bool(hint.get("convrot"))
    strange = matters - {"convrot_groupsize"} - ({"convrot"} if rotated else set())
    if strange or (rotated and (type(size) is not int or size < 4 or 4 ** round(math.log(size, 4)) != size)):
        said = ", ".join(f"{key} {str(hint.get(key))[:40]}" for key in sorted(strange) or ["convrot_groupsize"])
        raise CheckpointError(
            f"`{name}` of {where} says {said} of `{module}` in {hint['format']}, expected what is known of that "
            "format; pass the checkpoint that it was made from"
        )


def _json(where: object, name: str, text: bytes) -> dict[str, Any]:
    try:
        return json_object(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{name}` of {where} is not readable JSON ({error}), expected the format of a layer; download it again"
        ) from error


def _check_numbers(weights: Iterable[Packed]) -> None:
    """Read every scale of a tensor or of its rows, each file opened once; those of blocks wait for their weight."""
    small = [p for one in weights for role, p in one.parts.items() if not (role == "scale" and one.format in BLOCK)]
    for path in sorted({part.path for part in small}):
        with opened(path, "pt") as file:
            for part in small:
                if part.path == path:
                    refuse_bad_scale(part, file.get_tensor(part.name))


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to
