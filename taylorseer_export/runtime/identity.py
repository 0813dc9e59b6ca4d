"""The smallest ONNX graph: `target = Identity(source)`, bytes in and bytes out, written without the `onnx` package.

Source: `onnx.proto` (fields by number) and the wire format of protocol buffers.
"""

from __future__ import annotations

_UINT8 = 2  # of TensorProto.DataType
_IR_VERSION, _OPSET = 8, 13  # what every ONNX Runtime from 1.20 on takes


def _field(number: int, *values: bytes | str | int) -> bytes:
    """A field of a message: a number below 128, or text or messages of fewer than 128 bytes, one after the other."""
    if isinstance(values[0], int):
        return bytes((number << 3, values[0]))
    content = b"".join(v.encode() if isinstance(v, str) else bytes(v) for v in values)
    return bytes((number << 3 | 2, len(content))) + content


def _bytes_of(name: str) -> bytes:
    """A ValueInfoProto: `name`, uint8 `[size]`."""
    shape = _field(2, _field(1, _field(2, "size")))
    return _field(1, name) + _field(2, _field(1, _field(1, _UINT8), shape))


def _model() -> bytes:
    node = _field(1, "source") + _field(2, "target") + _field(4, "Identity")
    graph = _field(1, node) + _field(2, "copy") + _field(11, _bytes_of("source")) + _field(12, _bytes_of("target"))
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


IDENTITY = _model()
