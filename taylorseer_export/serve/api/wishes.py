"""What one picture is to be, and what a model takes of that, whether it is loaded here or served elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.embedded.edits import Use, check_strength, most_in_words, most_pictures, use_of
from taylorseer_export.embedded.requests import frame_rate
from taylorseer_export.errors import ConfigError
from taylorseer_export.serve.api.fields import REFERENCE
from taylorseer_export.serve.api.problems import Refusal
from taylorseer_export.serve.loras import chosen


class Wish(NamedTuple):
    """What one picture is to be.

    Attributes:
        prompt: The caption; for a model of classes the number of one.
        seed: Of the noise.
        size: (height, width) in pixels, of a video (frames, height, width); the bundle's if None.
        negative_prompt: What it is guided away from.
        guidance_scale: Dimensionless; the bundle's if None.
        pictures: `[H, W, 4]` uint8 that it is to be made from.
        mask: `[H, W, 4]` uint8, clear where the first of them is to change.
        strength: As of `Given`.
        lora: `NAME` or `NAME:STRENGTH` of a LoRA that the model is served with; none if None.
    """

    prompt: str
    seed: int = 0
    size: tuple[int, ...] | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    pictures: Sequence[np.ndarray] = ()
    mask: np.ndarray | None = None
    strength: float | None = None
    lora: str | None = None


class Takes(NamedTuple):
    """What a model takes of a wish.

    Attributes:
        name: Of the model.
        classes: How many it draws; None for one that draws what a prompt says.
        negative: Whether it is guided away from a text.
        use: What it does with a picture, see `use_of`.
        field: By which name a request brings one.
        most: How many a request may bring.
        loras: Names of the LoRAs that a request may choose of.
    """

    name: str
    classes: int | None
    negative: bool
    use: Use | None
    field: str = "image"
    most: int = 1
    loras: tuple[str, ...] = ()

    def label(self, prompt: str) -> int:
        """The class that a prompt names by its number.

        Raises:
            Refusal: It names none.
        """
        assert self.classes is not None, "bug in taylorseer-export: a class of a model that draws prompts"
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", prompt) or int(prompt) >= self.classes:
            raise Refusal(
                f"prompt is `{prompt[:64]}`, expected a class of {self.name}, 0 to {self.classes - 1}, since this "
                "model draws classes; send its number",
                400,
                "prompt",
            )
        return int(prompt)

    def check(self, wish: Wish) -> None:
        """Refuse what it does not take.

        Raises:
            Refusal: It takes no picture, lacks one, takes no mask or not so many, is not guided away from a text, has
                no such LoRA, or draws classes and the prompt names none.
            ConfigError: There is nothing that a strength is of.
        """
        if wish.pictures and self.use is None:
            message = (
                f"{self.field} is given for {self.name}, expected none, since it draws from text alone; leave it out"
            )
            raise Refusal(message, 400, self.field)
        if not wish.pictures and self.use in ("edits", "animates"):
            what, where = ("edit", " to /v1/images/edits") if self.use == "edits" else ("animate", "")
            message = (
                f"{self.field} is missing for {self.name}, expected the picture that it is to {what}; send it{where}"
            )
            raise Refusal(message, 400, self.field)
        if len(wish.pictures) > self.most or wish.mask is not None:
            few = len(wish.pictures) <= self.most
            what, seen = ("mask", "given") if few else (self.field, f"{len(wish.pictures)} pictures")
            which = "which changes as a whole" if self.most == 1 else "without a mask"
            raise Refusal(
                f"{what} is {seen} for {self.name}, expected {most_in_words(self.most)}, {which}; leave the rest out",
                400,
                what,
            )
        check_strength(self.name, self.use, bool(wish.pictures), wish.strength)
        if wish.negative_prompt is not None and not self.negative:
            raise Refusal(
                f"negative_prompt is given for {self.name}, expected none, since this model is not guided away from a "
                "text; leave it out",
                400,
                "negative_prompt",
            )
        if wish.lora is not None:
            self.lora(wish.lora)
        if self.classes is not None:
            self.label(wish.prompt)

    def lora(self, text: str) -> tuple[str, float]:
        """(name, strength) of `NAME` or `NAME:STRENGTH`; the strength is 1 where there is none.

        Raises:
            Refusal: It is served with no LoRA of that name, or the strength is no finite number.
        """
        try:
            return chosen(text, self.loras, self.name)
        except ConfigError as error:
            raise Refusal(str(error), 400, "lora") from error


def takes_of(manifest: Manifest) -> Takes:
    """What a bundle takes."""
    sampling = manifest.sampling
    classes = int(manifest.model.config["num_embeds_ada_norm"]) if sampling.source == "labels" else None
    guided = sampling.source == "prompts" and sampling.guidance in ("batched", "branches")
    field = "image" if frame_rate(manifest) is None else REFERENCE
    name, most = f"{manifest.family}-{manifest.name}", most_pictures(manifest)
    return Takes(name, classes, guided, use_of(manifest), field, most)
