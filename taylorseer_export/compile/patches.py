"""Pictures that text encoders see in patches: what the pipeline's processor does to them, as data and as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from taylorseer_export.bundle.manifest import Patches, Tensor
from taylorseer_export.checkpoint.checkpoint import Checkpoint
from taylorseer_export.compile.components import FILTERS, processor
from taylorseer_export.errors import CheckpointError, first_line
from taylorseer_export.families.whole import Patches as Declared

SEEN = "picture_tokens"  # the dimension that counts those of all pictures of a request


class Cutting(NamedTuple):
    """How pictures are cut into patches.

    Attributes:
        patches: What the run side does.
        mean, deviation: Of each colour, from 0 to 1: what the graph normalises it by.
    """

    patches: Patches
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def inputs(self, dtype: Any) -> list[Tensor]:
        """The inputs of the graph."""
        patches = self.patches
        count = f"{patches.merged**2}*{SEEN}"
        values = 3 * patches.frames * patches.side**2
        return [
            Tensor(name=patches.input, dtype=dtype, shape=(count, values), role="picture"),
            Tensor(name=patches.places, dtype="int64", shape=(count, 4), role="tokens"),
        ]

    def normalised(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the graph by name, the patches as their encoder wants them."""
        rows = given[self.patches.input]
        mean, deviation = (rows.new_tensor(of).view(1, 3, 1) for of in (self.mean, self.deviation))
        made = ((rows.unflatten(1, (3, -1)) - mean) / deviation).flatten(1)
        return {**given, self.patches.input: made}


def cutting(checkpoint: Checkpoint, declared: Declared, encoders: Mapping[str, Any]) -> Cutting:
    """What the processor of a pipeline does to pictures.

    Args:
        checkpoint: The transformer, in its pipeline folder.
        declared: By the family.
        encoders: Folder -> the encoder, loaded.

    Raises:
        CheckpointError: It does not load, or does anything but resize, normalise and cut.
    """
    where, eyes = checkpoint.root / declared.processor, encoders[declared.encoder].config.vision_config
    try:
        said = processor(where)
        size, side, merged = said["size"], said["patch_size"], said["merge_size"]
        usual = all(said[f"do_{what}"] for what in ("resize", "rescale", "normalize"))
        if not usual or round(1 / said["rescale_factor"]) != 255:
            raise ValueError("it does more, or less, than resize, normalise and cut")
        if (side, merged, said["temporal_patch_size"]) != (
            eyes.patch_size,
            eyes.spatial_merge_size,
            eyes.temporal_patch_size,
        ):
            raise ValueError("its patches are not those of the encoder")
        return Cutting(
            Patches(
                input=declared.name,
                places=declared.places,
                token=declared.token,
                each=declared.each,
                pictures=declared.pictures,
                area=declared.area,
                least=size["shortest_edge"],
                most=size["longest_edge"],
                side=side,
                frames=said["temporal_patch_size"],
                merged=merged,
                window=eyes.window_size // merged // side,
                filter=FILTERS[int(said["resample"])],
            ),
            tuple(said["image_mean"]),
            tuple(said["image_std"]),
        )
    except Exception as error:  # whatever a class makes of a folder that is not its own
        raise CheckpointError(
            f"{where} does not load as an image processor of transformers ({first_line(error)}), expected that of a "
            "diffusers pipeline; download it again"
        ) from error
