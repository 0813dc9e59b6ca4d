"""What prompts become, kept: text encoders run once for a prompt that is asked for again.

A server owns one and passes it on with every request; nothing is kept where none is passed. What is kept is never
changed: its arrays are copies that cannot be written, and who uses them copies again.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Condition
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from taylorseer_export.bundle.memory import CONDITIONING_ROOM
from taylorseer_export.runtime.denoiser import Denoiser

Encoded = Mapping[str, np.ndarray]


class Key(NamedTuple):
    """What decides what a prompt becomes.

    Attributes:
        denoiser: The loaded bundle whose encoders read it. Itself, not its name: two of one name share nothing.
        prompt: Its text.
        length: Most tokens; None is the bundle's own.
        picture: Digest of the picture that its encoders see beside the text; None where there is none, or a black one.
        negative: Whether guidance leads away from it, where that makes it another.
    """

    denoiser: Denoiser
    prompt: str
    length: int | None
    picture: bytes | None = None
    negative: bool = False


class Counts(NamedTuple):
    """What a cache did since it was made, and what it holds. Unit of `bytes`: bytes."""

    hits: int
    misses: int
    bytes: int


class ConditioningCache:
    """What prompts became, the longest unused forgotten first. Any thread may ask.

    Args:
        room: Most bytes of the arrays and texts that are kept; 0 keeps nothing and counts nothing.
    """

    def __init__(self, room: int = CONDITIONING_ROOM) -> None:
        self._room = room
        self._kept: OrderedDict[Key, Encoded] = OrderedDict()
        self._making: set[Key] = set()
        self._changed = Condition()
        self._hits = self._misses = self._bytes = 0

    @property
    def counts(self) -> Counts:
        """At this moment."""
        with self._changed:
            return Counts(self._hits, self._misses, self._bytes)

    def of(self, key: Key, make: Callable[[], Encoded]) -> Encoded:
        """What is kept under a key, or what `make` returns, which is kept from then on.

        Threads that ask for one key at a time make it once; those that ask for others do not wait. What is larger than
        all the room is not kept.

        Args:
            key: What decides what is made.
            make: Runs the encoders. What it raises is raised here, and nothing is kept.
        """
        if not self._room:
            return make()
        with self._changed:
            while key in self._making:
                self._changed.wait()
            if key in self._kept:
                self._hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self._misses += 1
            self._making.add(key)
        made: Encoded | None = None
        try:
            made = _sealed(make())
            return made
        finally:
            with self._changed:
                if made is not None:
                    self._keep(key, made)
                self._making.discard(key)
                self._changed.notify_all()

    def _keep(self, key: Key, made: Encoded) -> None:
        size = _bytes_of(key, made)
        if size > self._room:
            return
        while self._bytes + size > self._room:
            self._bytes -= _bytes_of(*self._kept.popitem(last=False))
        self._kept[key] = made
        self._bytes += size


def _sealed(made: Encoded) -> Encoded:
    """Copies that nobody can write to: an encoder may return views of what it writes again."""
    copies = {name: np.array(value) for name, value in made.items()}
    for copy in copies.values():
        copy.flags.writeable = False
    return MappingProxyType(copies)


def _bytes_of(key: Key, made: Encoded) -> int:
    return sys.getsizeof(key.prompt) + sum(sys.getsizeof(value) for value in made.values())
