"""Text features of the embedded FLUX model, computed with numpy alone.

A real FLUX reads its captions through T5 and CLIP. The embedded model draws coloured shapes from a
vocabulary of two dozen words, so a fixed table of orthogonal vectors does the same job, and the
production image needs neither torch nor a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taylorseer_export.errors import CheckpointError, ConfigError

VOCABULARY_FILE = "vocabulary.json"
TABLE_FILE = "text_embedding.safetensors"

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
_SHAPES = ("circle", "square", "triangle", "cross")
_RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class CaptionEncoder:
    """Fixed text encoder: caption -> per-word features and one pooled feature.

    With W the word table, P the position table, w(p) the word at position p (padding after the
    last one), and n the number of words of the caption:

        encoder_hidden_states[p] = W[w(p)] + P[p]
        pooled_projections       = sum over p < n of W[w(p)] * sign(P[p]) / sqrt(n)

    All rows of W and P are orthogonal to each other, so the sum loses nothing: a linear layer can
    read word and position back. Both outputs depend on the order of the words, which matters
    because FLUX gives every text token the same rotary position (txt_ids are zeros).

    Attributes:
        words: The vocabulary; `words[i]` belongs to row i of `word_table`. `words[0]` is padding.
        word_table: W, [len(words), D] float32.
        position_table: P, [L, D] float32; L is the fixed caption length in words.
    """

    words: tuple[str, ...]
    word_table: np.ndarray
    position_table: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> CaptionEncoder:
        """Load the encoder from `vocabulary.json` and `text_embedding.safetensors`.

        Args:
            folder: The folder that holds both files, e.g. `taylorseer_export/assets/flux/text`.

        Returns:
            The encoder.

        Raises:
            CheckpointError: A file is missing or damaged, or the two do not belong together.
        """
        folder = Path(folder)
        vocabulary_path = folder / VOCABULARY_FILE
        try:
            words = tuple(json.loads(vocabulary_path.read_text(encoding="utf-8"))["words"])
        except FileNotFoundError:
            raise CheckpointError(
                f"vocabulary file is missing at {vocabulary_path}, expected a JSON file; "
                "pass the `text` folder of the FLUX model"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"vocabulary file {vocabulary_path} is unreadable ({error}), expected "
                '{"words": [...]} (JSON); run tools/make_asset.py train-tiny flux again'
            ) from None
        tables = _float32_tensors(folder / TABLE_FILE)
        try:
            word_table, position_table = tables["word"], tables["position"]
        except KeyError as error:
            raise CheckpointError(
                f"text embedding file {folder / TABLE_FILE} has no tensor {error}, expected `word` "
                "and `position`; run tools/make_asset.py train-tiny flux again"
            ) from None
        if (
            word_table.ndim != 2
            or position_table.ndim != 2
            or (word_table.shape != (len(words), position_table.shape[1]))
        ):
            raise CheckpointError(
                f"word table shape is {list(word_table.shape)}, expected one row for each of "
                f"{len(words)} words, as wide as the position table "
                f"{list(position_table.shape)}; take both files from the same model"
            )
        return cls(words, word_table, position_table)

    @property
    def length(self) -> int:
        """Number of text tokens L of every encoded caption, padding included."""
        return self.position_table.shape[0]

    @property
    def width(self) -> int:
        """Number of features D of one text token and of the pooled feature."""
        return self.position_table.shape[1]

    def token_ids(self, captions: Sequence[str]) -> np.ndarray:
        """Rows of the word table for each caption: lower case, split on spaces, padded with 0.

        Args:
            captions: B captions of 1 to L known words each. A comma or full stop is ignored.

        Returns:
            [B, L] int64.

        Raises:
            ConfigError: A caption is empty, too long, or has an unknown word; names the known ones.
        """
        if isinstance(captions, str):
            raise ConfigError(f"captions is the string {captions!r}, expected a list of captions; pass [{captions!r}]")
        known = {word: row for row, word in enumerate(self.words) if row > 0}
        ids = np.zeros((len(captions), self.length), dtype=np.int64)
        for row, caption in enumerate(captions):
            words = caption.lower().replace(",", " ").replace(".", " ").split()
            if not 1 <= len(words) <= self.length:
                raise ConfigError(
                    f"caption length is {len(words)}, expected 1 to {self.length} (words); "
                    "write a caption such as 'a red circle left of a blue square'"
                )
            for position, word in enumerate(words):
                if word not in known:
                    raise ConfigError(
                        f"caption word is {word!r}, expected a known word (vocabulary of "
                        f"{len(known)} words); use only: {', '.join(sorted(known))}"
                    )
                ids[row, position] = known[word]
        return ids

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode captions into the two text inputs of the FLUX transformer.

        See the class for the formula. Case, commas and full stops make no difference.

        Args:
            captions: B captions of 1 to L known words each.

        Returns:
            `encoder_hidden_states` [B, L, D] float32 and `pooled_projections` [B, D] float32.

        Raises:
            ConfigError: A caption is empty, too long, or has an unknown word; names the known ones.
        """
        ids = self.token_ids(captions)
        words = self.word_table[ids]
        real = (ids > 0).astype(np.float32)[:, :, None]
        bound = words * np.sign(self.position_table)[None] * real
        pooled = bound.sum(axis=1) / np.sqrt(real.sum(axis=1))
        return {
            "encoder_hidden_states": (words + self.position_table[None]).astype(np.float32),
            "pooled_projections": pooled.astype(np.float32),
        }


def _float32_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a small safetensors file as float32."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        others = sorted({str(value.dtype) for value in tensors.values() if value.dtype.kind != "f"})
        if others:
            raise TypeError(f"it holds {', '.join(others)}")
        return {name: value.astype(np.float32) for name, value in tensors.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"text embedding file is missing at {path}, expected a safetensors file; "
            "pass the `text` folder of the FLUX model"
        ) from None
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two of dtypes that numpy lacks
        raise CheckpointError(
            f"text embedding file {path} is unreadable ({error}), expected a safetensors file of "
            "float16 or float32 tensors; run tools/make_asset.py train-tiny flux again"
        ) from None


def captions(count: int, seed: int) -> list[str]:
    """Captions in the encoder's words: two shapes of different colours and how they stand, or every fourth time one."""
    drawn = np.random.default_rng((seed, count))

    def thing(colour: str) -> str:
        return f"{'an' if colour[0] == 'o' else 'a'} {colour} {_SHAPES[drawn.integers(len(_SHAPES))]}"

    made = []
    for number in range(count):
        first, second = (_COLOURS[k] for k in drawn.permutation(len(_COLOURS))[:2])
        relation = _RELATIONS[drawn.integers(len(_RELATIONS))]
        made.append(thing(first) if number % 4 == 3 else f"{thing(first)} {relation} {thing(second)}")
    return made
