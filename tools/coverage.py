"""Which transformers of diffusers export: `python tools/coverage.py [CLASS ...]` writes graphs/coverage.md.

Every class that denoises pictures or video is built tiny and random. What `taps` proposes for it is traced, split and
held against the model, step by step, as `taylorseer-export auto` does; where that fails and a family declares it, the
declaration is. Classes named on the command line replace their own rows alone.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from randomised import randomised
from tiny_configs import LATENTS, tiny_config

from taylorseer_export.errors import ExportError, TaylorSeerError, first_line
from taylorseer_export.families import FAMILIES
from taylorseer_export.graph.propose import Proposal, propose

PAGE = Path(__file__).resolve().parents[1] / "graphs" / "coverage.md"

# Transformers of diffusers that this page leaves out, and why.
_SOUND = "it denoises sound"
EXCLUDED = {
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "RFD4ProteinaTransformer": "it denoises proteins",
    "PriorTransformer": "it makes an embedding of a picture, one vector",
    "DreamLiteTransformer2DModel": "it is a block of a UNet",
    "Transformer2DModel": "it is a block of UNets; as a model of its own it became DiT and PixArt",
    "TransformerTemporalModel": "it is a block of UNets",
}
_SMALL = {2: (6, 8), 3: (3, 6, 8)}  # latents for classes that are traced at one size, by the number of its sides
AUTO, DECLARED, REFUSED = "without a declaration", "with a declaration", "refused"


@dataclass(frozen=True)
class Row:
    """What came of one class: `how` it exports, at which granularity, with which sizes open, or the reason."""

    name: str
    how: str
    state: str
    note: str

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.how} | {self.state} | {self.note} |"


def classes() -> list[str]:
    """The classes of the page: transformers of diffusers that denoise pictures or video."""
    return sorted(set(transformers()) - EXCLUDED.keys())


def transformers() -> Iterator[str]:
    """Every public model under diffusers' `models/transformers`."""
    import diffusers
    from diffusers.models import transformers as folder

    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        for name, found in vars(module).items():
            own = inspect.isclass(found) and found.__module__ == module.__name__
            if own and issubclass(found, diffusers.ModelMixin) and hasattr(diffusers, name):
                yield name


def cover(name: str) -> Row:
    """Build, propose, export and verify one class."""
    import diffusers
    import torch

    from taylorseer_export.checkpoint.checkpoint import open_checkpoint
    from taylorseer_export.compile.export import Options
    from taylorseer_export.families.family import unknown
    from taylorseer_export.report.proposal import verified

    model_class = getattr(diffusers, name)
    try:
        model = randomised(lambda: model_class(**tiny_config(model_class)), seed=0)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            checkpoint = open_checkpoint(folder, unknown(name))
            skeleton = checkpoint.skeleton(torch.float32)
            proposal = propose(skeleton)
            size = LATENTS.get(name) or proposal.size or _SMALL[len(proposal.family().latent_size)]
            options = Options(order=1, interval=3, warmup=2, latent_size=size)
            try:
                found = verified(checkpoint, skeleton, proposal, options)
            except ExportError as error:
                if "add --batch 1" not in str(error):
                    raise
                found = verified(checkpoint, skeleton, proposal, replace(options, batch=1))
    except TaylorSeerError as error:
        return declared(name) or Row(name, REFUSED, "", sentence(str(error)))
    except Exception as error:  # of torch or diffusers: no sentence of ours yet
        return declared(name) or Row(name, REFUSED, "", sentence(f"{type(error).__name__}: {first_line(error)}"))
    return Row(name, AUTO, found.granularity, sizes(found.proposal))


def sizes(proposal: Proposal) -> str:
    """Which sizes one bundle takes."""
    fixed = [size for size, (low, high) in proposal.dimensions.items() if low == high]
    latent = next(spec for spec in proposal.inputs if spec.role == "latent")
    if not any(isinstance(entry, str) for entry in latent.shape[1:]):
        fixed = ["the picture", *fixed]
    return f"one size of {', '.join(fixed)}" if fixed else "any size"


def declared(name: str) -> Row | None:
    """The row of a class that a family declares, verified with its own tiny model; None where none does."""
    from tiny_models import MODELS

    from taylorseer_export.checkpoint.checkpoint import open_checkpoint
    from taylorseer_export.compile.export import Options
    from taylorseer_export.report.proposal import agreement

    for family, build, _ in MODELS.values():
        if FAMILIES[family].model_class != name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            build().save_pretrained(folder)
            agreement(open_checkpoint(folder, FAMILIES[family]), Options(order=1, interval=3, warmup=2))
        return Row(name, f"{DECLARED}, `{family}`", "module", "")
    return None


def sentence(text: str) -> str:
    """What a refusal says, for one cell of a table."""
    text = re.sub(r"\s*(; (add|declare|see|call|run|change|mend)\b.*)", "", text)
    text = re.sub(r" and mode <[^>]*>", "", text)  # of torch, with an address
    return text.replace("|", "\\|").replace("/tmp/", "")


def counts(rows: Mapping[str, Row]) -> tuple[int, int, int]:
    """(without a declaration, with one, refused)."""
    how = [row.how for row in rows.values()]
    return how.count(AUTO), sum(h.startswith(DECLARED) for h in how), how.count(REFUSED)


def versions() -> str:
    """What the page was made with."""
    return f"diffusers {version('diffusers')}, torch {version('torch').split('+')[0]}"


def page(rows: Mapping[str, Row]) -> str:
    """The whole page."""
    auto, with_one, refused = counts(rows)
    total = auto + with_one + refused
    lines = [
        "# Coverage",
        "",
        f"Of the {total} transformers of diffusers that denoise pictures or video, {auto + with_one} "
        f"({100 * (auto + with_one) // total} %) are traced and",
        f"split, and equal the eager model at every step: {auto} ({100 * auto // total} %) without a declaration, "
        f"{with_one} with that of a family.",
        f"{refused} are refused. Made with {versions()}.",
        "",
        "Each is tiny and random, in float32, and its graphs are run operator by operator, on a plan of full steps",
        "and on one with forecasts. `taylorseer-export auto --model FOLDER` does so with a model before it exports it.",
        "At granularity `module` every attention and MLP is forecast; where the proposed sites are not complete,",
        "`residual` or `last` is what verifies. One size of the batch is what `--batch 1` asks for. A class that needs",
        "no declaration may have one all the same.",
        "",
        "`python tools/coverage.py` writes this page, `python tools/coverage.py CLASS` one row of it.",
        "",
        "| class | exports | state | sizes, or why not |",
        "|---|---|---|---|",
        *(str(rows[name]) for name in sorted(rows)),
        "",
        "Left out:",
        "",
        *(f"- `{name}`: {reason}." for name, reason in EXCLUDED.items()),
        "",
    ]
    return "\n".join(lines)


def read(text: str) -> dict[str, Row]:
    """The rows of a page."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    return {name: Row(name, how, state, note) for name, how, state, note in found}


def main(asked: list[str]) -> None:
    """Cover the classes that are asked for, or all, and write the page."""
    rows = read(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    known = classes()
    rows = {name: rows[name] for name in rows if name in known}
    for number, name in enumerate(asked or known, 1):
        begin = time.monotonic()
        rows[name] = cover(name)
        print(f"{number}/{len(asked or known)} {time.monotonic() - begin:.0f} s {rows[name]}", flush=True)
        PAGE.write_text(page(rows), encoding="utf-8")
    print(f"{counts(rows)} of {len(known)}: without a declaration, with one, refused")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
