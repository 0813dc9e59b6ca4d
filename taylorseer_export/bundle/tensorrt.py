"""What both sides of a TensorRT bundle agree on: the library behind each kind of engine, its log, its tensors.

`tensorrt` 10 and 11 and `tensorrt_rtx` share one interface; what a release lacks is found by name, never by version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taylorseer_export.bundle.manifest import Dimension, Tensor
from taylorseer_export.bundle.shapes import resolve
from taylorseer_export.errors import TaylorSeerError, first_line

_LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "torch-tensorrt": "tensorrt"}
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def library_name(kind: str) -> str:
    """The library that runs engines of this kind, as Python and the manifest know it."""
    return _LIBRARIES[kind]


def library(kind: str, error: type[TaylorSeerError]) -> Any:
    """The library itself.

    Args:
        kind: Kind of engine.
        error: What to raise.

    Raises:
        TaylorSeerError: Of the class given: it is not installed, or does not find its own libraries.
    """
    try:
        if kind == "tensorrt-rtx":
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
    except (ImportError, OSError) as problem:
        raise error(
            f"{library_name(kind)} is not installed ({problem}), expected it for --engine {kind}; "
            f"pip install 'taylorseer-export[{kind}]'"
        ) from problem
    return trt


def logger(trt: Any) -> Any:
    """A log that keeps its errors in `errors`, newest last, and drops everything else.

    The library passes one log around in a process, so that only the first one made may get to hear of anything.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def last(self) -> str:
            """The newest error, or that there was none."""
            return first_line(self.errors[-1]) if self.errors else "it gives no reason"

    return Log()


def dtype_names(trt: Any) -> dict[Any, str]:
    """The library's dtype -> the contract's."""
    return {getattr(trt.DataType, theirs): ours for ours, theirs in _DTYPES.items()}


def extents(tensor: Tensor, dimensions: Mapping[str, Dimension]) -> tuple[tuple[int, ...], ...]:
    """Smallest, typical and largest shape of a tensor: one row of an optimisation profile."""
    sizes = (
        {name: d.minimum for name, d in dimensions.items()},
        {name: d.typical for name, d in dimensions.items()},
        {name: d.maximum for name, d in dimensions.items()},
    )
    return tuple(resolve(tensor.shape, chosen) for chosen in sizes)
