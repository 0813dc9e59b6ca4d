"""Videos that are made section by section: each section is a loop of its own, over frames that loops before it made.

A request of such a video is as many loops as it has sections, one after the other. Each begins with noise of its own
and with an empty history, so its first step is full; each is given the latent frame of the picture and those that were
made before, the nearest first, or zeros where there are none. The plan of a request is that of one loop. Steps are
counted over all of them, and what is told of the plan, as asked and as run, is that of the loops one after the other.

Source: Zhang and Agrawala 2025 (arXiv 2504.12626), sections 3.2 and 3.3, as diffusers has them.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Sections
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.runtime.joined import Joined

_TIME = 2  # axis
_FIRST_AHEAD, _AHEAD = 3, 2  # sections that lie between the picture and those being made, at most


def sections_of(manifest: Manifest) -> Sections | None:
    """How the videos of a bundle are made section by section; None where one loop makes all that it makes."""
    return manifest.parts["encode"].sections if "encode" in manifest.parts else None


def window_of(manifest: Manifest) -> int:
    """Latent frames of a section."""
    typical = {name: dimension.typical for name, dimension in manifest.dimensions.items()}
    return resolve(manifest.graphs["full"].input_of("latent").shape, typical)[_TIME]


def frames_of_section(manifest: Manifest) -> int:
    """Frames that one section more makes a video longer."""
    return manifest.sampling.time_scale * window_of(manifest)


@dataclass(frozen=True)
class Course:
    """The sections of one request: what each is given, and where what it makes belongs.

    Attributes:
        described: What the model has of them.
        held: Latent frames of each input that holds those made before, without the picture's, the nearest first.
        window: Latent frames of a section.
        count: Sections.
        picture: `[N, C, 1, H, W]` float32, the latents of the picture.
    """

    described: Sections
    held: tuple[int, ...]
    window: int
    count: int
    picture: np.ndarray

    def inputs(self, number: int, made: np.ndarray) -> dict[str, np.ndarray]:
        """Constant inputs of the transformer for a section.

        Args:
            number: Of the section, in the order in which they are made.
            made: `[N, C, F, H, W]`, the frames of those before it, in the order of the video.
        """
        count = sum(self.held)
        zeros = np.repeat(np.zeros_like(self.picture), count, _TIME)
        if self.described.direction == "backward":
            ahead = min(self.count - 1 - number, _FIRST_AHEAD if number == 0 else _AHEAD)
            first = 1 + ahead * self.window
            history = _split(np.concatenate([made, zeros], _TIME)[:, :, :count], self.held, _TIME)
            places = _split(np.arange(count) + first + self.window, self.held, 0)
        else:
            first, farthest_first = 1 + count, self.held[::-1]
            latest = np.concatenate([zeros, self.picture, made], _TIME)[:, :, -count:]
            history = _split(latest, farthest_first, _TIME)[::-1]
            places = _split(np.arange(count) + 1, farthest_first, 0)[::-1]
        history[0] = np.concatenate([self.picture, history[0]], _TIME)
        places[0] = np.append(0, places[0])
        given = {self.described.new: np.arange(first, first + self.window)}
        for names, values in zip(self.described.past, zip(history, places, strict=True), strict=True):
            given |= dict(zip(names, values, strict=True))
        return given

    def enter(
        self, number: int, made: np.ndarray, branches: Sequence[dict[str, np.ndarray]], joined: Joined | None
    ) -> tuple[list[dict[str, np.ndarray]], Joined | None]:
        """(constant inputs of each branch, what is joined to the noise) of a section.

        Args:
            number, made: As of `inputs`.
            branches, joined: Of the request.
        """
        given = self.inputs(number, made)
        return [{**branch, **given} for branch in branches], joined

    def joined(self, made: np.ndarray, section: np.ndarray) -> np.ndarray:
        """What is made once the next section is: frames in the order of the video."""
        backward = self.described.direction == "backward"
        return np.concatenate([section, made] if backward else [made, section], _TIME)

    def video(self, made: np.ndarray) -> np.ndarray:
        """`[N, C, 1 + F, H, W]`: the picture's latents, and what is made."""
        return np.concatenate([self.picture, made], _TIME)


def course_of(manifest: Manifest, described: Sections, count: int, picture: np.ndarray) -> Course:
    """The sections of a request of a bundle."""
    shapes = {t.name: t.shape for graph in manifest.graphs.values() for t in graph.inputs}
    first, *others = (int(shapes[frames][_TIME]) for frames, _ in described.past)
    return Course(described, (first - 1, *others), window_of(manifest), count, picture)


def spans(frames: int, window: int, direction: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of the latent frames of a video that are decoded together, in the order of the video.

    Two sections at a time, so that neighbours have one in common; that which is made first is decoded without another
    too. As diffusers does as soon as a section is made.

    Args:
        frames: Latent frames of the video, 1 + `window` times the number of sections.
        window: Latent frames of a section.
        direction: Of the sections.
    """
    count = (frames - 1) // window
    if direction == "backward":
        for number in range(count):
            yield (1 + number * window if number else 0), min(1 + (number + 2) * window, frames)
    else:
        for number in range(count):
            yield max(1 + (number - 1) * window, 0), 1 + (number + 1) * window


def _split(values: np.ndarray, sizes: tuple[int, ...], axis: int) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1], axis)
