"""What a prompt becomes, and the picture that comes of it.

This is the one place where the API asks the rest of the package for requests and pictures of a loaded bundle.
"""

from __future__ import annotations

import numpy as np

from taylorseer_export.bundle.latents import refuse_several
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.embedded.conditioning import ConditioningCache
from taylorseer_export.embedded.edits import Given, given_picture, steps_that_run
from taylorseer_export.embedded.picture import opaque
from taylorseer_export.embedded.requests import frame_rate, label_request, pictures_of, prompt_request
from taylorseer_export.embedded.video import check_mp4
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import RequestOptions
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import driven_of
from taylorseer_export.runtime.sampling import Request
from taylorseer_export.runtime.tensors import latent_sizes
from taylorseer_export.serve.api.wishes import Takes, Wish, takes_of


def check_draws(manifest: Manifest) -> None:
    """Refuse a bundle that makes no picture or video of a prompt.

    Raises:
        ConfigError: It takes tensors or videos, has no decoder or several latents, or makes videos, which PyAV is
            missing for.
    """
    refuse_several(manifest, "the images API")
    if driven_of(manifest) is not None:
        raise ConfigError(
            f"bundle {manifest.family}-{manifest.name} makes videos that others drive, expected one that draws from "
            "prompts and pictures; make them with `taylorseer-export run`"
        )
    if frame_rate(manifest) is not None:
        check_mp4()
    if manifest.sampling.pictures is None or manifest.sampling.source == "tensors":
        raise ConfigError(
            f"bundle {manifest.family}-{manifest.name} makes latents of tensors, expected one that makes a picture of "
            "a prompt; serve it with `taylorseer-export triton`"
        )


def picture_for(
    denoiser: Denoiser, takes: Takes, wish: Wish, options: RequestOptions
) -> tuple[RequestOptions, Given | None]:
    """The picture that a request brings, and what its options are then; see `steps_that_run`.

    Raises:
        Refusal, ConfigError: The model does not take what is wished, see `Takes.check`.
    """
    takes.check(wish)
    pictures = [opaque(picture) for picture in wish.pictures]
    given = given_picture(denoiser.manifest, pictures[0] if pictures else None, wish.strength, pictures[1:])
    return steps_that_run(options, denoiser, given)


def request_of(
    denoiser: Denoiser, wish: Wish, cache: ConditioningCache | None = None, given: Given | None = None
) -> Request:
    """The request of one picture that the model takes; noise is drawn and the prompt encoded. Takes milliseconds.

    Args:
        denoiser: The loaded bundle.
        wish: What it is to be.
        cache: Where what prompts become is kept; they are encoded anew if left out.
        given: From `picture_for`.

    Raises:
        ConfigError: The prompt, the size or the guidance does not fit the model; nothing was allocated for it.
    """
    takes = takes_of(denoiser.manifest)
    if takes.classes is not None:
        latent_sizes(denoiser.manifest, wish.size, "size")  # there is one: any other is refused
        return label_request(denoiser, [takes.label(wish.prompt)], [wish.seed], wish.guidance_scale)
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
