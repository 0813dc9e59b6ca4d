"""The denoiser: the engines of one bundle, checked, loaded, and ready to serve requests through slots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.profile import Profile, read_profile
from taylorseer_export.bundle.shapes import match
from taylorseer_export.bundle.store import Bundle, Progress, open_bundle
from taylorseer_export.errors import BundleError, ConfigError, StepError, first_line
from taylorseer_export.method import Plan
from taylorseer_export.runtime.check import check_engines
from taylorseer_export.runtime.engines import open_runner
from taylorseer_export.runtime.runner import Runner
from taylorseer_export.runtime.slot import Slot

if TYPE_CHECKING:
    from taylorseer_export.runtime.dropin import DropIn


def load(
    folder: str | Path,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
    cuda_graphs: bool = True,
    check: bool = True,
) -> Denoiser:
    """Check a bundle, load its engines, and check what they compute.

    Args:
        folder: The bundle.
        device: `cpu` or `cuda`.
        threads: CPU threads of each engine; 0 leaves it to the engine.
        progress: Called with the bytes just checked.
        cuda_graphs: Whether calls on a GPU are replayed as CUDA graphs.
        check: Whether two steps on typical inputs show that the engines are sound; see `check_engines`. Left out, what
            overflows is first seen in a picture.

    Raises:
        BundleError: The bundle is missing, damaged, too new, not for this machine, or its engines overflow.
    """
    bundle = open_bundle(Path(folder), progress)
    denoiser = Denoiser(bundle.manifest, open_runner(bundle, device, threads, cuda_graphs), bundle, device)
    if check:
        try:
            check_engines(denoiser)
        except MemoryError as error:
            denoiser.close()
            raise BundleError(
                f"memory is full while {folder} is checked ({first_line(error)}), expected room for its buffers at its "
                "smallest sizes; free memory, or export again with a smaller --size or --batch"
            ) from error
        except BaseException:
            denoiser.close()
            raise
    return denoiser


def request_constants(manifest: Manifest) -> dict[str, Tensor]:
    """The arguments a request keeps constant: prepare reads most, a graph in the loop may read some directly."""
    produced = {t.name for t in manifest.graphs["prepare"].outputs}
    declared = [t for g in manifest.graphs.values() for t in g.inputs if t.role == "constant"]
    return {t.name: t for t in declared if t.name not in produced}


class Denoiser:
    """Engines of one bundle, ready to serve requests through slots.

    Args:
        manifest: The contract.
        runner: The loaded engines.
        bundle: The bundle it was opened from, if any.
        device: Where the engines are.
    """

    def __init__(self, manifest: Manifest, runner: Runner, bundle: Bundle | None = None, device: str = "cpu") -> None:
        self.manifest, self.runner, self.bundle, self.device = manifest, runner, bundle, device
        self.latent = manifest.graphs["full"].input_of("latent")
        self.timestep = manifest.graphs["prepare"].input_of("step")
        self.constants = request_constants(manifest)

    def plan(self, text: str | None = None, steps: int | None = None) -> Plan:
        """The plan a request asks for: its own string, or the bundle's rule over `steps`."""
        default = self.manifest.plan
        if text is not None:
            plan = Plan.parse(text)
            if steps is not None:
                plan.check_length(steps)
            return plan
        return Plan.regular(steps or default.steps, default.interval, default.warmup, default.dialect)

    def profile(self, name: str, steps: int | None = None) -> Profile:
        """The bundle's calibrated plan and weights called `name`, refused if it is not for loops of `steps`.

        Raises:
            ConfigError: There is no such profile, or it is of another length.
            BundleError: It is damaged, or of another model.
        """
        if self.bundle is None:
            raise ConfigError(f"profile is `{name}`, expected none without a bundle on disk; load the bundle first")
        profile = read_profile(self.bundle, name)
        profile.check_fits(self.manifest, steps)
        return profile

    def sizes(self, latents: tuple[int, ...], conditioning: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Dimension sizes that a request's shapes imply, checked against the bundle's ranges.

        Raises:
            StepError: A shape contradicts the contract or another input, or a size is out of range.
        """
        sizes = match(self.latent.shape, latents, {}, self.latent.name)
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
        return sizes

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

    def slot(self, sizes: Mapping[str, int]) -> Slot:
        """A new slot for requests of these sizes; its buffers are allocated and bound now.

        Raises:
            StepError: A size is out of range; nothing was allocated.
        """
        self.check_sizes(sizes)
        return Slot(self, dict(sizes))

    def as_transformer(self, **options: Any) -> DropIn:
        """As the transformer of a diffusers pipeline; the options are those of `DropIn`."""
        from taylorseer_export.runtime.dropin import DropIn

        return DropIn(self, **options)

    def close(self) -> None:
        """Release the engines."""
        self.runner.close()

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
