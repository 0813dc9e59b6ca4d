"""Pictures that are given: what a model makes of those that it edits or animates, or what a loop begins with.

Which of these a bundle does follows from what its part `encode` makes: constant inputs of the transformer, as Kontext
has them; what a video has beside the noise, or the latents that its sections begin with; or mean and deviation of
latents, for all that draw from text alone.

Shapes: N samples, C channels, F latent frames, H and W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import Fitted, Manifest, PipelinePart
from taylorseer_export.bundle.part_agreement import BEGINNING, CONDITION
from taylorseer_export.bundle.shapes import linear
from taylorseer_export.embedded.patches import cut, sides_of_area
from taylorseer_export.embedded.picture import passed_on, resized, seen_by_encoder
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.noise import Generator
from taylorseer_export.runtime.parts import Cut, Part
from taylorseer_export.runtime.places import grid
from taylorseer_export.runtime.sampling import Beginning, Request, steps_at, tokens_of
from taylorseer_export.runtime.tensors import joins

STRENGTH = 0.6  # as diffusers' pipelines

Use = Literal["edits", "animates", "begins", "controls"]


class Given(NamedTuple):
    """A picture that comes with a request.

    Attributes:
        picture: `[height, width, 3]` uint8; of several the first. Of no pixels where videos come alone.
        strength: Of a loop that begins with it, the share of its steps that run.
        steps: Those in all; as many as leave those of the plan if None. See `steps_that_run`.
        others: Those behind the first, for a model that takes several; each of a size of its own.
        videos: For a model that they drive, by what they show, `pose` and `face`, and `background` and
            `mask` of one that it is put into: `[F, height, width, 3]` uint8.
    """

    picture: np.ndarray
    strength: float = STRENGTH
    steps: int | None = None
    others: tuple[np.ndarray, ...] = ()
    videos: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """All of them, in the order that they were given in."""
        return (self.picture, *self.others) if self.picture.size else ()


def use_of(manifest: Manifest) -> Use | None:
    """What a bundle does with a picture: it `edits` or `animates` it and needs one, `begins` with one, `controls` what
    it makes by some, and by a video, or None."""
    part = manifest.parts.get("encode")
    if part is None:
        return None
    if part.controlled is not None:
        return "controls"
    made = tuple(tensor.name for tensor in part.graph.outputs)
    if part.sections is not None or CONDITION in made or draws_condition(manifest):
        return "animates"
    return "edits" if part.graph.outputs[0].role == "constant" else "begins"


def draws_condition(manifest: Manifest) -> bool:
    """Whether what a video has of a picture is drawn, since the encoder leaves its latents open."""
    part = manifest.parts.get("encode")
    made = () if part is None or part.sections is not None else tuple(tensor.name for tensor in part.graph.outputs)
    return made == BEGINNING and joins(manifest)


def most_pictures(manifest: Manifest) -> int:
    """How many pictures a request to a bundle may bring; 1 also where it takes none."""
    text, encode = manifest.parts.get("text"), manifest.parts.get("encode")
    if text is not None and text.patches is not None:
        return text.patches.pictures
    if encode is not None and encode.controlled is not None:
        return encode.controlled.pictures
    return 1 if encode is None or encode.fitted is None else encode.fitted.pictures


def given_picture(
    manifest: Manifest,
    picture: np.ndarray | None,
    strength: float | None = None,
    others: Sequence[np.ndarray] = (),
) -> Given | None:
    """What comes with a request, checked against what a bundle does with it; None where no picture does.

    Args:
        manifest: Of the bundle.
        picture: `[height, width, 3]` uint8; of several the first.
        strength: As asked; None where nothing was.
        others: Those behind the first.

    Raises:
        ConfigError: The bundle takes no picture or fewer, or none of such a shape, or there is nothing that the
            strength is of.
    """
    given = None
    if picture is not None:
        given = Given(picture, STRENGTH if strength is None else strength, others=tuple(others))
        check_pictures(manifest, given)
    check_strength(f"{manifest.family}-{manifest.name}", use_of(manifest), given is not None, strength)
    return given


def check_pictures(manifest: Manifest, given: Given) -> None:
    """Refuse pictures for a bundle that takes none or fewer, and one of a shape that a bundle that edits does not take.

    Raises:
        ConfigError: As it says.
    """
    use, most, count = use_of(manifest), most_pictures(manifest), len(given.pictures)
    name = f"{manifest.family}-{manifest.name}"
    if use is None:
        raise ConfigError(f"picture is given for {name}, expected none, since it draws from text alone; leave it out")
    if count > most:
        raise ConfigError(f"{count} pictures are given for {name}, expected {most_in_words(most)}; leave the rest out")
    if use != "edits":
        return
    part = manifest.parts["encode"]
    for picture in given.pictures:
        sides = zip(brought_to(manifest, picture), part.graph.inputs[0].shape[2:], strict=True)
        for extent, (dimension, factor, _) in ((extent, linear(entry)) for extent, entry in sides):
            allowed = part.dimensions[dimension]
            low, high = factor * allowed.minimum, factor * allowed.maximum
            if not low <= extent <= high:
                height, width = picture.shape[:2]
                raise ConfigError(
                    f"picture is {height}x{width}, which is brought to a side of {extent}, expected {low} to {high} "
                    "(pixels); cut it to another shape"
                )


def most_in_words(most: int) -> str:
    """How many pictures are expected where more were given."""
    return "one picture" if most == 1 else f"at most {most} pictures"


def check_strength(name: str, use: Use | None, given: bool, strength: float | None) -> None:
    """Refuse a strength that is of nothing, or out of range.

    Args:
        name: Of the model.
        use: What it does with a picture.
        given: Whether one is.
        strength: As asked; None where nothing was.

    Raises:
        ConfigError: There is nothing that it is of, or it is no share.
    """
    if strength is not None and (use != "begins" or not given):
        what = "a picture that the loop begins with" if use == "begins" else f"none, since {name} begins with noise"
        raise ConfigError(f"strength is {strength:g}, expected {what}; leave it out")
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength:g}, expected above 0 and at most 1 (share of the steps); change it")


def steps_that_run(
    options: RequestOptions, denoiser: Denoiser, given: Given | None
) -> tuple[RequestOptions, Given | None]:
    """The options of a loop that begins with a picture: `steps` are those in all, a plan is of those that run.

    Args:
        options: As asked.
        denoiser: The loaded bundle.
        given: The picture; nothing changes without one, or for a model that edits it.
    """
    if given is None or use_of(denoiser.manifest) != "begins" or (options.steps is None and options.fixes_length):
        return options, given
    steps = denoiser.defaults.steps if options.steps is None else options.steps
    return replace(options, steps=steps_at(given.strength, steps)), given._replace(steps=steps)


def seen(
    denoiser: Denoiser, pictures: Sequence[np.ndarray], sides: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The constant inputs that a model that edits makes of pictures, each `[height, width, 3]` uint8, by their names.

    Args:
        denoiser: The loaded bundle.
        pictures: One, or as many as it takes.
        sides: (rows, columns) in tokens of the picture that is made.

    Raises:
        ConfigError: One is of a size that it does not take.
        StepError: All of them have too many tokens.
    """
    part, side = denoiser.manifest.parts["encode"], _side(denoiser.manifest)
    sizes = [brought_to(denoiser.manifest, picture) for picture in pictures]
    tokens = [(height // side, width // side) for height, width in sizes]
    count = sum(rows * columns for rows, columns in tokens)
    denoiser.contract.check_sizes({str(denoiser.constants[t.name].shape[-2]): count for t in part.graph.outputs})
    fit = resized if part.fitted is None else partial(cut_to, part.fitted)
    shown = [fit(picture, *size) for picture, size in zip(pictures, sizes, strict=True)]
    made = [_seen(denoiser, picture, number) for number, picture in enumerate(shown, 1)]
    tensors = {name: np.concatenate([one[name] for one in made], -2) for name in made[0]}
    for key, tensor in denoiser.constants.items():
        if tensor.fill == "sides" and sides is not None:
            tensors[key] = np.array([[(1, *pair) for pair in (sides, *tokens)]], np.int64)
    return tensors


def _seen(denoiser: Denoiser, picture: np.ndarray, number: int) -> dict[str, np.ndarray]:
    """What the picture of that number becomes, of whole tokens: its rows, and their places."""
    tensors = _encoded(denoiser, picture)
    counts = {entry for made in tensors for entry in denoiser.constants[made].shape if isinstance(entry, str)}
    rows, columns = (extent // _side(denoiser.manifest) for extent in picture.shape[:2])
    for key, tensor in denoiser.constants.items():
        if tensor.fill == "grid" and tensor.shape[-2] in counts:
            ids = grid(number * tensor.first, rows, columns, int(tensor.shape[-1]))
            ids = ids.astype(np.int64) if "int" in tensor.dtype else ids
            tensors[key] = ids if len(tensor.shape) == 2 else ids[None]
    return tensors


def shown_to(part: PipelinePart, picture: np.ndarray, size: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """A picture as the image encoder of a part is shown it, by name; none without one.

    Args:
        part: Its description.
        picture: `[height, width, 3]` uint8.
        size: (height, width) of the video in pixels, for an encoder that is shown it at that size.
    """
    if (shown := part.shown) is None:
        return {}
    extents = next(t.shape for t in part.graph.inputs if t.name == shown.input)
    own = (int(extents[2]), int(extents[3]))
    seen = resized(picture, *size) if shown.sized or shown.as_bytes else picture
    seen = passed_on(seen) if shown.sized else seen
    return {shown.input: _as_input(seen_by_encoder(seen, own, shown.edge, shown.filter))}


def cut_for(part: PipelinePart, given: Given | None) -> Cut | None:
    """Pictures as the text encoders of a part see them in patches; None where they do not."""
    return None if given is None or part.patches is None else cut(part.patches, given.pictures)


def begun_with(denoiser: Denoiser, request: Request, given: Given, seeds: Sequence[int]) -> Request:
    """A request that begins with a picture: its latents are drawn as the encoder leaves them open, then the noise.

    Args:
        denoiser: The loaded bundle.
        request: From noise alone; of a size.
        given: The picture, which is brought to that size.
        seeds: One per sample; both are drawn from one generator, as diffusers' pipelines do.
    """
    made = _encoded(denoiser, resized(given.picture, request.height, request.width))
    packing = denoiser.manifest.pipeline.packing
    clean, noise = [], []
    for seed in seeds:
        generator = Generator(seed)
        left_open, drawn = (generator.normals(made["mean"].size).reshape(made["mean"].shape) for _ in range(2))
        clean.append(made["mean"] + made["deviation"] * left_open)
        noise.append(drawn)
    both = [np.concatenate(values).astype(np.float32) for values in (clean, noise)]
    latents, noisy = [values if packing == 1 else tokens_of(values, packing) for values in both]
    return replace(request, latents=noisy, beginning=Beginning(latents, given.strength, given.steps))


def _encoded(denoiser: Denoiser, picture: np.ndarray) -> dict[str, np.ndarray]:
    encoder = denoiser.picture_encoder
    assert isinstance(encoder, Part), "bug in taylorseer-export: an encoder of videos edits a picture"
    return encoder({"picture": _as_input(picture)})


def brought_to(manifest: Manifest, picture: np.ndarray) -> tuple[int, int]:
    """The (height, width) in pixels of a picture as a bundle takes it, where nobody asks for another; see below."""
    return size_to_see(manifest.parts["encode"], picture.shape, _side(manifest))


def size_to_see(described: PipelinePart, shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """The (height, width) in pixels that a picture is brought to before it is encoded.

    Of the sizes that the part lists the one whose width to height is nearest, and of several the narrowest, as
    diffusers chooses; where none is listed its own shape with the area that the part says, or its own size, cut to
    multiples of a token's side. A fitted one has its shape, and no more than the most pixels.

    Args:
        described: The part `encode`.
        shape: (height, width) in pixels.
        side: Pixels of a token.

    Raises:
        ConfigError: It is smaller or longer than fitted pictures may be.
    """
    if described.area is not None:
        return sides_of_area(described.area, *shape[:2])
    height, width = shape[:2] if described.fitted is None else size_in(described.fitted, *shape[:2])
    if not described.sizes:
        return max(height // side, 1) * side, max(width // side, 1) * side
    return min(described.sizes, key=lambda size: (abs(width / height - size[1] / size[0]), size[1], size[0]))


def size_in(fitted: Fitted, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels of a picture that is no larger than it may be, as diffusers reckons for FLUX.2.

    Raises:
        ConfigError: It is smaller or longer than it may be.
    """
    if min(height, width) < fitted.shortest or max(height / width, width / height) > fitted.ratio:
        raise ConfigError(
            f"picture is {width}x{height}, expected sides of at least {fitted.shortest} pixels, one of them at most "
            f"{fitted.ratio} times the other; scale it or cut it"
        )
    if height * width <= fitted.area:
        return height, width
    scale = math.sqrt(fitted.area / (width * height))
    return int(height * scale), int(width * scale)


def cut_to(fitted: Fitted, picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture `[..., ..., 3]` uint8, made smaller where it is larger than it may be, and of that the middle."""
    made = resized(picture, *size_in(fitted, *picture.shape[:2]))
    top, left = (made.shape[0] - height) // 2, (made.shape[1] - width) // 2
    return made[top : top + height, left : left + width]


def black_for(manifest: Manifest, size: tuple[int, ...]) -> Given | None:
    """A black picture that a bundle takes, for a request of a size in pixels; None where it takes none."""
    part = manifest.parts.get("encode")
    if part is None or part.controlled is not None:
        return None
    sides = size[-2:]
    if part.fitted is not None:  # a picture of any size goes by one of a shape that it may have
        sides = (min(max(min(sides), part.fitted.shortest), math.isqrt(part.fitted.area)),) * 2
    return Given(np.zeros((*sides, 3), np.uint8))


def _side(manifest: Manifest) -> int:
    """Pixels of a token along each side."""
    return manifest.sampling.latent_scale * manifest.pipeline.packing


def as_unit(picture: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """`[1, 3, height, width]` float32 from 0 to 1, of that size."""
    return _as_input(resized(picture, *size))


def _as_input(picture: np.ndarray) -> np.ndarray:
    """`[1, 3, height, width]` float32 from 0 to 1."""
    values: np.ndarray = picture.astype(np.float32) / 255
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])
