"""What a manifest says of quantised weights."""

import shlex
from typing import Annotated, Literal

from pydantic import Field

from taylorseer_export.bundle.entries import Count, Text
from taylorseer_export.bundle.sealed import Part

UNQUANTISED = "the unquantised model"
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Quantised(Part):
    """How the weights of the blocks' linear layers are stored and computed with."""

    weights: Literal["fp8", "nvfp4", "int8"] = Field(
        description="Format. fp8: e4m3, a scale for each row. int8: whole numbers to 127, a scale for each row. nvfp4: "
        "e2m1 in blocks of 16 of a row with an e4m3 scale each, and one scale for all."
    )
    activations: Literal["none", "token", "static"] = Field(
        description="What these layers read. none: as it comes. token: each row quantised when it is computed, to "
        "e4m3; with nvfp4 to e2m1 in blocks of 16, with int8 to int8, in ONNX Runtime in blocks of 32. static: "
        "quantised by one constant for each layer; what is beyond it saturates."
    )
    input_scales: dict[Text, Scale] = Field(
        default={}, description="Weight -> what a value that its layer reads counts, where that is a constant."
    )
    samples: Count | None = Field(
        default=None,
        description="Requests that those constants were found on; None where checkpoint or caller brought them.",
    )
    kept: bool = Field(default=False, description="Whether values and scales are those of the checkpoint.")
    layers: tuple[Text, ...] = Field(min_length=1, description="Names of the quantised weights.")
    bytes: Count = Field(description="What their values and scales take.")
    unquantised_bytes: Count = Field(description="What they take in the bundle's precision.")
    keep_precision: tuple[Text, ...] = Field(default=(), description="Patterns of layers left out on purpose.")

    @property
    def reads(self) -> str:
        """What its layers read, where that is quantised too, for people; else empty."""
        if self.activations != "static":
            return "what they read by token" if self.activations == "token" else ""
        if self.samples is not None:
            return f"what they read by constants found on {self.samples} sample{'s' if self.samples != 1 else ''}"
        return f"what they read by constants of {'the checkpoint' if self.kept else 'the caller'}"

    @property
    def compared_with(self) -> str | None:
        """The model that shows what quantising costs, for people; None where nothing is quantised but what the
        checkpoint was already."""
        if not self.kept:
            return UNQUANTISED
        return None if self.activations == "none" else "the model with the checkpoint's weights dequantised"

    def given(self) -> dict[str, str | None]:
        """The options that ask for it, as on the command line."""
        kept = " --keep-precision ".join(map(shlex.quote, self.keep_precision)) or None
        return {
            "weights": "keep" if self.kept else self.weights,
            "activations": self.activations,
            "keep-precision": kept,
        }
