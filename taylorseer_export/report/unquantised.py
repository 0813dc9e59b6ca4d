"""The unquantised model in the place of a bundle: what quantised weights are compared with, on whole samples.

It is the untouched diffusers model, every step full, on the CPU; in float64 where memory allows, as in `verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.method import Forecasts, Plan
from taylorseer_export.report.verify import Reference, reference_model
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.sampling import Request


class Unquantised(Branches):
    """Answers the requests of a bundle as branches of its slots do, by the model that it was quantised from.

    Args:
        checkpoint: From `checkpoint_of`.
        denoiser: The bundle, whose inputs it takes.
    """

    def __init__(self, checkpoint: Checkpoint, denoiser: Denoiser) -> None:
        super().__init__([])
        self._reference = Reference(reference_model(checkpoint), denoiser, Forecasts(Plan("F"), 0))
        self._contract = denoiser.contract
        self._conditioning: list[Mapping[str, Any]] = []
        self._times: dict[str, np.ndarray] = {}
        self._step = 0

    def of(self, request: Request) -> Branches:
        """Itself, whatever the sizes: one request after the other."""
        return self

    def start(
        self,
        conditioning: Sequence[Mapping[str, Any]],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """As of branches; all steps are full."""
        assert timesteps is not None, "bug in taylorseer-export: a loop that does not know its timesteps"
        self._conditioning, self._times = list(conditioning), self._contract.times(np.asarray(timesteps))
        self._executed, self._step = "", 0

    def step(self, latents: Any) -> np.ndarray:
        """`noise_pred` of all branches, one after the other along the batch, float32."""
        times = {name: float(values[self._step]) for name, values in self._times.items()}
        answers = [self._reference.step(latents, times, own)[0] for own in self._conditioning]
        self._executed += "F"
        self._step += 1
        return np.concatenate(answers).astype(np.float32)

    @property
    def errors(self) -> tuple[float, ...]:
        """None: no guard asks."""
        return ()

    @property
    def executed(self) -> str:
        """The steps that ran, of all loops of the request."""
        return self._executed
