"""What of a family's pipeline stands around the transformer: how a prompt becomes its inputs, and latents a picture.

The functions here are traced with the modules of the pipeline folder and become graphs of their own. What cannot be in
a graph, tokenizing and packing, is said as data and done by the run side.

Shapes: T tokens, D width of an encoding, C channels, F frames, H and W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Modules = Mapping[str, Any]
Tensors = Mapping[str, Any]
Chat = Callable[[str], tuple[list[dict[str, Any]], dict[str, Any]]]


@dataclass(frozen=True)
class Tokens:
    """What one tokenizer makes of a prompt: `[1, T]` int64, an input of the text encoders.

    Attributes:
        name: Of the input.
        tokenizer: Its folder in the pipeline.
        length: Tokens that a prompt may have, without those of the template that are dropped.
        size: Dimension of the family that this number is; empty where it is the same for all requests.
        padded: Whether a prompt is filled up to its length.
        multiple: What it is filled up to a multiple of instead, its length at most, where any other prompt is as long
            as its own words make it; 0 if it is not.
        filled_with: The token for padding, or that for the end of a text.
        side: Where it is filled up; as the tokenizer says if empty.
        template: What the prompt is put into, in the place of `{}`.
        chat: `prompt -> (messages, options)` of the tokenizer's own chat template, which makes the template where it is
            given; what that begins with is then not added once more.
        special: Whether the tokenizer adds tokens of its own around the template.
        removed: What is taken out of a prompt first.
        lowered: Whether it is put in lower case first, without spaces at its ends.
        suffix: What follows once the prompt is filled up; its tokens count within `length`.
        spelled: Whether what the prompt has in quotes becomes tokens of single letters. Its tokens are then made apart
            from those of the template, and `length` is of the prompt alone.
        dropped: Leading tokens, of the template, that the encoders leave out of what they return: how many, or the text
            that they are of. `encode` is given their number, by the name of the input and `_dropped`.
        kept: Name of the input `[1, T]` int64: of which tokens the encoders return the states, where the template is
            not for negative prompts. Those are the first and, of a prompt, all but the first behind it of as many as
            are dropped: two less than those of the text.
        mask: Name of the input `[1, T]` int64 that is 1 where a token is no padding; empty where there is none.
        cleaned: Whether HTML entities and runs of spaces are resolved first.
        sought: Tokens that `encode` looks for: it is given their numbers, by these names.
        quoted: Whether what the prompt has in quotes is meant, each as `Text "...". `; without any all is padding.
        blank: What stands for a prompt that is empty.
        shortened: Whether a prompt that has more tokens, in its template, first loses characters at its end: as many as
            the text has of its tokens from the last but one that it may have to the third last of all. It is then cut
            off like any other.
    """

    name: str
    tokenizer: str
    length: int
    size: str = ""
    padded: bool = True
    multiple: int = 0
    filled_with: Literal["pad", "end"] = "pad"
    side: Literal["", "left", "right"] = ""
    template: str = "{}"
    chat: Chat | None = None
    special: bool = True
    removed: tuple[str, ...] = ()
    lowered: bool = False
    suffix: str = ""
    spelled: bool = False
    dropped: int | str = 0
    kept: str = ""
    mask: str = ""
    cleaned: bool = False
    sought: tuple[str, ...] = ()
    quoted: bool = False
    blank: str = ""
    shortened: bool = False


@dataclass(frozen=True)
class Shown:
    """A picture as an image encoder is shown it: an input `[1, 3, height, width]`, normalised as it wants it.

    Attributes:
        name: Of the input.
        processor: Its folder in the pipeline, which says to what size a picture is brought and how it is normalised.
        sized: Whether the pipeline brings the picture to the size of the video first, and passes it on in floats.
        as_bytes: Whether it does so, and passes it on as it is.
    """

    name: str
    processor: str
    sized: bool = False
    as_bytes: bool = False


@dataclass(frozen=True)
class Patches:
    """Pictures of any size, one or several, as text encoders see them beside the prompt: cut into patches.

    Attributes:
        name: Of the input: a row for each patch, `[P, 3 * frames * side * side]`, normalised as the encoder wants it.
        places: Name of the input `[P, 4]` int64: picture, window, row and column of each patch.
        processor: Its folder in the pipeline, which says to what size a picture is brought and how it is normalised.
        encoder: Folder of the encoder, whose `vision_config` says how large a window is.
        token: What stands in a prompt for one token of a picture.
        each: What stands before the prompt for each picture, its number, from 1, in the place of `{}`.
        pictures: How many a request may bring.
        area: Pixels that the pipeline brings a picture to before the processor does, sides rounded to 32.
    """

    name: str
    places: str
    processor: str
    encoder: str
    token: str
    each: str
    pictures: int
    area: int


@dataclass(frozen=True)
class Fitted:
    """How pictures that a model goes by, each of a shape of its own, are brought to whole tokens.

    Attributes:
        area: Most pixels; a larger one is made smaller, until it has about as many. What is over whole tokens is then
            cut off around its middle.
        shortest: Fewest pixels along a side.
        ratio: Most that one side is of the other.
        pictures: How many a request may bring.
    """

    area: int
    shortest: int
    ratio: int
    pictures: int


@dataclass(frozen=True)
class Sections:
    """A video that is made a window of latent frames at a time, each by a loop of its own, from those made before.

    Attributes:
        direction: `forward` where the first frames are made first, `backward` where the last ones are.
        new: Input that holds the places in time of the frames that a section makes.
        past: Inputs that hold frames made before, with those that hold their places, the nearest frames first. The
            first of them begins with the frame of the picture.
        usual: How many are made where nobody asks for another length.
    """

    direction: Literal["forward", "backward"]
    new: str
    past: tuple[tuple[str, str], ...]
    usual: int


@dataclass(frozen=True)
class Driven:
    """A video that is driven by others frame for frame: a pose and a face.

    It is made a window of latent frames at a time, each by a loop of its own that is given the last frame of the one
    before. Frames of `pose` and `scene` come to `animate` as many at a time as a latent frame has.

    Attributes:
        pose: Input of `animate` with frames of the pose, `[1, 3, F, height, width]` from 0 to 1.
        scene: Its input with what there is of the frames that are made, `[1, 4, F, height, width]`: the fourth channel
            is 1 where that stays, and 0 where it is made anew.
        face: Input of the transformer with frames of the face, `[N, 3, F, side, side]` from -1 to 1. A call that
            guidance leads away from is given -1 alone.
        ahead: Latent frames of a window before those of the video; the first `condition` has as many more.
    """

    pose: str
    scene: str
    face: str
    ahead: int


@dataclass(frozen=True)
class Controlled:
    """A video that goes by another frame for frame, of which a mask says what is made anew, and by pictures.

    What `animate` makes of all latent frames is joined along the frames. The latents of a picture stand ahead of those,
    without a mask; the noise has as many latent frames more, which are no part of the video. Where no video is given
    there is grey, all of which is made anew.

    Attributes:
        video: Input of `animate` with frames of the other behind the first, which is `picture`: `[1, 3, F, height,
            width]` from 0 to 1, as many at a time as a latent frame has.
        mask: Its input with so many frames of the mask, `[1, 1, F, height, width]`, 1 where it is made anew, else 0.
        shown: Its input with the one frame of the mask that a latent frame is told of, `[1, 1, 1, height, width]`.
        control: What it makes, an input of the transformer `[1, C, 1, H, W]`.
        latents: Of its channels, those of the latents of what stays.
        pictures: How many a request may bring.
    """

    video: str
    mask: str
    shown: str
    control: str
    latents: int
    pictures: int


@dataclass(frozen=True)
class Tiling:
    """How the tiles of a video lie in its latents; neighbours are blended where they overlap.

    Attributes:
        frames: Latent frames of a tile, without the one before that it begins with.
        frame_stride: Latent frames from one tile to the next.
        side: Latent pixels of a tile along each side.
        side_stride: Latent pixels from one tile to the next.
        time_scale: Frames of a latent frame; the first is one frame.
        scale: Pixels of a latent pixel along each side.
    """

    frames: int
    frame_stride: int
    side: int
    side_stride: int
    time_scale: int
    scale: int


@dataclass(frozen=True)
class Whole:
    """The parts of a pipeline besides the transformer.

    Attributes:
        decode: `(vae, latents [1, C, H, W]) -> picture [1, 3, height, width]` from 0 to 1, or with transparency `[1, 4,
            height, width]`; the latents as the scheduler leaves them, unpacked. None where no graph decodes them.
        frames: `(vae, latents [1, C, F, H, W], caches of the latent frames before, or None for the first) -> (pictures
            [1, 3, frames, height, width] from 0 to 1, caches)`: the decoder of a causal video VAE, as many latent
            frames at a time as `at_once` says. None where pictures are no videos, or no graph decodes them.
        at_once: Latent frames of the first call of `frames`, and of any later one.
        tile: `(vae, latents [1, C, F, H, W]) -> pictures [1, 3, frames, height, width]` from 0 to 1 and beyond: one
            tile of a video VAE that decodes in tiles, of as many latent frames and pixels as `Tiling` says. None as
            above.
        tiling: `vae -> Tiling`, how its tiles lie.
        frame_rate: Frames per second that the family's videos are usually shown at; 0 where they are none.
        dropped: Leading frames of what is decoded that the pipeline leaves out of its video.
        skipped: Leading latent frames that it does not decode.
        see: `(vae, picture [1, 3, height, width] from 0 to 1) -> inputs of the transformer by name`, each `[1, ...]`:
            what a picture that is to be edited becomes. None where the pipeline takes none, or no graph encodes it.
        animate: `(modules, pictures by name, caches of the latent frame before, or None for the first) -> (made by
            name, caches)`: what a video that is made from a picture has of it, one latent frame at a time. The first
            one gets `picture`, as above, and what `shown` names, and makes inputs of the transformer by name, each
            `[1, ...]`; any later one, whose frames are grey, gets nothing. Each makes `condition`, `[1, C, 1, H, W]`,
            the channels that follow those of the noise, or the frame that replaces its first. Where the first leaves no
            caches there are no later ones: they have zeros, and it may make `mean` and `deviation` of `condition`
            instead, which is then drawn. With `sections` it makes these of its latents. None where videos are made of
            text alone.
        sections: How a video that is made from a picture is made section by section; None where one loop makes it.
        driven: How others drive a video that is made from a picture. `animate` is given their frames too, any later
            one as well, and what it makes of all of them is joined along the frames. The picture is then not stretched
            but put on black. None where nothing drives it.
        controlled: How a video goes by another, and by pictures; None where it does not.
        cropped: Side of the square whose pixels a video from a picture has, if the pipeline lets the picture keep its
            shape and cuts off what is outside of the video; 0 where it is stretched.
        seers: Folders of the image encoders that `animate` has besides the VAE.
        shown: What they are shown; None where there are none.
        begin: `(vae, picture as above) -> (mean, deviation)` of the latents `[1, C, H, W]` that a loop may begin with,
            with noise upon them, as the scheduler has latents. None where `see` is one, or where there is noise alone.
        seen_at: (height, width) in pixels that such a picture is brought to: that of the nearest shape. Where there are
            none, its own shape with `area` pixels, or its own size, cut to whole tokens.
        area: Pixels that such a picture is brought to, each side rounded to 32; 0 where it is not.
        fitted: How it keeps its shape, where `see` may be given several pictures, one after the other. The rows of all
            of them follow those of the first, and begin their places with a multiple of where those begin.
        encoders: Folders of the text encoders.
        tokens: What the tokenizers make of a prompt.
        encode: `(encoders, tokens and masks by name, what `read` names) -> inputs of the transformer by name`, each
            `[1, ...]`.
        read: What the text encoders see beside the prompt: the picture that a video is made of, black for a negative
            prompt; or pictures that are edited, in patches, for that too. None where they see the prompt alone.
        negative: The negative prompt of a request that guidance needs one for and that brings none; None where guidance
            is off without one.
    """

    decode: Callable[[Any, Any], Any] | None = None
    frames: Callable[[Any, Any, Sequence[Any] | None], tuple[Any, list[Any]]] | None = None
    tile: Callable[[Any, Any], Any] | None = None
    tiling: Callable[[Any], Tiling] | None = None
    frame_rate: int = 0
    at_once: tuple[int, int] = (1, 1)
    dropped: int = 0
    skipped: int = 0
    see: Callable[[Any, Any], dict[str, Any]] | None = None
    animate: Callable[[Modules, Tensors, Sequence[Any] | None], tuple[dict[str, Any], list[Any]]] | None = None
    sections: Sections | None = None
    driven: Driven | None = None
    controlled: Controlled | None = None
    cropped: int = 0
    seers: tuple[str, ...] = ()
    shown: Shown | None = None
    begin: Callable[[Any, Any], tuple[Any, Any]] | None = None
    seen_at: tuple[tuple[int, int], ...] = ()
    area: int = 0
    fitted: Fitted | None = None
    encoders: tuple[str, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    encode: Callable[[Modules, Tensors], dict[str, Any]] | None = None
    read: Shown | Patches | None = None
    negative: str | None = None


def picture(vae: Any, latents: Any) -> Any:
    """Of latents that one factor, and for some models a shift, scales: `[1, C, H, W]` -> `[1, 3, height, width]`."""
    config = vae.config
    latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    return unit(vae.decode(latents, return_dict=False)[0])


def latents(vae: Any, picture: Any) -> Any:
    """The other way round, the middle of what the encoder leaves open: `[1, 3, height, width]` -> `[1, C, H, W]`."""
    config = vae.config
    made = vae.encode(2 * picture - 1).latent_dist.mode()
    return (made - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def spread(vae: Any, picture: Any) -> tuple[Any, Any]:
    """The same with what it leaves open: (mean, deviation), each `[1, C, H, W]`."""
    config = vae.config
    made = vae.encode(2 * picture - 1).latent_dist
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    return (made.mean - shift) * scale, made.std * scale


def still_spread(vae: Any, picture: Any) -> tuple[Any, Any]:
    """The same of a video VAE, as its one frame."""
    config = vae.config
    made = vae.encode((2 * picture - 1).unsqueeze(2)).latent_dist
    scale = picture.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return scaled(vae, made.mean).squeeze(2), (made.std / scale).squeeze(2)


def unit(values: Any) -> Any:
    """Pictures from -1 to 1 as pictures from 0 to 1, cut off there."""
    return (values / 2 + 0.5).clamp(0, 1)


def normed(vae: Any, latents: Any) -> Any:
    """Latents `[1, C, F, H, W]` that were scaled channel by channel, as the VAE made them."""
    config = vae.config
    mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    scale = latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return latents * scale + mean


def scaled(vae: Any, latents: Any) -> Any:
    """The other way round: latents `[1, C, F, H, W]` of the VAE as the scheduler has them."""
    config = vae.config
    mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    scale = latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / scale


def in_tokens(latents: Any) -> Any:
    """Latents as pipelines pack them, 2 x 2 latent pixels a token: `[1, C, H, W]` -> `[1, H / 2 * W / 2, 4 C]`."""
    _, channels, height, width = latents.shape
    blocks = latents.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(1, (height // 2) * (width // 2), 4 * channels)


def still(vae: Any, latents: Any) -> Any:
    """The one frame of a video VAE: `[1, C, H, W]` -> `[1, 3 or 4, height, width]`."""
    return unit(vae.decode(normed(vae, latents.unsqueeze(2)), return_dict=False)[0][:, :, 0])
