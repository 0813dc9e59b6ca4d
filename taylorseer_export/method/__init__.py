"""The TaylorSeer method as plain arithmetic: plans and weights, standard library only."""

from taylorseer_export.method.plan import Dialect, Plan
from taylorseer_export.method.weights import (
    Form,
    derivative_weights,
    exact_weights,
    forecast_weights,
    from_snapshots,
    gain,
    update_scales,
)

__all__ = [
    "Dialect",
    "Form",
    "Plan",
    "derivative_weights",
    "exact_weights",
    "forecast_weights",
    "from_snapshots",
    "gain",
    "update_scales",
]
