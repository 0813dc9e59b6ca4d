"""Captions of the kind that the embedded FLUX was trained on."""

from __future__ import annotations

import numpy as np

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
_SHAPES = ("circle", "square", "triangle", "cross")
_RELATIONS = ("left of", "right of", "above", "below")


def captions(count: int, seed: int) -> list[str]:
    """Captions in the words that it knows: two things of different colours and how they stand, each fourth time one."""
    drawn = np.random.default_rng((seed, count))

    def thing(colour: str) -> str:
        return f"{'an' if colour[0] == 'o' else 'a'} {colour} {_SHAPES[drawn.integers(len(_SHAPES))]}"

    made = []
    for number in range(count):
        first, second = (_COLOURS[k] for k in drawn.permutation(len(_COLOURS))[:2])
        relation = _RELATIONS[drawn.integers(len(_RELATIONS))]
        made.append(thing(first) if number % 4 == 3 else f"{thing(first)} {relation} {thing(second)}")
    return made
