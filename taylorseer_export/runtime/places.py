"""Inputs that say where tokens are and which count: they follow from the sizes, for every family."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# FramePack's frames in time: 16 and 2 of the past, the picture and the last frame, then the new ones.
_FIRST_FRAME = {"indices_latents_history_4x": 0, "indices_latents_history_2x": 16, "indices_latents_clean": 18}


def place(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int], sides: tuple[int, int] | None = None
) -> np.ndarray | None:
    """Where tokens are and which count, for the inputs that say this and nothing else; None for any other input."""
    if name.endswith("_mask"):
        return np.ones(shape, np.float32 if name == "encoder_attention_mask" else np.int64)
    if name.startswith("indices_"):
        return np.arange(shape[0], dtype=np.int64) + _FIRST_FRAME.get(name, 20)
    if name == "img_shapes":  # frames, height and width in tokens
        return np.broadcast_to([1, *(sides or sides_of(sizes["image_tokens"]))], shape).astype(np.int64)
    if name == "txt_ids":
        return np.zeros(shape, np.float32)
    if name in ("img_ids", "image_ids"):  # FLUX: a picture to be edited has a 1 in column 0
        _, width = sides_of(shape[0]) if sides is None or name == "image_ids" else sides
        ids = np.full(shape, float(name == "image_ids"), np.float32)
        ids[:, 1], ids[:, 2] = np.divmod(np.arange(shape[0]), width)
        return ids
    return None


def sides_of(count: int) -> tuple[int, int]:
    """(rows, columns) of a picture of `count` tokens, as square as the count allows."""
    width = max(w for w in range(1, int(count**0.5) + 1) if count % w == 0)
    return count // width, width
