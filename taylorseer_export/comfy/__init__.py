"""Nodes for ComfyUI: a bundle as a MODEL, its plan, and what ran.

ComfyUI finds this folder in its `custom_nodes/`, where `taylorseer-export comfy --into FOLDER` puts a link to it.
Nothing but ComfyUI may import what is in it: it needs ComfyUI's modules, and takes nothing else from them but names.
"""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """The extension, when ComfyUI starts; raises `ImportError` in one sentence where the package is missing."""
    try:
        from taylorseer_export.comfy.nodes import extension
    except ModuleNotFoundError as error:
        if error.name != "taylorseer_export":
            raise
        raise ImportError(
            "taylorseer-export is missing in the Python that runs ComfyUI, expected it beside these nodes; install it "
            "there with pip"
        ) from error
    return extension()
