"""The safetensors container, memory-mapped, without the `safetensors` package (whose numpy side has no bfloat16).

Format: 8 bytes of header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import cast

from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.mapping import map_file

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """Where a tensor lies. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path
    entries: Mapping[str, SafetensorsEntry]
    metadata: Mapping[str, str]
    data: mmap.mmap = field(repr=False)
    header_bytes: int = 0


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map a file and parse its header.

    Raises: MalformedModel, UnsupportedModel (element type, naming tensor and type).
    """
    size = path.stat().st_size
    if size < 8:
        raise MalformedModel(f"{path}: {size} bytes are too few for a safetensors file")
    data = map_file(path)
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise MalformedModel(f"{path}: a header of {length} bytes in a file of {size}; fetch the file again")
    header = _parse_header(path, data[8 : 8 + length])
    metadata = cast(dict[str, str], header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    return SafetensorsFile(path, MappingProxyType(entries), MappingProxyType(metadata), data, 8 + length)


def _parse_header(path: Path, text: bytes) -> dict[str, object]:
    try:
        header: object = json.loads(text)
    except ValueError as error:
        raise MalformedModel(f"{path}: the header is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise MalformedModel(f"{path}: the header should be a JSON object")
    return cast(dict[str, object], header)


def _entry(path: Path, name: str, value: object, start: int, size: int) -> SafetensorsEntry:
    try:
        fields = cast(dict[str, object], value)
        dtype = str(fields["dtype"])
        shape = tuple(int(extent) for extent in cast(list[int], fields["shape"]))
        begin, end = cast(list[int], fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedModel(f"{path}: tensor {name} has a damaged entry; fetch the file again") from error
    if dtype not in ITEM_SIZES:
        known = ", ".join(ITEM_SIZES)
        raise UnsupportedModel(f"{path}: tensor {name} has type {dtype}, which is not supported (supported: {known})")
    if end - begin != prod(shape) * ITEM_SIZES[dtype]:
        raise MalformedModel(f"{path}: tensor {name} of {dtype} {shape} has {end - begin} bytes")
    if not 0 <= begin <= end <= size - start:
        raise MalformedModel(f"{path}: tensor {name} ends after the file, which was cut off: fetch it again")
    return SafetensorsEntry(name, dtype, shape, start + begin, end - begin)
