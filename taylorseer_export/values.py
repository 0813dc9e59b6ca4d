"""Values as people type them: numbers in a range, bytes of memory, sizes in pixels."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from fractions import Fraction

_LARGEST = (1 << 31) - 1
HIGHEST_SEED = (1 << 63) - 1
MOST_THREADS = 1024  # of one engine
_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def whole(low: int = -_LARGEST, high: int = _LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`, any of 32 bits if left out."""

    def value_of(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            span = f", at least {low}" if high == _LARGEST and value < low else f", {low} to {high}"
            span = "" if low == -_LARGEST else span
            raise argparse.ArgumentTypeError(f"is {text[:64]}, expected a whole number{span}")
        return value

    return value_of


def real(above: float | None = None) -> Callable[[str], float]:
    """A finite number above `above`; any, infinite and NaN included, where that is left out."""

    def value_of(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            if above is None:
                raise argparse.ArgumentTypeError(f"is {text}, expected a number") from None
            value = math.nan
        if above is not None and not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"is {text}, expected a number above {above:g}")
        return value

    return value_of


def finite(text: str) -> float:
    """A number that is not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text[:64]}, expected a finite number")
    return value


def memory(text: str) -> int:
    """Bytes of `24GiB`, `1.5 GB`, `512MiB` or `1000000`; a fraction of a byte is dropped."""
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,18})?\s*([a-z]*)", text.strip().lower())
    value = int(Fraction(found[1] + (found[2] or "")) * _UNITS.get(found[3], 0)) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a size above 0 in GiB, GB, MiB, MB or bytes, like 24GiB")
    return value


def memory_or_none(text: str) -> int:
    """Bytes as `memory` reads them, or 0."""
    return 0 if text.strip() == "0" else memory(text)


def size(text: str) -> tuple[int, ...]:
    """(height, width) of `1024x768`, or (frames, height, width) of `81x480x832`."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(re.fullmatch("[0-9]{1,6}", p) and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(
            f"is {text}, expected HxW, like 1024x1024, or FxHxW for a video, sides below {10**6}"
        )
    return tuple(int(p) for p in parts)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of `0,1`, each once."""
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,3}", part) for part in parts) or len({*map(int, parts)}) < len(parts):
        raise argparse.ArgumentTypeError(f"is {text[:64]}, expected different numbers from 0, like 0,1")
    return tuple(map(int, parts))


def seed(text: str) -> int:
    """A seed that torch, numpy and a 64-bit port of a server all take."""
    return whole(0, HIGHEST_SEED)(text)
