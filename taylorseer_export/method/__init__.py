"""The TaylorSeer method as plain arithmetic: plans and weights, standard library only."""

from taylorseer_export.method.guard import RULES, Guard, Rule
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
    "RULES",
    "Dialect",
    "Form",
    "Guard",
    "Plan",
    "Rule",
    "derivative_weights",
    "exact_weights",
    "forecast_weights",
    "from_snapshots",
    "gain",
    "update_scales",
]
