"""What diffusers' pipelines pass to a transformer in another form than the graphs of its bundle take it.

Most pipelines need nothing here: their arguments are the inputs of the graphs, under the same names. What the others do
is a word in the manifest, and a function here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import StepError

Form = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def form_of(manifest: Manifest) -> Form:
    """`(hidden_states, arguments) -> (latent, inputs)` of a bundle."""
    return _FORMS[manifest.pipeline.arguments]


def latent_of(latents: Any, shape: tuple[int, ...]) -> Any:
    """The latent of a bundle, of a shape that a form once gave, within what a pipeline passes at a later step.

    Every form takes all rows or the first ones, and which it is stays the same with the conditioning.
    """
    return latents if latents.shape == shape else latents[:, : shape[1]]


def _declared(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return latents, inputs


def _rows_behind(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The rows of the picture to be edited follow those of the noise; column 0 of `img_ids` tells them apart."""
    ids = inputs.get("img_ids")
    if ids is None:
        return latents, inputs
    rows = int((ids.reshape(-1, *ids.shape[-2:])[0, :, 0] == 0).sum())  # they are the same for all samples
    if rows == ids.shape[-2]:
        raise StepError(
            "input `hidden_states` has no rows of a picture to be edited, expected them after those of the noise; "
            "pass image= to the pipeline, or use a bundle of the model that takes text alone"
        )
    split = {"img_ids": ids[..., :rows, :], "image_ids": ids[..., rows:, :], "image_latents": latents[:, rows:]}
    return latents[:, :rows], {**inputs, **split}


def _first_shape(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask that is left out lets every text token through; of the shapes the model looks at the first alone."""
    given = dict(inputs)
    text, shapes = given.get("encoder_hidden_states"), given.get("img_shapes")
    if text is not None:
        given.setdefault("encoder_hidden_states_mask", text.new_ones(text.shape[:2]).long())
    if shapes is not None:
        given["img_shapes"] = [shapes[0]] * len(latents)
    return latents, given


_FORMS: dict[str, Form] = {"declared": _declared, "rows-behind": _rows_behind, "first-shape": _first_shape}
