"""Which files an ONNX graph reads beside itself, told and changed without the `onnx` package.

A model is a protobuf message; a tensor whose values lie elsewhere names a file, relative to the folder of the model.
Only the fields that lead there are walked, and everything else is copied as it is.

Source: `onnx.proto` (fields by number) and the wire format of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

# Message -> field -> message: every way from a model to the tensors in it.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # fields of an entry
_LOCATION = b"location"
_OPERATION = 4  # field of a node: its operation
_ENGINE = b"EPContext"  # an operation that holds an engine of some execution provider, or names its file
_MEMORY = "_ORT_MEM_ADDR_"  # part of a location that stands for an address
_ORT = b"ORTM"  # the mark of ONNX Runtime's own format, behind four bytes
_NAME = 8  # field of a tensor
_BYTES = 2  # wire type of a field that holds text, bytes or a message


def external_files(model: bytes) -> tuple[str, ...]:
    """The files that a model reads beside itself, relative to its folder, each once.

    Raises:
        ValueError: It is no message, or reads what no name tells: a compiled engine (`EPContext`), memory of the
            process, or a model in ONNX Runtime's own format.
    """
    if model[4:8] == _ORT:
        raise ValueError("a model in ONNX Runtime's own format")
    found: dict[str, None] = {}

    def note(location: str) -> str:
        if _MEMORY in location:
            raise ValueError("a graph that reads the memory of the process")
        found[location] = None
        return location

    relocated(model, note)
    return tuple(found)


def initializers(model: bytes) -> tuple[str, ...]:
    """Names of the tensors of a model's graph, wherever their values lie.

    Raises:
        ValueError: It is no message.
    """
    data, found = memoryview(model), []
    try:
        for number, _, begin, end in _fields(data):
            if _FIELDS["model"].get(number) != "graph":
                continue
            graph = data[begin:end]
            tensors = [graph[b:e] for field, _, b, e in _fields(graph) if _FIELDS["graph"].get(field) == "tensor"]
            for tensor in tensors:
                found += [bytes(tensor[b:e]).decode() for field, _, b, e in _fields(tensor) if field == _NAME]
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not an ONNX model ({type(error).__name__})") from error
    return tuple(found)


def relocated(model: bytes, change: Callable[[str], str]) -> bytes:
    """The model with other files in the place of those it reads.

    Args:
        model: The model.
        change: Old name -> new name, both relative to the folder of the model.

    Raises:
        ValueError: It is no message.
    """
    try:
        return bytes(_message("model", memoryview(model), change))
    except (RecursionError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not an ONNX model ({type(error).__name__})") from error


def _message(kind: str, data: memoryview, change: Callable[[str], str]) -> bytearray | memoryview:
    """A message with the tensors in it changed; the memory it came in where nothing did."""
    if kind == "entry":
        return _entry(data, change)
    children, made, copied = _FIELDS[kind], bytearray(), 0
    for number, start, begin, end in _fields(data):
        if kind == "node" and number == _OPERATION and bytes(data[begin:end]) == _ENGINE:
            raise ValueError("a graph that runs a compiled engine (EPContext)")
        if number not in children:
            continue
        old = data[begin:end]
        new = _message(children[number], old, change)
        if new is not old:
            made += data[copied:start]
            made += _varint(number << 3 | _BYTES) + _varint(len(new)) + new
            copied = end
    return made + data[copied:] if copied else data


def _entry(data: memoryview, change: Callable[[str], str]) -> bytearray | memoryview:
    parts = {number: bytes(data[begin:end]) for number, _, begin, end in _fields(data)}
    if parts.get(_KEY) != _LOCATION:
        return data
    old = parts.get(_VALUE, b"").decode()
    new = change(old)
    if new == old:
        return data
    made = bytearray()
    for number, text in ((_KEY, _LOCATION), (_VALUE, new.encode())):
        made += _varint(number << 3 | _BYTES) + _varint(len(text)) + text
    return made


def _fields(data: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """(number, start, begin of its content, end) of every field of a message that holds bytes."""
    position = 0
    while position < len(data):
        start = position
        tag, position = _read(data, position)
        match tag & 7:
            case 0:
                _, position = _read(data, position)
            case 1:
                position += 8
            case 5:
                position += 4
            case 2:
                length, begin = _read(data, position)
                position = begin + length
                if position <= len(data):
                    yield tag >> 3, start, begin, position
            case other:
                raise ValueError(f"not an ONNX model (field of wire type {other})")
        if position > len(data):
            raise ValueError("not an ONNX model (it ends within a field)")


def _read(data: memoryview, position: int) -> tuple[int, int]:
    """(value, position behind it) of the number that starts at `position`."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("not an ONNX model (a number without end)")


def _varint(value: int) -> bytes:
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
