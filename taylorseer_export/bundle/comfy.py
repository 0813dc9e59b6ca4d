"""What a bundle knows of ComfyUI's own model of its family."""

from pydantic import Field

from taylorseer_export.bundle.entries import ClassName, Config, Size, Text
from taylorseer_export.bundle.sealed import Part


class Comfy(Part):
    """ComfyUI's model that the engines stand in for."""

    model: ClassName = Field(description="Its class in `comfy.supported_models`.")
    config: Config = Field(default_factory=dict, description="What that class is told of the network.")
    inputs: dict[Text, Text] = Field(description="Constant inputs of the transformer -> what ComfyUI calls them.")
    ignored: tuple[Text, ...] = Field(
        default=(), description="Parts of a conditioning that the model does not look at."
    )
    weights: dict[Text, tuple[Size, ...]] = Field(
        default_factory=dict, description="Modules of the network -> the shape of their weights, where ComfyUI asks."
    )
