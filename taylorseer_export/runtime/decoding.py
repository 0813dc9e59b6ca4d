"""Latents become pictures or videos: the part `decode`, loaded.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Sections
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.frames import Frames, frames_at_once
from taylorseer_export.runtime.parts import Part, open_engines, open_part, refuse_unsound, smallest
from taylorseer_export.runtime.sections import spans
from taylorseer_export.runtime.tiles import TileDecoder

Take = Callable[[np.ndarray], None]


class FrameDecoder:
    """The decoder of videos, some latent frames at a time, called with arrays of the host; its calls take turns.

    Args:
        frames: Its graphs.
    """

    def __init__(self, frames: Frames) -> None:
        self.described, self._frames = frames.described, frames

    def __call__(self, latents: np.ndarray, take: Take) -> None:
        """Decode one video.

        Args:
            latents: `[1, C, F, H, W]`.
            take: Given the pictures of each call in turn, `[1, 3, frames, height, width]` from 0 to 1.

        Raises:
            StepError: A size is out of range, or the latent frames are not as many; nothing was allocated.
        """
        first, later = frames_at_once(self.described)
        if latents.shape[2] < first or (latents.shape[2] - first) % later:
            known = ", ".join(str(first + k * later) for k in range(3))
            raise StepError(
                f"latents have {latents.shape[2]} latent frames, expected {known} and so on, as many as the decoder "
                "takes at a time; sample another number of them"
            )
        begins = [0, *range(first, latents.shape[2], later)]
        given = ({"latents": latents[:, :, at : at + (later if at else first)]} for at in begins)
        self._frames(given, lambda made: take(made["picture"]))

    def close(self) -> None:
        """Release its engines."""
        self._frames.close()


Decoder = Part | FrameDecoder | TileDecoder


def open_decoder(bundle: Bundle, device: Device, threads: int = 0) -> Decoder:
    """Load what makes pictures or videos of latents, and call it; arguments and errors are those of `open_part`."""
    described = bundle.manifest.parts.get("decode")
    if described is None or described.later is None:
        part = open_part(bundle, "decode", device, threads)
        return part if part.described.tiles is None else TileDecoder(part)
    decoder = FrameDecoder(Frames("decode", *open_engines(bundle, "decode", device, threads)))
    noise, (first, later) = smallest(described)["latents"], frames_at_once(described)
    try:
        decoder(
            noise.take(np.arange(first + 2 * later) % first, 2),
            lambda pictures: refuse_unsound(bundle, "decode", "picture", pictures),
        )
    except BaseException:
        decoder.close()
        raise
    return decoder


def decoded(decoder: Decoder, latents: np.ndarray) -> np.ndarray:
    """What latents show, one sample after the other, uint8.

    Args:
        decoder: Of the bundle.
        latents: `[N, C, H, W]`, or `[N, C, F, H, W]` of videos.

    Returns:
        Pictures `[N, height, width, 3]`, or videos `[N, frames, height, width, 3]`.
    """
    if isinstance(decoder, Part):
        made = [decoder({"latents": one[None]})["picture"][0] for one in latents]
        return _bytes(np.stack(made).transpose(0, 2, 3, 1))
    return np.stack([_video(decoder, one[None]) for one in latents])


def decoded_in_sections(decoder: Decoder, latents: np.ndarray, window: int, sections: Sections) -> np.ndarray:
    """As `decoded`, of videos that were made section by section, `[N, C, F, H, W]`.

    Args:
        decoder: Of the bundle.
        latents: The picture's latent frame and the sections, as `Course.video` returns them.
        window: Latent frames of a section.
        sections: How they were made.
    """
    assert isinstance(decoder, TileDecoder), "bug in taylorseer-export: sections that are not decoded in tiles"
    parts = list(spans(latents.shape[2], window, sections.direction))
    return np.stack([_blended(decoder, [one[None, :, begin:end] for begin, end in parts], window) for one in latents])


def _blended(decoder: TileDecoder, parts: Sequence[np.ndarray], shared: int) -> np.ndarray:
    """`[frames, height, width, 3]` uint8 of parts `[1, C, F, H, W]`, each of which shares its last latent frames with
    the next: that comes in evenly while this goes out, over as many frames as those make."""
    overlap = decoder.tiles.time_scale * (shared - 1) + 1
    finished: list[np.ndarray] = []
    going: np.ndarray | None = None  # the frames at the end of the part before
    share = np.linspace(0, 1, overlap, dtype=np.float32)[:, None, None]
    for number, latents in enumerate(parts):
        tiles: list[np.ndarray] = []
        decoder.beyond(latents, tiles.append)
        made = np.concatenate(tiles, 2)
        if going is not None:
            made[:, :, :overlap] = (1 - share) * going + share * made[:, :, :overlap]
        end = made.shape[2] - (overlap if number + 1 < len(parts) else 0)
        finished.append(_bytes(made[0, :, :end].transpose(1, 2, 3, 0)))
        going = made[:, :, end:]
    return np.concatenate(finished)


def _video(decoder: FrameDecoder | TileDecoder, latents: np.ndarray) -> np.ndarray:
    """`[frames, height, width, 3]` uint8 of `[1, C, F, H, W]`; its pictures are floats a few at a time."""
    frames: list[np.ndarray] = []
    latents = latents[:, :, decoder.described.skipped :]
    decoder(latents, lambda pictures: frames.append(_bytes(pictures[0].transpose(1, 2, 3, 0))))
    return np.concatenate(frames)[decoder.described.dropped :]


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
