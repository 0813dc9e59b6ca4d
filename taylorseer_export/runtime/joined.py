"""What a loop has beside its latents, the same at every step."""

# Shapes: N samples, C channels, F frames, H and W latent pixels

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Joined:
    """What a model from pictures has beside the noise, the same at every step.

    Attributes:
        axis: Of channels that follow those of the latents, or of frames in the place of their first ones.
        value: `[N, C, F, H, W]` float32, in latent pixels, or in what order the latents have it.
        ahead: Whether it is frames.
    """

    axis: int
    value: np.ndarray
    ahead: bool = False
