"""Normal numbers of a seed: the noise that torch's generator draws on the CPU, without torch.

The words are those of the Mersenne Twister that torch seeds, so the uniform numbers are the same bits. Torch then takes
logarithms, cosines and sines in float32, by functions that differ by units in the last place between its builds and
CPUs; here they are taken in float64 and rounded once. So each pair of numbers lies within

    |z - z_torch| <= (4 pi + 6) 2^-24 r,   r = sqrt(-2 log u)

of torch's: 2^-24 for each rounding of torch's angle, which is up to 2 pi long and rounded twice, 2 * 2^-24 for its
cosine or sine and for its logarithm, of which the root leaves half, and 2^-24 for the root, the product and the
rounding here. Below 16 numbers torch computes in float64 itself, and both round the same number.

Source: Matsumoto and Nishimura 1998, Box and Muller 1958; what is drawn in which order is torch's `normal_fill`.
"""

from __future__ import annotations

import numpy as np

from taylorseer_export.errors import ConfigError

BLOCK = 16  # numbers that torch makes of as many uniform ones: the first half gives lengths, the second angles
BITS = 24  # of such a uniform number
PART = 512  # blocks at a time, which a CPU keeps in its cache
LOWEST_SEED, HIGHEST_SEED = -(1 << 63), (1 << 64) - 1


class Generator:
    """Draws what a new generator of torch draws, within the bound above, one draw after the other.

    Args:
        seed: As `torch.Generator.manual_seed` takes it; its low 32 bits count.

    Raises:
        ConfigError: The seed has more than 64 bits.
    """

    def __init__(self, seed: int) -> None:
        if not LOWEST_SEED <= seed <= HIGHEST_SEED:
            raise ConfigError(f"seed has {seed.bit_length()} bits, expected at most 64; choose a smaller one")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._half = False  # whether torch holds back one of a pair

    def normals(self, count: int) -> np.ndarray:
        """`[count]` float32, what `torch.randn` draws next.

        Args:
            count: How many, at least 0. An odd number below 16 can be the last draw alone.
        """
        assert not self._half, "bug in taylorseer-export: a draw after one that left half a pair"
        if count < BLOCK:
            self._half = count % 2 > 0
            return _few(self._twister, count)
        made = _blocks(_words(self._twister, count)[: count - count % BLOCK])
        if count % BLOCK:  # the last numbers are a block of their own, which torch draws after all others
            made = np.concatenate([made[: count - BLOCK], _blocks(_words(self._twister, BLOCK))])
        return made


def normals(count: int, seed: int) -> np.ndarray:
    """`[count]` float32: the first draw of a new generator; arguments and errors are those of `Generator`."""
    return Generator(seed).normals(count)


def _words(twister: np.random.RandomState, count: int) -> np.ndarray:
    return np.frombuffer(twister.bytes(4 * count), "<u4")


def _blocks(words: np.ndarray) -> np.ndarray:
    """Normal numbers of as many words, of which the low bits are uniform."""
    # Turns by 24 bits are turns by the high 12 and by the low 12, of which there are few.
    half = 1 << BITS // 2
    high, low = (np.exp(2j * np.pi / turn * np.arange(half)) for turn in (half, half * half))
    made = np.empty((len(words) // BLOCK, 2, BLOCK // 2), np.float32)
    for begin in range(0, len(made), PART):
        part = words.reshape(made.shape)[begin : begin + PART] & ((1 << BITS) - 1)
        lengths, angles = np.sqrt(-2 * np.log(1 - part[:, 0] * 2.0**-BITS)), part[:, 1]
        turned = lengths * (high[angles >> BITS // 2] * low[angles & (half - 1)])
        made[begin : begin + PART, 0], made[begin : begin + PART, 1] = turned.real, turned.imag
    return made.reshape(-1)


def _few(twister: np.random.RandomState, count: int) -> np.ndarray:
    """Pairs of normal numbers, each of two uniform ones that are multiples of 2^-53: angle and length."""
    pairs = -(-count // 2)
    high, low = _words(twister, 4 * pairs).astype(np.uint64).reshape(2 * pairs, 2).T
    uniform = ((high << np.uint64(32) | low) & np.uint64((1 << 53) - 1)) * 2.0**-53
    angle, length = 2 * np.pi * uniform[::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([length * np.cos(angle), length * np.sin(angle)], 1).astype(np.float32).reshape(-1)[:count]
