"""Components of a diffusers pipeline, loaded by the library that each is a class of; tokenizers as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from taylorseer_export.bundle.manifest import Tokens
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.checkpoint.files import read_json
from taylorseer_export.compile.draft import PRECISIONS, Options
from taylorseer_export.errors import CheckpointError, first_line
from taylorseer_export.families.whole import Tokens as Declared

INDEX = "model_index.json"


def class_of(checkpoint: Checkpoint, name: str) -> tuple[str, str]:
    """(library, class) of a component, by the index of the pipeline."""
    path = checkpoint.root / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.root} has no {INDEX}, expected a whole diffusers pipeline for --whole; pass its folder, or "
            "leave --whole out"
        )
    entry = read_json(path).get(name)
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


def tokenizer(checkpoint: Checkpoint, declared: Declared, folder: Path) -> Tokens:
    """A tokenizer written as data, and what is to be made with it."""
    import transformers

    where = checkpoint.root / declared.tokenizer
    try:
        with _quiet():
            found = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
            backend = found.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            path = folder / f"{declared.tokenizer}.json"
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
