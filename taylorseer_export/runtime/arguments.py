"""What diffusers' pipelines pass to a transformer in another form than the graphs of its bundle take it.

Most families need nothing here: their arguments are the inputs of the graphs, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.errors import StepError

Form = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def form_of(manifest: Manifest) -> Form:
    """`(hidden_states, arguments) -> (latent, inputs)` of a bundle."""
    return _FORMS.get(manifest.family, _as_they_are)


def ignored(manifest: Manifest) -> frozenset[str]:
    """Arguments that the model itself does not look at, so that a pipeline may pass them."""
    unguided = manifest.family == "hunyuan-video" and not manifest.model.config.get("guidance_embeds")
    return frozenset({"guidance"} if unguided else ())


def renewed(manifest: Manifest) -> frozenset[str]:
    """Arguments that the pipeline casts anew at every call, so that it is their numbers that stay the same."""
    past = {"latents_clean", "latents_history_2x", "latents_history_4x"}
    return frozenset(past if manifest.family == "framepack" else ())


def attributes_of(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What pipelines read from a transformer besides its config."""
    if class_name != "HiDreamImageTransformer2DModel":
        return {}
    height, width = config["max_resolution"]
    return {"max_seq": height * width // config["patch_size"] ** 2}


def _as_they_are(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return latents, inputs


def _kontext(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The rows of the picture to be edited follow those of the noise; column 0 of `img_ids` tells them apart."""
    ids = inputs.get("img_ids")
    if ids is None:
        return latents, inputs
    rows = int((ids[:, 0] == 0).sum())
    if rows == len(ids):
        raise StepError(
            "input `hidden_states` has no rows of a picture to be edited, expected them after those of the noise; "
            "pass image= to the pipeline, or use a bundle of family flux"
        )
    split = {"img_ids": ids[:rows], "image_ids": ids[rows:], "image_latents": latents[:, rows:]}
    return latents[:, :rows], {**inputs, **split}


def _qwen_image(latents: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask that is left out lets every text token through; of the shapes the model looks at the first alone."""
    given = dict(inputs)
    text, shapes = given.get("encoder_hidden_states"), given.get("img_shapes")
    if text is not None:
        given.setdefault("encoder_hidden_states_mask", text.new_ones(text.shape[:2]).long())
    if shapes is not None:
        given["img_shapes"] = [shapes[0]] * len(latents)
    return latents, given


_FORMS: dict[str, Form] = {"flux-kontext": _kontext, "qwen-image": _qwen_image}
