"""What quantised weights cost: the error of the quantisation, that of forecasting, and both together.

Shares of the norm of what the unquantised model predicts, over all steps of one trajectory, every model fed the same
latents:

    quantisation error    the bundle with all steps full, against that model
    forecast error        the bundle by its plan, against the bundle with all steps full
    both                  the bundle by its plan, against that model

so that both are never more than the sum of the two. What the bundle's precision rounds is in the first; in float32 it
is little beside few bits. A bundle that keeps a checkpoint's own values has no unquantised model: what it is compared
with has those values dequantised, and the quantisation error is that of activations alone. Where these are not
quantised either there is none to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.quantised import UNQUANTISED
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.draft import PRECISIONS
from taylorseer_export.graph.formats import dequantised, quantised
from taylorseer_export.graph.quantise import rounded

Predictions = Sequence[np.ndarray]


@dataclass(frozen=True)
class Errors:
    """Shares of the norm of the unquantised predictions, dimensionless.

    Attributes:
        against: The model that made them; None where there is none but that of the bundle's own numbers.
        quantisation, both: None there.
    """

    against: str | None
    quantisation: float | None
    forecast: float
    both: float | None

    def __str__(self) -> str:
        if self.against is None:
            return (
                "quantisation error none beside that of the checkpoint, whose unquantised weights are in no file here; "
                f"forecast error {self.forecast:.1e} of the prediction"
            )
        alone = "" if self.against == UNQUANTISED else " of activations alone"
        return (
            f"quantisation error{alone} {self.quantisation:.1e}, forecast error {self.forecast:.1e}, both "
            f"{self.both:.1e}: shares of the prediction of {self.against}"
        )


def errors(against: str | None, plain: Predictions, full: Predictions, by_plan: Predictions) -> Errors:
    """The three errors.

    Args:
        against: As of `Errors`.
        plain: Predictions of that model, all steps full, one for each step.
        full: Of the bundle, all steps full.
        by_plan: Of the bundle by its plan.
    """
    scale = _norm(plain, [np.zeros_like(p) for p in plain])
    forecast = _norm(by_plan, full) / scale
    if against is None:
        return Errors(None, None, forecast, None)
    return Errors(against, _norm(full, plain) / scale, forecast, _norm(by_plan, plain) / scale)


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
