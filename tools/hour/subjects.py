"""What is benched: published models with random bfloat16 weights, or tiny ones of their families for a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cards
import diffusers
import torch
from randomised import randomised
from tiny_models import dit_inputs, flux_inputs, tiny_dit, tiny_flux, tiny_wan, wan_inputs

from hour.machine import BF16, Machine
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile import export
from taylorseer_export.families import FAMILIES
from taylorseer_export.runtime.trajectory import Trajectory


@dataclass(frozen=True)
class Subject:
    """A model, its inputs, and how much of a contest it gets.

    Attributes:
        family: Of the model.
        published: Its name in `cards.py`.
        tiny: Builds the model of a trial.
        inputs: (model, steps, batch, tiny) -> latents, timesteps, conditioning.
        batch: Samples of a call.
        steps: Of a loop.
        granularities: That ours runs at.
        loops: Pairs of whole loops.
        repeats: Calls of a timing of a full step.
        parity: Whether it is compared with itself in float32, which takes twice its memory again.
        rivals: Whether the hook and cache-dit run on it.
    """

    family: str
    published: str
    tiny: Callable[[], Any]
    inputs: Callable[[Any, int, int, bool], Any]
    batch: int = 1
    steps: int = 50
    granularities: tuple[str, ...] = ("residual", "module")
    loops: int = 2
    repeats: int = 5
    parity: bool = True
    rivals: bool = False


def _flux(model: Any, steps: int, batch: int, tiny: bool) -> Any:
    """1024 pixels and 512 text tokens."""
    side, text = (4, 6) if tiny else (64, 512)
    return flux_inputs(model, steps, batch, side, side, text)


def _dit(model: Any, steps: int, batch: int, tiny: bool) -> Any:
    return dit_inputs(model, steps, batch)


def _wan(frames: int) -> Callable[[Any, int, int, bool], Any]:
    """480 pixels by 832 of so many latent frames, and 512 text tokens."""

    def inputs(model: Any, steps: int, batch: int, tiny: bool) -> Any:
        shape = (2, 3, 2, 6) if tiny else (frames, 30, 52, 512)
        return wan_inputs(model, steps, batch, *shape)

    return inputs


SUBJECTS = {
    "flux": Subject("flux", "flux.1-dev", tiny_flux, _flux, rivals=True),
    "dit": Subject("dit", "dit-xl-2-256", tiny_dit, _dit, batch=2),
    # A loop of 81 frames takes half a minute all-full, so there is one; the large model gets fewer frames and steps.
    "wan": Subject("wan", "wan2.1-t2v-1.3b", tiny_wan, _wan(21), loops=1, repeats=2),
    "wan-14b": Subject(
        "wan",
        "wan2.1-t2v-14b",
        tiny_wan,
        _wan(9),
        steps=20,
        granularities=("residual",),
        loops=1,
        repeats=1,
        parity=False,
    ),
}


class Case:
    """One model on the device, its inputs for every step, and its trace.

    Args:
        name: Of `SUBJECTS`.
        args: The settings of the hour.
        machine: Where it lies.
    """

    def __init__(self, name: str, args: Any, machine: Machine) -> None:
        self.name, self.args, self.machine, self.subject = name, args, machine, SUBJECTS[name]
        self.family, self.batch = FAMILIES[self.subject.family], self.subject.batch
        self.steps = args.steps or self.subject.steps
        self.model = _model(self.subject, args.tiny, machine.device)
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        latents, self.timesteps, conditioning = self.subject.inputs(self.model, self.steps, self.batch, args.tiny)
        self.arrays = {key: value.numpy() for key, value in conditioning.items()}
        self.data = Trajectory(latents.numpy(), self.timesteps.float().numpy(), self.arrays)
        self.latents = latents.to(machine.device, BF16)
        self.conditioning = {key: self._own(key, value) for key, value in conditioning.items()}
        checkpoint = Checkpoint(name, self.family, Path(name), config, {}, weightless=True)
        self.traced = export.trace_model(checkpoint, self.options("residual", 1))

    def _own(self, name: str, value: torch.Tensor) -> torch.Tensor:
        floats = value.is_floating_point() and not name.endswith("_ids")
        return value.to(self.machine.device, BF16 if floats else value.dtype)

    def options(self, granularity: Any, order: int, weights: str | None = None) -> export.Options:
        a = self.args
        return export.Options(order=order, interval=a.interval, warmup=a.warmup, steps=self.steps,
                              granularity=granularity, engine="inductor", device=self.machine.device,
                              precision="bf16", latent_size=self._latent_size(), batch=self.batch,
                              weights=weights)  # fmt: skip

    def _latent_size(self) -> tuple[int, ...] | None:
        """What the graphs are static in; the DiT knows no other size than its own, FLUX's latents are packed."""
        if self.subject.family == "dit":
            return None
        if self.subject.family == "flux":
            side = round(self.latents_shape[2] ** 0.5)
            return (2 * side, 2 * side)
        return tuple(self.latents_shape[3:])

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[S, B, ...]"""
        return tuple(self.data.latents.shape)

    def inputs(self, k: int) -> dict[str, torch.Tensor]:
        """Arguments of the diffusers model at step k."""
        timestep = self.timesteps[k].expand(self.batch).to(self.machine.device)
        timestep = timestep.to(BF16) if self.subject.family == "flux" else timestep.float()
        return {"hidden_states": self.latents[k], "timestep": timestep, **self.conditioning}

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(**inputs, return_dict=False)[0]
        return result


def _model(subject: Subject, tiny: bool, device: str) -> torch.nn.Module:
    """The diffusers model in bfloat16 with random weights, made on the device."""
    if tiny:
        return halved(subject.tiny().to(device))
    described = cards.config(subject.published)
    kind = getattr(diffusers, FAMILIES[subject.family].model_class)
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            model = randomised(lambda: kind.from_config({k: v for k, v in described.items() if k[0] != "_"}), seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    return halved(model)


def halved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights in bfloat16; buffers that a checkpoint does not hold, such as angles, stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(BF16)
    return model.requires_grad_(False)
