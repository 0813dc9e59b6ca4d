"""A part of a video that goes one latent frame at a time, with the caches that the frame before left.

Shapes: C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Lock

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import PartName, PipelinePart, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.runtime.parts import Part, open_engines, open_part, refuse_unsound, sizes_of, smallest
from taylorseer_export.runtime.runner import Buffer, Call, Runner

Given = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Bound:
    """Calls for one size of videos, and their buffers.

    Attributes:
        inputs: Of the first latent frame, and of any later one; buffers of one size are the same.
        calls: That of the first latent frame, and the two of later ones in turn, each with what it writes.
    """

    inputs: tuple[dict[str, Buffer], dict[str, Buffer]]
    calls: tuple[tuple[Call, dict[str, Buffer]], ...]


class Frames:
    """The graphs of such a part, called with arrays of the host; videos take turns.

    It holds what one latent frame needs, however long a video is: what is read, what the first frame and a later one
    write, and two sets of caches. A call reads one set and writes the other, and the next call the other way round, so
    nothing is copied between them. Buffers of one size are kept at a time.

    Args:
        name: Of the part, and of the graph of the first latent frame.
        described: Its contract.
        runner: Its engines, loaded.
    """

    def __init__(self, name: PartName, described: PipelinePart, runner: Runner) -> None:
        self.name, self.described, self._runner = name, described, runner
        self._turn = Lock()
        self._sizes: dict[str, int] = {}
        self._bound: _Bound | None = None

    def __call__(self, given: Iterable[Given], take: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Go through one video.

        Args:
            given: The inputs of each latent frame in turn, without caches.
            take: Told what is made of each in turn, without caches.

        Raises:
            StepError: A size is out of range; nothing was allocated.
        """
        frames = iter(given)
        first = next(frames)
        sizes = sizes_of(self.name, self.described, first)
        with self._turn:
            if self._bound is None or sizes != self._sizes:
                self._bound = None  # gone before the others are allocated
                self._bound, self._sizes = self._bind(sizes), sizes
            for k, values in enumerate(chain([first], frames)):
                for name, value in values.items():
                    self._bound.inputs[min(k, 1)][name].write(value)
                call, made = self._bound.calls[0 if k == 0 else 1 + k % 2]
                call()
                take({name: buffer.read() for name, buffer in made.items()})

    def _bind(self, sizes: Mapping[str, int]) -> _Bound:
        first, later = self.described.graph, self.described.later
        assert later is not None, "bug in taylorseer-export: a part of pictures opened for videos"

        def buffers(tensors: tuple[Tensor, ...], caches: bool = False) -> dict[str, Buffer]:
            wanted = [t for t in tensors if t.role.startswith("cache") == caches]
            return {t.name: self._runner.buffer(resolve(t.shape, sizes), t.dtype) for t in wanted}

        read, alone, several = buffers(first.inputs), buffers(first.outputs), buffers(later.outputs)
        # Names as they are written; what reads them is called the same but for the role.
        even, odd = (buffers(first.outputs, caches=True) for _ in range(2))
        own = {t.name: read[t.name] for t in later.inputs if t in first.inputs}
        own |= buffers(tuple(t for t in later.inputs if t not in first.inputs))

        def bound(before: Mapping[str, Buffer], after: Mapping[str, Buffer]) -> tuple[Call, dict[str, Buffer]]:
            caches = {name.replace("cache_out", "cache_in"): buffer for name, buffer in before.items()}
            return self._runner.bind("later", {**own, **caches}, {**several, **after}), several

        begin = self._runner.bind(self.name, read, {**alone, **even})
        return _Bound((read, own), ((begin, alone), bound(odd, even), bound(even, odd)))

    def close(self) -> None:
        """Release its engines."""
        self._bound = None
        self._runner.close()


class FrameEncoder:
    """What a video that is made from a picture has of it: the part `encode`, loaded.

    Args:
        frames: Its graphs.
    """

    def __init__(self, frames: Frames) -> None:
        self.described, self._frames = frames.described, frames

    def __call__(
        self, given: Given, frames: int, driving: Callable[[int], Given] | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs of the transformer by name, and `condition`, `[1, C, F, H, W]`.

        Args:
            given: The picture as each of its inputs, `[1, 3, height, width]` from 0 to 1.
            frames: Of the video, in latent frames.
            driving: Of a video that others drive, what each latent frame is given of them, by its index.

        Raises:
            StepError: A size is out of range; nothing was allocated.
        """
        made: dict[str, list[np.ndarray]] = {}

        def take(outputs: dict[str, np.ndarray]) -> None:  # views of what the next call writes
            for name, value in outputs.items():
                made.setdefault(name, []).append(np.array(value))

        def of(frame: int) -> Given:
            own = {} if driving is None else driving(frame)
            return own if frame else {**given, **own}

        self._frames((of(k) for k in range(frames)), take)
        # What is made of later latent frames as well is made of all of them.
        assert self.described.later is not None
        several = {tensor.name for tensor in self.described.later.outputs}
        return {name: np.concatenate(values, 2) if name in several else values[0] for name, values in made.items()}

    def close(self) -> None:
        """Release its engines."""
        self._frames.close()


def frames_at_once(described: PipelinePart) -> tuple[int, int]:
    """Latent frames of a video that the first call of its decoder takes, and any later one."""
    assert described.later is not None, "bug in taylorseer-export: a part of pictures asked about videos"
    first, later = (int(graph.input_of("latent").shape[2]) for graph in (described.graph, described.later))
    return first, later


def _noise(described: PipelinePart, frame: int) -> dict[str, np.ndarray]:
    """What a latent frame is given beside a picture, at the smallest sizes."""
    assert described.later is not None
    graph = described.later if frame else described.graph
    given = smallest(described.model_copy(update={"graph": graph}))
    return {tensor.name: given[tensor.name] for tensor in graph.inputs if tensor.role != "cache_in"}


def open_picture_encoder(bundle: Bundle, device: Device, threads: int = 0) -> Part | FrameEncoder:
    """Load what encodes pictures, and call it; arguments and errors are those of `open_part`."""
    described = bundle.manifest.parts.get("encode")
    if described is None or described.later is None:
        return open_part(bundle, "encode", device, threads)
    encoder = FrameEncoder(Frames("encode", *open_engines(bundle, "encode", device, threads)))
    try:
        for output, values in encoder(smallest(described), 3, partial(_noise, described)).items():
            refuse_unsound(bundle, "encode", output, values)
    except BaseException:
        encoder.close()
        raise
    return encoder
