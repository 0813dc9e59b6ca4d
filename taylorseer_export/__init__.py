"""Diffusion transformers as compiled graphs: a full one, a forecast one, and the Taylor buffers between them.

    import taylorseer_export as tse

    folder = tse.export("black-forest-labs/FLUX.1-dev", order=2, out="engines/")
    denoiser = tse.load(folder)
    pipe.transformer = denoiser.as_transformer()

Importing this package imports neither torch nor an engine; names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taylorseer_export.compile.api import export as export
    from taylorseer_export.errors import TaylorSeerError as TaylorSeerError
    from taylorseer_export.method import Forecasts as Forecasts
    from taylorseer_export.method import Guard as Guard
    from taylorseer_export.method import Plan as Plan
    from taylorseer_export.method import forecast_weights as forecast_weights
    from taylorseer_export.runtime.denoiser import Denoiser as Denoiser
    from taylorseer_export.runtime.denoiser import load as load
    from taylorseer_export.runtime.following import follow as follow
    from taylorseer_export.runtime.group import Group as Group
    from taylorseer_export.runtime.slot import Slot as Slot

    __version__: str

_PUBLIC = {
    "export": "taylorseer_export.compile.api",
    "load": "taylorseer_export.runtime.denoiser",
    "Denoiser": "taylorseer_export.runtime.denoiser",
    "follow": "taylorseer_export.runtime.following",
    "Group": "taylorseer_export.runtime.group",
    "Slot": "taylorseer_export.runtime.slot",
    "Forecasts": "taylorseer_export.method",
    "Guard": "taylorseer_export.method",
    "Plan": "taylorseer_export.method",
    "forecast_weights": "taylorseer_export.method",
    "TaylorSeerError": "taylorseer_export.errors",
}

__all__ = [
    "Denoiser",
    "Forecasts",
    "Group",
    "Guard",
    "Plan",
    "Slot",
    "TaylorSeerError",
    "export",
    "follow",
    "forecast_weights",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "__version__":
        from taylorseer_export.bundle.manifest import tool_version

        return tool_version()
    raise AttributeError(f"module `taylorseer_export` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
