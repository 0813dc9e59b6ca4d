"""Values from outside, as the contract of a graph wants them or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.runner import host_dtype


def checked(tensor: Tensor, values: Any, when: str = "") -> np.ndarray:
    """The values as an array of the contract's dtype, refused if they are not finite or would change kind."""
    array = np.asarray(values)
    kind = host_dtype(tensor.dtype)
    whole = kind.kind in "iu"
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        raise StepError(
            f"input `{tensor.name}` is {array.dtype}{when}, expected {tensor.dtype}; convert it before the call"
        )
    with np.errstate(over="ignore"):  # what is too large for the contract's dtype becomes infinite, and is refused
        array = array.astype(kind, copy=False)
    if not whole and not np.isfinite(array).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise StepError(
            f"input `{tensor.name}` has {bad} values that are NaN or infinite{when}, expected finite numbers; "
            "check what made it"
        )
    if tensor.values and array.size and not tensor.values[0] <= array.min() <= array.max() <= tensor.values[1]:
        raise StepError(
            f"input `{tensor.name}` holds {array.min()} to {array.max()}{when}, expected {tensor.values[0]} to "
            f"{tensor.values[1]} (table index); correct the values"
        )
    return array
