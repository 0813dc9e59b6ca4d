"""Guidance on several ranks: each runs one of the two branches, and the predictions meet once in a step.

    rank 0    conditional      \\
                                >  predictions of both, in this order, on both
    rank 1    unconditional    /

Nothing of a graph changes, so any bundle of any engine runs so. Where the graphs of one are themselves shared out over
M ranks, 2 M run it, the first M the conditional branch.

What both ranks go on with has the order of one process. Where that makes a call for each branch, it is equal to the
last bit; where it makes one call of both, as halves of the batch, an engine may round them otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.shapes import names
from taylorseer_export.errors import ConfigError, StepError
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.group import Group, together
from taylorseer_export.runtime.share import Share
from taylorseer_export.runtime.slot import Slot

_BATCH = "batch"


class GuidedShare(Share):
    """The share of a rank that runs one branch of guidance: half of the batch, of its rows.

    Args:
        contract: Of the bundle.
        ranks: All of them.

    Attributes:
        everyone: The same.
        branch: 0 runs the conditional one, 1 the unconditional.

    Raises:
        ConfigError: They are not as many as the two branches need.
    """

    def __init__(self, contract: Contract, ranks: Group | None) -> None:
        self.everyone = check_branches(contract.manifest, ranks)
        super().__init__(contract, self.everyone.half())
        self.branch = self.everyone.rank // (self.everyone.size // 2)

    @property
    def groups(self) -> tuple[Group, ...]:
        """What has to agree: everyone."""
        return (self.everyone,)

    @property
    def first(self) -> bool:
        """Whether this rank writes what all have made."""
        return self.everyone.rank == 0

    def expect_calls(self, what: str) -> None:
        """Refuse what does not tell which of its calls belong to one step; raises `ConfigError`."""
        raise ConfigError(
            f"{what} is asked of ranks that run one branch of guidance each, expected `run` or `replay`; leave "
            "--parallel guidance out for it"
        )

    def of_loop(self) -> Share:
        """Nothing but its calls, see `one_branch.py`: every rank has all latents, and the same ones."""
        return Share(Contract(self.whole))

    def sizes(self, whole: Mapping[str, int]) -> dict[str, int]:
        """Sizes of this rank's rows of its half."""
        return super().sizes({n: self._halved(n, size) if n == _BATCH else size for n, size in whole.items()})

    def sizes_of_branch(self, whole: Mapping[str, int], calls: int) -> dict[str, int]:
        """Sizes of this rank's rows of what one process gives to each of its calls of a step."""
        return self.sizes(whole) if calls == 1 else super().sizes(whole)

    def close(self) -> None:
        """Leave the ranks, or the half of them that this one is in."""
        super().close()
        if self.owned and self.group is None:
            self.everyone.close()

    def latents(self, values: np.ndarray, latent: Tensor | None = None) -> np.ndarray:
        """This rank's rows of its half of latents, or of several in their leading dimensions."""
        return super().latents(self._half(latent or self.contract.latent, values), latent)

    def conditioning(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's rows of its half of what has one entry for each sample."""
        constants = self.contract.constants
        return super().conditioning(
            {n: self._half(constants[n], np.asarray(v)) if n in constants else v for n, v in given.items()}
        )

    def of_branch(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """This rank's constant inputs, of those that one process gives to each of its calls of a step."""
        return self.conditioning(calls[0]) if len(calls) == 1 else super().conditioning(calls[self.branch])

    def latents_of_branch(self, values: np.ndarray, calls: int) -> np.ndarray:
        """This rank's rows of what one process gives to each of its calls of a step."""
        return self.latents(values) if calls == 1 else super().latents(values)

    def joined(self, predictions: np.ndarray, latent: Tensor | None = None) -> np.ndarray:
        """Both branches' predictions of all rows, or several in their leading dimensions, from this rank's."""
        with self.everyone.together():
            parts = self.everyone.gathered(predictions)
        latent = latent or self.contract.latent
        rows, count = self._dims(latent, predictions.ndim), self.everyone.size // 2
        branches = [np.concatenate(one, axis=rows[0]) if rows else one[0] for one in (parts[:count], parts[count:])]
        return np.concatenate(branches, axis=predictions.ndim - len(latent.shape))

    def decide(self, slot: Slot, calls: int = 1) -> Slot:
        """Let the guard of a slot decide as one process does: of one call by all its samples, of two by the first."""
        if slot.memory.probe is not None:
            slot.memory.probe.group = _Deciding(self.everyone, self.group, first=calls > 1)
        return slot

    def _half(self, tensor: Tensor, values: np.ndarray) -> np.ndarray:
        """The entries of this rank's branch along the batch, of which the conditional ones are the first half."""
        dims = [k for k, entry in enumerate(tensor.shape, values.ndim - len(tensor.shape)) if _BATCH in names(entry)]
        for dim in dims:
            size = self._halved(_BATCH, values.shape[dim])
            values = np.take(values, range(self.branch * size, (self.branch + 1) * size), axis=dim)
        return values

    def _halved(self, name: str, size: int) -> int:
        if size % 2:
            raise StepError(
                f"size `{name}` is {size}, expected an even one, whose first half is the conditional branch of "
                "guidance; give both, or leave --parallel guidance out"
            )
        return size // 2


class _Deciding:
    """What the guard of a slot sums its error over: the rows of a branch, and both branches or the first alone."""

    def __init__(self, everyone: Group, group: Group | None, first: bool) -> None:
        self._everyone, self._group, self._first = everyone, group, first

    def summed(self, values: np.ndarray) -> np.ndarray:
        """The sum, alike on every rank."""
        with self._everyone.together():
            every = self._everyone.gathered(values)
        return np.sum(every[: len(every) // 2] if self._first else every, axis=0)

    def together(self, step: int | None = None) -> AbstractContextManager[None]:
        """Of the ranks that run the probe together: those of one branch."""
        return together(self._group, step)


def check_branches(manifest: Manifest, ranks: Group | None) -> Group:
    """Refuse another number of ranks than the two branches of guidance need.

    Raises:
        ConfigError: Not half of them run one branch.
    """
    wanted, seen = 2 * (manifest.parallel.degree if manifest.parallel else 1), ranks.size if ranks else 1
    if ranks is None or seen != wanted:
        raise ConfigError(
            f"--parallel guidance is asked of {seen} rank{'s' * (seen > 1)}, expected {wanted}, half of them for each "
            f"branch of guidance; run it with `torchrun --nproc-per-node {wanted} -m taylorseer_export …`"
        )
    return ranks
