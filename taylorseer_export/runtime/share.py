"""The share of one rank: which rows of a request are its own, and what all ranks do together.

A bundle that is not shared out is the share of the one rank there is: everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.parallel import RANK
from taylorseer_export.bundle.shapes import linear, names
from taylorseer_export.errors import BundleError, ConfigError, StepError
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.slot import Slot


class Share:
    """The rows of one rank.

    Args:
        contract: Of the bundle.
        group: The ranks; None where there is one.

    Raises:
        BundleError: The bundle is shared out over more ranks, or fewer.
    """

    def __init__(self, contract: Contract, group: Group | None = None) -> None:
        self._contract, self.group, self._parallel = contract, group, contract.manifest.parallel
        self.rank = 0 if group is None else group.rank
        check_ranks(contract.manifest, group)

    @property
    def ranks(self) -> int:
        return 1 if self._parallel is None else self._parallel.degree

    @property
    def groups(self) -> tuple[Group, ...]:
        """The ranks that have to agree about a request; none where there is one rank."""
        return () if self.group is None else (self.group,)

    @property
    def first(self) -> bool:
        """Whether this rank writes what all have made."""
        return self.rank == 0

    def decide(self, slot: Slot) -> Slot:
        """Let the guard of a slot decide by what all ranks measure, as it does by itself."""
        return slot

    def expect_loop(self) -> None:
        """Refuse to sample; raises `ConfigError`."""
        self.expect_one("sampling")

    def expect_one(self, what: str) -> None:
        """Refuse to do on several ranks what one does alone so far; raises `ConfigError`."""
        if self.ranks > 1:
            raise ConfigError(
                f"{what} is asked of a bundle that is shared out over {self.ranks} ranks, expected `replay` or slots "
                "alone; export again without --parallel for it"
            )

    def latents(self, values: np.ndarray) -> np.ndarray:
        """This rank's rows of latents, or of several in their leading dimensions."""
        return self._rows(self._contract.latent, values)

    def conditioning(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's rows of what has one entry for each row of the latent, and all of the rest."""
        constants = self._contract.constants
        mine = {n: self._rows(constants[n], np.asarray(v)) if n in constants else v for n, v in given.items()}
        return {**mine, RANK: np.array([self.rank])} if RANK in constants and self.ranks > 1 else mine

    def joined(self, predictions: np.ndarray) -> np.ndarray:
        """All ranks' rows of predictions, or of several in their leading dimensions, from this rank's; sent once."""
        if self.group is None or self.ranks == 1:
            return predictions
        dims = self._dims(self._contract.latent, predictions.ndim)
        with self.group.together():
            parts = self.group.gathered(predictions)
        return np.concatenate(parts, axis=dims[0])

    def _rows(self, tensor: Tensor, values: np.ndarray) -> np.ndarray:
        for dim in self._dims(tensor, values.ndim):
            assert self._parallel is not None
            entry = tensor.shape[dim - (values.ndim - len(tensor.shape))]
            name, factor, offset = linear(entry)
            size, left = divmod(values.shape[dim] - offset, factor)
            if left or size % self.ranks:
                raise StepError(
                    f"size `{name}` is {size}, expected a multiple of {self.ranks}, the ranks that share it; use "
                    "such a size, or export again with another --degree"
                )
            own = size // self.ranks * factor
            values = np.take(values, range(self.rank * own, (self.rank + 1) * own), axis=dim)
        return values

    def _dims(self, tensor: Tensor, rank: int) -> list[int]:
        """The dimensions that are shared out, of an array with `rank` dimensions that ends in those of the tensor."""
        if self._parallel is None:
            return []
        leading = rank - len(tensor.shape)
        return [leading + k for k, entry in enumerate(tensor.shape) if self._parallel.dimension in names(entry)]


def check_ranks(manifest: Manifest, group: Group | None) -> None:
    """Refuse a bundle for another number of ranks than there are.

    Raises:
        BundleError: It is shared out over some and there is one, or another number.
        ConfigError: There are several and it is not shared out.
    """
    wanted, seen = manifest.parallel.degree if manifest.parallel else 1, group.size if group else 1
    if wanted == seen:
        return
    if wanted == 1:
        raise ConfigError(
            f"{seen} ranks run a bundle that is not shared out, expected one process; leave torchrun out, run "
            "the branches of guidance on two by --parallel guidance, or export again with --parallel"
        )
    raise BundleError(
        f"{seen} rank{'s' * (seen > 1)} run{'s' * (seen == 1)} a bundle that is shared out over {wanted}, expected "
        f"{wanted}; run it with `torchrun --nproc-per-node {wanted} -m taylorseer_export replay …`"
    )
