"""What a part of a pipeline says besides its graphs: prompts, tiles, pictures that are shown, sections of a video."""

from typing import Literal

from pydantic import Field

from taylorseer_export.bundle.entries import Count, RelativePath, Size, SizeName, Template, Text
from taylorseer_export.bundle.sealed import Part

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class Tokens(Part):
    """What one tokenizer makes of a prompt: an input of the graph `text`, and its mask."""

    input: Text = Field(description="Name of the input.")
    mask: Text | None = Field(default=None, description="Name of the input that is 1 where a token is no padding.")
    file: RelativePath = Field(description="The tokenizer, as the `tokenizers` library stores it.")
    length: Size = Field(description="Tokens that a prompt may have, without those that are dropped.")
    size: SizeName | None = Field(default=None, description="Dimension that this number is; null where it is fixed.")
    padding: Count | None = Field(default=None, description="Token that fills a prompt up to its length; or null.")
    multiple: Size | None = Field(
        default=None, description="It is filled up to a multiple of so many, its length at most; null: to its length."
    )
    side: Literal["left", "right"] = Field(default="right", description="Where it is filled up.")
    template: Template = Field(default="{}", description="What the prompt is put into, in the place of {}.")
    special: bool = Field(default=True, description="Whether the tokenizer adds its own tokens around that.")
    removed: tuple[Text, ...] = Field(default=(), description="What is taken out of a prompt first.")
    lowered: bool = Field(default=False, description="Whether it is in lower case, without spaces at its ends, first.")
    suffix: Template | None = Field(
        default=None, description="What follows once the prompt is filled up; its tokens count within `length`."
    )
    spelled: bool = Field(
        default=False,
        description="Whether what it has in quotes is tokens of single letters, and the template's are made apart.",
    )
    dropped: Count = Field(default=0, description="Leading tokens that the encoders leave out of what they return.")
    kept: Text | None = Field(
        default=None,
        description="Name of the input that says of which tokens states are returned: the first and, but for so many "
        "that are dropped, those behind it; of a negative prompt, which has no template, the first ones.",
    )
    cleaned: bool = Field(default=False, description="Whether HTML entities and runs of spaces are resolved first.")
    quoted: bool = Field(
        default=False,
        description='Whether it is what the prompt has in quotes, each as `Text "...". `; without any all is padding.',
    )
    blank: Text = Field(default="", description="What stands for a prompt that is empty.")
    shortened: bool = Field(
        default=False,
        description="Whether one that has more tokens, in its template, first loses characters at its end: as many as "
        "the text has of its tokens from the last but one that it may have to the third last of all.",
    )


class Tiles(Part):
    """How the tiles of a video lie in its latents; neighbours are blended where they overlap."""

    frames: Size = Field(description="Latent frames of a tile, without the one before that it begins with.")
    frame_stride: Size = Field(description="Latent frames from one tile to the next.")
    side: Size = Field(description="Latent pixels of a tile along each side.")
    side_stride: Size = Field(description="Latent pixels from one tile to the next.")
    time_scale: Size = Field(description="Frames of a latent frame; the first is one frame.")
    scale: Size = Field(description="Pixels of a latent pixel along each side.")


class Shown(Part):
    """How an image encoder is shown the picture that is given, as an input of the graph."""

    input: Text = Field(description="Name of the input; its shape is the size that the picture is brought to.")
    edge: Size | None = Field(
        default=None,
        description="Pixels that the shorter side is brought to before the middle is cut out; null: nothing is cut.",
    )
    filter: Filter = Field(description="Of Pillow, that it is resized by.")
    sized: bool = Field(
        default=False,
        description="Whether it has the size of the video first, and is floats in between, by which some bytes lose 1.",
    )
    as_bytes: bool = Field(default=False, description="Whether it has the size of the video first and stays bytes.")


class Patches(Part):
    """Pictures of any size, one or several, that text encoders see beside the prompt, cut into patches.

    A picture is brought to `area`, then to whole tokens within `least` and `most` pixels. Its patches come token by
    token, row by row, and so do those of each token.
    """

    input: Text = Field(description="Name of the input: a row for each patch, its colours one after the other.")
    places: Text = Field(description="Name of the input that holds picture, window, row and column of each patch.")
    token: Text = Field(description="What stands in a prompt for one token of a picture.")
    each: Template = Field(description="What stands before the prompt for each picture, its number in the place of {}.")
    pictures: Size = Field(description="How many a request may bring.")
    area: Size = Field(description="Pixels that a picture is brought to first, in its shape, sides rounded to 32.")
    least: Size = Field(description="Fewest pixels that encoders are shown.")
    most: Size = Field(description="Most pixels that encoders are shown.")
    side: Size = Field(description="Pixels of a patch along each side.")
    frames: Size = Field(description="How many times a patch stands in its row, as frames of a video would.")
    merged: Size = Field(description="Patches along each side that become one token.")
    window: Size = Field(description="Tokens along each side of a window.")
    filter: Filter = Field(description="Of Pillow, that it is resized by after it was brought to its area.")


class Fitted(Part):
    """How pictures that a model goes by are brought to whole tokens, each in its own shape; of several the rows follow
    each other, and their places begin with `first`, twice that, and so on.
    """

    area: Size = Field(description="Most pixels; a larger one is made smaller, in its shape.")
    shortest: Size = Field(description="Fewest pixels along a side.")
    ratio: Size = Field(description="Most that one side is of the other, dimensionless.")
    pictures: Size = Field(description="How many a request may bring.")


class Sections(Part):
    """A video is several loops: each makes a section of its latent frames, from those made before.

    A section has as many latent frames as the latent of the denoiser typically has.
    """

    direction: Literal["forward", "backward"] = Field(
        description="What is made first. forward: the beginning of the video. backward: its end."
    )
    new: Text = Field(description="Input of the denoiser that holds the places in time of the frames of a section.")
    past: tuple[tuple[Text, Text], ...] = Field(
        min_length=1,
        description="Inputs that hold frames made before, each with the one that holds their places in time; the "
        "nearest first, and in that the frame of the picture before all others.",
    )
    usual: Size = Field(description="Sections of a video where nobody asks for another length.")


class Controlled(Part):
    """A video goes by another frame for frame, and by pictures whose latents stand ahead of it."""

    video: Text = Field(
        description="Input of graph `later` with frames of the other, as many as a latent frame has, from 0 to 1; the "
        "first is `picture`."
    )
    mask: Text = Field(description="Input of both graphs with so many frames of a mask: 1 where it is made anew.")
    shown: Text = Field(description="Input of both graphs with the frame of the mask that a latent frame is told of.")
    control: Text = Field(description="What both make, an input of the denoiser, joined along the frames.")
    latents: Size = Field(description="Its channels that hold latents of what stays; a picture has no others.")
    pictures: Size = Field(description="How many pictures a request may bring.")


class Driven(Part):
    """A video is driven by others frame for frame, and is several loops: each makes a section of its latent frames, as
    many as the latent of the denoiser typically has, and is given the last frame of the one before.
    """

    pose: Text = Field(
        description="Input of both graphs that holds frames of the pose, as many as a latent frame has, from 0 to 1."
    )
    scene: Text = Field(
        description="Input of both graphs that holds what there is of the frames that are made, its fourth channel 1 "
        "where that stays and 0 where it is made anew."
    )
    face: Text = Field(description="Input of the denoiser that holds frames of the face, from -1 to 1.")
    ahead: Count = Field(description="Leading latent frames of a section that are none of the video.")
