"""What quantised weights cost: the error of the quantisation, that of forecasting, and both together.

Shares of the norm of what the unquantised model predicts, over all steps of one trajectory, every model fed the same
latents:

    quantisation error    the model with dequantised weights, all steps full
    forecast error        the bundle by its plan, against the bundle with all steps full
    both                  the bundle by its plan
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.draft import PRECISIONS
from taylorseer_export.graph.formats import dequantised, quantised
from taylorseer_export.graph.quantise import rounded

Predictions = Sequence[np.ndarray]


@dataclass(frozen=True)
class Errors:
    """Shares of the norm of the unquantised predictions, dimensionless."""

    quantisation: float
    forecast: float
    both: float

    def __str__(self) -> str:
        return (
            f"quantisation error {self.quantisation:.1e}, forecast error {self.forecast:.1e}, both {self.both:.1e}: "
            "shares of the unquantised model's prediction"
        )


def errors(plain: Predictions, exact: Predictions, full: Predictions, by_plan: Predictions) -> Errors:
    """The three errors.

    Args:
        plain: Predictions of the unquantised model, all steps full, one for each step.
        exact: Of the model with dequantised weights, all steps full.
        full: Of the bundle, all steps full.
        by_plan: Of the bundle by its plan.
    """
    scale = _norm(plain, [np.zeros_like(p) for p in plain])
    return Errors(_norm(exact, plain) / scale, _norm(by_plan, full) / scale, _norm(by_plan, plain) / scale)


def _norm(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    squares = (np.square(a.astype(np.float64) - b).sum() for a, b in zip(one, other, strict=True))
    return float(np.sqrt(sum(squares)))


def round_inputs(model: nn.Module, manifest: Manifest) -> None:
    """Let the layers of a model round what they read by the constants of a bundle; nothing where it has none."""
    found = manifest.quantised
    for name, scale in found.input_scales.items() if found else ():
        rule = partial(_rounding, found.weights, scale)  # type: ignore[union-attr]
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(rule)


def _rounding(form: str, scale: float, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return rounded(args[0], form, scale), *args[1:]


def hold_quantised(model: nn.Module, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Put into a model, in place, the numbers that the quantised weights of a bundle stand for."""
    found = manifest.quantised
    for name in found.layers if found else ():
        form = found.weights  # type: ignore[union-attr]
        values, scale, *whole = quantised(checkpoint.tensor(name), form, PRECISIONS[manifest.precision])
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(dequantised(values, scale, whole[0] if whole else None, parameter.dtype))
