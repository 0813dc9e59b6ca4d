"""LoRA: low-rank updates that are added to a checkpoint's weights while these stream to the bundle.

    W' = W + scale (alpha / rank) B A

so that an exported graph is that of the updated model, at no cost of its own. What authors and trainers name otherwise
(kohya, BFL, XLabs, ComfyUI, the original Wan and Hunyuan names) goes through diffusers' own converters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from taylorseer_export.errors import CheckpointError

_PAIR = re.compile(r"(?:transformer\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default[_0-9]*)?\.weight")
_ALPHA = re.compile(r"(?:transformer\.)?(?P<module>.+)\.alpha")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a file


class _Update(NamedTuple):
    """The update of one weight: B `[out, rank]`, A `[rank, in]`, and what their product is multiplied by."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float


@dataclass(frozen=True)
class Lora:
    """One LoRA file, ready to be added.

    Attributes:
        given: What the user wrote.
        path: The file.
        scale: Its strength, dimensionless.
        updates: Weight name in diffusers -> its update.
    """

    given: str
    path: Path
    scale: float
    updates: dict[str, _Update]

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its update, in float32; as it is where the file has none for it."""
        if name not in self.updates or self.scale == 0:
            return weight
        up, down, factor = self.updates[name]
        delta = up.float().flatten(1) @ down.float().flatten(1)
        return weight.float() + self.scale * factor * delta.reshape(weight.shape)


def open_lora(given: str, loader: str, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Read `file` or `file:scale`.

    Args:
        given: What the user wrote.
        loader: Class in `diffusers.loaders` that knows how the LoRAs of the family are named; none if empty.
        shapes: Tensor name in diffusers -> shape, of the checkpoint it is added to.

    Raises:
        CheckpointError: The file is missing or damaged, in no layout that is known, or does not fit the checkpoint.
    """
    text, separator, last = given.rpartition(":")
    try:
        path, scale = (Path(text).expanduser(), float(last)) if separator else (Path(given).expanduser(), 1.0)
    except ValueError:
        path, scale = Path(given).expanduser(), 1.0
    if not math.isfinite(scale):
        raise CheckpointError(f"--lora {given} has scale {scale}, expected a finite number; write FILE:0.8")
    if not path.is_file():
        raise CheckpointError(f"--lora {path} is missing, expected a safetensors file; check the path")
    tensors, metadata = _read(path)
    known = _named_as_peft(path, tensors, loader)
    updates = _updates(path, known, metadata)
    _check(path, updates, shapes)
    return Lora(given, path, scale, updates)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, and peft's settings if it carries any."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(_METADATA, "{}")
        return tensors, {key.removeprefix("transformer."): value for key, value in dict(json.loads(text)).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), expected a complete safetensors file; download it again"
        ) from error


def _named_as_peft(path: Path, tensors: dict[str, torch.Tensor], loader: str) -> dict[str, torch.Tensor]:
    """The same under the names that peft gives them, which diffusers' converters end with."""
    if not loader or all(_PAIR.fullmatch(name) for name in tensors):
        return tensors
    import diffusers.loaders

    converter = getattr(diffusers.loaders, loader)
    try:
        found = converter.lora_state_dict(dict(tensors), return_alphas=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not converted by diffusers' {loader} ({_sentence(error)}), expected a LoRA of "
            "this family; check --lora and the family"
        ) from error
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    return {**converted, **(alphas or {})}


def _updates(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, _Update]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    strangers = []
    for name, value in tensors.items():
        if pair := _PAIR.fullmatch(name):
            sides.setdefault(pair["module"], {})[pair["side"]] = value
        elif alpha := _ALPHA.fullmatch(name):
            alphas[alpha["module"]] = float(value)
        else:
            strangers.append(name)
    strangers += [
        f"{module}.lora_{'AB'.replace(side, '')}.weight missing"
        for module, found in sides.items()
        for side in found
        if len(found) == 1
    ]
    strangers += [f"{module}.alpha alone" for module in alphas if module not in sides]
    if strangers or not sides:
        raise CheckpointError(
            f"{path} has {len(strangers)} tensors that are no low-rank pair of the transformer ({_some(strangers)}), "
            "expected only `<module>.lora_A.weight`, `<module>.lora_B.weight` and `<module>.alpha`, or a layout that "
            "diffusers converts; remove the others, or export without it"
        )
    return {
        f"{module}.weight": _Update(pair["B"], pair["A"], _factor(module, pair["A"].shape[0], alphas, metadata))
        for module, pair in sides.items()
    }


def _factor(module: str, rank: int, alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> float:
    """alpha / rank, from the tensors or else from peft's settings; 1 where neither says anything."""
    alpha = alphas.get(module)
    if alpha is None and "lora_alpha" in metadata:
        special = dict(metadata.get("alpha_pattern") or {})
        alpha = next((v for k, v in special.items() if module == k or module.endswith(f".{k}")), metadata["lora_alpha"])
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def _check(path: Path, updates: Mapping[str, _Update], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"`{name}` is not known" for name in updates if name not in shapes]
    for name, (up, down, _) in updates.items():
        seen = (up.shape[0], math.prod(down.shape[1:]))
        if name in shapes and (up.shape[1] != down.shape[0] or seen != (shapes[name][0], math.prod(shapes[name][1:]))):
            wrong.append(f"`{name}` is {list(shapes[name])}, its pair {list(up.shape)} x {list(down.shape)}")
    if wrong:
        raise CheckpointError(
            f"{path} has {len(wrong)} updates that do not fit the checkpoint ({_some(wrong)}), expected pairs for its "
            "weights; check --lora, --model and the family"
        )


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _some(complaints: list[str]) -> str:
    return "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
