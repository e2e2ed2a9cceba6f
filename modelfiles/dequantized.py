"""A quantised GGUF model as one float32 file in the model cache, made once and mapped by every worker of the host.

SmolLM2's 98 MB of 4-bit blocks become 538 MB that the page cache holds once, however many workers run. The file is
safetensors with a checksum per tensor in its metadata. Checking them costs 40 ms for SmolLM2 (docs/log.md), reads the
pages that the worker needs next, and makes fsync unnecessary: a file that a power cut tore is found and made again.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import xxhash

from modelfiles.cache import exclusive, explained, sweep_temporaries, temporary_path
from modelfiles.errors import ModelFilesError
from modelfiles.gguf_file import TensorType
from modelfiles.quantization import Bytes, Floats, dequantize_chunks
from modelfiles.safetensors_file import SafetensorsEntry, SafetensorsFile, read_safetensors

_ALIGNMENT = 64  # a cache line; torch wants no more
_CHECKSUM = "xxh3_64:"
_NO_CHECKSUM = "0" * 16
_VERSION = 1

Write: TypeAlias = Callable[[int, Floats], None]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A tensor to dequantise: its Hugging Face name, its blocks in row order, and the shape that they fill."""

    name: str
    shape: tuple[int, ...]
    tensor_type: TensorType
    raw: Callable[[], Bytes]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * 4


def open_dequantized(
    tensors: Sequence[QuantizedTensor], digest: str, cache_dir: Path, num_threads: int
) -> SafetensorsFile:
    """Map the float32 file of the model with this digest; make it first where it is not there or is damaged.

    Raises: CacheError (not writable, disk full).
    """
    final = cache_dir / "dequantized" / f"{digest}-f32-v{_VERSION}.safetensors"
    found = _open_if_sound(final, num_threads)
    if found is not None:
        return found
    with exclusive(final.with_suffix(".lock")):
        found = _open_if_sound(final, num_threads)  # another worker of this host may have been faster
        if found is not None:
            return found
        with explained(final.parent):
            _write_file(tensors, final, num_threads)
        return read_safetensors(final)


def dequantize_in_memory(tensor: QuantizedTensor) -> Floats:
    """For hosts without a writable cache: each process then holds its own copy."""
    out = np.empty(prod(tensor.shape), np.float32)
    position = 0
    for piece in dequantize_chunks(tensor.tensor_type, tensor.raw()):
        out[position : position + piece.size] = piece
        position += piece.size
    return out.reshape(tensor.shape)


def _open_if_sound(path: Path, num_threads: int) -> SafetensorsFile | None:
    if not path.is_file():
        return None
    try:
        file = read_safetensors(path)
    except ModelFilesError:  # whatever is wrong with it, it is made again
        return None
    with ThreadPoolExecutor(num_threads) as pool:
        return file if all(pool.map(partial(_is_sound, file), file.entries.values())) else None


def _is_sound(file: SafetensorsFile, entry: SafetensorsEntry) -> bool:
    content = memoryview(file.data)[entry.offset : entry.offset + entry.num_bytes]
    return xxhash.xxh3_64_hexdigest(content) == file.metadata.get(_CHECKSUM + entry.name)


def _write_file(tensors: Sequence[QuantizedTensor], final: Path, num_threads: int) -> None:
    """Largest tensors first, so that no thread is left with the embedding at the end. The header comes last."""
    sweep_temporaries(final)
    temporary = temporary_path(final)
    checksums = {tensor.name: _NO_CHECKSUM for tensor in tensors}
    start = len(_header(tensors, checksums))
    offsets = _offsets(tensors, start)
    descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, start + sum(tensor.num_bytes for tensor in tensors))
        largest_first = sorted(tensors, key=lambda tensor: -tensor.num_bytes)
        with ThreadPoolExecutor(num_threads) as pool:
            digests = pool.map(partial(_write_tensor, descriptor, offsets), largest_first)
            checksums.update(zip((tensor.name for tensor in largest_first), digests, strict=True))
        _write_whole(descriptor, memoryview(_header(tensors, checksums)), 0)
        os.rename(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, offsets: Mapping[str, int], tensor: QuantizedTensor) -> str:
    offset = offsets[tensor.name]
    checksum = xxhash.xxh3_64()
    for piece in dequantize_chunks(tensor.tensor_type, tensor.raw()):
        content = piece.data.cast("B")
        checksum.update(content)
        _write_whole(descriptor, content, offset)
        offset += len(content)
    return checksum.hexdigest()


def _write_whole(descriptor: int, content: memoryview, offset: int) -> None:
    """write(2) may stop early at 2 GiB, at a signal, or just before a full disk says so."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _offsets(tensors: Sequence[QuantizedTensor], start: int) -> dict[str, int]:
    offsets = dict[str, int]()
    for tensor in tensors:
        offsets[tensor.name] = start
        start += tensor.num_bytes
    return offsets


def _header(tensors: Sequence[QuantizedTensor], checksums: dict[str, str]) -> bytes:
    """Its length depends on names and shapes only: checksums have a fixed width."""
    entries: dict[str, object] = {"__metadata__": {_CHECKSUM + name: value for name, value in checksums.items()}}
    begins = _offsets(tensors, 0)
    for tensor in tensors:
        begin = begins[tensor.name]
        entries[tensor.name] = {
            "dtype": "F32",
            "shape": tensor.shape,
            "data_offsets": [begin, begin + tensor.num_bytes],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
