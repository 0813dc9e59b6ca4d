"""What a prompt becomes, and the picture that comes of it.

This is the one place where the API asks the rest of the package for requests and pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import Given, given_picture, steps_that_run, use_of
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.embedded.requests import frame_rate, label_request, pictures_of, prompt_request, usual_size
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Request
from taylorseer_export.runtime.tensors import latent_sizes
from taylorseer_export.serve.api.fields import REFERENCE
from taylorseer_export.serve.api.problems import Refusal


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
    """

    prompt: str
    seed: int = 0
    size: tuple[int, ...] | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    pictures: Sequence[np.ndarray] = ()
    mask: np.ndarray | None = None
    strength: float | None = None


def check_draws(manifest: Manifest) -> None:
    """Refuse a bundle that makes no picture or video of a prompt.

    Raises:
        ConfigError: It takes tensors, has no decoder, or makes videos, which PyAV is missing for.
    """
    if frame_rate(manifest) is not None and find_spec("av") is None:
        raise ConfigError("av is not installed, expected it for videos; pip install 'taylorseer-export[video]'")
    if manifest.sampling.pictures is None or manifest.sampling.source == "tensors":
        raise ConfigError(
            f"bundle {manifest.family}-{manifest.name} makes latents of tensors, expected one that makes a picture of "
            "a prompt; serve it with `taylorseer-export triton`"
        )


def takes_pictures(manifest: Manifest) -> bool:
    """Whether the model edits or animates pictures, or begins with them."""
    return use_of(manifest) is not None


def picture_for(denoiser: Denoiser, wish: Wish, options: RequestOptions) -> tuple[RequestOptions, Given | None]:
    """The picture that a request brings, and what its options are then; see `steps_that_run`.

    Raises:
        Refusal: The model takes none, lacks one, or takes no mask or several.
        ConfigError: There is nothing that a strength is of.
    """
    manifest = denoiser.manifest
    name, use = f"{manifest.family}-{manifest.name}", use_of(manifest)
    field = "image" if frame_rate(manifest) is None else REFERENCE
    if wish.pictures and not takes_pictures(manifest):
        message = f"{field} is given for {name}, expected none, since it draws from text alone; leave it out"
        raise Refusal(message, 400, field)
    if not wish.pictures and use in ("edits", "animates"):
        what, where = ("edit", " to /v1/images/edits") if use == "edits" else ("animate", "")
        message = f"{field} is missing for {name}, expected the picture that it is to {what}; send it{where}"
        raise Refusal(message, 400, field)
    if len(wish.pictures) > 1 or wish.mask is not None:
        what, seen = ("mask", "given") if len(wish.pictures) == 1 else (field, f"{len(wish.pictures)} pictures")
        raise Refusal(
            f"{what} is {seen} for {name}, expected one picture, which changes as a whole; leave the rest out",
            400,
            what,
        )
    given = given_picture(manifest, opaque(wish.pictures[0]) if wish.pictures else None, wish.strength)
    return steps_that_run(options, denoiser, given)


def request_of(
    denoiser: Denoiser, wish: Wish, cache: ConditioningCache | None = None, given: Given | None = None
) -> Request:
    """The request of one picture; noise is drawn and the prompt encoded. Takes milliseconds.

    Args:
        denoiser: The loaded bundle.
        wish: What it is to be.
        cache: Where what prompts become is kept; they are encoded anew if left out.
        given: From `picture_for`.

    Raises:
        ConfigError: The prompt, the size or the guidance does not fit the model; nothing was allocated for it.
    """
    manifest = denoiser.manifest
    name = f"{manifest.family}-{manifest.name}"
    guided = manifest.sampling.source == "prompts" and manifest.sampling.guidance in ("batched", "branches")
    if wish.negative_prompt is not None and not guided:
        raise Refusal(
            f"negative_prompt is given for {name}, expected none, since this model is not guided away from a text; "
            "leave it out",
            400,
            "negative_prompt",
        )
    if manifest.sampling.source == "labels":
        latent_sizes(manifest, wish.size, "size")  # there is one: any other is refused
        return label_request(denoiser, [_label(manifest, wish.prompt)], [wish.seed], wish.guidance_scale)
    return prompt_request(
        denoiser,
        [wish.prompt],
        [wish.seed],
        wish.size,
        wish.guidance_scale,
        wish.negative_prompt,
        cache=cache,
        given=given,
    )


def picture_of(denoiser: Denoiser, request: Request, latents: np.ndarray) -> np.ndarray:
    """The picture of the latents of a request of one: `[H, W, 3]` uint8, `[F, H, W, 3]` of a video."""
    return pictures_of(denoiser, request, latents)[0]


def description_of(denoiser: Denoiser) -> dict[str, Any]:
    """What a client may want to know of a model before it asks for a picture."""
    manifest, defaults = denoiser.manifest, denoiser.defaults
    labels = manifest.sampling.source == "labels"
    side, frames = manifest.sampling.latent_scale, [1]
    if labels:
        height, width = (side * int(extent) for extent in denoiser.latent.shape[2:])
    else:
        *frames, height, width = usual_size(manifest)
    return {
        "draws": manifest.sampling.source,
        "classes": int(manifest.model.config["num_embeds_ada_norm"]) if labels else None,
        "takes_pictures": takes_pictures(manifest),
        "frames": frames[0] if frames else 1,
        "frame_rate": frame_rate(manifest),
        "size": f"{width}x{height}",
        "multiple_of": None if labels else side * manifest.pipeline.packing,
        "steps": defaults.steps,
        "most_steps": defaults.most_steps,
        "plan": str(denoiser.forecasts().plan),
        "order": defaults.order,
        "guards": list(defaults.capacity.guards),
        "profiles": list(denoiser.profiles),
    }


def _label(manifest: Manifest, prompt: str) -> int:
    """The class that a prompt names by its number."""
    classes = int(manifest.model.config["num_embeds_ada_norm"])
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", prompt) or int(prompt) >= classes:
        raise Refusal(
            f"prompt is `{prompt[:64]}`, expected a class of {manifest.family}-{manifest.name}, 0 to {classes - 1}, "
            "since this model draws classes; send its number",
            400,
            "prompt",
        )
    return int(prompt)
