"""Components of a diffusers pipeline, loaded by the library that each is a class of; tokenizers as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_args

from taylorseer_export.bundle.manifest import Filter, Shown, Tensor, Tokens
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.checkpoint.files import INDEX, MODULAR_INDEX, read_json
from taylorseer_export.compile.draft import PRECISIONS, Options
from taylorseer_export.errors import CheckpointError, first_line
from taylorseer_export.families.family import replaced
from taylorseer_export.families.whole import Chat
from taylorseer_export.families.whole import Shown as DeclaredShown
from taylorseer_export.families.whole import Tokens as Declared

FILTERS: tuple[Filter, ...] = get_args(Filter)  # in the order of Pillow's numbers


def class_of(checkpoint: Checkpoint, name: str) -> tuple[str, str]:
    """(library, class) of a component, by the index of the pipeline.

    That of a modular one says behind them where a component is loaded from; of one that was not loaded, its class too.
    """
    paths = [checkpoint.root / name for name in (INDEX, MODULAR_INDEX)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{checkpoint.root} has no {INDEX}, expected a whole diffusers pipeline for --whole; pass its folder, or "
            "leave --whole out"
        )
    entry = read_json(path).get(name)
    if path.name == MODULAR_INDEX and isinstance(entry, list) and len(entry) == 3:
        *entry, where = entry
        if entry[0] is None and isinstance(where, dict):
            entry = where.get("type_hint")
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
        raise CheckpointError(
            f"`{name}` of {path} is {entry}, expected a class of diffusers or transformers; download the pipeline again"
        )
    return entry[0], str(entry[1])


def component(checkpoint: Checkpoint, name: str, options: Options) -> Any:
    """A component of the pipeline in eval mode, in the precision of the export.

    Raises:
        CheckpointError: It does not load.
    """
    library, kind = class_of(checkpoint, name)
    dtype = {"torch_dtype" if library == "diffusers" else "dtype": PRECISIONS[options.precision]}
    try:
        with quiet():
            made = getattr(import_module(library), kind).from_pretrained(
                checkpoint.root / name, use_safetensors=True, local_files_only=True, **dtype
            )
    except Exception as error:  # whatever a class makes of a folder that is not its own
        raise CheckpointError(
            f"{checkpoint.root / name} does not load as {kind} of {library} ({first_line(error)}), expected a "
            "component of a diffusers pipeline with its safetensors; download it again"
        ) from error
    return made.eval().requires_grad_(False)


def tokenizer(checkpoint: Checkpoint, declared: Declared, folder: Path) -> Tokens:
    """A tokenizer written as data, and what is to be made with it."""
    import transformers

    where = checkpoint.root / declared.tokenizer
    try:
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
            backend = _backend(found)
            backend.no_padding()
            backend.no_truncation()
            path = folder / f"{declared.tokenizer}.json"
            backend.save(str(path))
    except Exception as error:
        raise CheckpointError(
            f"{where} does not load as a tokenizer ({first_line(error)}), expected one that the tokenizers library "
            "has; download it again"
        ) from error
    template, special = declared.template, declared.special
    if declared.chat is not None:
        template = _template(where, found, declared.chat)
        special = special and not (found.bos_token and template.startswith(found.bos_token))
    length, dropped = declared.length, declared.dropped
    if isinstance(dropped, str):
        # Of a template that is not for negative prompts, the first token and the last are kept.
        dropped = len(found.encode(dropped, add_special_tokens=special)) - (2 if declared.kept else 0)
    if declared.spelled:
        length += len(found.encode(declared.suffix, add_special_tokens=special))
    fill = found.eos_token_id if declared.filled_with == "end" else found.pad_token_id
    if declared.padded and fill is None:
        raise CheckpointError(f"{where} has no token for padding, expected one; download it again")
    return Tokens(
        input=declared.name,
        mask=declared.mask or None,
        file=f"text/{path.name}",
        length=length,
        size=declared.size or None,
        padding=fill if declared.padded else None,
        side="left" if (declared.side or found.padding_side) == "left" else "right",
        template=template,
        removed=declared.removed,
        lowered=declared.lowered,
        suffix=declared.suffix or None,
        multiple=declared.multiple or None,
        spelled=declared.spelled,
        dropped=dropped,
        kept=declared.kept or None,
        cleaned=declared.cleaned,
        quoted=declared.quoted,
        blank=declared.blank,
        shortened=declared.shortened,
        special=special,
    )


def _backend(found: Any) -> Any:
    """A tokenizer as the library has it; ByT5's, which transformers has in Python alone, with its bytes as letters."""
    if hasattr(found, "backend_tokenizer"):
        return found.backend_tokenizer
    if type(found).__name__ != "ByT5Tokenizer":
        raise ValueError("it is none of that library")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = found.added_tokens_decoder
    known = {letter: byte + found.offset for byte, letter in bytes_to_unicode().items()}
    known |= {str(token): number for number, token in special.items()}
    made = Tokenizer(models.BPE(known, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    end = (found.eos_token, found.eos_token_id)
    made.post_processor = processors.TemplateProcessing(f"$A {found.eos_token}", special_tokens=[end])
    made.add_special_tokens([*special.values()])
    for text in ("", 'Text "a b". Text "\u00e9\u4e2d". ', "".join(map(str, special.values()))):
        if made.encode(text).ids != found(text).input_ids:
            raise ValueError("its bytes are numbered in another way")
    return made


def _template(where: Path, found: Any, chat: Chat) -> str:
    """What a tokenizer's chat template puts a prompt into, in the place of `{}`.

    Raises:
        CheckpointError: It has none, or makes another text of a prompt than the one with the prompt in that place.
    """

    def text(prompt: str) -> str:
        messages, options = chat(prompt)
        return str(found.apply_chat_template(messages, tokenize=False, **options))

    try:
        made = text("{}")
        if made.count("{}") != 1 or any(text(prompt) != made.replace("{}", prompt) for prompt in ("", " a\n\nb ")):
            raise ValueError("it changes the prompt")
    except Exception as error:  # whatever a template raises, and transformers where there is none
        raise CheckpointError(
            f"{where} has no chat template that a prompt is put into as it is ({first_line(error)}), expected the one "
            "of the published pipeline; download it again"
        ) from error
    return made


def numbers(checkpoint: Checkpoint, declared: Declared, folder: Path) -> dict[str, int]:
    """The special tokens that the encoders look for, and their numbers in what `tokenizer` wrote.

    Raises:
        CheckpointError: There is no such token.
    """
    if not declared.sought:
        return {}
    special = read_json(folder / f"{declared.tokenizer}.json").get("added_tokens", [])
    known = {entry["content"]: int(entry["id"]) for entry in special}
    for token in declared.sought:
        if token not in known:
            raise CheckpointError(
                f"{checkpoint.root / declared.tokenizer} has no special token `{token}`, expected it in the tokenizer "
                f"of family {checkpoint.family.name}; download it again"
            )
    return {token: known[token] for token in declared.sought}


class Look(NamedTuple):
    """How an image encoder is shown a picture.

    Attributes:
        shown: What the run side does.
        size: (height, width) in pixels.
        mean, deviation: Of each colour, from 0 to 1: what the graph normalises it by.
    """

    shown: Shown
    size: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def refuse_other_guider(checkpoint: Checkpoint) -> None:
    """Refuse a pipeline that guides by another rule than uncond + scale * (cond - uncond), at every step.

    Raises:
        CheckpointError: It does.
    """
    said = checkpoint.guider
    usual = {
        "_class_name": "ClassifierFreeGuidance",
        "guidance_rescale": 0.0,
        "use_original_formulation": False,
        "start": 0.0,
        "stop": 1.0,
        "enabled": True,
    }
    for name, value in usual.items():
        if said and said.get(name, value) != value:
            raise CheckpointError(
                f"`{name}` of {checkpoint.root / 'guider'} is {said[name]}, expected {value}, the only guidance of a "
                "whole bundle; change it, or leave --whole out"
            )


def look(checkpoint: Checkpoint, declared: DeclaredShown) -> Look:
    """What an image processor does to a picture.

    Raises:
        CheckpointError: It does not load, or does anything but resize, cut out the middle, and normalise.
    """
    _, kind = class_of(checkpoint, declared.processor)
    where = checkpoint.root / declared.processor
    try:
        with quiet():
            found = getattr(import_module("transformers"), kind).from_pretrained(where, local_files_only=True)
        said = found.to_dict()
        cut, size = said.get("do_center_crop"), said["size"]
        sides = said["crop_size"] if cut else size
        made = Look(
            Shown(
                input=declared.name,
                sized=declared.sized,
                as_bytes=declared.as_bytes,
                edge=size["shortest_edge"] if cut else None,
                filter=FILTERS[int(said["resample"])],
            ),
            (sides["height"], sides["width"]),
            tuple(said["image_mean"]),
            tuple(said["image_std"]),
        )
        usual = all(said[f"do_{what}"] for what in ("resize", "rescale", "normalize"))
        inside = made.shown.edge is None or made.shown.edge >= max(made.size)
        if not usual or not inside or round(1 / said["rescale_factor"]) != 255:
            raise ValueError("it does more, or less, than resize, cut out the middle and normalise")
    except Exception as error:  # whatever a class makes of a folder that is not its own
        raise CheckpointError(
            f"{where} does not load as {kind} of transformers ({first_line(error)}), expected an image processor of a "
            "diffusers pipeline; download it again"
        ) from error
    return made


def processor(where: Path) -> dict[str, Any]:
    """What the image processor in a folder says of itself, whatever class it is of."""
    import transformers

    with quiet():
        return dict(transformers.AutoImageProcessor.from_pretrained(where, local_files_only=True).to_dict())


def shown_as(seen: Look | None, dtype: Any) -> list[Tensor]:
    """The input of a graph that an image encoder is shown a picture as; none where there is no such encoder."""
    if seen is None:
        return []
    return [Tensor(name=seen.shown.input, dtype=dtype, shape=(1, 3, *seen.size), role="picture")]


def normalised(seen: Look | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a graph by name, that picture as its encoder wants it."""
    if seen is None or seen.shown.input not in given:
        return dict(given)
    pixels = given[seen.shown.input]
    mean, deviation = (pixels.new_tensor(of).view(1, 3, 1, 1) for of in (seen.mean, seen.deviation))
    return {**given, seen.shown.input: (pixels - mean) / deviation}


@contextmanager
def plain_masks() -> Iterator[None]:
    """Let text encoders make their masks of whole rows and columns, as transformers 5 does.

    Version 4 makes them position by position within a vmap, which is no operator of a traced graph.
    """
    from transformers import masking_utils

    if "use_vmap" in signature(masking_utils.sdpa_mask).parameters:
        yield
        return

    def whole(function: Callable[..., Any], bh_indices: bool = True) -> Callable[..., Any]:
        def mask(batch: Any, head: Any, rows: Any, columns: Any) -> Any:
            seen = function(batch[:, None, None, None], head[:, None, None], rows[:, None], columns)
            return seen.expand(*(each.shape[0] for each in (batch, head, rows, columns)))

        return mask

    with replaced(masking_utils, _vmap_for_bhqkv=whole, TransformGetItemToIndex=nullcontext):
        yield


@contextmanager
def quiet() -> Iterator[None]:
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
