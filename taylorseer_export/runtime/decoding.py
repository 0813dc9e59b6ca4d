"""Latents become pictures or videos: the part `decode`, loaded.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import PipelinePart, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.runtime.parts import Part, open_engines, open_part, refuse_unsound, sizes_of, smallest
from taylorseer_export.runtime.runner import Buffer, Call, Runner
from taylorseer_export.runtime.tiles import TileDecoder

Take = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class _Bound:
    """Calls for one size of videos, and their buffers.

    Attributes:
        latents: Of one latent frame; every call reads it.
        calls: That of the first latent frame, and the two of later ones in turn, each with the pictures it writes.
    """

    latents: Buffer
    calls: tuple[tuple[Call, Buffer], ...]


class FrameDecoder:
    """The decoder of videos, one latent frame at a time, called with arrays of the host; its calls take turns.

    It holds what one latent frame needs, however long a video is: the latent frame, the pictures of the first one and
    of a later one, and two sets of caches. A call reads one set and writes the other, and the next call the other way
    round, so nothing is copied between them. Buffers of one size are kept at a time.

    Args:
        described: Its contract.
        runner: Its engines, loaded.
    """

    def __init__(self, described: PipelinePart, runner: Runner) -> None:
        self.described, self._runner = described, runner
        self._turn = Lock()
        self._sizes: dict[str, int] = {}
        self._bound: _Bound | None = None

    def __call__(self, latents: np.ndarray, take: Take) -> None:
        """Decode one video.

        Args:
            latents: `[1, C, F, H, W]`.
            take: Given the pictures of each latent frame in turn, `[1, 3, frames, height, width]` from 0 to 1.

        Raises:
            StepError: A size is out of range; nothing was allocated.
        """
        sizes = sizes_of("decode", self.described, {"latents": latents[:, :, :1]})
        with self._turn:
            if self._bound is None or sizes != self._sizes:
                self._bound = None  # gone before the others are allocated
                self._bound, self._sizes = self._bind(sizes), sizes
            for k in range(latents.shape[2]):
                self._bound.latents.write(latents[:, :, k : k + 1])
                call, picture = self._bound.calls[0 if k == 0 else 1 + k % 2]
                call()
                take(picture.read())

    def _bind(self, sizes: Mapping[str, int]) -> _Bound:
        first, later = self.described.graph, self.described.later
        assert later is not None, "bug in taylorseer-export: a decoder of pictures opened for videos"

        def buffers(tensors: tuple[Tensor, ...], role: str) -> dict[str, Buffer]:
            return {t.name: self._runner.buffer(resolve(t.shape, sizes), t.dtype) for t in tensors if t.role == role}

        latents, alone = buffers(first.inputs, "latent"), buffers(first.outputs, "picture")
        several = buffers(later.outputs, "picture")
        # Names as they are written; what reads them is called the same but for the role.
        even, odd = (buffers(first.outputs, "cache_out") for _ in range(2))

        def bound(before: Mapping[str, Buffer], after: Mapping[str, Buffer]) -> tuple[Call, Buffer]:
            read = {name.replace("cache_out", "cache_in"): buffer for name, buffer in before.items()}
            call = self._runner.bind("later", {**latents, **read}, {**several, **after})
            return call, several["picture"]

        begin = self._runner.bind("decode", latents, {**alone, **even})
        return _Bound(latents["latents"], ((begin, alone["picture"]), bound(odd, even), bound(even, odd)))

    def close(self) -> None:
        """Release its engines."""
        self._bound = None
        self._runner.close()


Decoder = Part | FrameDecoder | TileDecoder


def open_decoder(bundle: Bundle, device: Device, threads: int = 0) -> Decoder:
    """Load what makes pictures or videos of latents, and call it; arguments and errors are those of `open_part`."""
    described = bundle.manifest.parts.get("decode")
    if described is None or described.later is None:
        part = open_part(bundle, "decode", device, threads)
        return part if part.described.tiles is None else TileDecoder(part)
    decoder = FrameDecoder(*open_engines(bundle, "decode", device, threads))
    noise = smallest(described)["latents"]
    try:
        decoder(noise.repeat(3, 2), lambda pictures: refuse_unsound(bundle, "decode", "picture", pictures))
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


def _video(decoder: FrameDecoder | TileDecoder, latents: np.ndarray) -> np.ndarray:
    """`[frames, height, width, 3]` uint8 of `[1, C, F, H, W]`; its pictures are floats a few at a time."""
    frames: list[np.ndarray] = []
    decoder(latents, lambda pictures: frames.append(_bytes(pictures[0].transpose(1, 2, 3, 0))))
    return np.concatenate(frames)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 255).astype(np.uint8)
