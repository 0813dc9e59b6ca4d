"""Diffusion transformers as compiled graphs: a full one, a forecast one, and the Taylor buffers between them.

    import taylorseer_export as tse

    denoiser = tse.load("engines/flux-tiny")

Importing this package imports neither torch nor an engine; names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "load": "taylorseer_export.runtime.denoiser",
    "Denoiser": "taylorseer_export.runtime.denoiser",
    "Slot": "taylorseer_export.runtime.slot",
    "Forecasts": "taylorseer_export.method",
    "Guard": "taylorseer_export.method",
    "Plan": "taylorseer_export.method",
    "forecast_weights": "taylorseer_export.method",
    "TaylorSeerError": "taylorseer_export.errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module `taylorseer_export` has no attribute `{name}`")
