"""LoRA: low-rank updates that are added to a checkpoint's weights while these stream to the bundle.

    W' = W + s (alpha / rank) B A + s D                        with s the scale that the user gives
    W' = m (W + s (alpha / rank) B A) / |W + s (alpha / rank) B A|      DoRA, with the norm of each output row

so that an exported graph is that of the updated model, at no cost of its own. What authors and trainers name otherwise
(kohya, BFL, XLabs, ComfyUI, ai-toolkit, the original Wan and Hunyuan names) goes where diffusers' own converters send
it.

DoRA is as peft defines it (`peft.tuners.lora.dora`: `linalg.norm(weight + scaling * lora_weight, dim=1)`, over all but
the first axis for convolutions), with the scale inside the norm; at a scale of 0 the magnitudes still hold. ComfyUI
instead goes straight from W to W' by its strength; at 1 the two agree. A magnitude `[1, in]`, as LyCORIS writes it with
`wd_on_output` off, is one of columns: there the norm is that of each.

No tensor of a file goes unread: what is not added is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from taylorseer_export.checkpoint.files import headers, json_object, opened, tensor_names
from taylorseer_export.checkpoint.formats import refuse_quantised
from taylorseer_export.checkpoint.lora_names import (
    Pair,
    Place,
    Side,
    named_in_model,
    places_of_pairs,
    places_of_weights,
    some,
)
from taylorseer_export.errors import CheckpointError

# Part of an update -> how a file names it, after its module.
_PARTS = {
    "down": re.compile(r"(?P<module>.+?)(?:\.lora_A(?:\.\w+)?|\.lora_down|\.lora\.down|\.down)\.weight"),
    "up": re.compile(r"(?P<module>.+?)(?:\.lora_B(?:\.\w+)?|\.lora_up|\.lora\.up|\.up)\.weight"),
    "alpha": re.compile(r"(?P<module>.+)\.alpha"),
    "magnitude": re.compile(r"(?P<module>.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.\w+){0,2})"),
    "scaled_bias": re.compile(r"(?P<module>.+?)\.lora_B(?:\.\w+)?\.bias"),
    "bias": re.compile(r"(?P<module>.+)\.diff_b"),
    "difference": re.compile(r"(?P<module>.+)\.diff"),
}
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:lora_(?:prior_)?te\d?_|te\d?_|text_encoders?(?:_\d)?\.|text_model\.|cond_stage_model\."
    r"|conditioner\.|clip_[lgh]\.|t5xxl\.)"
)
SKIPPABLE = ("text-encoder",)  # what a user may leave out on purpose
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a file


class _Update(NamedTuple):
    """The update of one tensor, of which some parts may be missing.

    B `[out, rank]` and A `[rank, in]`, what their product is multiplied by, the magnitude of DoRA (`[out]`, or
    `[1, in]` of columns), and a difference with the tensor's shape.
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    factor: float = 1.0
    magnitude: torch.Tensor | None = None
    difference: torch.Tensor | None = None


@dataclass(frozen=True)
class Lora:
    """One LoRA file, ready to be added.

    Attributes:
        given: What the user wrote.
        path: The file.
        scale: Its strength, dimensionless.
        updates: Tensor name in diffusers -> its update.
        skipped: What was left out on purpose -> its number of tensors.
    """

    given: str
    path: Path
    scale: float
    updates: dict[str, _Update]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor with its update, in float32; as it is where the file has none for it."""
        update = self.updates.get(name)
        if update is None or (self.scale == 0 and update.magnitude is None):
            return weight
        total = weight.float()
        if update.up is not None and update.down is not None:
            delta = update.up.float().flatten(1) @ update.down.float().flatten(1)
            total = total + self.scale * update.factor * delta.reshape(weight.shape)
        if update.difference is not None:
            total = total + self.scale * update.factor * update.difference.float().reshape(weight.shape)
        return total if update.magnitude is None else _with_magnitude(total, update.magnitude)


def _with_magnitude(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The weight with each row, or each column, brought to its magnitude; one of zeros has no direction and stays."""
    columns = magnitude.ndim == 2
    flat = weight.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=0 if columns else 1, keepdim=True, dtype=torch.float64)
    wanted = magnitude.double() if columns else magnitude.double()[:, None]
    factor = torch.where(norm > 0, wanted / norm.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return (flat * factor).to(weight.dtype).reshape(weight.shape)


def open_lora(
    given: str, model_class: str, loader: str, shapes: Mapping[str, tuple[int, ...]], skip: Iterable[str] = ()
) -> Lora:
    """Read `file` or `file:scale`.

    Args:
        given: What the user wrote.
        model_class: Class of the transformer in diffusers.
        loader: Class in `diffusers.loaders` that knows how the LoRAs of the family are named; none if empty.
        shapes: Tensor name in diffusers -> shape, of the checkpoint it is added to.
        skip: What to leave out on purpose, of SKIPPABLE.

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
    tensors, settings = _read(path)
    encoders = [name for name in tensors if _TEXT_ENCODER.match(name)]
    skipped = encoders if "text-encoder" in skip else []
    tensors = {name: value for name, value in tensors.items() if name not in set(skipped)}
    modules = _modules(path, tensors, bool(encoders) and not skipped)
    updates = _updates(path, modules, settings, model_class, loader, shapes)
    return Lora(given, path, scale, updates, {"text-encoder": len(skipped)} if skipped else {})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, and peft's settings if it carries any."""
    refuse_quantised(path, headers(dict.fromkeys(tensor_names(path), path)))
    with opened(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = (file.metadata() or {}).get(_METADATA, "{}")
    try:
        settings = json_object(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({_METADATA}: {error}), expected a complete safetensors file; download it again"
        ) from error
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    if problem := _unusable(settings):
        raise CheckpointError(
            f"{path} is damaged ({_METADATA}: {problem}), expected peft's settings; download it again"
        )
    arrays = {name: value for name, value in tensors.items() if value.is_floating_point() and value.ndim > 0}
    infinite = [name for name, value in arrays.items() if not value.float().isfinite().all()]
    if infinite:
        raise CheckpointError(
            f"{path} has {len(infinite)} tensors with values that are NaN or infinite ({some(infinite)}), expected "
            "finite numbers; its training went wrong, or download it again"
        )
    return tensors, settings


def _unusable(settings: Mapping[str, Any]) -> str | None:
    """What of peft's settings says no strength; None where all that is read of them does."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return f"alpha_pattern is a {type(patterns).__name__}"
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"alpha_pattern has {pattern!r}, which is no pattern: {error}"
    alphas = [*patterns.values(), *([settings["lora_alpha"]] if "lora_alpha" in settings else [])]
    wrong = [alpha for alpha in alphas if type(alpha) not in (int, float) or not math.isfinite(alpha)]
    return f"an alpha is {str(wrong[0])[:40]!r}" if wrong else None


def _modules(path: Path, tensors: Mapping[str, torch.Tensor], encoders: bool) -> dict[str, dict[str, Any]]:
    """Module of the file -> part -> its tensor, and under the part's name with `:name` its name in the file.

    Raises:
        CheckpointError: A tensor is no part of an update that is known here, or in no dtype of one.
    """
    modules: dict[str, dict[str, Any]] = {}
    strangers = []
    for name, value in tensors.items():
        matches = ((part, pattern.fullmatch(name)) for part, pattern in _PARTS.items())
        part, module = next(((part, match["module"]) for part, match in matches if match), ("", ""))
        scalar = part == "alpha" and value.numel() == 1 and math.isfinite(float(value))
        matrix = part not in ("down", "up") or (value.ndim > 1 and value.numel() > 0)
        floats = part not in ("", "alpha") and value.is_floating_point() and value.ndim > 0 and matrix
        if _TEXT_ENCODER.match(name) or not (scalar or floats):
            strangers.append(name)
            continue
        parts = modules.setdefault(module, {})
        if part in parts:
            strangers.append(name)
        parts |= {part: value, f"{part}:name": name}
    strangers += [
        f"{module}.alpha alone"
        for module, parts in modules.items()
        if "alpha" in parts and not {"down", "up"} & {*parts}
    ]
    strangers += [parts["magnitude:name"] for parts in modules.values() if "magnitude" in parts and "down" not in parts]
    if strangers or not modules:
        advice = "; --lora-skip text-encoder leaves those of text encoders out" if encoders else ""
        raise CheckpointError(
            f"{path} has {len(strangers)} tensors that are no low-rank pair of the transformer ({some(strangers)}), "
            "expected only `<module>.lora_A.weight`, `<module>.lora_B.weight` and `<module>.alpha`, the magnitudes of "
            "a DoRA and the differences `.diff` and `.diff_b`, or a layout that diffusers converts; remove the others, "
            f"or export without it{advice}"
        )
    return modules


def _updates(
    path: Path,
    modules: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    model_class: str,
    loader: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, _Update]:
    places = _places(path, modules, model_class, loader, shapes)
    half = [
        f"{place.module}.lora_{missing}.weight missing"
        for place in places
        for missing, part in (("A", "down"), ("B", "up"))
        if {"down", "up"} & {*modules[place.source]} and part not in modules[place.source]
    ]
    if half:
        raise CheckpointError(
            f"{path} has {len(half)} tensors that are no low-rank pair of the transformer ({some(half)}), expected "
            "both of each; download it again"
        )
    if settings.get("use_dora") and not any("magnitude" in parts for parts in modules.values()):
        raise CheckpointError(f"{path} says it is a DoRA and has no magnitudes, expected them; download it again")
    updates: dict[str, _Update] = {}
    wrong: list[str] = []
    for place in places:
        parts = modules[place.source]
        factor = _factor(place, parts, settings)
        weight, bias = f"{place.module}.weight", f"{place.module}.bias"
        if {"down", "difference"} & {*parts}:
            if weight in updates:
                wrong.append(f"`{weight}` is updated twice")
            update, complaints = _update_of_weight(place, parts, factor, shapes.get(weight))
            updates[weight] = update
            wrong += complaints
        for part, by in (("bias", 1.0), ("scaled_bias", factor)):
            if part in parts:
                value = parts[part] if place.rows is None else parts[part][place.rows]
                if bias not in shapes or tuple(value.shape) != shapes[bias]:
                    wrong.append(f"`{bias}` is {list(shapes.get(bias, ()))}, its difference {list(value.shape)}")
                if bias in updates:
                    wrong.append(f"`{bias}` is updated twice")
                updates[bias] = _Update(factor=by, difference=value)
    if wrong:
        raise CheckpointError(
            f"{path} has {len(wrong)} updates that do not fit the checkpoint ({some(wrong)}), expected pairs for its "
            "weights; check --lora, --model and the family"
        )
    return updates


def _places(
    path: Path,
    modules: Mapping[str, Mapping[str, Any]],
    model_class: str,
    loader: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Place]:
    """Where every module of the file goes."""

    def side(parts: Mapping[str, Any], part: str) -> Side | None:
        return Side(parts[f"{part}:name"], tuple(parts[part].shape)) if part in parts else None

    pairs = {m: Pair(side(p, "down"), side(p, "up")) for m, p in modules.items() if {"down", "up"} & {*p}}
    alone = {m: p for m, p in modules.items() if m not in pairs}
    try:
        alphas = any("alpha" in parts for parts in modules.values())
        places = places_of_pairs(pairs, alphas, model_class, loader, shapes) if pairs else []
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    for module, parts in alone.items():
        one = next(value for part, value in parts.items() if ":" not in part)
        candidates = [
            [Place(named_in_model(module), module, None)],
            places_of_weights({module: one.shape}, model_class),
        ]
        fitting = [found for found in candidates if found and all(_known(place, parts, shapes) for place in found)]
        if not fitting:
            name = next(value for part, value in parts.items() if ":" in part)
            raise CheckpointError(
                f"{path} has a difference that is of no tensor of the transformer (`{name}`), expected one of a weight "
                "or a bias that diffusers' converter knows by itself; remove it, or export without the file"
            )
        places += fitting[0]
    return places


def _known(place: Place, parts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    wanted = [f"{place.module}.weight"] * ("difference" in parts)
    wanted += [f"{place.module}.bias"] * ("bias" in parts or "scaled_bias" in parts)
    return all(name in shapes for name in wanted)


def _update_of_weight(
    place: Place, parts: Mapping[str, Any], factor: float, shape: tuple[int, ...] | None
) -> tuple[_Update, list[str]]:
    """The update, and what of it does not fit a weight of this shape; None for a weight that is not there."""

    def rows(value: torch.Tensor) -> torch.Tensor:
        return value if place.rows is None else value[place.rows]

    name, wrong = f"`{place.module}.weight`", []
    if shape is None:
        return _Update(), [f"{name} is not known"]
    if "down" not in parts:
        difference = rows(parts["difference"])
        fits = tuple(difference.shape) == shape
        return _Update(difference=difference), [] if fits else [
            f"{name} is {list(shape)}, its difference {list(difference.shape)}"
        ]
    up, down = rows(parts["up"]), parts["down"]
    seen = (up.shape[0], math.prod(down.shape[1:]))
    if up.shape[1] != down.shape[0] or seen != (shape[0], math.prod(shape[1:])):
        wrong.append(f"{name} is {list(shape)}, its pair {list(up.shape)} x {list(down.shape)}")
    if "difference" in parts:
        wrong.append(f"{name} has a pair and a difference, expected one of them")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        size, peft = parts["up"].shape[0], "dora_scale" not in parts["magnitude:name"]
        if magnitude.numel() == size and (magnitude.shape[0] == size or (peft and magnitude.shape[:2] == (1, size))):
            magnitude = rows(magnitude.flatten())
        elif peft or len(shape) != 2 or place.rows is not None or tuple(magnitude.shape) != (1, shape[1]):
            wrong.append(f"{name} has rows {size}, its magnitude {list(magnitude.shape)}")
    return _Update(up, down, factor, magnitude), wrong


def _factor(place: Place, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """alpha / rank, from the tensors or else from peft's settings; 1 where neither says anything."""
    if "down" not in parts:
        return 1.0
    rank, alpha = parts["down"].shape[0], parts.get("alpha")
    if alpha is None and "lora_alpha" in settings:
        special = settings.get("alpha_pattern") or {}  # patterns of the ends of names, of which the first holds
        own = (value for key, value in special.items() if re.match(rf"(.*\.)?({key})$", place.module))
        alpha = next(own, settings["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return 1.0 if alpha is None else float(alpha) / rank
