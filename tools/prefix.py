"""What a full step computes and a request keeps, with rows of pictures in every step and with their keys made once.

    python tools/prefix.py                      FLUX.2 klein KV at its card's sizes
    python tools/prefix.py --pictures 1 2 4     of so many pictures, each of as many tokens as the card's

The same model in two forms: `flux2-edit`, where the rows of pictures go through every full step, and `flux2-kv`, where
`prepare` computes them once. Counted from the graphs, as cards are: matrix products and attention, two for each
multiplication and addition; bytes in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cards
from weight_formats import flops

from taylorseer_export.bundle.memory import role_bytes, size
from taylorseer_export.compile.export import Draft, draft

MODEL, TOKENS = "flux.2-klein-9b-kv", 4096  # of each picture
FORMS = {"flux2-edit": "in every full step", "flux2-kv": "once, by `prepare`"}


def table(forms: Mapping[str, tuple[Draft, dict[Any, str]]], counts: Sequence[int], tokens: int) -> list[str]:
    """Lines of markdown: of each number of pictures one for each form.

    Args:
        forms: Family -> its draft, and the names of the symbols of its trace.
        counts: Pictures.
        tokens: Of each of them.
    """
    lines = [
        "| pictures | rows of them are computed | full step | once | `prepare` hands over | weights of `prepare` |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for count in counts:
        for family, words in FORMS.items():
            of_any, names = forms[family]
            made = replace(of_any, typical={**of_any.typical, "condition_tokens": tokens * count})
            prepare, full = made.split.prepare, made.split.full
            kept = size(role_bytes(prepare.outputs, "constant", made.typical))
            step, once = (f"{flops(made, cut, names) / 1e12:.1f} TFLOP" for cut in (full, prepare))
            lines.append(f"| {count} | {words} | {step} | {once} | {kept} | {size(made.weights_bytes(prepare))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 2, 4], help="how many (default: 1 2 4)")
    given = parser.parse_args()
    entries = cards.config(MODEL)
    forms = {}
    for family in FORMS:
        cards.MODELS[MODEL] = replace(cards.MODELS[MODEL], family=family)
        traced, options = cards.traced_model(MODEL, entries)
        forms[family] = draft(traced, options), traced.trace.names
    print("\n".join(table(forms, given.pictures, TOKENS)))


if __name__ == "__main__":
    main()
