"""Videos that drive another: what a request makes of those of a pose and a face, beside the picture of a character.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from taylorseer_export.bundle.manifest import Driven, Manifest
from taylorseer_export.embedded.animating import Drawn
from taylorseer_export.embedded.controlling import check_control, controlled_of
from taylorseer_export.embedded.edits import Given, shown_to
from taylorseer_export.embedded.picture import grey, on_black, resized
from taylorseer_export.errors import ConfigError
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import DrivenCourse, driven_of, sections_for
from taylorseer_export.runtime.noise import Generator
from taylorseer_export.runtime.sections import window_of
from taylorseer_export.runtime.tensors import NEGATIVE

POSE, FACE, BACKGROUND, MASK = "pose", "face", "background", "mask"
DRIVING = (POSE, FACE)
SCENE = (BACKGROUND, MASK)
"""Names of the videos that a request brings: always, and where the character is put into another video. Of that the
mask is white where the character comes, and black where it stays."""


def with_videos(manifest: Manifest, given: Given | None, videos: Mapping[str, np.ndarray]) -> Given | None:
    """What comes with a request, and the videos beside it by what they show; None where nothing does.

    Raises:
        ConfigError: What `check_videos` raises, or there are videos and no picture.
    """
    if given is None and not videos:
        return None
    check_videos(manifest, videos)
    if given is None and controlled_of(manifest) is not None:
        return Given(np.zeros((0, 0, 3), np.uint8), videos=videos)
    if given is None:
        name = f"{manifest.family}-{manifest.name}"
        raise ConfigError(f"picture is missing for {name}, expected the one that it is to animate; pass it")
    return given._replace(videos=videos)


def check_videos(manifest: Manifest, videos: Mapping[str, np.ndarray]) -> None:
    """Refuse videos for a bundle that none drive, and what is missing or too short for one that they do.

    Raises:
        ConfigError: As it says, or they are not of as many frames as each other.
    """
    name = f"{manifest.family}-{manifest.name}"
    if controlled_of(manifest) is not None:
        check_control(name, videos)
        return
    if driven_of(manifest) is None:
        if videos:
            raise ConfigError(
                f"video of a {min(videos)} is given for {name}, expected none, since no video drives it; leave it out"
            )
        return
    for other in videos:
        if other not in (*DRIVING, *SCENE):
            known = ", ".join((*DRIVING, *SCENE))
            raise ConfigError(f"video of a {other} is given for {name}, expected {known}; leave it out")
    for wanted in (*DRIVING, *(SCENE if any(one in videos for one in SCENE) else ())):
        if wanted not in videos:
            raise ConfigError(
                f"video of a {wanted} is missing for {name}, expected it beside the picture, since it drives what is "
                f"made; pass it, on the command line with --{wanted}"
            )
    frames = len(videos[POSE])
    if frames < 2:
        raise ConfigError(f"video of a {POSE} has {frames} frame, expected at least 2; give a longer one")
    for other, video in videos.items():
        if len(video) != frames:
            raise ConfigError(
                f"video of a {other} has {len(video)} frames, expected {frames} as that of the {POSE}; cut the longer "
                "one"
            )


def frames_asked(videos: Mapping[str, np.ndarray], frames: int) -> int:
    """The frames of the video that is made, which are the first ones of those that drive it.

    Raises:
        ConfigError: These have fewer, or it would be one picture.
    """
    if not 2 <= frames <= len(videos[POSE]):
        raise ConfigError(
            f"size frames is {frames}, expected 2 to {len(videos[POSE])}, as the videos have that drive it; change it"
        )
    return frames


def driven_by(
    denoiser: Denoiser, driven: Driven, given: Given, size: tuple[int, ...], seeds: Sequence[int], guided: bool
) -> Drawn:
    """What a request of a video of a size has of a picture and the videos that drive it.

    Args:
        denoiser: The loaded bundle.
        driven: How its videos are driven.
        given: The picture, which is put on black in its own shape, and videos that `check_videos` lets pass: these are
            stretched to the size of the video, or of a face, by Lanczos.
        size: (frames, height, width) of the video in pixels.
        seeds: One per sample; the noise of one section after the other is drawn from one generator.
        guided: Whether guidance leads away from something, which then sees no face.

    Raises:
        ConfigError: The videos are too short, or there are several sections and no decoder, which each is made with, or
            several ranks.
    """
    manifest, (frames, height, width) = denoiser.manifest, size
    count, window = sections_for(manifest, driven, frames_asked(given.videos, frames)), window_of(manifest)
    if count > 1 and "decode" not in manifest.parts:
        raise ConfigError(
            f"video of {frames} frames is {count} sections, each of which begins with a frame of the one before, "
            "expected a bundle with its decoder; export it without --without decode, or ask for fewer frames"
        )
    if count > 1 and denoiser.share.groups:
        raise ConfigError(
            f"video of {frames} frames is {count} sections, asked of several ranks, expected one section; run it on "
            "one rank, or ask for fewer frames"
        )
    side = int(denoiser.constants[driven.face].shape[3])
    encoder = denoiser.picture_encoder
    character = np.ascontiguousarray(on_black(given.picture, height, width).transpose(2, 0, 1)[None])
    course = DrivenCourse(
        denoiser,
        driven,
        window,
        count,
        frames,
        {"picture": character.astype(np.float32) / 255, **shown_to(encoder.described, given.picture)},
        np.stack([resized(frame, height, width) for frame in given.videos[POSE][:frames]]),
        np.stack([resized(frame, side, side) for frame in given.videos[FACE][:frames]]),
        _scene(given.videos, *size),
    )
    tensors = course.inputs(0)
    if guided:
        tensors[NEGATIVE + driven.face] = np.full_like(tensors[driven.face], -1)
    latent, scale = denoiser.latent.shape, manifest.sampling.latent_scale
    shape = (1, _channels(denoiser), window, height // scale, width // scale)
    assert len(latent) == len(shape), "bug in taylorseer-export: a picture that a video drives"
    noise = []
    for seed in seeds:
        generator = Generator(seed)
        drawn = [generator.normals(math.prod(shape)).reshape(shape) for _ in range(count)]
        noise.append(np.concatenate(drawn, 2))
    return Drawn(tensors, course, np.concatenate(noise))


def _scene(videos: Mapping[str, np.ndarray], frames: int, height: int, width: int) -> np.ndarray | None:
    """`[frames, height, width, 4]` uint8, what a character is put into, and in the fourth channel where that stays."""
    if BACKGROUND not in videos:
        return None
    pairs = zip(videos[BACKGROUND][:frames], videos[MASK][:frames], strict=True)
    both = [(resized(one, height, width), grey(resized(other, height, width))) for one, other in pairs]
    return np.stack([np.concatenate([frame, 255 - mask[..., None]], 2) for frame, mask in both])


def _channels(denoiser: Denoiser) -> int:
    """Of what is sampled: those that the transformer makes."""
    made = next(t for t in denoiser.manifest.graphs["full"].outputs if t.role == "noise_pred")
    return int(made.shape[1])
