"""Values from outside, as the contract of a graph wants them or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Tensor
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.runner import host_dtype


def array_for(tensor: Tensor, values: Any, when: str = "") -> np.ndarray:
    """The values as an array of the contract's dtype.

    Truth values and whole numbers are converted to any dtype that holds them exactly, and floating-point numbers are
    rounded to the contract's precision; whatever else would change is refused.

    Raises:
        StepError: They are of another kind, not finite, or out of the range of the dtype or of the contract.
    """
    given = np.asarray(values)
    kind = host_dtype(tensor.dtype)
    if given.dtype.kind not in ("biu" if kind.kind in "biu" else "biuf"):
        raise StepError(
            f"input `{tensor.name}` is {given.dtype}{when}, expected {tensor.dtype}; convert it before the call"
        )
    with np.errstate(over="ignore"):  # what is too large for the contract's dtype becomes infinite, and is refused
        array = given.astype(kind, copy=False)
    if given.dtype.kind in "biu" and not _holds(array, given):
        raise StepError(
            f"input `{tensor.name}` is {given.dtype} from {given.min()} to {given.max()}{when}, expected numbers that "
            f"{tensor.dtype} holds exactly; correct the values"
        )
    if kind.kind == "f" and not np.isfinite(array).all():
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


def number_for(tensor: Tensor, value: Any) -> np.ndarray:
    """`array_for` of one number, `[1]`: a step of a loop brings one, and numpy's ways for many take 30 µs."""
    kind = host_dtype(tensor.dtype)
    if isinstance(value, float) and kind.kind == "f" and not tensor.values and abs(value) <= float(np.finfo(kind).max):
        return np.array([value], kind)
    return array_for(tensor, [value])


def _holds(array: np.ndarray, given: np.ndarray) -> bool:
    """Whether a conversion of whole numbers kept every value."""
    if array.dtype.kind != "f":  # both are whole: numpy would compare int64 with uint64 as float64
        return bool((array == given).all() and ((array < 0) == (given < 0)).all())
    with np.errstate(invalid="ignore"):  # infinite where it is too large for the dtype, and no whole number then
        return bool(np.isfinite(array).all() and (array.astype(given.dtype) == given).all())


def check_prediction(finite: bool, step: int, plan: object) -> None:
    """Refuse what the transformer answered at a step of a plan if it is not `finite`.

    Raises:
        StepError: It has numbers that are not finite.
    """
    if not finite:
        raise StepError(
            f"noise_pred has values that are NaN or infinite at step {step} (plan {plan}), expected finite numbers; "
            "lower --order or --interval"
        )
