"""The branch of guidance that a rank runs, in the loop of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Forecasts
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.guidance import GuidedShare
from taylorseer_export.runtime.lead import ready, told
from taylorseer_export.runtime.slot import Slot

if TYPE_CHECKING:
    from taylorseer_export.runtime.denoiser import Denoiser


class OneBranch(Branches):
    """The branch of guidance that this rank runs, among those of a request; what a step returns is of both.

    Args:
        share: Of this rank.
        slot: For its branch.
        calls: How many calls of the transformer one process makes in a step: one of both halves, or two.
    """

    def __init__(self, share: GuidedShare, slot: Slot, calls: int) -> None:
        super().__init__([share.decide(slot, calls)])
        self._share, self._calls = share, calls

    def start(
        self,
        conditioning: Sequence[Mapping[str, Any]],
        forecasts: Forecasts,
        timesteps: Sequence[float] | np.ndarray | None = None,
        lora: Adapter | None = None,
    ) -> None:
        """Begin a request, with the constant inputs of all calls; the other arguments are those of `Slot.start`.

        Raises:
            StepError: The ranks have not the same request, or one of them could not begin it.
        """
        given = {f"{name} of call {k}": told(v) for k, call in enumerate(conditioning) for name, v in call.items()}
        times = None if timesteps is None else np.asarray(timesteps).tolist()
        self._share.everyone.agree({**given, "plan": forecasts, "timestep": times, "lora": lora})
        with ready(self._share.everyone):
            super().start([self._share.of_branch(conditioning)], forecasts, timesteps, lora)

    def stage(self, latents: Any) -> None:
        """As of several slots: all ranks have the same latents, after the first guided step too."""
        if (number := len(self.slots[0].executed)) < 2:
            what = "latents after a step (give all ranks one guidance scale)" if number else "latents"
            self._share.everyone.agree({what: told(latents)})
        super().stage(self._share.latents_of_branch(latents, self._calls))

    def finish(self) -> np.ndarray:
        """The one exchange of a step."""
        return self._share.joined(super().finish())

    def try_weights(self, latents: Any, weights: Sequence[float] | np.ndarray) -> np.ndarray:
        """As `Slot.try_weights`, in both branches."""
        return self._share.joined(super().try_weights(self._share.latents_of_branch(latents, self._calls), weights))


def one_branch(
    denoiser: Denoiser, latents: np.ndarray, calls: Sequence[Mapping[str, Any]], guided: bool
) -> OneBranch | None:
    """A new slot for the branch of this rank; None where a rank runs both.

    Args:
        denoiser: The loaded bundle.
        latents: As the transformer takes them.
        calls: Constant inputs of each call that one process makes in a step.
        guided: Whether guidance combines two predictions.

    Raises:
        ConfigError: It does not.
        StepError: A size is out of range.
    """
    share = denoiser.share
    if not isinstance(share, GuidedShare):
        return None
    if not guided:
        raise ConfigError(
            "guidance of this request is off or an input of the model, expected two predictions in a step, one for "
            "each rank; give what it leads away from, or leave --parallel guidance out"
        )
    whole = denoiser.sizes(latents.shape, calls[share.branch if len(calls) > 1 else 0])
    denoiser.check_sizes(whole)
    sizes = share.sizes_of_branch(whole, len(calls))
    return OneBranch(share, Slot(share.contract, denoiser.runner, sizes, denoiser.usual, share.group), len(calls))
