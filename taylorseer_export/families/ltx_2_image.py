"""LTX-2 from a picture: its latents are the first frame of the video, whose tokens have timestep 0.

The sound, and what video and sound see of each other, have the timestep of the step. The model modulates token by
token; here two rows serve the video, of timestep 0 and of the step, and its places tell which tokens begin it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taylorseer_export.families.ltx_2 import LTX_2


def _from_picture(model: Any, inputs: dict[str, Any]) -> Any:
    """As LTX2ImageToVideoPipeline: a timestep for each token of the video, 0 in the first frame."""
    import torch

    places = {name: inputs[name].float() for name in ("video_coords", "audio_coords")}
    time, begins = inputs["timestep"], places["video_coords"][:, 0, :, 0]
    # Made of the latent, so that what is spread over tokens counts as of a step and is never kept for all of them.
    later = inputs["hidden_states"].new_ones(begins.shape) * (begins > 0) > 0
    still = places["video_coords"].new_zeros(time.shape, dtype=time.dtype)  # a constant, looked at once
    told = torch.where(later, time[:, None], still[:, None])
    told_twice = {"audio_timestep": time, "sigma": time, "use_cross_timestep": True, "return_dict": False}
    return model(**{**inputs, **places, "timestep": told}, **told_twice)


LTX_2_IMAGE = replace(
    LTX_2,
    name="ltx-2-image",
    title="LTX-2 and 2.3, video and sound with a picture as the first frame",
    pipeline=replace(
        LTX_2.pipeline, arguments="first-frame", ignored_inputs=(*LTX_2.pipeline.ignored_inputs, "audio_timestep")
    ),
    forward=_from_picture,
)
