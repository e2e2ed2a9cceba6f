"""The GGUF container: header, metadata, tensor directory.

The `gguf` package's reader makes a numpy array of every string and takes 3.0 s for SmolLM2's 98,000 vocabulary
entries on our two cores (docs/log.md); this one skips arrays until someone asks and takes milliseconds. The format's
constants (value types, block sizes) still come from the package, and the tests compare with its reader.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.mapping import map_file

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4


class ValueType(IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class TensorType(IntEnum):
    """Element types of tensors that we can load. The numbers are ggml's."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    Q4_K = 12
    Q6_K = 14
    BF16 = 30


BLOCK_SIZES: Mapping[TensorType, tuple[int, int]] = MappingProxyType(
    {
        TensorType.F32: (1, 4),
        TensorType.F16: (1, 2),
        TensorType.BF16: (1, 2),
        TensorType.Q4_0: (32, 18),
        TensorType.Q4_1: (32, 20),
        TensorType.Q8_0: (32, 34),
        TensorType.Q4_K: (256, 144),
        TensorType.Q6_K: (256, 210),
    }
)
"""Elements and bytes of one block."""


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata that has been skipped, not read."""

    key: str
    element_type: ValueType
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` has the slowest dimension first, as torch has it (GGUF writes it reversed)."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    offset: int

    @property
    def tensor_type(self) -> TensorType:
        """Raises UnsupportedModel, naming tensor and type, for a type that we cannot load."""
        try:
            return TensorType(self.type_number)
        except ValueError as error:
            known = ", ".join(kind.name for kind in TensorType)
            raise UnsupportedModel(
                f"tensor {self.name} has GGUF type {type_name(self.type_number)}, which is not supported "
                f"(supported: {known}); requantise the model to one of them"
            ) from error

    @property
    def num_bytes(self) -> int:
        elements, block_bytes = BLOCK_SIZES[self.tensor_type]
        if self.shape and self.shape[-1] % elements:
            raise MalformedModel(f"tensor {self.name}: rows of {self.shape[-1]} are not whole blocks of {elements}")
        return prod(self.shape) // elements * block_bytes


Scalar: TypeAlias = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed header. The file is mapped, so tensors and skipped arrays cost nothing until they are read."""

    path: Path
    metadata: Mapping[str, Scalar | GgufArray]
    tensors: Mapping[str, GgufTensor]
    data: mmap.mmap = field(repr=False)
    header_bytes: int = 0

    def get_int(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise MalformedModel(f"{self.path}: metadata {key} should be an integer, not {value!r}")
        return value

    def get_float(self, key: str) -> float | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MalformedModel(f"{self.path}: metadata {key} should be a number, not {value!r}")
        return float(value)

    def get_str(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is None or isinstance(value, str):
            return value
        raise MalformedModel(f"{self.path}: metadata {key} should be a string, not {value!r}")

    def get_bool(self, key: str) -> bool | None:
        value = self.metadata.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise MalformedModel(f"{self.path}: metadata {key} should be true or false, not {value!r}")

    def array_length(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value.count if isinstance(value, GgufArray) else None

    def read_strings(self, key: str) -> list[str] | None:
        """An array of strings, decoded; None where the key is absent."""
        array = self._array(key, {ValueType.STRING})
        if array is None:
            return None
        data, position, strings = self.data, array.offset, list[str]()
        unpack = _U64.unpack_from
        for _ in range(array.count):
            start = position + 8
            position = start + unpack(data, position)[0]
            strings.append(data[start:position].decode("utf-8", errors="replace"))
        return strings

    def read_numbers(self, key: str) -> list[int | float] | None:
        """An array of numbers; None where the key is absent."""
        array = self._array(key, set(_SCALARS))
        if array is None:
            return None
        code = _SCALARS[array.element_type].format[1:]
        return list(struct.unpack_from(f"<{array.count}{code}", self.data, array.offset))

    def tensor_bytes(self, name: str) -> memoryview:
        tensor = self.tensors[name]
        return memoryview(self.data)[tensor.offset : tensor.offset + tensor.num_bytes]

    def _array(self, key: str, element_types: set[ValueType]) -> GgufArray | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, GgufArray) or value.element_type not in element_types:
            names = "/".join(sorted(kind.name for kind in element_types))
            raise MalformedModel(f"{self.path}: metadata {key} should be an array of {names}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and parse its header.

    Raises: MalformedModel (not GGUF, truncated, inconsistent), UnsupportedModel (version, byte order).
    """
    size = path.stat().st_size
    if size < 24:
        raise MalformedModel(f"{path}: {size} bytes are too few for a GGUF file")
    cursor = _Cursor(path, map_file(path))
    try:
        return _parse(cursor)
    except struct.error as error:
        raise MalformedModel(f"{path}: header cut off at byte {cursor.position}; fetch the file again") from error


def type_name(type_number: int) -> str:
    """ggml's name of a tensor type, known to us or not."""
    from gguf.constants import GGMLQuantizationType  # 0.3 s of imports that only an error message needs

    try:
        return GGMLQuantizationType(type_number).name
    except ValueError:
        return f"number {type_number}"


@dataclass(slots=True)
class _Cursor:
    """A position in the mapped header."""

    path: Path
    data: mmap.mmap
    position: int = 4

    def u32(self) -> int:
        return self.unpack(_U32)

    def u64(self) -> int:
        return self.unpack(_U64)

    def unpack(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def string(self) -> str:
        length = self.u64()
        self.require(length)
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value_type(self) -> ValueType:
        number = self.u32()
        try:
            return ValueType(number)
        except ValueError as error:
            raise MalformedModel(f"{self.path}: byte {self.position}: {number} is no value type") from error

    def require(self, num_bytes: int) -> None:
        """A damaged length must not become an allocation or a position past the end."""
        if num_bytes > len(self.data) - self.position:
            raise MalformedModel(
                f"{self.path}: {num_bytes} bytes are announced at byte {self.position} of {len(self.data)}; "
                "the file is damaged or was cut off: fetch it again"
            )


def _parse(cursor: _Cursor) -> GgufFile:
    num_tensors, num_metadata = _read_preamble(cursor)
    metadata = dict(_read_entry(cursor) for _ in range(num_metadata))
    relative = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise MalformedModel(f"{cursor.path}: general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = dict[str, GgufTensor]()
    for tensor in relative:
        if tensor.name in tensors:
            raise MalformedModel(f"{cursor.path}: tensor {tensor.name} is there twice")
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.type_number, tensor.shape, start + tensor.offset)
    _require_whole(cursor, tensors)
    return GgufFile(cursor.path, MappingProxyType(metadata), MappingProxyType(tensors), cursor.data, start)


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != MAGIC:
        raise MalformedModel(f"{cursor.path} is not a GGUF file: it starts with {cursor.data[:4]!r}")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise UnsupportedModel(f"{cursor.path}: big-endian GGUF is not supported")
    if version not in SUPPORTED_VERSIONS:
        raise UnsupportedModel(f"{cursor.path}: GGUF version {version} is not supported (supported: 2, 3)")
    return cursor.u64(), cursor.u64()


def _read_entry(cursor: _Cursor) -> tuple[str, Scalar | GgufArray]:
    key = cursor.string()
    kind = cursor.value_type()
    if kind is ValueType.STRING:
        return key, cursor.string()
    if kind is ValueType.ARRAY:
        return key, _skip_array(cursor, key)
    return key, cursor.unpack(_SCALARS[kind])


def _skip_array(cursor: _Cursor, key: str) -> GgufArray:
    element_type, count = cursor.value_type(), cursor.u64()
    array = GgufArray(key, element_type, count, cursor.position)
    if element_type is ValueType.ARRAY:
        raise UnsupportedModel(f"{cursor.path}: metadata {key} is an array of arrays")
    if element_type is not ValueType.STRING:
        num_bytes = count * _SCALARS[element_type].size
        cursor.require(num_bytes)
        cursor.position += num_bytes
        return array
    cursor.require(count * 8)
    data, position, unpack = cursor.data, cursor.position, _U64.unpack_from
    for _ in range(count):
        position += 8 + unpack(data, position)[0]
    cursor.require(position - cursor.position)
    cursor.position = position
    return array


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string()
    num_dimensions = cursor.u32()
    if num_dimensions > MAX_DIMENSIONS:
        raise MalformedModel(f"{cursor.path}: tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(num_dimensions))[::-1]
    return GgufTensor(name, cursor.u32(), shape, cursor.u64())


def _require_whole(cursor: _Cursor, tensors: Mapping[str, GgufTensor]) -> None:
    """A file that a download cut off is found here, not when a worker touches the missing page."""
    known = {int(kind) for kind in TensorType}
    for tensor in tensors.values():
        if tensor.type_number in known and tensor.offset + tensor.num_bytes > len(cursor.data):
            raise MalformedModel(
                f"{cursor.path}: tensor {tensor.name} ends at byte {tensor.offset + tensor.num_bytes}, "
                f"the file at {len(cursor.data)}; it was cut off: fetch it again"
            )
