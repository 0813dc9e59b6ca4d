"""The parts of a pipeline besides the transformer, as drafts of their own: text encoders and the decoder.

They are loaded by the library that each is a class of, one part at a time and from safetensors alone; no Python of the
checkpoint is run. Their graphs are traced whole, for one prompt and for one picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taylorseer_export.bundle.manifest import PartName, PipelinePart, Role, Tensor, Tiles, Tokens
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.checkpoint.files import read_json
from taylorseer_export.compile.draft import PRECISIONS, BaseDraft, Options
from taylorseer_export.compile.engines import Progress, builder
from taylorseer_export.errors import CheckpointError, ConfigError, first_line
from taylorseer_export.families.whole import Tokens as Declared
from taylorseer_export.families.whole import Whole
from taylorseer_export.graph.cut import Cut
from taylorseer_export.graph.part import trace_part

DECODER = "vae"
_INDEX = "model_index.json"
_TOKENIZER = "{}.json"
_LARGEST_SIDE = 256  # latent pixels


@dataclass(frozen=True)
class PartDraft(BaseDraft):
    """A part of a pipeline, traced.

    Attributes:
        pipeline: Folder that its modules were loaded from.
        cuts: Its graph; of the decoder of a video that of the first latent frame, then that of any later one.
        spans: Dimension -> (smallest, largest) size.
        modules: Name in the pipeline -> the module, with its weights.
        tokens: How a prompt becomes its inputs.
        negative: See `Whole.negative`.
        tiles: Of the decoder of a video in tiles; None for any other part.
        frame_rate: Frames per second of videos; None where it decodes none.
    """

    pipeline: Path
    options: Options
    cuts: tuple[Cut, ...]
    spans: dict[str, tuple[int, int]]
    sizes: dict[str, int | None]
    typical: dict[str, int]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    buffers: dict[str, torch.Tensor]
    modules: Mapping[str, nn.Module]
    tokens: tuple[Tokens, ...] = ()
    negative: str | None = None
    tiles: Tiles | None = None
    frame_rate: int | None = None

    @property
    def graphs(self) -> tuple[Cut, ...]:
        return self.cuts

    def origin(self) -> str:
        return str(self.pipeline)

    def ranges(self) -> dict[str, tuple[int, int]]:
        return self.spans

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return _tensors(self.modules)

    def described(self) -> PipelinePart:
        """As the manifest holds it; its files lie in the folder of its name."""
        within = self.graphs[0].name
        contracts = [self.contract(cut) for cut in self.graphs]
        graph, *later = [one.model_copy(update={"file": f"{within}/{one.file}"}) for one in contracts]
        return PipelinePart(
            graph=graph,
            later=later[0] if later else None,
            tiles=self.tiles,
            frame_rate=self.frame_rate,
            dimensions=self.dimensions(),
            tokens=self.tokens,
            negative=self.negative,
        )


def parts_of(checkpoint: Checkpoint, without: Sequence[str] = ()) -> tuple[PartName, ...]:
    """Names of the parts that a whole bundle of this checkpoint has.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        without: Parts to be left out.

    Raises:
        ConfigError: The family declares none, or all are left out.
    """
    whole = checkpoint.family.whole
    known: dict[PartName, bool] = {
        "text": whole is not None and whole.encode is not None,
        "decode": whole is not None and any((whole.decode, whole.frames, whole.tile)),
    }
    found = tuple(name for name, has in known.items() if has)
    for name in without:
        if name not in found:
            raise ConfigError(
                f"--without is {name} for family {checkpoint.family.name}, expected "
                f"{' or '.join(found) or 'a family with parts'}; leave it out"
            )
    left = tuple(name for name in found if name not in without)
    if not left:
        raise ConfigError(
            f"--whole is given for {checkpoint.family.name}, expected a family whose pipeline this version exports, "
            "and a part of it; leave --whole out"
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
    names = [DECODER] if "decode" in parts else []
    if "text" in parts:
        names += [*whole.encoders, *(tokens.tokenizer for tokens in whole.tokens)]
    for name in names:
        _class_of(checkpoint, name)
        if not (checkpoint.root / name).is_dir():
            raise CheckpointError(
                f"{checkpoint.root} has no folder `{name}`, expected a whole diffusers pipeline; download it, or leave "
                f"the part out with --without {'decode' if name == DECODER else 'text'}"
            )


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
    return (_text if name == "text" else _decode)(checkpoint, options, whole, folder)


def _text(checkpoint: Checkpoint, options: Options, whole: Whole, folder: Path) -> PartDraft:
    assert whole.encode is not None
    encoders = {name: _component(checkpoint, name, options) for name in whole.encoders}
    tokens = tuple(_tokenizer(checkpoint, declared, folder) for declared in whole.tokens)
    inputs, ranges = [], {}
    for one in tokens:
        extent: int | str = one.length + one.dropped
        if one.size:
            ranges[one.size] = (1, one.length)
            extent = f"{one.size}+{one.dropped}" if one.dropped else one.size
        inputs += [
            Tensor(name=name, dtype="int64", shape=(1, extent), role="tokens") for name in (one.input, one.mask) if name
        ]

    def encode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        assert whole.encode is not None
        return whole.encode(encoders, given)

    lengths = {one.size: one.length for one in tokens if one.size}
    cut, constants = trace_part("text", encoders, encode, inputs, ranges, lambda _: "constant")
    made = _drafted(checkpoint, options, encoders, (cut,), constants, (ranges, lengths))
    return replace(made, tokens=tokens, negative=whole.negative)


def _decode(checkpoint: Checkpoint, options: Options, whole: Whole, folder: Path) -> PartDraft:
    vae = _component(checkpoint, DECODER, options)
    channels = int(getattr(vae.config, "latent_channels", 0) or vae.config.z_dim)
    dtype: Any = str(PRECISIONS[options.precision]).removeprefix("torch.")
    if whole.tile is not None:
        return _tile(checkpoint, options, whole, vae, channels)
    frame = () if whole.frames is None else (1,)
    latents = Tensor(name="latents", dtype=dtype, shape=(1, channels, *frame, "height", "width"), role="latent")
    sides = checkpoint.latent_size[-2:] if options.latent_size is None else options.latent_size[-2:]
    ranges = {
        name: (2, _LARGEST_SIDE) if options.latent_size is None else (side, side)
        for name, side in zip(("height", "width"), sides, strict=True)
    }
    typical = {name: min(max(side, 2), _LARGEST_SIDE) for name, side in zip(ranges, sides, strict=True)}

    def decode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if whole.frames is None:
            assert whole.decode is not None
            return {"picture": whole.decode(vae, given["latents"])}
        before = [given[name] for name in given if name != "latents"]
        picture, caches = whole.frames(vae, given["latents"], before or None)
        return {"picture": picture, **{f"cache_out_{k}": cache for k, cache in enumerate(caches)}}

    modules = {DECODER: vae}
    first, constants = trace_part("decode", modules, decode, [latents], ranges, _role_of_decoded)
    if whole.frames is None:
        return _drafted(checkpoint, options, modules, (first,), constants, (ranges, typical))
    inputs = [latents, *(_read(tensor) for tensor in first.outputs if tensor.role == "cache_out")]
    later, more = trace_part("later", modules, decode, inputs, ranges, _role_of_decoded)
    made = _drafted(checkpoint, options, modules, (first, later), constants | more, (ranges, typical))
    return replace(made, frame_rate=whole.frame_rate)


def _tile(checkpoint: Checkpoint, options: Options, whole: Whole, vae: Any, channels: int) -> PartDraft:
    """Of videos that are decoded in tiles: whatever size a bundle takes, the tiles at its edges have every size."""
    assert whole.tiling is not None, "bug in taylorseer-export: tiles without their sizes"
    tiles = whole.tiling(vae)
    largest = {"frames": tiles.frames + 1, "height": tiles.side, "width": tiles.side}
    dtype: Any = str(PRECISIONS[options.precision]).removeprefix("torch.")
    latents = Tensor(name="latents", dtype=dtype, shape=(1, channels, *largest), role="latent")
    ranges = {name: (1, most) for name, most in largest.items()}

    def decode(given: Mapping[str, Any]) -> Mapping[str, Any]:
        assert whole.tile is not None
        return {"picture": whole.tile(vae, given["latents"])}

    cut, constants = trace_part("decode", {DECODER: vae}, decode, [latents], ranges, _role_of_decoded)
    made = _drafted(checkpoint, options, {DECODER: vae}, (cut,), constants, (ranges, largest))
    return replace(made, tiles=Tiles(**asdict(tiles)), frame_rate=whole.frame_rate)


def _role_of_decoded(name: str) -> Role:
    return "picture" if name == "picture" else "cache_out"


def _read(written: Tensor) -> Tensor:
    """The input of the next call that a cache of this one is."""
    return written.model_copy(update={"name": written.name.replace("out", "in"), "role": "cache_in"})


def _drafted(
    checkpoint: Checkpoint,
    options: Options,
    modules: Mapping[str, nn.Module],
    graphs: tuple[Cut, ...],
    constants: dict[str, torch.Tensor],
    extents: tuple[dict[str, tuple[int, int]], dict[str, int]],
) -> PartDraft:
    ranges, typical = extents
    tensors = _tensors(modules) | constants
    read = {name: None for cut in graphs for name in cut.parameters()}
    return PartDraft(
        pipeline=checkpoint.root,
        options=options,
        cuts=graphs,
        spans=ranges,
        sizes={key: low if low == high else None for key, (low, high) in ranges.items()},
        typical=typical,
        stored={key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in read},
        buffers=constants,
        modules=modules,
    )


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Every tensor of the modules under each of its names: some are tied."""
    return {
        f"{part}.{name}": value.detach()
        for part, module in modules.items()
        for name, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    }


def _class_of(checkpoint: Checkpoint, name: str) -> tuple[str, str]:
    """(library, class) of a component, by the index of the pipeline."""
    path = checkpoint.root / _INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.root} has no {_INDEX}, expected a whole diffusers pipeline for --whole; pass its folder, or "
            "leave --whole out"
        )
    entry = read_json(path).get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
        raise CheckpointError(
            f"`{name}` of {path} is {entry}, expected a class of diffusers or transformers; download the pipeline again"
        )
    return entry[0], str(entry[1])


def _component(checkpoint: Checkpoint, name: str, options: Options) -> Any:
    """A component of the pipeline in eval mode, in the precision of the export.

    Raises:
        CheckpointError: It does not load.
    """
    library, kind = _class_of(checkpoint, name)
    dtype = {"torch_dtype" if library == "diffusers" else "dtype": PRECISIONS[options.precision]}
    try:
        with _quiet():
            made = getattr(import_module(library), kind).from_pretrained(
                checkpoint.root / name, use_safetensors=True, local_files_only=True, **dtype
            )
    except Exception as error:  # whatever a class makes of a folder that is not its own
        raise CheckpointError(
            f"{checkpoint.root / name} does not load as {kind} of {library} ({first_line(error)}), expected a "
            "component of a diffusers pipeline with its safetensors; download it again"
        ) from error
    return made.eval().requires_grad_(False)


def _tokenizer(checkpoint: Checkpoint, declared: Declared, folder: Path) -> Tokens:
    """A tokenizer written as data, and what is to be made with it."""
    import transformers

    where = checkpoint.root / declared.tokenizer
    try:
        with _quiet():
            found = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
            backend = found.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            path = folder / _TOKENIZER.format(declared.tokenizer)
            backend.save(str(path))
    except Exception as error:
        raise CheckpointError(
            f"{where} does not load as a tokenizer ({first_line(error)}), expected one that the tokenizers library "
            "has; download it again"
        ) from error
    fill = found.eos_token_id if declared.filled_with == "end" else found.pad_token_id
    if declared.padded and fill is None:
        raise CheckpointError(f"{where} has no token for padding, expected one; download it again")
    return Tokens(
        input=declared.name,
        mask=declared.mask or None,
        file=f"text/{path.name}",
        length=declared.length,
        size=declared.size or None,
        padding=fill if declared.padded else None,
        side="left" if found.padding_side == "left" else "right",
        template=declared.template,
        dropped=declared.dropped,
        cleaned=declared.cleaned,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers and diffusers note while they load; their errors come as exceptions."""
    import diffusers
    import transformers

    logs = (transformers.utils.logging, diffusers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
