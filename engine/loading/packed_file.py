"""One file per host with a model's packed weights, mapped read-only by every worker.

    header: magic, number of pieces, bytes of the weights, a checksum per piece, a checksum of the header
    weights: as `PackedLayout` says, from a page boundary on

Made once, under a lock, beside its final name. A worker checks size and checksums before it uses a file: that reads
the pages that it needs next, and makes fsync unnecessary, since a file that a power cut tore is found and made again.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from engine.kernels.native.library import Library
from engine.loading.layout import PackedLayout, Piece
from engine.loading.pack import OnFraction, pack_pieces
from engine.models.weights import SourceTensor
from modelfiles.cache import exclusive, explained, sweep_temporaries, temporary_path

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the bytes would differ for the same model and panel format: layout, packing, dequantisation."""

_MAGIC = b"BATONPK1"
_PAGE = 65536  # the largest page size that Linux has on our machines (aarch64)
_FIXED = struct.Struct("<8sQQ")
_CHECKSUM = struct.Struct("<Q")
_HUGE_PAGE = 2 * 1024**2
_ZEROS = bytes(_HUGE_PAGE)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Where the packed weights of a model (by its digest) lie in a cache folder."""

    folder: Path
    model_digest: str
    layout: PackedLayout

    @property
    def path(self) -> Path:
        return self.folder / f"{self._stem}-{self.layout.format}-v{VERSION}.weights"

    def open_or_make(
        self, weights: Mapping[str, SourceTensor], library: Library, num_threads: int, on_fraction: OnFraction
    ) -> mmap.mmap:
        """The weights, mapped read-only. Where the file is missing or damaged, one process of the host makes it.

        Raises: CacheError (not writable, disk full).
        """
        found = self._open_if_sound(num_threads)
        if found is not None:
            return found
        with exclusive(self.path.with_suffix(".lock"), lambda: on_fraction(self.fraction_of_another())):
            found = self._open_if_sound(num_threads)  # another worker of this host may have been faster
            if found is None:
                with explained(self.folder):
                    self._make(weights, library, num_threads, on_fraction)
                    self._sweep_other_versions()
                    found = self._map()
        return found

    @property
    def _stem(self) -> str:
        return self.model_digest[:32]

    @property
    def _start(self) -> int:
        """Bytes of the header, whole pages."""
        size = _FIXED.size + (len(self.layout.pieces()) + 1) * _CHECKSUM.size
        return -(-size // _PAGE) * _PAGE

    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(
                file.fileno(), self.layout.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._start
            )
        if hasattr(mmap, "MADV_HUGEPAGE"):  # where the disk must be read, it is read in huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    def _open_if_sound(self, num_threads: int) -> mmap.mmap | None:
        pieces = self.layout.pieces()
        try:
            if self.path.stat().st_size != self._start + self.layout.num_bytes:
                return None
            with open(self.path, "rb") as file:
                checksums = _parse_header(file.read(self._start), len(pieces), self.layout.num_bytes)
            mapping = self._map() if checksums is not None else None
        except OSError:  # whatever is wrong with it, it is made again
            return None
        if checksums is None or mapping is None:
            return None
        content = memoryview(mapping)

        def is_sound(piece: Piece, checksum: int) -> bool:
            return xxhash.xxh3_64_intdigest(content[piece.offset : piece.offset + piece.num_bytes]) == checksum

        with ThreadPoolExecutor(num_threads, "verify") as pool:
            if all(pool.map(is_sound, pieces, checksums)):
                return mapping
        log.warning("packed weights are damaged and are made again: %s", self.path)
        return None

    def _make(
        self, weights: Mapping[str, SourceTensor], library: Library, num_threads: int, on_fraction: OnFraction
    ) -> None:
        began = time.monotonic()
        sweep_temporaries(self.path)
        temporary = temporary_path(self.path)
        start, checksums = self._start, [0] * len(self.layout.pieces())
        descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o644)

        extend = _HugePages(descriptor, start + self.layout.num_bytes).extend

        def write(i: int, piece: Piece, content: memoryview) -> None:
            checksums[i] = xxhash.xxh3_64_intdigest(content)
            extend(start + piece.offset + piece.num_bytes)
            _write_whole(descriptor, content, start + piece.offset)

        try:
            pack_pieces(self.layout, weights, library, num_threads, write, on_fraction)
            extend(start + self.layout.num_bytes)
            _write_whole(descriptor, memoryview(_format_header(checksums, self.layout.num_bytes)), 0)
            os.rename(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        seconds = round(time.monotonic() - began, 2)
        log.info("packed weights written: %s", self.path, extra={"seconds": seconds, "bytes": self.layout.num_bytes})

    def fraction_of_another(self) -> float:
        """How far the process that holds the lock is: what its file occupies by now."""
        for part in self.folder.glob(f".{self.path.name}.*.tmp"):
            try:
                return min(1.0, part.stat().st_blocks * 512 / self.layout.num_bytes)
            except FileNotFoundError:
                continue
        return 0.0

    def _sweep_other_versions(self) -> None:
        """Nobody but an older Baton reads them; one that still runs keeps its mapping."""
        for path in self.folder.glob(f"{self._stem}-{self.layout.format}-v*"):
            if path.stem != self.path.stem:
                path.unlink(missing_ok=True)


class _HugePages:
    """Extends a file by whole huge pages of zeros, ahead of what is written to it.

    ext4 and xfs choose the size of page cache pages at the first write. Pieces end anywhere, so that writing them alone
    left half of SmolLM2's file in small pages, and a decode step 4 to 9 % slower (docs/log.md).
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._lock = threading.Lock()
        self._extended = 0

    def extend(self, end: int) -> None:
        """Make the file at least `end` long. What lies below an earlier `end` is not touched again."""
        with self._lock:
            while self._extended < end:
                count = min(_HUGE_PAGE, self._size - self._extended)
                _write_whole(self._descriptor, memoryview(_ZEROS)[:count], self._extended)
                self._extended += count


def _format_header(checksums: list[int], num_bytes: int) -> bytes:
    body = _FIXED.pack(_MAGIC, len(checksums), num_bytes) + b"".join(map(_CHECKSUM.pack, checksums))
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def _parse_header(header: bytes, num_pieces: int, num_bytes: int) -> list[int] | None:
    """The checksums, or None for a header of something else."""
    end = _FIXED.size + num_pieces * _CHECKSUM.size
    if header[: _FIXED.size] != _FIXED.pack(_MAGIC, num_pieces, num_bytes):
        return None
    if _CHECKSUM.unpack_from(header, end)[0] != xxhash.xxh3_64_intdigest(header[:end]):
        return None
    return [checksum for (checksum,) in _CHECKSUM.iter_unpack(header[_FIXED.size : end])]


def _write_whole(descriptor: int, content: memoryview, offset: int) -> None:
    """write(2) may stop early at 2 GiB, at a signal, or just before a full disk says so."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
