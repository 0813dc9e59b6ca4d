"""The share of one rank: which rows of a request are its own, and what all ranks do together.

A bundle that is not shared out is the share of the one rank there is: everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.manifest import Manifest, Tensor
from taylorseer_export.bundle.parallel import RANK
from taylorseer_export.bundle.shapes import linear, names
from taylorseer_export.errors import BundleError, ConfigError, StepError
from taylorseer_export.runtime.contract import Contract
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.lead import Lead
from taylorseer_export.runtime.slot import Slot


class Share:
    """The rows of one rank.

    Args:
        contract: Of the bundle, as the graphs of one rank have it.
        group: The ranks; None where there is one.

    Attributes:
        contract: As given.
        whole: The manifest of a request before it is shared out.
        lead: On a rank 0 that leads: what tells the others.
        owned: Whether the group is closed with it.

    Raises:
        BundleError: The bundle is shared out over more ranks, or fewer.
    """

    def __init__(self, contract: Contract, group: Group | None = None) -> None:
        self.contract, self.group, self._parallel = contract, group, contract.manifest.parallel
        self.whole = whole_of(contract.manifest)
        self.lead: Lead | None = None
        self.owned = False
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

    def expect_calls(self, what: str) -> None:
        """Refuse to be asked call by call where calls do not tell which belong together; raises `ConfigError`."""

    def of_loop(self) -> Share:
        """What a loop shares out: this, or nothing where its calls are."""
        return self

    def expect_one(self, what: str) -> None:
        """Refuse to do on several ranks what one does alone so far; raises `ConfigError`."""
        if self.ranks > 1:
            raise ConfigError(
                f"{what} is asked of a bundle that is shared out over {self.ranks} ranks, expected none; leave it out, "
                "or export again without --parallel for it"
            )

    def sizes(self, whole: Mapping[str, int]) -> dict[str, int]:
        """Sizes of one rank.

        Raises:
            StepError: One does not divide.
        """
        if self._parallel is None:
            return dict(whole)
        name = self._parallel.dimension
        return {n: self._own(n, size) if n == name else size for n, size in whole.items()}

    def done(self) -> None:
        """A request is at its end on all ranks."""
        if self.lead is not None:
            self.lead.done()

    def close(self) -> None:
        """Let those that follow go, and leave the group where it is this one's own."""
        if self.lead is not None:
            self.lead.close()
        self.lead = None
        if self.owned and self.group is not None:
            self.group.close()

    def latents(self, values: np.ndarray, latent: Tensor | None = None) -> np.ndarray:
        """This rank's rows of latents, or of several in their leading dimensions.

        Args:
            values: `[..., *latent]`.
            latent: Which one they are, the first if left out.
        """
        return self._rows(latent or self.contract.latent, values)

    def conditioning(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's rows of what has one entry for each row of the latent, and all of the rest."""
        constants = self.contract.constants
        mine = {n: self._rows(constants[n], np.asarray(v)) if n in constants else v for n, v in given.items()}
        return {**mine, RANK: np.array([self.rank])} if RANK in constants and self.ranks > 1 else mine

    def joined(self, predictions: np.ndarray, latent: Tensor | None = None) -> np.ndarray:
        """All ranks' rows of predictions, or of several in their leading dimensions, from this rank's; sent once.

        Args:
            predictions: `[..., *latent]`.
            latent: Whose they are, the first one's if left out; of one that is whole on every rank nothing is sent.
        """
        dims = self._dims(latent or self.contract.latent, predictions.ndim)
        if self.group is None or not dims:
            return predictions
        with self.group.together():
            parts = self.group.gathered(predictions)
        return np.concatenate(parts, axis=dims[0])

    def _rows(self, tensor: Tensor, values: np.ndarray) -> np.ndarray:
        for dim in self._dims(tensor, values.ndim):
            assert self._parallel is not None
            entry = tensor.shape[dim - (values.ndim - len(tensor.shape))]
            name, factor, offset = linear(entry)
            own = self._own(name, (values.shape[dim] - offset) // factor) * factor
            values = np.take(values, range(self.rank * own, (self.rank + 1) * own), axis=dim)
        return values

    def _own(self, name: str, size: int) -> int:
        if size % self.ranks:
            raise StepError(
                f"size `{name}` is {size}, expected a multiple of {self.ranks}, the ranks that share it; use "
                "such a size, or export again with another --degree"
            )
        return size // self.ranks

    def _dims(self, tensor: Tensor, rank: int) -> list[int]:
        """The dimensions that are shared out, of an array with `rank` dimensions that ends in those of the tensor."""
        if self._parallel is None:
            return []
        leading = rank - len(tensor.shape)
        return [leading + k for k, entry in enumerate(tensor.shape) if self._parallel.dimension in names(entry)]


def whole_of(manifest: Manifest) -> Manifest:
    """What a request is held to before it is shared out: the sizes of all ranks, and no input that tells a rank."""
    parallel = manifest.parallel
    if parallel is None:
        return manifest
    one = manifest.dimensions[parallel.dimension]
    ends = {name: parallel.degree * getattr(one, name) for name in ("minimum", "typical", "maximum")}
    dimensions = {**manifest.dimensions, parallel.dimension: one.model_copy(update=ends)}
    graphs = {
        name: graph.model_copy(update={"inputs": tuple(t for t in graph.inputs if t.name != RANK)})
        for name, graph in manifest.graphs.items()
    }
    return manifest.model_copy(update={"parallel": None, "dimensions": dimensions, "graphs": graphs})


def ranks_of(manifest: Manifest, given: Any, device: Device, several: bool = False) -> Group | None:
    """The ranks that run a bundle: those given, a process group of torch.distributed too, or those of torchrun.

    Raises:
        ConfigError: What is given is no group, or a rank that torchrun started is not there.
    """
    if given is None:
        return Group.from_environment(device) if manifest.parallel or several else None
    return given if isinstance(given, Group) else Group.of(given, device)


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
        f"{wanted}; run it with `torchrun --nproc-per-node {wanted} -m taylorseer_export …`"
    )
