"""Videos that are driven by others frame for frame, a pose and a face: made section by section, each a loop of its own.

A section is given the last frame that the one before it made, decoded, and begins with it; that frame is not shown
twice. The videos that drive are as long as the sections together need: behind their last frame they run back,
and forth again, and what is made of that is cut off. The first section is given no frame of the video.

Shapes: N samples, C channels, F latent frames of all sections, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from taylorseer_export.bundle.manifest import Driven, Manifest
from taylorseer_export.bundle.part_agreement import CONDITION
from taylorseer_export.runtime.decoding import FrameDecoder
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.frames import FrameEncoder
from taylorseer_export.runtime.joined import Joined
from taylorseer_export.runtime.sections import window_of

Rows = dict[str, np.ndarray]

_GREY = 0.5  # what there is of frames of which nothing is there, from 0 to 1


def driven_of(manifest: Manifest) -> Driven | None:
    """How the videos of a bundle are driven by others; None where they are not."""
    return manifest.parts["encode"].driven if "encode" in manifest.parts else None


def frames_in_section(manifest: Manifest, driven: Driven) -> int:
    """Frames that one section makes."""
    return manifest.sampling.time_scale * (window_of(manifest) - 1 - driven.ahead) + 1


def sections_for(manifest: Manifest, driven: Driven, frames: int) -> int:
    """How many sections a video of so many frames, at least two, is made in."""
    return -(-(frames - 1) // (frames_in_section(manifest, driven) - 1))


@dataclass(frozen=True)
class DrivenCourse:
    """The sections of one request, as `Course` is of those that nothing drives.

    Attributes:
        denoiser: The loaded bundle.
        described: What the model has of them.
        window: Latent frames of a section, with those ahead.
        count: Sections.
        frames: Of the video.
        character: The picture as each input of the part `encode` that holds it.
        pose: `[frames, height, width, 3]` uint8, of the size of the video.
        face: `[frames, side, side, 3]` uint8.
        scene: `[frames, height, width, 4]` uint8, what the character is put into: the fourth channel is 255 where that
            stays, and 0 where the character comes. None where all is made anew.
    """

    denoiser: Denoiser
    described: Driven
    window: int
    count: int
    frames: int
    character: Rows
    pose: np.ndarray
    face: np.ndarray
    scene: np.ndarray | None = None

    def inputs(self, number: int, before: np.ndarray | None = None) -> Rows:
        """What a section of one sample is given, by name: inputs of the transformer, and `condition`.

        Args:
            number: Of the section.
            before: `[1, 3, 1, height, width]` from 0 to 1, the last frame of the one before it; None of the first.
        """
        encoder, scale = self.denoiser.picture_encoder, self.denoiser.manifest.sampling.time_scale
        assert isinstance(encoder, FrameEncoder), "bug in taylorseer-export: what drives a video has no later frames"
        length = frames_in_section(self.denoiser.manifest, self.described)
        begin = number * (length - 1)
        indices = forth_and_back(self.frames, begin + length)[begin:]

        def driving(frame: int) -> Mapping[str, np.ndarray]:
            own = indices[scale * (frame - 1) + 1 :][:scale] if frame else indices[:1]
            pose = _unit(self.pose[own])
            if self.scene is None:
                scene = np.full((1, 4, *pose.shape[2:]), _GREY, np.float32)
                scene[:, 3] = 0
            else:
                scene = _unit(self.scene[own])
            if frame == 0 and before is not None:
                scene[:, :3], scene[:, 3] = before, 1
            return {self.described.pose: pose, self.described.scene: scene}

        made = encoder(self.character, self.window - self.described.ahead, driving)
        return {**made, self.described.face: 2 * _unit(self.face[indices]) - 1}

    def enter(
        self, number: int, made: np.ndarray, branches: Sequence[Rows], joined: Joined | None
    ) -> tuple[list[Rows], Joined | None]:
        """(constant inputs of each branch, what is joined to the noise) of a section; those of the first are given.

        Args:
            number: Of the section, in the order of the video.
            made: `[N, C, F, H, W]`, what those before it made.
            branches, joined: Of the request.
        """
        if number == 0:
            return [*branches], joined
        assert joined is not None, "bug in taylorseer-export: sections without what is joined to their noise"
        rows = [self.inputs(number, self._last(one)) for one in made[:, None, :, -self.window :]]
        given = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        joined = replace(joined, value=given.pop(CONDITION))
        conditional, *others = branches
        faces = given.pop(self.described.face)  # what guidance leads away from sees none, whatever the section
        return [{**conditional, **given, self.described.face: faces}, *({**one, **given} for one in others)], joined

    def joined(self, made: np.ndarray, section: np.ndarray) -> np.ndarray:
        """What is made once the next section is."""
        return np.concatenate([made, section], 2)

    def video(self, made: np.ndarray) -> np.ndarray:
        """`[N, C, F, H, W]`: what is made, with the latent frames ahead of each section."""
        return made

    def _last(self, latents: np.ndarray) -> np.ndarray:
        """The last frame that a section `[1, C, window, H, W]` shows, `[1, 3, 1, height, width]` from 0 to 1."""
        last: list[np.ndarray] = []

        def take(frames: np.ndarray) -> None:  # a view of what the next call writes
            last[:] = [np.array(frames[:, :, -1:], np.float32)]

        _decoder(self.denoiser)(latents[:, :, self.described.ahead :], take)
        return last[0]


def decoded_in_driven_sections(
    denoiser: Denoiser, latents: np.ndarray, driven: Driven, frames: int | None = None
) -> np.ndarray:
    """What latents of sections `[N, C, F, H, W]` show, `[N, frames, height, width, 3]` uint8.

    Args:
        denoiser: The loaded bundle.
        latents: As `DrivenCourse.video` returns them.
        driven: What the model has of them.
        frames: Of the video; all that there are if None.
    """
    window, videos = window_of(denoiser.manifest), []
    for one in latents[:, None]:
        shown: list[np.ndarray] = []

        def take(made: np.ndarray, shown: list[np.ndarray] = shown) -> None:
            shown.append(np.rint(made[0].transpose(1, 2, 3, 0).clip(0, 1) * 255).astype(np.uint8))

        for begin in range(0, one.shape[2], window):
            known = len(shown)
            _decoder(denoiser)(one[:, :, begin + driven.ahead : begin + window], take)
            if begin:  # the frame that this section was given
                shown[known] = shown[known][1:]
        videos.append(np.concatenate(shown)[:frames])
    return np.stack(videos)


def forth_and_back(count: int, length: int) -> list[int]:
    """Indices of a video of `count` frames, at least two, which runs back and forth until it is `length` frames long.

    forth_and_back(4, 8)  =  0 1 2 3 2 1 0 1
    """
    turn = 2 * (count - 1)
    return [min(k % turn, turn - k % turn) for k in range(length)]


def _decoder(denoiser: Denoiser) -> Callable[[np.ndarray, Callable[[np.ndarray], None]], None]:
    decoder = denoiser.decoder
    assert isinstance(decoder, FrameDecoder), "bug in taylorseer-export: sections that are not decoded frame by frame"
    return decoder


def _unit(frames: np.ndarray) -> np.ndarray:
    """Frames `[F, height, width, C]` uint8 as `[1, C, F, height, width]` float32 from 0 to 1."""
    return np.ascontiguousarray(frames.transpose(3, 0, 1, 2)[None].astype(np.float32) / 255)
