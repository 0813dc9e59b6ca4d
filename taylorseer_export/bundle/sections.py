"""How a manifest says that a video is made section by section."""

from typing import Literal

from pydantic import Field

from taylorseer_export.bundle.entries import Size, Text
from taylorseer_export.bundle.sealed import Part


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
