"""The parts of a pipeline besides the transformer, as drafts of their own: text encoders, and both ways of the VAE.

They are loaded by the library that each is a class of, one part at a time and from safetensors alone; no Python of the
checkpoint is run. Their graphs are traced whole, for one prompt and for one picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isqrt
from pathlib import Path
from typing import Any

from torch import nn

from taylorseer_export.bundle.manifest import (
    Controlled,
    Driven,
    Fitted,
    PartName,
    PipelinePart,
    Role,
    Sections,
    Tensor,
    Tiles,
)
from taylorseer_export.bundle.part_agreement import BEGINNING, CONDITION
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.checkpoint.files import INDEX
from taylorseer_export.checkpoint.recognise import pipeline_of
from taylorseer_export.compile.components import (
    class_of,
    component,
    look,
    normalised,
    numbers,
    plain_masks,
    refuse_other_guider,
    shown_as,
    tokenizer,
)
from taylorseer_export.compile.draft import PRECISIONS, Options
from taylorseer_export.compile.engines import Progress, builder
from taylorseer_export.compile.part_draft import PartDraft, drafted
from taylorseer_export.compile.patches import SEEN, cutting
from taylorseer_export.errors import CheckpointError, ConfigError
from taylorseer_export.families.whole import Patches as DeclaredPatches
from taylorseer_export.families.whole import Shown as DeclaredShown
from taylorseer_export.families.whole import Whole
from taylorseer_export.graph.part import trace_part

VAE = "vae"
_LARGEST_SIDE = 256  # latent pixels
_SIDES = ("rows", "columns")  # of a picture that is encoded, in tokens


def parts_asked(checkpoint: Checkpoint, whole: bool, without: Sequence[str] = ()) -> tuple[PartName, ...]:
    """Names of the parts that a bundle gets: those asked for; of an embedded pipeline all, unless they are left out.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        whole: Whether its parts are asked for.
        without: Parts to be left out.

    Raises:
        ConfigError: What `parts_of` raises, or parts are left out where none are asked for.
    """
    comes_whole = checkpoint.embedded and (checkpoint.root / INDEX).is_file()
    if without and not (whole or comes_whole):
        raise ConfigError("--without is given without --whole, expected it too; add it, or leave --without out")
    if whole or (comes_whole and set(_declared(checkpoint.family.whole)) - set(without)):
        return parts_of(checkpoint, without)
    return ()


def _declared(whole: Whole | None) -> tuple[PartName, ...]:
    if whole is None:
        return ()
    known: dict[PartName, bool] = {
        "text": whole.encode is not None,
        "encode": any((whole.see, whole.begin, whole.animate)),
        "decode": any((whole.decode, whole.frames, whole.tile)),
    }
    return tuple(name for name, has in known.items() if has)


def parts_of(checkpoint: Checkpoint, without: Sequence[str] = ()) -> tuple[PartName, ...]:
    """Names of the parts that a whole bundle of this checkpoint has.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        without: Parts to be left out.

    Raises:
        ConfigError: The family declares none, or all are left out.
    """
    found = _declared(checkpoint.family.whole)
    for name in without:
        if name not in found:
            raise ConfigError(
                f"--without is {name} for family {checkpoint.family.name}, expected "
                f"{' or '.join(found) or 'a family with parts'}; leave it out"
            )
    left = tuple(name for name in found if name not in without)
    if not left:
        of = " of ".join(filter(None, (checkpoint.family.name, pipeline_of(checkpoint.folder))))
        raise ConfigError(
            f"--whole is given for {of}, expected a family whose pipeline this version exports, and a part "
            "of it; leave --whole out"
        )
    whole = checkpoint.family.whole
    if whole is not None and whole.read is not None and "text" in left and "encode" not in left:
        raise ConfigError(
            f"--without is encode for family {checkpoint.family.name}, expected text too, whose encoders see the "
            "picture that is given; add --without text, or leave it out"
        )
    return left


def refuse_missing(checkpoint: Checkpoint, parts: Sequence[PartName]) -> None:
    """Refuse a folder that lacks a part, before the work of exporting.

    Raises:
        CheckpointError: Names what is missing.
    """
    whole = checkpoint.family.whole
    if not parts:
        return
    assert whole is not None, "bug in taylorseer-export: parts of a family that declares none"
    needed: dict[PartName, list[str]] = {
        "text": [*whole.encoders, *(tokens.tokenizer for tokens in whole.tokens), *_processors(whole.read)],
        "encode": [VAE, *whole.seers, *_processors(whole.shown)],
        "decode": [VAE],
    }
    refuse_other_guider(checkpoint)
    for name in dict.fromkeys(name for part in parts for name in needed[part]):
        class_of(checkpoint, name)
        if not (checkpoint.root / name).is_dir():
            of = [part for part in parts if name in needed[part]]
            raise CheckpointError(
                f"{checkpoint.root} has no folder `{name}`, expected a whole diffusers pipeline; download it, or leave "
                f"{' and '.join(of)} out with --without {' --without '.join(of)}"
            )


def _processors(declared: DeclaredShown | DeclaredPatches | None) -> list[str]:
    return [] if declared is None else [declared.processor]


def write_parts(
    checkpoint: Checkpoint, options: Options, folder: Path, progress: Progress
) -> dict[PartName, PipelinePart]:
    """Build the parts that are asked for, each in a folder of its name; one is in memory at a time.

    Raises:
        CheckpointError, ExportError, BuildError: See the steps.
    """
    made: dict[PartName, PipelinePart] = {}
    for name in options.parts:
        progress(name, 0, 1)
        part = open_part(checkpoint, options, name, folder / name)
        builder(options.engine).build(part, folder / name, progress)
        made[name] = part.described()
    return made


def open_part(checkpoint: Checkpoint, options: Options, name: PartName, folder: Path) -> PartDraft:
    """Load a part and trace it.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        options: Of the bundle.
        name: Of the part.
        folder: That gets its files; its tokenizers are written into it now.

    Raises:
        CheckpointError: A component is missing or damaged.
        ExportError: It is not traceable.
    """
    whole = checkpoint.family.whole
    assert whole is not None, "bug in taylorseer-export: a part of a family that declares none"
    folder.mkdir()
    make = {"text": _text, "encode": _encode, "decode": _decode}[name]
    return make(checkpoint, options, whole, folder)


def _text(checkpoint: Checkpoint, options: Options, whole: Whole, folder: Path) -> PartDraft:
    assert whole.encode is not None
    encoders = {name: component(checkpoint, name, options) for name in whole.encoders}
    tokens = tuple(tokenizer(checkpoint, declared, folder) for declared in whole.tokens)
    inputs, ranges = [], {}
    for one in tokens:
        extent: int | str = one.length + one.dropped
        if one.size:
            ranges[one.size] = (1, one.length)
            extent = f"{one.size}+{one.dropped}" if one.dropped else one.size
        inputs += [
            Tensor(name=name, dtype="int64", shape=(1, extent), role="tokens") for name in (one.input, one.mask) if name
        ]
        if one.kept:
            inputs.append(Tensor(name=one.kept, dtype="int64", shape=(1, one.size or one.length), role="tokens"))
    cut = cutting(checkpoint, whole.read, encoders) if isinstance(whole.read, DeclaredPatches) else None
    seen = look(checkpoint, whole.read) if isinstance(whole.read, DeclaredShown) else None
    inputs += shown_as(seen, _dtype(options)) if cut is None else cut.inputs(_dtype(options))
    if cut is not None:
        ranges[SEEN] = (1, max(one.length for one in tokens))
    sought = {name: k for one in whole.tokens for name, k in numbers(checkpoint, one, folder).items()}
    sought |= {f"{one.input}_dropped": one.dropped for one in tokens}

    def encode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        assert whole.encode is not None
        given = normalised(seen, given) if cut is None else cut.normalised(given)
        return whole.encode(encoders, {**given, **sought})

    card = checkpoint.card
    lengths = {one.size: min(int(card.get(one.size, one.length)), one.length) for one in tokens if one.size}
    if cut is not None or any(one.multiple for one in tokens):  # prompts are seldom as long as they may be
        lengths = {name: min(checkpoint.family.typical.get(name, most), most) for name, most in lengths.items()}
    if cut is not None:
        lengths[SEEN] = min(cut.patches.area, cut.patches.most) // (cut.patches.side * cut.patches.merged) ** 2
    with plain_masks():
        graph, constants = trace_part("text", encoders, encode, inputs, ranges, lambda _: "constant")
    made = drafted(checkpoint, options, encoders, (graph,), constants, (ranges, lengths))
    patches, shown = None if cut is None else cut.patches, None if seen is None else seen.shown
    return replace(made, tokens=tokens, negative=whole.negative, shown=shown, patches=patches)


def _encode(checkpoint: Checkpoint, options: Options, whole: Whole, folder: Path) -> PartDraft:
    vae = component(checkpoint, VAE, options)
    packing = checkpoint.family.packing
    side, ranges = checkpoint.latent_scale * packing, dict.fromkeys(_SIDES, (2, _LARGEST_SIDE // packing))
    fitted = None if whole.fitted is None else Fitted(**asdict(whole.fitted))
    if fitted is not None:  # the longest side that is left of any
        ranges = dict.fromkeys(_SIDES, (fitted.shortest // side, isqrt(fitted.area * fitted.ratio) // side))
    if whole.see is None and options.latent_size is not None:  # the picture is of the size that is drawn
        own = zip(_SIDES, options.latent_size[-2:], strict=True)
        ranges = {name: (extent // packing,) * 2 for name, extent in own}
    shape: tuple[int | str, ...] = (1, 3, *(f"{side}*{name}" for name in ranges))
    picture = Tensor(name="picture", dtype=_dtype(options), shape=shape, role="picture")
    sides = [extent // packing for extent in checkpoint.latent_size[-2:]]
    typical = {
        name: min(max(extent, low), high) for extent, (name, (low, high)) in zip(sides, ranges.items(), strict=True)
    }
    if whole.animate is not None:
        return _animate(checkpoint, options, whole, {VAE: vae}, picture, (ranges, typical))

    def encode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if whole.see is not None:
            return whole.see(vae, given["picture"])
        assert whole.begin is not None
        return dict(zip(BEGINNING, whole.begin(vae, given["picture"]), strict=True))

    def role(name: str) -> Role:
        return "latent" if name in BEGINNING else "constant"

    cut, constants = trace_part("encode", {VAE: vae}, encode, [picture], ranges, role)
    made = drafted(checkpoint, options, {VAE: vae}, (cut,), constants, (ranges, typical))
    return replace(made, shown_at=whole.seen_at, area=whole.area or None, fitted=fitted)


def _animate(
    checkpoint: Checkpoint,
    options: Options,
    whole: Whole,
    modules: dict[str, nn.Module],
    picture: Tensor,
    extents: tuple[dict[str, tuple[int, int]], dict[str, int]],
) -> PartDraft:
    """Of what a video is made from: the first latent frame, of which the picture is one, and any later one, if there is
    anything in it."""
    modules = {**modules, **{name: component(checkpoint, name, options) for name in whole.seers}}
    seen = None if whole.shown is None else look(checkpoint, whole.shown)
    inputs = [picture, *shown_as(seen, _dtype(options)), *_driving(whole, picture, 1)]

    def animate(given: Mapping[str, Any]) -> Mapping[str, Any]:
        assert whole.animate is not None
        pictures = {name: value for name, value in given.items() if not name.startswith("cache")}
        pictures = normalised(seen, pictures)
        caches = [value for name, value in given.items() if name.startswith("cache")]
        made, caches = whole.animate(modules, pictures, caches or None)
        return {**made, **{f"cache_out_{k}": cache for k, cache in enumerate(caches)}}

    def role(name: str) -> Role:
        return "latent" if name in (CONDITION, *BEGINNING) else "cache_out" if name.startswith("cache") else "constant"

    first, constants = trace_part("encode", modules, animate, inputs, extents[0], role)
    caches = [_read(tensor) for tensor in first.outputs if tensor.role == "cache_out"]
    graphs = [first]
    if caches:
        caches += _driving(whole, picture, checkpoint.family.time_scale)
        later, more = trace_part("later", {VAE: modules[VAE]}, animate, caches, extents[0], role)
        graphs, constants = [first, later], constants | more
    made = drafted(checkpoint, options, modules, tuple(graphs), constants, extents)
    sections = None if whole.sections is None else Sections(**asdict(whole.sections))
    driven = None if whole.driven is None else Driven(**asdict(whole.driven))
    controlled = None if whole.controlled is None else Controlled(**asdict(whole.controlled))
    shown = None if seen is None else seen.shown
    made = replace(made, sections=sections, driven=driven, controlled=controlled)
    return replace(made, shown=shown, cropped=whole.cropped or None)


def _driving(whole: Whole, picture: Tensor, frames: int) -> list[Tensor]:
    """So many frames, of the picture's size, of what drives a video or is gone by; none where nothing is."""
    beside: list[tuple[str, int, int]] = []
    if (driven := whole.driven) is not None:
        beside = [(driven.pose, 3, frames), (driven.scene, 4, frames)]
    if (by := whole.controlled) is not None:  # whose first frame is the picture
        beside = [(by.video, 3, frames)] if frames > 1 else []
        beside += [(by.mask, 1, frames), (by.shown, 1, 1)]
    return [
        picture.model_copy(update={"name": name, "shape": (1, channels, count, *picture.shape[2:])})
        for name, channels, count in beside
    ]


def _decode(checkpoint: Checkpoint, options: Options, whole: Whole, folder: Path) -> PartDraft:
    vae = component(checkpoint, VAE, options)
    channels = int(getattr(vae.config, "latent_channels", 0) or vae.config.z_dim)
    if whole.tile is not None:
        return _tile(checkpoint, options, whole, vae, channels)
    fold = _fold(checkpoint, channels)
    extents = [name if fold == 1 else f"{fold}*{name}" for name in ("height", "width")]
    shape = (1, channels // fold**2, *(() if whole.frames is None else whole.at_once[:1]), *extents)
    latents = Tensor(name="latents", dtype=_dtype(options), shape=shape, role="latent")
    sides = [side // fold for side in (options.latent_size or checkpoint.latent_size)[-2:]]
    least, most = 2 // fold, _LARGEST_SIDE // fold
    ranges = {
        name: (least, most) if options.latent_size is None else (side, side)
        for name, side in zip(("height", "width"), sides, strict=True)
    }
    typical = {name: min(max(side, least), most) for name, side in zip(ranges, sides, strict=True)}

    def decode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if whole.frames is None:
            assert whole.decode is not None
            return {"picture": whole.decode(vae, given["latents"])}
        before = [given[name] for name in given if name != "latents"]
        picture, caches = whole.frames(vae, given["latents"], before or None)
        return {"picture": picture, **{f"cache_out_{k}": cache for k, cache in enumerate(caches)}}

    modules = {VAE: vae}
    first, constants = trace_part("decode", modules, decode, [latents], ranges, _role_of_decoded)
    if whole.frames is None:
        return drafted(checkpoint, options, modules, (first,), constants, (ranges, typical))
    shape = (*shape[:2], whole.at_once[1], *extents)
    inputs = [latents.model_copy(update={"shape": shape})]
    inputs += [_read(tensor) for tensor in first.outputs if tensor.role == "cache_out"]
    later, more = trace_part("later", modules, decode, inputs, ranges, _role_of_decoded)
    made = drafted(checkpoint, options, modules, (first, later), constants | more, (ranges, typical))
    return replace(made, frame_rate=whole.frame_rate, dropped=whole.dropped, skipped=whole.skipped)


def _fold(checkpoint: Checkpoint, channels: int) -> int:
    """Side of the square of unpacked latent pixels that is one of the VAE, where a token has the channels of one."""
    packing, latent = checkpoint.family.packing, checkpoint.family.inputs(checkpoint.config)[0]
    return packing if packing > 1 and latent.shape[-1] == channels else 1


def _tile(checkpoint: Checkpoint, options: Options, whole: Whole, vae: Any, channels: int) -> PartDraft:
    """Of videos that are decoded in tiles: whatever size a bundle takes, the tiles at its edges have every size."""
    assert whole.tiling is not None, "bug in taylorseer-export: tiles without their sizes"
    tiles = whole.tiling(vae)
    largest = {"frames": tiles.frames + 1, "height": tiles.side, "width": tiles.side}
    latents = Tensor(name="latents", dtype=_dtype(options), shape=(1, channels, *largest), role="latent")
    ranges = {name: (1, most) for name, most in largest.items()}

    def decode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        assert whole.tile is not None
        return {"picture": whole.tile(vae, given["latents"])}

    cut, constants = trace_part("decode", {VAE: vae}, decode, [latents], ranges, _role_of_decoded)
    typical = {**largest, "frames": min(largest["frames"], checkpoint.latent_size[0])}
    made = drafted(checkpoint, options, {VAE: vae}, (cut,), constants, (ranges, typical))
    return replace(made, tiles=Tiles(**asdict(tiles)), frame_rate=whole.frame_rate, dropped=whole.dropped)


def _dtype(options: Options) -> Any:
    """Of pictures and latents, as a manifest names it."""
    return str(PRECISIONS[options.precision]).removeprefix("torch.")


def _role_of_decoded(name: str) -> Role:
    return "picture" if name == "picture" else "cache_out"


def _read(written: Tensor) -> Tensor:
    """The input of the next call that a cache of this one is."""
    return written.model_copy(update={"name": written.name.replace("out", "in"), "role": "cache_in"})
