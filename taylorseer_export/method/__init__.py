"""The TaylorSeer method as plain arithmetic: plans and weights, standard library only."""

from taylorseer_export.method.forecasts import (
    BundleDefaults,
    CalibratedPlan,
    Capacity,
    Forecasts,
    Granularity,
    Layout,
    RequestOptions,
    Weights,
    check_weights,
    forecasts_from_options,
)
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
    "BundleDefaults",
    "CalibratedPlan",
    "Capacity",
    "Dialect",
    "Forecasts",
    "Form",
    "Granularity",
    "Guard",
    "Layout",
    "Plan",
    "RequestOptions",
    "Rule",
    "Weights",
    "check_weights",
    "derivative_weights",
    "exact_weights",
    "forecast_weights",
    "forecasts_from_options",
    "from_snapshots",
    "gain",
    "update_scales",
]
