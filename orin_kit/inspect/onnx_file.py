"""What an ONNX file holds, without its weights and without the onnx package, which the device install lacks.

The file is a protobuf message, mapped and walked: of a weight only its name, type, shape and place are looked at.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError

# TensorProto.DataType -> name as safetensors has it, bits a value; strings have no size of their own.
DTYPES: dict[int, tuple[str, int]] = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16), 6: ("I32", 32), 7: ("I64", 64),
    8: ("STRING", 0), 9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64), 12: ("U32", 32), 13: ("U64", 64),
    14: ("C64", 64), 15: ("C128", 128), 16: ("BF16", 16), 17: ("F8_E4M3", 8), 18: ("F8_E4M3UZ", 8), 19: ("F8_E5M2", 8),
    20: ("F8_E5M2UZ", 8), 21: ("U4", 4), 22: ("I4", 4), 23: ("F4", 4), 24: ("F8_E8M0", 8), 25: ("U2", 2), 26: ("I2", 2),
    27: ("F6_E2M3", 6), 28: ("F6_E3M2", 6),
}  # fmt: skip
VALUE_BYTES = {name: bits // 8 for name, bits in DTYPES.values()}
# Operators that read packed weights: which input holds them, bits of a code where the attribute `bits` does not say
# (None: the input's own type), and the attribute that says how many input features share a scale.
PACKED_INPUTS: dict[tuple[str, str], tuple[int, int | None, str]] = {
    ("com.microsoft", "MatMulNBits"): (1, 4, "block_size"),
    ("com.microsoft", "GatherBlockQuantized"): (0, 4, "block_size"),
    ("orin_kit", "Int4Linear"): (1, 4, "group_size"),
    ("orin_kit", "EmbeddingGather"): (1, 4, "group_size"),
    ("", "DequantizeLinear"): (0, None, "block_size"),
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
EXTERNAL = 1  # TensorProto.DataLocation
MEND = "export it again, or copy it whole"

Message = dict[int, list[Any]]


@dataclass(frozen=True)
class Value:
    """A graph's input or output; a dimension without a fixed size is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Initializer:
    """A weight or constant.

    Attributes:
        bytes: of its data, wherever it lies.
        file: the external file, "" when the data are in the model itself.
        start: where the data begin in that file.
        bits, group_size: of weights that a node reads as packed ones; None for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str = ""
    start: int = 0
    bits: int | None = None
    group_size: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.bytes


@dataclass(frozen=True)
class OnnxFile:
    """A model: `ops` counts nodes by (domain, operator), those of subgraphs among them; "" is the standard domain."""

    producer: str
    ir_version: int
    opsets: dict[str, int]
    ops: Counter[tuple[str, str]] = field(default_factory=Counter)
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    initializers: tuple[Initializer, ...] = ()


def read_onnx(path: str | Path) -> OnnxFile:
    """Read a model file's structure.

    Raises:
        ArtifactError: it is missing, cut short or no ONNX model; a file with its weights is missing or short.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:  # the map outlives its file, and goes when nothing looks at it any more
            model = _read_model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except FileNotFoundError as error:
        raise ArtifactError(f"no {path.name} in {path.parent}", mend=MEND) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{path} is cut short or no ONNX model ({path.stat().st_size} bytes)"
        raise ArtifactError(what, mend=MEND) from error
    _check_external(path.parent, model)
    return model


def external_files(model: OnnxFile) -> dict[str, int]:
    """The files that weights lie in -> the bytes they must have at least."""
    needed: dict[str, int] = {}
    for tensor in model.initializers:
        if tensor.file:
            needed[tensor.file] = max(needed.get(tensor.file, 0), tensor.end)
    return needed


def _check_external(directory: Path, model: OnnxFile) -> None:
    for name, needed in external_files(model).items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{directory}: weights lie outside of it, in {name}", mend=MEND)
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory} lacks {name}, where weights lie", mend=MEND)
        size = (directory / name).stat().st_size
        if size < needed:
            raise ArtifactError(f"{directory / name} is cut short: {size} bytes of {needed}", mend=MEND)


def _read_model(view: memoryview) -> OnnxFile:
    model = message_of(view)
    ir_version, graph = int(model[1][0]), message_of(model[7][0])
    packed: dict[str, tuple[int | None, int]] = {}
    initializers = tuple(_initializer(message_of(tensor)) for tensor in graph.get(5, ()))
    stored = {tensor.name for tensor in initializers}  # older files list them among the inputs
    ops: Counter[tuple[str, str]] = Counter()
    _look_at_nodes(graph, ops, packed)
    return OnnxFile(
        producer=text_of(model, 2),
        ir_version=ir_version,
        opsets={text_of(opset, 1): int(opset.get(2, [0])[0]) for opset in map(message_of, model.get(8, ()))},
        ops=ops,
        inputs=tuple(value for value in map(_value, graph.get(11, ())) if value.name not in stored),
        outputs=tuple(map(_value, graph.get(12, ()))),
        initializers=tuple(_as_packed(tensor, packed) for tensor in initializers),
    )


def _look_at_nodes(graph: Message, ops: Counter[tuple[str, str]], packed: dict[str, tuple[int | None, int]]) -> None:
    """Count the operators, and note the bits and group sizes of what is read as packed weights."""
    for node in map(message_of, graph.get(1, ())):
        op = "" if (domain := text_of(node, 7)) == "ai.onnx" else domain, text_of(node, 4)
        ops[op] += 1
        numbers: dict[str, int] = {}
        for attribute in map(message_of, node.get(5, ())):
            if 3 in attribute:
                numbers[text_of(attribute, 1)] = int(attribute[3][-1])
            for subgraph in attribute.get(6, []) + attribute.get(11, []):
                _look_at_nodes(message_of(subgraph), ops, packed)
        if op in PACKED_INPUTS:
            place, bits, group = PACKED_INPUTS[op]
            packed[str(node[1][place], "utf-8")] = numbers.get("bits", bits), numbers.get(group, 0)


def _as_packed(tensor: Initializer, packed: dict[str, tuple[int | None, int]]) -> Initializer:
    if tensor.name not in packed:
        return tensor
    bits, group_size = packed[tensor.name]
    if bits is None:
        bits = next(bits for name, bits in DTYPES.values() if name == tensor.dtype)
    if bits < 1:
        raise ValueError(f"{tensor.name} is read in codes of {bits} bits")
    if bits > 8:  # a bias in int32, say
        return tensor
    return replace(tensor, bits=bits, group_size=group_size or None)


def _value(view: memoryview) -> Value:
    value = message_of(view)
    tensor = message_of(message_of(value[2][0])[1][0])
    dims = [message_of(dim) for dim in message_of(tensor[2][0]).get(1, ())] if 2 in tensor else []
    shape = tuple(int(dim[1][0]) if 1 in dim else text_of(dim, 2) or "?" for dim in dims)
    return Value(text_of(value, 1), DTYPES[tensor[1][0]][0], shape)


def _initializer(tensor: Message) -> Initializer:
    shape = tuple(_integers(tensor.get(1, ())))
    dtype, bits = DTYPES[tensor[2][0]]
    size = -(-math.prod(shape) * bits // 8)
    name = text_of(tensor, 8)
    if tensor.get(14, [0])[0] != EXTERNAL:
        if 9 in tensor and len(tensor[9][0]) != size:
            raise ValueError(f"{name} has {len(tensor[9][0])} bytes, its shape says {size}")
        return Initializer(name, dtype, shape, size)
    where = {text_of(entry, 1): text_of(entry, 2) for entry in map(message_of, tensor.get(13, ()))}
    if int(where.get("length", size)) != size:
        raise ValueError(f"{name} has {where['length']} bytes, its shape says {size}")
    return Initializer(name, dtype, shape, size, where["location"], int(where.get("offset", 0)))


def text_of(message: Message, number: int) -> str:
    return str(message[number][-1], "utf-8") if number in message else ""


def _integers(values: Any) -> Iterator[int]:
    """Repeated integers, packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def message_of(view: memoryview) -> Message:
    """A message's fields by number, in order; texts, bytes and messages as views."""
    fields: Message = {}
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == VARINT:
            value, at = _varint(view, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
            if wire == BYTES:
                size, at = _varint(view, at)
            elif not size:
                raise ValueError(f"wire type {wire}")
            value, at = view[at : at + size], at + size
        if at > len(view) or not number:
            raise ValueError("a field reaches over the end")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and where the next thing is."""
    number = shift = 0
    while True:
        byte = view[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError("a number is too long")
