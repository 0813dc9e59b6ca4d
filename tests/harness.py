"""What the tests of graphs and engines share: tiny checkpoints, denoisers over them, toy models to trace."""

# Shapes: S steps, B batch

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch

from taylorseer_export.compile.eager import eager_modules
from taylorseer_export.compile.export import Draft, describe
from taylorseer_export.families.family import Defaults, Family, Input
from taylorseer_export.graph.trace import Trace, trace
from taylorseer_export.method import RequestOptions, forecasts_from_options
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.eager import EagerRunner
from taylorseer_export.runtime.slot import Slot

FLOAT32 = torch.float32
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


class Tiny(NamedTuple):
    """A tiny diffusers model, its checkpoint folder, and `inputs(steps, batch=…)` for it."""

    family: str
    model: torch.nn.Module
    folder: Path
    inputs: Callable[..., Any]


def eager_denoiser(draft: Draft) -> Denoiser:
    """A denoiser over the eager graphs of a draft: everything but the engines, and no ONNX."""
    manifest = describe(draft, "eager")
    return Denoiser(manifest, EagerRunner(eager_modules(draft), manifest.graphs))


def as_arrays(conditioning, without=()):
    return {name: value.numpy() for name, value in conditioning.items() if name not in without}


def beside(owner, conditioning, step):
    """The further latents of a step, which the inputs of a tiny model have in its conditioning."""
    return {name: conditioning[name][step].numpy() for name in owner.others}


def together(slot, prediction: np.ndarray) -> np.ndarray:
    """noise_pred [B, …]; of several latents all predictions, flat, in one [B, N]."""
    others = [value.reshape(len(value), -1) for value in slot.others.values()]
    return np.concatenate([prediction.reshape(len(prediction), -1), *others], 1) if others else prediction


def open_slot(denoiser: Denoiser, inputs) -> Slot:
    latents, _, conditioning = inputs
    return denoiser.slot(denoiser.sizes(tuple(latents.shape[1:]), as_arrays(conditioning, denoiser.others)))


def begin(slot: Slot, inputs, plan: str, order=None, ahead=True, **options) -> None:
    """Start a request; `ahead` says whether its timesteps are known before the first step."""
    _, timestep, conditioning = inputs
    timesteps = timestep.float().numpy() if ahead else None
    asked = forecasts_from_options(RequestOptions(plan=plan, order=order), slot.contract.defaults)
    forecasts = replace(asked, **options)
    slot.start(as_arrays(conditioning, slot.contract.others), forecasts, timesteps)


def advance(slot: Slot, inputs, step: int, ahead=True) -> torch.Tensor:
    """noise_pred [B, …] of one step."""
    latents, timestep, conditioning = inputs
    others = beside(slot.contract, conditioning, step)
    prediction = slot.step(latents[step].numpy(), None if ahead else float(timestep[step]), others)
    return torch.from_numpy(together(slot, prediction))


def run(denoiser: Denoiser, inputs, plan: str, order=None, slot=None, ahead=True, **options) -> torch.Tensor:
    """noise_pred [S, …] of a whole request, in a new slot or in `slot`."""
    slot = slot or open_slot(denoiser, inputs)
    begin(slot, inputs, plan, order, ahead, **options)
    return torch.stack([advance(slot, inputs, step, ahead) for step in range(len(plan))])


def allowed(model, reference, plan: str, order: int, dtype=FLOAT32) -> torch.Tensor:
    """[S] bounds on an error of arithmetic in `dtype`, derived from the gains of the plan."""
    return oracle.bound(reference, oracle.gains(plan, order), dtype, *oracle.extent(model))


def representable(inputs, dtype):
    """The inputs with every float of the latents and the conditioning rounded to `dtype`, as an engine sees them."""
    latents, timestep, conditioning = inputs

    def rounded(name, value):
        return value.to(dtype).float() if value.is_floating_point() and not name.endswith("_ids") else value

    return rounded("", latents), timestep, {n: rounded(n, v) for n, v in conditioning.items()}


# Toys: a family of one small module, so that graph passes can be tested on graphs a reader can hold in mind.


class Passage(torch.nn.Module):
    """An identity with a name, to hang a tap on."""

    def forward(self, hidden_states):
        return hidden_states


class Toy(torch.nn.Module):
    """`compute(model, **inputs) -> tensor` as a model that can be traced: sites are `site`, stack is `first` to `last`.

    Only what passes through `self.site` is tapped; the stack taps stand on the latent and on the result.
    """

    def __init__(self, compute, **parameters):
        super().__init__()
        self.config = {}
        self.compute = compute
        self.first, self.last, self.site = Passage(), Passage(), Passage()
        for name, value in parameters.items():
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, hidden_states, timestep, text, label, return_dict=False):
        result = self.compute(self, self.first(hidden_states), timestep, text, label)
        return (self.last(result),)


TOY_INPUTS = (
    Input("hidden_states", ("batch", "image_tokens", 4), "latent"),
    Input("timestep", ("batch",), "step"),
    Input("text", ("batch", "text_tokens", 4), "constant"),
    Input("label", ("batch", 4), "constant"),
)

TOY = Family(
    name="toy",
    title="a toy",
    model_class="Toy",
    reference="nobody/toy",
    sites=("site",),
    stack_input=("first", "hidden_states"),
    stack_output=("last", "hidden_states"),
    inputs=lambda config: TOY_INPUTS,
    dimensions=lambda config: {"batch": (1, 8), "image_tokens": (4, 64), "text_tokens": (1, 64)},
    latent_sizes=lambda config, height, width: {},
    defaults=Defaults(steps=4, interval=2, warmup=1, order=1),
    scheduler="none",
    guidance="none",
    guidance_scale=1.0,
    latent_size=(2, 2),
)


def toy_trace(compute, **parameters) -> tuple[Toy, Trace]:
    """A toy and its trace, which can be called: passes leave the code of a graph as it was."""
    toy = Toy(compute, **parameters).eval()
    traced = trace(toy, TOY, FLOAT32)
    traced.module.recompile()
    return toy, traced


def toy_inputs(batch=2, image_tokens=5, text_tokens=3, seed=0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, image_tokens, 4, generator=rng),
        "timestep": torch.rand(batch, generator=rng),
        "text": torch.randn(batch, text_tokens, 4, generator=rng),
        "label": torch.randn(batch, 4, generator=rng),
    }
