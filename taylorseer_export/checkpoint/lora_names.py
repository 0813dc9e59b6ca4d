"""Where the modules of a LoRA file are in the model.

diffusers has a converter for the names of each family's trainers (kohya, BFL, XLabs, ComfyUI, ai-toolkit, musubi). It
reads pairs and drops whatever else a file holds, so it is only asked where things go: it converts pairs of carriers,
whose numbers say which row of which module they are, and what comes back tells which rows of which module of the file
make which module of the model. Every part of an update then follows its module: pair, magnitude, bias, difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from taylorseer_export.checkpoint.original import converter_of
from taylorseer_export.errors import CheckpointError

_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.)?")
_JOINED = re.compile(r"lora_(?:unet|transformer)_")  # kohya's, before names whose dots are underscores
_PAIR = re.compile(r"(?:transformer\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default[_0-9]*)?\.weight")
_RANK = 2  # of the carriers: a converter may swap halves of a matrix, or look for blocks in ranks of 3 and 4


class Side(NamedTuple):
    """One matrix of a pair in a file: its name, and its shape."""

    name: str
    shape: tuple[int, ...]


class Pair(NamedTuple):
    """A pair as it stands in a file; a side that is not there is None."""

    down: Side | None
    up: Side | None


class Place(NamedTuple):
    """`rows` of a module in the file make one of the model; None for all of it."""

    module: str
    source: str
    rows: torch.Tensor | None


def named_in_model(module: str, shapes: Iterable[str] = ()) -> str:
    """A module of a file without what tools put before the model's own names, its dots back where it had none.

    Args:
        module: Its name in the file.
        shapes: Tensors of the model: of several modules that are alike but for dots, none is meant.
    """
    if joined := _JOINED.match(module):
        own = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
        found = [name for name in own if name.replace(".", "_") == module[joined.end() :]]
        return found[0] if len(found) == 1 else module
    return _PREFIX.sub("", module)


def places_of_pairs(
    pairs: Mapping[str, Pair],
    alphas: bool,
    model_class: str,
    loader: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Place]:
    """Where the pairs of a file go.

    Names of the model come first, then what the loader makes of the names in the spellings that it may know, then what
    the converter of whole checkpoints does.

    Args:
        pairs: Module of the file -> its pair.
        alphas: Whether the file has an alpha for them.
        model_class: Class of the transformer in diffusers.
        loader: Class in `diffusers.loaders` that knows the names of its LoRAs; none if empty.
        shapes: Tensor name in diffusers -> shape, of the checkpoint it is added to.

    Raises:
        CheckpointError: No way knows all of them; it says what stood in the way of the first.
    """
    direct = [Place(named_in_model(module, shapes), module, None) for module in pairs]
    if not loader or all(f"{place.module}.weight" in shapes for place in direct):
        return direct
    first: CheckpointError | None = None
    for spelled in _spellings(pairs, alphas):
        try:
            return _places_by_loader(pairs, spelled, model_class, loader, shapes)
        except CheckpointError as error:
            first = first or error
    if places := places_of_weights({module: pair.up.shape for module, pair in pairs.items() if pair.up}, model_class):
        if {place.source for place in places} == pairs.keys() and not _strangers(places, shapes):
            return places
    assert first is not None, "bug in taylorseer-export: no spelling was tried"
    raise first


def places_of_weights(modules: Mapping[str, tuple[int, ...]], model_class: str) -> list[Place]:
    """Where modules go by the converter of whole checkpoints, if it takes some of a model's tensors without the others.

    Args:
        modules: Module of the file -> shape of a tensor of it, its rows first.
        model_class: Class of the transformer in diffusers.
    """
    starts = _starts({module: shape[0] for module, shape in modules.items()})
    carriers = {
        f"{named_in_model(module)}.weight": starts[module] + torch.arange(shape[0], dtype=torch.float64)[:, None]
        for module, shape in modules.items()
    }
    try:
        found: dict[str, torch.Tensor] = converter_of(model_class, carriers)(dict(carriers))
    except Exception:  # whatever a converter makes of half a model; the caller then says what it could not place
        return []
    places = []
    for name, rows in found.items():
        first = int(rows.min())
        source = next((m for m, start in starts.items() if start <= first < start + modules[m][0]), None)
        if source is None or not name.endswith(".weight"):
            return []
        places.append(Place(name.removesuffix(".weight"), source, _rows(rows, starts[source], modules[source][0])))
    return places if not _unread(places, {module: shape[0] for module, shape in modules.items()}) else []


def _places_by_loader(
    pairs: Mapping[str, Pair],
    carriers: dict[str, torch.Tensor],
    model_class: str,
    loader: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Place]:
    import diffusers.loaders

    try:
        found: Any = getattr(diffusers.loaders, loader).lora_state_dict(dict(carriers), return_alphas=True)
    except Exception as error:
        raise CheckpointError(
            f"is not converted by diffusers' {loader} ({type(error).__name__}: {' '.join(str(error).split())}), "
            f"expected a LoRA of {model_class}; check --lora and the family"
        ) from error
    converted = found[0] if isinstance(found, tuple) else found
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in converted.items():
        if match := _PAIR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = value
    sizes = {module: pair.up.shape[0] for module, pair in pairs.items() if pair.up}
    starts, names, places = _starts(sizes), list(pairs), []
    for module, side in sides.items():
        if side.keys() == {"A", "B"} and side["A"].unique().numel() == 1:
            source = names[int(side["A"].flatten()[0])]
            numbers = side["B"][:, :1] - starts[source]
            if 0 <= numbers.min() and numbers.max() < sizes[source]:
                places.append(Place(module, source, _rows(side["B"][:, :1], starts[source], sizes[source])))
    strange = [f"`{module}.weight` is not known" for module in _strangers(places, shapes)]
    strange += [f"`{module}` is left unread by diffusers' {loader}" for module in _unread(places, sizes)]
    strange += [f"`{module}` is half a pair" for module, pair in pairs.items() if not (pair.up and pair.down)]
    if strange:
        raise CheckpointError(
            f"has {len(strange)} updates that do not fit the checkpoint ({some(strange)}), expected pairs for its "
            "weights; check --lora, --model and the family"
        )
    return places


def _spellings(pairs: Mapping[str, Pair], alphas: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Carriers as the file names them, then as peft and kohya do; with an alpha (the rank) as the file, then not."""
    starts = _starts({module: pair.up.shape[0] for module, pair in pairs.items() if pair.up})
    for down, up in ((None, None), ("lora_A", "lora_B"), ("lora_down", "lora_up")):
        for alpha in (alphas, not alphas):
            found = {}
            for number, (module, pair) in enumerate(pairs.items()):
                if pair.down:
                    name = f"{module}.{down}.weight" if down else pair.down.name
                    found[name] = torch.full((_RANK, *pair.down.shape[1:]), float(number), dtype=torch.float64)
                if pair.up:
                    rows = starts[module] + torch.arange(pair.up.shape[0], dtype=torch.float64)
                    shape = (pair.up.shape[0], _RANK, *[1] * (len(pair.up.shape) - 2))
                    name = f"{module}.{up}.weight" if up else pair.up.name
                    found[name] = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
                if alpha:
                    found[f"{module}.alpha"] = torch.tensor(float(_RANK), dtype=torch.float64)
            yield found


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    """Module -> the number of its first row, all of them counted on."""
    starts, end = {}, 0
    for module, size in sizes.items():
        starts[module], end = end, end + size
    return starts


def _rows(carried: torch.Tensor, start: int, size: int) -> torch.Tensor | None:
    rows = carried.flatten() - start
    whole = rows.numel() == size and bool((rows == torch.arange(size, dtype=rows.dtype)).all())
    return None if whole else rows.round().long()


def _strangers(places: Iterable[Place], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [place.module for place in places if f"{place.module}.weight" not in shapes]


def _unread(places: Iterable[Place], sizes: Mapping[str, int]) -> list[str]:
    """Modules of which some row goes nowhere."""
    read = {module: torch.zeros(size, dtype=torch.bool) for module, size in sizes.items()}
    for place in places:
        read[place.source][slice(None) if place.rows is None else place.rows] = True
    return [module for module, rows in read.items() if not rows.all()]


def some(complaints: list[str]) -> str:
    """The first of them, and how many more there are."""
    return "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
