"""Wan 2.2 TI2V-5B from a picture: its latents are the first frame, whose tokens have timestep 0.

The model modulates token by token; here two rows serve them, that of timestep 0 and that of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from taylorseer_export.errors import ConfigError
from taylorseer_export.families.family import Input, Pipeline, call, no_counterpart, no_entries, replaced
from taylorseer_export.families.wan import WAN

_CHANNELS = 48  # of the one Wan that is told the timestep of each token


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    seen = (config["in_channels"], config["out_channels"])
    if seen != (_CHANNELS, _CHANNELS):
        raise ConfigError(
            f"config entries `in_channels` and `out_channels` are {seen[0]} and {seen[1]}, expected {_CHANNELS} both: "
            "of all Wan, TI2V-5B alone takes a picture as its first frame; export the others as family wan"
        )
    return WAN.inputs(config)


def _dimensions(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    made = WAN.dimensions(config)
    return {**made, "frames": (2, made["frames"][1])}


def _from_picture(model: Any, inputs: dict[str, Any]) -> Any:
    """As WanImageToVideoPipeline: a timestep for each token, 0 in the first frame."""
    import torch

    if torch.compiler.is_exporting():
        return call(model, inputs)  # `_forward` takes one
    frames, first = _tokens(model, inputs["hidden_states"])
    timestep = inputs["timestep"][:, None].repeat(1, frames * first)
    timestep[:, :first] = 0
    return call(model, {**inputs, "timestep": timestep})


def _tokens(model: Any, latents: Any) -> tuple[Any, Any]:
    """(frames, tokens of each)."""
    _, high, wide = model.config.patch_size
    return latents.shape[2], (latents.shape[3] // high) * (latents.shape[4] // wide)


@contextmanager
def _row_by_row(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(replaced(model, forward=partial(_forward, model)))
        for block in model.blocks:
            stack.enter_context(replaced(block, forward=partial(_block, block)))
        yield


def _forward(model: Any, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool) -> Any:
    import torch

    (frames, first), (_, high, wide) = _tokens(model, hidden_states), model.config.patch_size
    rows, columns = hidden_states.shape[3] // high, hidden_states.shape[4] // wide
    rotary = model.rope(hidden_states)
    states = model.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
    # Made of the latent, so that what is spread over tokens counts as of a step and is never kept for all of them; by
    # the places of frames, which are others on each rank.
    later = hidden_states.new_zeros(frames, first) + (torch.arange(frames) > 0).to(hidden_states.dtype)[:, None]
    later = later.reshape(1, frames * first, 1)

    def spread(of_step: Any, of_picture: Any) -> Any:
        return torch.where(later > 0, of_step, of_picture)

    none = encoder_hidden_states.new_zeros(encoder_hidden_states.shape[0])  # of a constant: `prepare` looks at it once
    time, told, text, _ = model.condition_embedder(timestep, encoder_hidden_states)
    still, told_still, *_ = model.condition_embedder(none, encoder_hidden_states[:, :0])
    parts = [one.unflatten(1, (6, -1)).float().chunk(6, 1) for one in (told, told_still)]
    modulation = [spread(*both) for both in zip(*parts, strict=True)]
    for block in model.blocks:
        states = block(states, text, modulation, rotary)
    last = spread(time.unsqueeze(1), still.unsqueeze(1))
    shift, scale = (own + last for own in model.scale_shift_table.chunk(2, 1))
    states = model.proj_out((model.norm_out(states.float()) * (1 + scale) + shift).type_as(states))
    made = states.reshape(states.shape[0], frames, rows, columns, 1, high, wide, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return (made.flatten(6, 7).flatten(4, 5).flatten(2, 3),)


def _block(block: Any, hidden_states: Any, encoder_hidden_states: Any, temb: Any, rotary_emb: Any) -> Any:
    """The block's own forward, its modulation spread over tokens already."""
    own = zip(block.scale_shift_table.chunk(6, 1), temb, strict=True)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table + spread for table, spread in own)
    normed = (block.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
    attended = block.attn1(normed, None, None, rotary_emb)
    hidden_states = (hidden_states.float() + attended * gate).type_as(hidden_states)
    normed = block.norm2(hidden_states.float()).type_as(hidden_states)
    hidden_states = hidden_states + block.attn2(normed, encoder_hidden_states, None, None)
    normed = (block.norm3(hidden_states.float()) * (1 + scale_mlp) + shift_mlp).type_as(hidden_states)
    return (hidden_states.float() + block.ffn(normed).float() * gate_mlp).type_as(hidden_states)


WAN_5B_IMAGE = replace(
    WAN,
    name="wan-5b-image",
    title="Wan 2.2 TI2V-5B with a picture as its first frame",
    reference="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    inputs=_inputs,
    dimensions=_dimensions,
    scheduler_config={**WAN.scheduler_config, "flow_shift": 5.0},
    latent_scale=16,
    latent_size=(31, 44, 80),
    pipeline=Pipeline(flow_steps="count", arguments="first-frame"),
    comfy=no_counterpart,
    whole=None,
    by_config=no_entries,
    variants={},
    forward=_from_picture,
    patched=_row_by_row,
)
