"""A slot that takes whole requests on every rank: what the drop-in and loops of one's own step.

Each rank is called with the same whole latents, runs its own rows, and gets the whole prediction: one gather for each
step, by the host. Where the loop is ours (`sampling.py`), latents stay on their ranks and are gathered once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import StepError
from taylorseer_export.method import Forecasts
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.calls import host_array
from taylorseer_export.runtime.lead import told
from taylorseer_export.runtime.runner import Buffer, Runner
from taylorseer_export.runtime.share import Share
from taylorseer_export.runtime.slot import Slot


class WholeSlot(Slot):
    """As a slot of one rank, of whole requests. All ranks call it alike and at the same time.

    Args:
        share: Of this rank.
        runner: The loaded engines.
        sizes: Of every dimension but the steps, of the whole.
        lora: As of `Slot`.
    """

    def __init__(self, share: Share, runner: Runner, sizes: Mapping[str, int], lora: Adapter | None = None) -> None:
        super().__init__(share.contract, runner, share.sizes(sizes), lora, share.group)
        self._share, self.whole = share, dict(sizes)
        graph = share.whole.graphs["full"]
        made = next(tensor for tensor in graph.outputs if tensor.role == "noise_pred")
        latent = next(tensor for tensor in graph.inputs if tensor.role == "latent")
        self._given = resolve(latent.shape, sizes)
        self._answer = runner.buffer(resolve(made.shape, sizes), made.dtype)

    def start(
        self,
        conditioning: Mapping[str, Any],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """As `Slot.start`, with the whole conditioning.

        Raises:
            StepError: As there; or another rank was asked for something else, which is named.
            RankError: A rank is not there.
        """
        given = {name: told(value) for name, value in conditioning.items()}
        clock = None if timesteps is None else told(timesteps)
        self._ranks.agree({"plan": forecasts, "sizes": self.whole, "timesteps": clock, "lora": lora, **given})
        super().start(self._share.conditioning(conditioning), forecasts, timesteps, lora)

    def stage(
        self,
        latents: Any,
        timestep: float | None = None,
        decided: str | None = None,
        others: Mapping[str, Any] | None = None,
        next_timestep: float | None = None,
    ) -> None:
        """As `Slot.stage`, with the whole latents; before the first step ranks hold that theirs are the same."""
        values = host_array(latents)
        if values.shape != self._given:
            raise StepError(
                f"input `{self.contract.latent.name}` is {list(values.shape)}, expected {list(self._given)} as when "
                "the slot was opened; open a slot of that size"
            )
        if not self.executed:
            beside = {name: told(value) for name, value in (others or {}).items()}
            self._ranks.agree({"latents (give all ranks one seed)": told(values), **beside})
        super().stage(self._share.latents(values), timestep, decided, others, next_timestep)

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """As `Slot.try_weights`, of all rows."""
        return self._share.joined(super().try_weights(latents, weights))

    def _count(self) -> Buffer:
        mine = super()._count().read()
        self._answer.write(self._share.joined(mine))
        return self._answer

    @property
    def _ranks(self) -> Any:
        assert self._share.group is not None, "bug in taylorseer-export: a slot of one rank is called whole"
        return self._share.group
