"""LTX-2 from a picture: its latents are the first frame of the video, whose tokens have timestep 0.

The sound, and what video and sound see of each other, have the timestep of the step. The model modulates token by
token; here two rows serve the video, of timestep 0 and of the step, and its places tell which tokens begin it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.families.family import replaced
from taylorseer_export.families.ltx_2 import LTX_2


def _from_picture(model: Any, inputs: dict[str, Any]) -> Any:
    """As LTX2ImageToVideoPipeline: a timestep for each token of the video, 0 in the first frame."""
    import torch

    places = {name: inputs[name].float() for name in ("video_coords", "audio_coords")}
    time = told = inputs["timestep"]
    if not torch.compiler.is_exporting():  # `_told_apart` takes one
        told = time[:, None] * (places["video_coords"][:, 0, :, 0] > 0)
    told_twice = {"audio_timestep": time, "sigma": time, "use_cross_timestep": True, "return_dict": False}
    return model(**{**inputs, **places, "timestep": told}, **told_twice)


@contextmanager
def _row_by_row(model: Any) -> Iterator[None]:
    with LTX_2.patched(model), replaced(model, forward=partial(_told_apart, model, model.forward)):
        yield


def _told_apart(model: Any, forward: Any, hidden_states: Any, video_coords: Any, **others: Any) -> Any:
    """The model's own forward, its modulation of the video spread over tokens."""
    import torch

    batch, tokens, _ = hidden_states.shape
    # Made of the latent, so that what is spread over tokens counts as of a step and is never kept for all of them.
    later = hidden_states.new_ones(batch, tokens, 1) * (video_coords[:, 0, :, :1] > 0).to(hidden_states.dtype)
    embed = model.time_embed.forward
    zero = video_coords.new_zeros(batch)  # of a constant: `prepare` looks at it once
    still, told_still = (one[:, None] for one in embed(zero, batch_size=batch, hidden_dtype=hidden_states.dtype))

    def spread(of_step: Any, of_picture: Any) -> Any:
        return torch.where(later > 0, of_step, of_picture)

    def embedded(timestep: Any, **sizes: Any) -> Any:
        made, told = embed(timestep, **sizes)
        return made, spread(told[:, None], told_still)

    def modulation(block: Any, own: Any, table: Any, temb: Any, batch_size: int) -> tuple[Any, ...]:
        if table is not block.scale_shift_table:
            return tuple(own(table, temb, batch_size))
        parts = zip(table, *(one.chunk(len(table), -1) for one in (temb, still)), strict=True)
        return tuple(entry + spread(of_step, of_picture) for entry, of_step, of_picture in parts)

    with ExitStack() as stack:
        stack.enter_context(replaced(model.time_embed, forward=embedded))
        for block in model.transformer_blocks:
            stack.enter_context(replaced(block, get_mod_params=partial(modulation, block, block.get_mod_params)))
        return forward(hidden_states=hidden_states, video_coords=video_coords, **others)


LTX_2_IMAGE = replace(
    LTX_2,
    name="ltx-2-image",
    title="LTX-2 and 2.3, video and sound with a picture as the first frame",
    pipeline=replace(
        LTX_2.pipeline, arguments="first-frame", ignored_inputs=(*LTX_2.pipeline.ignored_inputs, "audio_timestep")
    ),
    forward=_from_picture,
    patched=_row_by_row,
)
