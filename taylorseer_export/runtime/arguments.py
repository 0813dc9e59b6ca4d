"""What diffusers' pipelines pass to a transformer in another form than the graphs of its bundle take it.

Most pipelines need nothing here: their arguments are the inputs of the graphs, under the same names. What the others do
is a word in the manifest, and a function here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import StepError
from taylorseer_export.runtime.calls import host_array

Form = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def form_of(manifest: Manifest) -> Form:
    """`(hidden_states, arguments) -> (latent, inputs)` of a bundle."""
    if manifest.pipeline.arguments == "noise-alone":
        return partial(_noise_alone, int(manifest.graphs["full"].input_of("latent").shape[1]))
    if manifest.pipeline.arguments == "rotary":
        return partial(_rotary, manifest.model.config)
    return _FORMS[manifest.pipeline.arguments]


def latent_of(latents: Any, shape: tuple[int, ...]) -> Any:
    """The latent of a bundle, of a shape that a form once gave, within what a pipeline passes at a later step.

    Every form takes all rows or channels or the first ones, and which it is stays the same with the conditioning.
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


class Pictures:
    """What the first call of a loop returns of the pictures ahead of its latent, and the others bring: the pictures.

    Their keys and values are where `prepare` put them; to a pipeline it is a cache, which it clears at the end.
    """

    def __init__(self, latents: Any, places: Any) -> None:
        self.inputs = {"image_latents": latents, "image_ids": places}

    def clear(self) -> None:
        """Let go of the pictures."""
        self.inputs = {}


def rows_ahead(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any], Pictures | None]:
    """The latent alone, the inputs of the graphs, and what the first call has to return beside its prediction."""
    rest = dict(inputs)
    mode, rows, kept = rest.pop("kv_cache_mode", None), rest.pop("num_ref_tokens", 0), rest.pop("kv_cache", None)
    if mode == "extract" and rows:
        places = rest["img_ids"]
        made = Pictures(latents[:, :rows], places[..., :rows, :])
        return latents[:, rows:], {**rest, "img_ids": places[..., rows:, :], **made.inputs}, made
    if mode == "cached" and isinstance(kept, Pictures):
        return latents, {**rest, **kept.inputs}, None
    if mode is None and kept is None:
        return latents, rest, None
    raise StepError(
        f"argument `kv_cache_mode` is {mode!r} with {rows} rows of pictures and {type(kept).__name__} as `kv_cache`, "
        "expected `extract` with such rows at the first step and `cached` with what that returned at all others; call "
        "it as its pipeline does"
    )


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


def _places_of_all(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The places of the latent alone; those of the text before them are zero."""
    places, text = inputs.get("position_ids"), inputs.get("encoder_hidden_states")
    if places is None or text is None:
        return latents, inputs
    words, rows = text.shape[1], latents.shape[1]
    if places.shape[0] != words + rows or bool(places[:words].any()):
        raise StepError(
            f"input `position_ids` is {list(places.shape)}, expected zeros for each of {words} tokens of text and the "
            f"places of {rows} of the latent behind them; pass those of the pipeline"
        )
    return latents, {**inputs, "position_ids": places[words:]}


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
    given, shapes = _masked(inputs), _shapes(inputs)
    if shapes is None:
        return latents, given
    if len(shapes) > 1:
        raise StepError(
            f"argument `img_shapes` has {len(shapes)} pictures a sample, expected 1, the one that is made: this bundle "
            "is of a model that takes text alone; leave the others out, or use a bundle of the model that edits them"
        )
    return latents, {**given, "img_shapes": [shapes] * len(latents)}


def _pictures_behind(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The rows of pictures follow those of the noise, and their shapes tell how many each has."""
    given, shapes = _masked(inputs), _shapes(inputs)
    if shapes is None:
        return latents, given
    rows, *behind = shapes.prod(1).tolist()
    if not behind or rows + sum(behind) != latents.shape[1]:
        raise StepError(
            f"input `hidden_states` has {latents.shape[1]} rows and `img_shapes` pictures of "
            f"{' + '.join(map(str, (rows, *behind)))}, expected those of the noise and then of pictures to be "
            "edited; pass image= to the pipeline, or use a bundle of the model that takes text alone"
        )
    split = {"image_latents": latents[:, rows:], "img_shapes": [shapes] * len(latents)}
    return latents[:, :rows], {**given, **split}


def _noise_alone(channels: int, latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Behind the channels of the noise stand those of a picture, which are zeros where the pipeline has none."""
    if latents[:, channels:].any():
        raise StepError(
            f"input `hidden_states` has a picture in its channels from {channels} on, expected zeros there, since this "
            "bundle is of a model that takes text alone; use a pipeline from text, or a bundle of the model that takes "
            "a picture"
        )
    return latents[:, :channels], inputs


def _rotary(config: dict[str, Any], latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tables of places, a row for each token, as one tensor over frames, rows and columns."""
    tables = inputs.get("image_rotary_emb")
    if tables is None:
        return latents, inputs
    (frames, _, height, width), side = latents.shape[1:], config["patch_size"]
    grid = (frames // (config.get("patch_size_t") or 1), height // side, width // side)
    if any(len(table) != np.prod(grid) for table in tables):
        raise StepError(
            f"argument `image_rotary_emb` has {', '.join(str(len(table)) for table in tables)} rows, expected "
            f"{np.prod(grid)}, one for each token of the latent; pass those of the pipeline"
        )
    whole = np.stack([host_array(table) for table in tables])
    return latents, {**inputs, "image_rotary_emb": whole.reshape(2, *grid, whole.shape[-1])}


def _masked(inputs: dict[str, Any]) -> dict[str, Any]:
    given, text = dict(inputs), inputs.get("encoder_hidden_states")
    if text is not None:
        given.setdefault("encoder_hidden_states_mask", text.new_ones(text.shape[:2]).long())
    return given


def _shapes(inputs: dict[str, Any]) -> Any:
    """(frames, rows, columns) of each picture of the first sample, `[P, 3]`; the model looks at no other sample's."""
    shapes = inputs.get("img_shapes")
    return None if shapes is None else host_array(shapes[0]).reshape(-1, 3)


def clock_of(manifest: Manifest) -> Callable[[Any, Any, dict[str, Any]], Any]:
    """`(hidden_states, timestep, arguments) -> timestep` of a bundle: one or several that are equal."""
    several = manifest.pipeline.arguments == "first-frame"
    return _of_later_frames if several else lambda latents, timestep, inputs: timestep


def _of_later_tokens(timestep: Any, inputs: dict[str, Any]) -> Any:
    """Those of the tokens that do not begin at 0 seconds; what is seen of the other latent has that of the step."""
    shape, places = list(getattr(timestep, "shape", ())), inputs.get("video_coords")
    later = None if places is None else places[:, 0, :, 0] != 0
    if later is None or shape != list(later.shape) or bool(timestep[~later].any()):
        raise StepError(
            f"input `timestep` is {shape}, expected one for each token of the video, 0 for those of the first frame, "
            "which is a picture; use a pipeline from a picture, or a bundle of the model from text"
        )
    if not inputs.get("use_cross_timestep"):
        raise StepError(
            f"argument `use_cross_timestep` is {inputs.get('use_cross_timestep')}, expected True, as the pipeline "
            "passes it by default; leave it out there"
        )
    return timestep[later]


def _of_later_frames(latents: Any, timestep: Any, inputs: dict[str, Any]) -> Any:
    """Those of the tokens of all frames but the first, which is without noise."""
    if latents.ndim == 3:
        return _of_later_tokens(timestep, inputs)
    shape, frames = list(getattr(timestep, "shape", ())), latents.shape[2]
    first = shape[1] // frames if len(shape) == 2 else 0
    if not first or shape[1] % frames or timestep[:, :first].any():
        raise StepError(
            f"input `timestep` is {shape}, expected one for each token of {frames} frames, 0 for those of the first, "
            "which is a picture; use a pipeline from a picture, or a bundle of the model from text"
        )
    return timestep[:, first:]


_FORMS: dict[str, Form] = {
    "declared": _declared,
    "rows-behind": _rows_behind,
    "rows-ahead": _declared,  # `rows_ahead` comes before
    "first-shape": _first_shape,
    "mask-of-all": _mask_of_all,
    "places-of-all": _places_of_all,
    "lists": _lists,
    "channels-last": _declared,
    "first-frame": _declared,  # `clock_of` tells the timestep
    "pictures-behind": _pictures_behind,
}
