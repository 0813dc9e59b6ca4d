"""The contract of a bundle as the run side reads it: what its requests may ask for."""

from __future__ import annotations

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.method import BundleDefaults, Capacity


def defaults_of(manifest: Manifest) -> BundleDefaults:
    """What requests for forecasts that name nothing get, and what none may exceed."""
    plan, state = manifest.plan, manifest.state
    return BundleDefaults(
        plan.steps,
        plan.interval,
        plan.warmup,
        plan.dialect,
        plan.order,
        manifest.dimensions["steps"].maximum,
        Capacity(state.order, state.layout, state.guards),
    )
