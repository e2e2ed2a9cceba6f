"""The memory that KV blocks live in: one tensor, and at the same time bytes that another process can map.

Layout [num_blocks, kv_heads, num_layers, 2, block_size, head_dim]: a block is one contiguous region. Backed by a memfd,
so that a decode worker on the same host maps it read-only and copies blocks without a socket in between. Pages are
taken from the system when they are first written.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from engine.dispatch import KVPlace


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of a model's KV blocks, and the type of their numbers by torch's name."""

    num_kv_heads: int
    num_layers: int
    block_size: int
    head_dim: int
    dtype: str = "float32"

    @property
    def block_bytes(self) -> int:
        item_bytes = getattr(torch, self.dtype).itemsize
        return self.num_kv_heads * self.num_layers * 2 * self.block_size * self.head_dim * item_bytes


def check_shape(shape: KVShape, num_blocks: int) -> None:
    """Raises: ValueError."""
    if shape.block_size < 1 or shape.block_size & (shape.block_size - 1):
        raise ValueError(f"block_size is {shape.block_size}, expected a power of two")
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}, expected at least 1")


class KVMemory:
    """All KV blocks of a worker. `fd` may be passed on; `block(i)` is writable memory of this process.

    With `has_dummy` the tensor has one block more, behind all others: where a step's padding writes.
    """

    place: Final[Literal[KVPlace.HOST]] = KVPlace.HOST

    def __init__(self, shape: KVShape, num_blocks: int, *, has_dummy: bool = False) -> None:
        check_shape(shape, num_blocks)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        self.block_bytes = shape.block_bytes
        num_rows = num_blocks + has_dummy
        self.fd = _anonymous_file(num_rows * self.block_bytes)
        self._mapping = mmap.mmap(self.fd, num_rows * self.block_bytes)
        self.buffer = memoryview(self._mapping)[: num_blocks * self.block_bytes]
        self.tensor: Tensor = torch.frombuffer(self._mapping, dtype=getattr(torch, shape.dtype)).view(
            num_rows, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim
        )

    @property
    def address(self) -> int:
        """Where the first block begins in this process."""
        return self.tensor.data_ptr()

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block, writable."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        return self.buffer[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    def copy_block(self, source: int, destination: int) -> None:
        """Copy-on-write: make `destination` equal to `source`."""
        self.block(destination)[:] = self.block(source)

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots from `first_slot` on in every layer, so that a tail block tells nothing of earlier tenants."""
        self.tensor[block_id, :, :, :, first_slot:].zero_()

    def close(self) -> None:
        """Give up the file. The mapping itself lives until the tensor and all views are gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _anonymous_file(size: int) -> int:
    """A file without a name: it is gone when the last process that holds it ends, however that ends."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        # A worker that maps it is killed when it reads what was cut off (SIGBUS): none maps what could shrink.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
