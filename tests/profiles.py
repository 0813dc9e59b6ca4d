"""Profiles for the tests: made up, fitting the bundle that they are beside."""

from taylorseer_export.bundle.profile import Evidence, Profile
from taylorseer_export.method import Plan, forecast_weights

PLAN = "FF..F..."
SAME = Evidence(fitted=40.0, held_out=40.0)


def weights_of(plan, order):
    """The paper's own weights, as a profile holds them."""
    steps = range(len(plan))
    return tuple(() if plan.is_full(s) else forecast_weights(plan.history(s, order), s, order) for s in steps)


def made(manifest, name="fast", **changes):
    fields = {
        "tool_version": "0",
        "name": name,
        "family": manifest.family,
        "weights_sha256": manifest.model.weights_sha256,
        "granularity": manifest.state.granularity,
        "order": 1,
        "plan": PLAN,
        "weights": weights_of(Plan(PLAN), 1),
        "thresholds": {},
        "samples": 8,
        "held_out": 2,
        "calibrated": SAME,
        "regular": SAME,
        "fewer_steps": SAME,
    }
    return Profile(**{**fields, **changes})
