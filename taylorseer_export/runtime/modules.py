"""Modules of a transformer that a pipeline calls by itself, such as those that make the places of tokens.

They have no weights, so that diffusers' class makes them of its config alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taylorseer_export.errors import BundleError, first_line

if TYPE_CHECKING:
    from taylorseer_export.bundle.manifest import Manifest


def modules_of(manifest: Manifest) -> dict[str, Any]:
    """Name -> module, of those that the manifest names.

    Raises:
        BundleError: This diffusers makes none of the config.
    """
    names = manifest.pipeline.modules
    if not names:
        return {}
    import diffusers
    import torch

    model = manifest.model
    try:
        with torch.device("meta"):
            made = getattr(diffusers, model.class_name).from_config(model.config)
        return {name: made.get_submodule(name) for name in names}
    except Exception as error:  # whatever a class makes of a config that it was not written for
        raise BundleError(
            f"{model.class_name} of diffusers {diffusers.__version__} is not made of the bundle's config "
            f"({first_line(error)}), expected its modules {', '.join(names)}, which the pipeline calls; install the "
            "diffusers that the bundle was exported with"
        ) from error
