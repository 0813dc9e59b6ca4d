"""LoRA at load: low-rank updates added to the weights of a bundle while its engines are loaded, nothing exported again.

    W' = W + s (alpha / rank) B A        with s the scale that the user gives, of any rank

The sum is formed once, so a step costs what it did: no further operation, no further byte is read. What it costs is
said by `Merged`: memory, since updated weights are no longer mapped from the bundle, and the time of the load.

Names are the model's own, as diffusers and peft write them, or kohya with underscores for dots. What needs a converter
(names of other trainers), DoRA and differences are for the export, which knows them (`checkpoint/lora.py`); here they
are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.runner import from_bits, to_bits

WEIGHTS = "weights.safetensors"
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.)?")
_JOINED = re.compile(r"lora_(?:unet|transformer)_")  # kohya's, before names whose dots are underscores
_PARTS = {
    "down": re.compile(r"(?P<module>.+?)(?:\.lora_A(?:\.\w+)?|\.lora_down|\.lora\.down)\.weight"),
    "up": re.compile(r"(?P<module>.+?)(?:\.lora_B(?:\.\w+)?|\.lora_up|\.lora\.up)\.weight"),
    "alpha": re.compile(r"(?P<module>.+)\.alpha"),
}
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a file
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
_SHOWN = 5
_MOST_HEADER = 100 << 20  # bytes, as safetensors has it


@dataclass(frozen=True)
class Merged:
    """The weights of a bundle that LoRAs change.

    Attributes:
        weights: Tensor name -> its bits, in the dtype that it is stored in; bfloat16 as uint16.
        unread: Updated tensors of the model that no graph reads, so that the bundle does not have them.
        bytes: What the changed weights take.
    """

    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.weights.values())


class Pair(NamedTuple):
    """B `[out, rank]`, A `[rank, in]`, and what their product is multiplied by; float32."""

    up: np.ndarray
    down: np.ndarray
    factor: float


def merged(given: Sequence[str | Path], bundle: Bundle) -> Merged:
    """The weights that adapters change, with their updates.

    Args:
        given: `FILE` or `FILE:SCALE`, dimensionless; several are added up.
        bundle: Checked.

    Raises:
        ConfigError: A file is missing, damaged, holds something else than low-rank pairs of this model under its own
            names, or does not fit the bundle's weights.
    """
    if not given:
        return Merged()
    stored = _Tensors(bundle.path(WEIGHTS))
    shapes = {name: stored.shape(name) for name in stored.names}
    quantised = {name for name in shapes if stored.dtype(name) not in _STORED}
    totals: dict[str, np.ndarray] = {}
    unread: dict[str, None] = {}
    for one in given:
        path, scale = file_and_scale(str(one))
        pairs, absent = pairs_of(path, shapes, partial(_elsewhere, names=shapes), quantised=quantised)
        unread |= dict.fromkeys(f"{module}.weight" for module in absent)
        for name, pair in pairs.items():
            total = totals.pop(name) if name in totals else stored.read(name)
            change = (pair.up @ pair.down) * np.float32(scale * pair.factor)
            totals[name] = total + change.reshape(total.shape)
    weights = {name: _as_stored(name, total, stored.dtype(name)) for name, total in totals.items()}
    return Merged(weights, tuple(unread))


def file_and_scale(given: str) -> tuple[Path, float]:
    """(file, scale) of `FILE` or `FILE:SCALE`; the scale is 1 where there is none.

    Raises:
        ConfigError: The file is missing, or the scale no finite number.
    """
    text, separator, last = given.rpartition(":")
    try:
        path, scale = (Path(text).expanduser(), float(last)) if separator else (Path(given).expanduser(), 1.0)
    except ValueError:
        path, scale = Path(given).expanduser(), 1.0
    if not math.isfinite(scale):
        raise ConfigError(f"lora {given} has scale {scale}, expected a finite number; write FILE:0.8")
    if not path.is_file():
        raise ConfigError(f"lora {path} is missing, expected a safetensors file; check the path")
    return path, scale


def pairs_of(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    is_absent: Callable[[str], bool],
    absent: Collection[str] = (),
    quantised: Collection[str] = (),
) -> tuple[dict[str, Pair], list[str]]:
    """Tensor of the bundle -> its pair in a file, and the modules of the file that the bundle has not.

    Args:
        path: The file.
        shapes: Tensor of the bundle -> its shape.
        is_absent: Whether a module that is none of those may be in the file, and is then returned.
        absent: Names of such modules, as far as they are known.
        quantised: Tensors that take no update, since they are held quantised.

    Raises:
        ConfigError: The file is damaged, or holds something else than low-rank pairs that fit.
    """
    known = (*shapes, *(f"{module}.weight" for module in absent))
    file = _Tensors(path)
    modules: dict[str, dict[str, str]] = {}
    strangers = []
    for name in file.names:
        matches = ((part, pattern.fullmatch(name)) for part, pattern in _PARTS.items())
        part, module = next(((part, _own(match["module"], known)) for part, match in matches if match), ("", ""))
        parts = modules.setdefault(module, {}) if part else {}
        if not part or part in parts or file.dtype(name) not in _STORED:
            strangers.append(name)
        parts[part] = name
    half = [module for module, parts in modules.items() if not {"up", "down"} <= parts.keys()]
    unknown = [module for module in modules if f"{module}.weight" not in shapes]
    unread = [module for module in unknown if is_absent(module)]
    strangers += [f"{module}: half a pair" for module in half]
    strangers += [f"`{module}.weight` is not known" for module in unknown if module not in {*half, *unread}]
    settings = file.settings()
    if settings.get("use_dora"):
        strangers.append("it says that it is a DoRA")
    if strangers or not modules:
        raise ConfigError(
            f"lora {path} has {len(strangers)} tensors that are no low-rank pair of this bundle's model "
            f"({some(strangers)}), expected `<module>.lora_A.weight`, `<module>.lora_B.weight` and `<module>.alpha` "
            f"under the names of diffusers; export again with --lora {path}, which reads other layouts, or use another"
        )
    closed = sorted(f"{module}.weight" for module in modules if f"{module}.weight" in quantised)
    if closed:
        raise ConfigError(
            f"lora {path} updates {len(closed)} weights that this bundle holds quantised ({some(closed)}), expected "
            f"weights of its precision; export again with --lora {path}, which is added before that"
        )
    pairs, wrong = {}, []
    for module in modules.keys() - set(unread):
        parts, name = modules[module], f"{module}.weight"
        up, down = (file.read(parts[part]) for part in ("up", "down"))
        shape = shapes[name]
        fits = up.ndim >= 2 and down.ndim >= 2 and up.shape[1] == down.shape[0]
        if not fits or (up.shape[0], math.prod(down.shape[1:])) != (shape[0], math.prod(shape[1:])):
            wrong.append(f"`{name}` is {list(shape)}, its pair {list(up.shape)} x {list(down.shape)}")
            continue
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            wrong.append(f"`{name}` gets numbers that are NaN or infinite")
        alpha = float(file.read(parts["alpha"]).reshape(-1)[0]) if "alpha" in parts else None
        factor = _factor(path, module, len(down), alpha, settings)
        pairs[name] = Pair(up.reshape(len(up), -1), down.reshape(len(down), -1), factor)
    if wrong:
        raise ConfigError(
            f"lora {path} has {len(wrong)} updates that do not fit the bundle ({some(sorted(wrong))}), expected pairs "
            "for its weights; use an adapter of this model"
        )
    return pairs, unread


def _own(module: str, names: Iterable[str]) -> str:
    """A module of a file as the model calls it: without what tools put before, its dots back where it had none."""
    joined = _JOINED.match(module)
    if joined is None:
        return _PREFIX.sub("", module)
    own = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    found = [name for name in own if name.replace(".", "_") == module[joined.end() :]]
    return found[0] if len(found) == 1 else module  # of several that are alike but for dots, none is meant


def _elsewhere(module: str, names: Iterable[str]) -> bool:
    """Whether a module that the bundle lacks is in other blocks of it: nothing of the last ones' text is read."""
    like = re.compile(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(f"{module}.weight"), count=1))
    block = re.match(r".*?\.\d+\.", module)
    return block is not None and any(map(like.fullmatch, names)) and any(n.startswith(block[0]) for n in names)


def _factor(path: Path, module: str, rank: int, alpha: float | None, settings: Mapping[str, Any]) -> float:
    """alpha / rank, from the tensors or else from peft's settings; 1 where neither says anything."""
    rooted = False
    if alpha is None and "lora_alpha" in settings:
        special = settings.get("alpha_pattern") or {}
        own = (value for key, value in special.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha, rooted = next(own, settings["lora_alpha"]), bool(settings.get("use_rslora"))
    if alpha is None:
        return 1.0
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ConfigError(f"lora {path} has alpha {str(alpha)[:40]!r}, expected a finite number; download it again")
    return alpha / (math.sqrt(rank) if rooted else rank)


def _as_stored(name: str, total: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = to_bits(total) if dtype == "BF16" else total.astype(_STORED[dtype])
    if not np.isfinite(from_bits(bits) if dtype == "BF16" else bits).all():
        raise ConfigError(
            f"`{name}` with its lora is beyond the range of {dtype}, expected finite numbers; lower the scale, or "
            "export again with --precision bf16"
        )
    return bits


class _Tensors:
    """A safetensors file, read tensor by tensor; bfloat16, which numpy lacks, as the same numbers in float32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._data = np.memmap(path, np.uint8, "r")
            size = int.from_bytes(self._data[:8].tobytes(), "little")
            if not 2 <= size <= min(len(self._data) - 8, _MOST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(self._data[8 : 8 + size].tobytes())
            self._metadata = header.pop("__metadata__", None) or {}
            self._start = 8 + size
            self._places = {name: _place(entry, len(self._data) - self._start) for name, entry in header.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"lora {path} is not readable ({error}), expected a complete safetensors file; download it again"
            ) from error

    @property
    def names(self) -> Iterable[str]:
        return self._places.keys()

    def dtype(self, name: str) -> str:
        return self._places[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        dtype, shape, begin, end = self._places[name]
        bits = self._data[self._start + begin : self._start + end].view(_STORED[dtype])
        return (from_bits(bits) if dtype == "BF16" else bits.astype(np.float32)).reshape(shape)

    def settings(self) -> dict[str, Any]:
        """peft's settings, if the file carries any."""
        try:
            found = json.loads(self._metadata.get(_METADATA, "{}"))
            return {key.removeprefix("transformer."): value for key, value in found.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"lora {self._path} is damaged ({_METADATA}: {error}), expected peft's settings; download it again"
            ) from error


def _place(entry: Mapping[str, Any], size: int) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (begin, end) = str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["data_offsets"]
    if not 0 <= begin <= end <= size:
        raise ValueError("its tensors are cut off")
    if dtype in _STORED and end - begin != math.prod(shape) * np.dtype(_STORED[dtype]).itemsize:
        raise ValueError("the sizes of its tensors are not those of their shapes")
    return dtype, shape, int(begin), int(end)


def some(complaints: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return "; ".join(complaints[:_SHOWN]) + (
        f"; and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
    )
