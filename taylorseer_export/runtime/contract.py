"""The contract of a bundle as the run side reads it: what a request brings, of which sizes, and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from taylorseer_export.bundle.latents import predictions_of
from taylorseer_export.bundle.low_rank import LORA
from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.shapes import in_products, match
from taylorseer_export.errors import StepError
from taylorseer_export.method import BundleDefaults, Capacity
from taylorseer_export.runtime.places import check_pictures
from taylorseer_export.runtime.values import array_for


class Contract:
    """What the graphs of a bundle take.

    Args:
        manifest: Of the bundle.

    Attributes:
        latent, timestep: The inputs that change with the step.
        next_timestep: The one that is told the timestep of the next step; None where the model is told one alone.
        others: Further latents by name, where the model denoises several; they tell no sizes.
        predictions: Latent -> the name of its prediction.
        constants: Those that a request keeps constant, by their diffusers argument names.
        lora: The input that takes the LoRA of a request; None where the bundle has none.
        inputs: Graph -> the names of its inputs.
        defaults: What requests for forecasts that name nothing get, and what none may exceed.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.latent, *others = (t for t in manifest.graphs["full"].inputs if t.role == "latent")
        self.others = {tensor.name: tensor for tensor in others}
        self.predictions = predictions_of(manifest)
        clocks = {t.fill: t for t in manifest.graphs["prepare"].inputs if t.role == "step"}
        self.timestep, self.next_timestep = clocks[None], clocks.get("next")
        self.constants = request_constants(manifest)
        self.lora = lora_input(manifest)
        self.inputs = {name: frozenset(t.name for t in graph.inputs) for name, graph in manifest.graphs.items()}
        self.defaults = defaults_of(manifest)

    def arrays(self, conditioning: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The constant inputs among these, as the graphs take them; raises what `array_for` raises."""
        return {n: array_for(self.constants[n], value) for n, value in conditioning.items() if n in self.constants}

    @property
    def noiseless(self) -> float:
        """The timestep of no noise, which follows the last one of a loop."""
        return float(self.manifest.pipeline.timestep_reversed)

    def times(self, timesteps: np.ndarray) -> dict[str, np.ndarray]:
        """What prepare takes of the steps of a loop, `[S]` each, by name; the step behind the last is that of no noise.

        Args:
            timesteps: `[S]`, from `array_for`.
        """
        made = {self.timestep.name: timesteps}
        if self.next_timestep is not None:
            made[self.next_timestep.name] = np.append(timesteps[1:], timesteps.dtype.type(self.noiseless))
        return made

    def sizes(self, latents: tuple[int, ...], conditioning: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Dimension sizes that a request's shapes imply, checked against the bundle's ranges.

        Raises:
            StepError: A shape contradicts the contract or another input, or a size is out of range.
        """
        sizes = match(self.latent.shape, latents, self._of_one_size(), self.latent.name)
        for name, tensor in self.constants.items():
            if name not in conditioning:
                shape = ", ".join(map(str, tensor.shape))
                raise StepError(
                    f"input `{name}` is missing, expected {tensor.dtype} [{shape}]; pass it with the conditioning"
                )
            sizes = match(tensor.shape, np.shape(conditioning[name]), sizes, name)
        unknown = conditioning.keys() - self.constants.keys()
        if unknown:
            raise StepError(
                f"input `{min(unknown)}` is not known, expected only {', '.join(self.constants)}; leave it out"
            )
        self.check_sizes(sizes)
        for name, tensor in self.constants.items():
            if tensor.fill == "sides":
                check_pictures(name, conditioning[name], self.of_all_ranks(sizes))
        return sizes

    def _of_one_size(self) -> dict[str, int]:
        """The sizes in products, such as rows times columns, that are one each: no shape tells them."""
        ranges = self.manifest.dimensions
        told = in_products([self.latent.shape, *(tensor.shape for tensor in self.constants.values())])
        return {name: ranges[name].minimum for name in told if ranges[name].minimum == ranges[name].maximum}

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes that the bundle does not take. Numbers alone: to be asked before anything of that size is made.

        Args:
            sizes: By name; where the bundle has no range of that name, its shapes say what they say.

        Raises:
            StepError: A size is out of range.
        """
        for name, size in sizes.items():
            if name in self.manifest.dimensions:
                self._check_range(name, size)

    def of_all_ranks(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Sizes of the whole, from those of one rank."""
        parallel = self.manifest.parallel
        degree = {} if parallel is None else {parallel.dimension: parallel.degree}
        return {name: size * degree.get(name, 1) for name, size in sizes.items()}

    def _check_range(self, name: str, size: int) -> None:
        allowed = self.manifest.dimensions[name]
        if not allowed.minimum <= size <= allowed.maximum:
            expected = (
                f"{allowed.minimum} (the bundle is static)"
                if allowed.minimum == allowed.maximum
                else f"{allowed.minimum} to {allowed.maximum}"
            )
            raise StepError(
                f"size `{name}` is {size}, expected {expected}; use such a size, or export again without --size"
            )


def request_constants(manifest: Manifest) -> dict[str, Tensor]:
    """The arguments a request keeps constant: prepare reads most, a graph in the loop may read some directly."""
    produced = {t.name for t in manifest.graphs["prepare"].outputs}
    declared = [t for g in manifest.graphs.values() for t in g.inputs if t.role == "constant"]
    return {t.name: t for t in declared if t.name not in produced}


def lora_input(manifest: Manifest) -> Tensor | None:
    """The input that takes the LoRA of a request, where the bundle has one; the graphs share its buffer."""
    return next((t for graph in manifest.graphs.values() for t in graph.inputs if t.role == LORA), None)


def defaults_of(manifest: Manifest) -> BundleDefaults:
    """What requests for forecasts that name nothing get, and what none may exceed."""
    plan, state = manifest.plan, manifest.state
    return BundleDefaults(
        plan.steps,
        plan.interval,
        plan.warmup,
        plan.dialect,
        plan.order,
        manifest.dimensions["steps"].maximum,
        Capacity(state.order, state.layout, state.guards),
    )
