"""PullDown as raw protobuf bytes: a megabyte of KV is copied once on each side and never becomes a message object.

The bytes are exactly what baton.proto says (a test compares with the generated code). PullDown is written with its
`data` field last, as every writer of fields in order of their numbers does.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.errors import TransportLost

_INDEX, _OFFSET, _GENERATION = 0x08, 0x10, 0x18  # field numbers 1..3, varint
_DATA = 0x22  # field number 4, length-delimited
MAX_HEADER_BYTES = 4 + 5 + 10 + 10 + 10


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of one block. `data` is a view into the received message."""

    index: int
    offset: int
    generation: int
    data: memoryview


def encode_header(index: int, offset: int, generation: int, num_bytes: int) -> bytes:
    """Everything of a PullDown before its data."""
    header = bytearray()
    for tag, value in ((_INDEX, index), (_OFFSET, offset), (_GENERATION, generation)):
        if value:  # proto3 leaves out zeros
            header.append(tag)
            _append_varint(header, value)
    header.append(_DATA)
    _append_varint(header, num_bytes)
    return bytes(header)


def decode(message: bytes) -> Frame:
    """Parse a PullDown without copying its data.

    Raises: TransportLost if the bytes are not one (`data` must be there, and last).
    """
    fields = {_INDEX: 0, _OFFSET: 0, _GENERATION: 0}
    position = 0
    while position < len(message):
        tag = message[position]
        value, position = _read_varint(message, position + 1)
        if tag == _DATA:
            if position + value != len(message):
                raise TransportLost("a PullDown whose data does not end it")
            return Frame(fields[_INDEX], fields[_OFFSET], fields[_GENERATION], memoryview(message)[position:])
        if tag not in fields:
            raise TransportLost(f"a PullDown with tag {tag}")
        fields[tag] = value
    raise TransportLost("a PullDown without data")


def _append_varint(into: bytearray, value: int) -> None:
    while value > 0x7F:
        into.append(value & 0x7F | 0x80)
        value >>= 7
    into.append(value)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise TransportLost("a PullDown with a broken number")
