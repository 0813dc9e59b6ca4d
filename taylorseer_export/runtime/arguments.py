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


def _mask_of_all(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The mask of the text alone; every token of the latent counts."""
    text, mask = inputs.get("encoder_hidden_states"), inputs.get("attention_mask")
    if text is None or mask is None:
        return latents, inputs
    words, rows = text.shape[1], latents.shape[1]
    if mask.shape[1] != words + rows or not bool((mask[:, words:] == 1).all()):
        raise StepError(
            f"input `attention_mask` is {list(mask.shape)}, expected a number for each of {words} tokens of text and a "
            f"one for each of {rows} of the latent behind them; mask the text alone"
        )
    return latents, {**inputs, "attention_mask": mask[:, :words]}


def _lists(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Words of samples, `[T, D]` each, in one tensor, with a mask that says how many each has."""
    texts = inputs.get("cap_feats")
    if texts is None:
        return latents, inputs
    if not isinstance(texts, list | tuple) or not all(getattr(text, "ndim", 0) == 2 for text in texts):
        raise StepError("input `cap_feats` is no list of tensors [T, D], expected one for each sample; pass it so")
    words = texts[0].new_zeros(len(texts), max(map(len, texts)), texts[0].shape[1])
    mask = words.new_zeros(words.shape[:2]).long()
    for row, counted, text in zip(words, mask, texts, strict=True):
        row[: len(text)] = text
        counted[: len(text)] = 1
    return latents, {**inputs, "cap_feats": words, "cap_mask": mask}


def _first_shape(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask that is left out lets every text token through; of the shapes the model looks at the first alone."""
    given = dict(inputs)
    text, shapes = given.get("encoder_hidden_states"), given.get("img_shapes")
    if text is not None:
        given.setdefault("encoder_hidden_states_mask", text.new_ones(text.shape[:2]).long())
    if shapes is not None:
        given["img_shapes"] = [shapes[0]] * len(latents)
    return latents, given


_FORMS: dict[str, Form] = {
    "declared": _declared,
    "rows-behind": _rows_behind,
    "first-shape": _first_shape,
    "mask-of-all": _mask_of_all,
    "lists": _lists,
}
