"""Constants of a TensorFlow graph file (.pb), read without TensorFlow.

The format is protobuf's (protobuf.dev/programming-guides/encoding): a message is a row of fields, each a tag
(number * 8 + kind) and a value. Of GraphDef (tensorflow/core/framework/{graph,node_def,attr_value,tensor}.proto) only
what leads to a constant is looked at; everything else is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from var_ext.checkpoints import CheckpointError

# Numbers of fields.
NODE = 1  # of GraphDef
NAME, OP, ATTR = 1, 2, 5  # of NodeDef
KEY, VALUE = 1, 2  # of an entry of a map
TENSOR = 8  # of AttrValue
DTYPE, SHAPE, CONTENT, FLOATS = 1, 2, 4, 5  # of TensorProto
DIM, SIZE = 2, 1  # of TensorShapeProto and its Dim

FLOAT32 = 1  # of DataType
VARINT, WIDE, BYTES, NARROW = 0, 1, 2, 5  # kinds of values


class _Malformed(ValueError):
    """The bytes are no message."""


def read_constants(path: Path) -> dict[str, np.ndarray]:
    """Names and values of the float32 constants of a graph; others, such as shapes, are passed over.

    Raises:
        CheckpointError: the file cannot be read, or is no graph, or is cut short.
    """
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    try:
        found = dict(_constants(content))
    except (_Malformed, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} must be a TensorFlow graph (.pb), but its {len(content)} bytes are of another format or cut "
            f"short: {error}"
        ) from error
    if not found:
        raise CheckpointError(f"{path} must be a TensorFlow graph (.pb) with constants, got none")
    return found


def _constants(graph: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for number, node in _fields(graph):
        if number != NODE or not isinstance(node, memoryview):
            continue
        name, constant, value = "", False, None
        for field, content in _fields(node):
            if not isinstance(content, memoryview):
                continue
            if field == NAME:
                name = str(content, "utf-8")
            elif field == OP:
                constant = bytes(content) == b"Const"
            elif field == ATTR:
                value = _value(content) or value
        if constant and value is not None:
            array = _array(value, name)
            if array is not None:
                yield name, array


def _value(entry: memoryview) -> memoryview | None:
    """The tensor of an attribute "value", None for any other."""
    fields = dict(_fields(entry))
    key, inner = fields.get(KEY), fields.get(VALUE)
    if not (isinstance(key, memoryview) and isinstance(inner, memoryview) and bytes(key) == b"value"):
        return None
    tensor = dict(_fields(inner)).get(TENSOR)
    return tensor if isinstance(tensor, memoryview) else None


def _array(tensor: memoryview, name: str) -> np.ndarray | None:
    """The values of a TensorProto of float32: raw bytes, or a list of numbers, of which one may stand for all."""
    fields = list(_fields(tensor))
    if dict(fields).get(DTYPE) != FLOAT32:
        return None
    shape: list[int] = []
    values = b""
    for number, content in fields:
        if number == SHAPE and isinstance(content, memoryview):
            dims = [dim for n, dim in _fields(content) if n == DIM and isinstance(dim, memoryview)]
            sizes = [dict(_fields(dim)).get(SIZE, 0) for dim in dims]  # a size of 0 is left out
            shape = [size for size in sizes if isinstance(size, int)]
        elif number in (CONTENT, FLOATS) and isinstance(content, memoryview):
            values += bytes(content)
    if len(values) % 4:
        raise _Malformed(f"{len(values)} bytes of float32 in {name}")
    flat, count = np.frombuffer(values, "<f4"), math.prod(shape)
    if flat.size == 1:
        flat = np.full(count, flat[0])
    if flat.size != count:
        raise _Malformed(f"{name} has {flat.size} values for the shape {tuple(shape)}")
    return flat.reshape(shape).astype(np.float32)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: a whole number, or its bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in (WIDE, NARROW):
            length = 8 if kind == WIDE else 4
        else:
            raise _Malformed(f"a field of kind {kind}")
        if at + length > len(message):
            raise _Malformed(f"a field of {length} bytes where {len(message) - at} are left")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise _Malformed("a number without an end")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
