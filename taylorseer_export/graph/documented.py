"""What the documentation of `forward` says of its arguments: shapes, in words that are known here."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from taylorseer_export.bundle.shapes import evaluate
from taylorseer_export.errors import TaylorSeerError
from taylorseer_export.graph.fakes import TOKENS, UNKNOWN

_CHANNELS = ("in_channels", "in_visual_dim", "in_dim")


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def documented(model: nn.Module, config: Mapping[str, Any]) -> dict[str, tuple[int | str, ...]]:
    """Argument -> shape, of those for which the documentation of `forward` says one in words that are known here."""
    lines = []
    for name, text in documentation(model).items():
        for pattern in (
            r"of shape `\(([^`]*)\)`",
            r"(?:: |``|[Ss]hape(?:d|:| is)? )[\[(]((?:B|N|batch_size)(?:, *\w+)*,?)[\])]",
        ):
            if said := re.search(pattern, text):
                lines.append((name, said[1]))
                break
    tokens = next(
        (re.split(r",\s*", shape)[1] for name, shape in lines if name == "hidden_states" and "," in shape), ""
    )
    found = {}
    for name, shape in lines:
        entries = [_entry(word.strip(), tokens, config) for word in re.split(r",\s*", shape.rstrip(","))]
        if all(entry is not None for entry in entries):
            found[name] = tuple(entry for entry in entries if entry is not None)
    return found


def documentation(model: nn.Module) -> dict[str, str]:
    """Argument -> what the documentation of `forward` says of it."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(type(model).forward) or "").splitlines():
        begins = re.match(r"\s*(\w+)\s*(\(|:)", line)
        if begins and (begins[1] in arguments(model) or begins[1] in ("Returns", "Args")):
            name = begins[1]
        found[name] = f"{found.get(name, '')} {line.strip()}"
    return found


_LETTERS: Mapping[str, int | str] = {
    "C": UNKNOWN, "T": "frames", "F": "frames", "H": "rows", "W": "columns", "L": "text_tokens", "D": UNKNOWN,
    "D_caption": UNKNOWN, "max_patches": TOKENS,
}  # fmt: skip


def _entry(word: str, tokens: str, config: Mapping[str, Any]) -> int | str | None:
    """A size in the words of a documentation: a dimension, a number, or arithmetic over entries of the config."""
    rows, columns = sides_of(config)
    of_latent = {"height": rows, "width": columns, "num_frames": "frames", "frames": "frames", "num_frame": "frames"}
    if re.fullmatch(r"batch[_ ]size|B|N", word):
        return "batch"
    if word in _LETTERS:
        return {"C": channels_of(config), "H": rows, "W": columns}.get(word, _LETTERS[word])
    if word in ("pt", "ph", "pw") and len(patch := config.get("patch_size") or ()) == 3:
        return int(patch[("pt", "ph", "pw").index(word)])
    if word in of_latent:
        return of_latent[word]
    if re.fullmatch(r"(num_)?channels?", word):
        return channels_of(config)
    if "+" in word and all(parts := [_entry(part.strip(), tokens, config) for part in word.split("+")]):
        return "+".join(map(str, parts)) if any(isinstance(part, str) for part in parts) else sum(map(int, parts))  # type: ignore[arg-type]
    if word == tokens or re.search(r"image_seq|image_sequence", word):
        return "image_tokens" if re.search(r"len|tokens", word) else None
    if re.search(r"(seq|text|sequence).*len", word):
        return "text_tokens"
    if re.fullmatch(r"embed[_ ]dims?|projection_dim", word):
        return UNKNOWN
    counted = re.sub(r"len\((\w+)\)", lambda m: str(len(config.get(m[1]) or ())), word)
    counted = re.sub(r"prod\((\w+)\)", lambda m: str(math.prod(config.get(m[1]) or ())), counted)
    try:
        return evaluate(counted, {key: value for key, value in config.items() if type(value) is int})
    except TaylorSeerError:
        return None


def channels_of(config: Mapping[str, Any]) -> int:
    return next((config[key] for key in _CHANNELS if isinstance(config.get(key), int)), UNKNOWN)


def sides_of(config: Mapping[str, Any]) -> tuple[int | str, ...]:
    patch = config.get("patch_size") or (config.get("all_patch_size") or (1,))[:1]
    side = patch[-1] if isinstance(patch, tuple | list) else patch
    return (f"{side}*rows", f"{side}*columns") if side > 1 else ("rows", "columns")
