"""Guidance: the two predictions of a step, as one."""

from __future__ import annotations

import numpy as np

from taylorseer_export.bundle.manifest import Pipeline


def combined(prediction: np.ndarray, scale: float, pipeline: Pipeline) -> np.ndarray:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional).

    Of each token it is as long as the conditional where the norm is kept, or no longer where it is cut.

    Args:
        prediction: `[2 N, ...]` float32, the conditional ones first.
        scale: Dimensionless.
        pipeline: What the family's pipeline does with norms.
    """
    conditional, unconditional = np.split(prediction, 2)
    guided: np.ndarray = unconditional + np.float32(scale) * (conditional - unconditional)
    if pipeline.guidance_keeps_norm or pipeline.guidance_cuts_norm:
        ratio = np.linalg.norm(conditional, axis=-1, keepdims=True) / np.linalg.norm(guided, axis=-1, keepdims=True)
        guided *= np.minimum(ratio, 1) if pipeline.guidance_cuts_norm else ratio
    return guided
