"""Videos decoded in tiles: of frames, and within them of pixels, blended where neighbours overlap.

The order of tiles and the weights of the blending are those of diffusers, so that the pictures are.

Shapes: C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from taylorseer_export.runtime.parts import Part

_TIME, _ROWS, _COLUMNS = 2, 3, 4  # axes


class TileDecoder:
    """The decoder of videos whose graph decodes one tile, called with arrays of the host.

    It holds two tiles of frames in full size, however long a video is: one, and the one before for its end.

    Args:
        part: The graph, loaded.
    """

    def __init__(self, part: Part) -> None:
        assert part.described.tiles is not None, "bug in taylorseer-export: tiles of a decoder that has none"
        self.described, self._part, self.tiles = part.described, part, part.described.tiles

    def __call__(self, latents: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
        """Decode one video.

        Args:
            latents: `[1, C, F, H, W]`.
            take: Given the pictures of each tile of frames in turn, `[1, 3, frames, height, width]` from 0 to 1.
        """
        self.beyond(latents, lambda made: take(made.clip(0, 1)))

    def beyond(self, latents: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
        """The same, with pictures from 0 to 1 and beyond, as they are before they are blended with others."""
        tiles, count = self.tiles, latents.shape[_TIME]
        if count <= tiles.frames:
            take(self._pictures(latents))
            return
        before: np.ndarray | None = None
        for begin in range(0, count, tiles.frame_stride):
            made = self._pictures(latents[:, :, begin : begin + tiles.frames + 1])
            stride = tiles.time_scale * tiles.frame_stride
            if before is None:
                take(made[:, :, : stride + 1])
            else:
                made = made[:, :, 1:]  # that of the latent frame before, which it began with
                _blend(before, made, tiles.time_scale * (tiles.frames - tiles.frame_stride), _TIME)
                if made.shape[_TIME]:
                    take(made[:, :, :stride])
            before = made

    def _pictures(self, latents: np.ndarray) -> np.ndarray:
        """`[1, 3, frames, height, width]` of the latent frames of one tile, `[1, C, F, H, W]`."""
        tiles = self.tiles
        height, width = latents.shape[_ROWS:]
        if max(height, width) <= tiles.side:
            return self._part({"latents": latents})["picture"]
        overlap, stride = tiles.scale * (tiles.side - tiles.side_stride), tiles.scale * tiles.side_stride
        above: Sequence[np.ndarray] = ()
        finished = []
        for top in range(0, height, tiles.side_stride):
            row: list[np.ndarray] = []
            for left in range(0, width, tiles.side_stride):
                tile = latents[:, :, :, top : top + tiles.side, left : left + tiles.side]
                made = self._part({"latents": tile})["picture"]
                if above:
                    _blend(above[len(row)], made, overlap, _ROWS)
                if row:
                    _blend(row[-1], made, overlap, _COLUMNS)
                row.append(made)
            finished.append(np.concatenate([made[:, :, :, :stride, :stride] for made in row], _COLUMNS))
            above = row
        return np.concatenate(finished, _ROWS)

    def close(self) -> None:
        """Release its engine."""
        self._part.close()


def _blend(before: np.ndarray, after: np.ndarray, overlap: int, axis: int) -> None:
    """Let the beginning of one tile come in, in place, as the end of the one before goes out: the first row, column or
    frame of the overlap is all that of the one before, and no one is all that of this tile."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    if not overlap:
        return
    going = np.moveaxis(before, axis, 0)[-overlap:]
    coming = np.moveaxis(after, axis, 0)
    share = (np.arange(overlap, dtype=np.float32) / overlap).reshape(-1, *[1] * (after.ndim - 1))
    coming[:overlap] = going * (1 - share) + coming[:overlap] * share
