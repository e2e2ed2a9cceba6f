"""KV blocks in a GPU's memory, and every CUDA call that sizing and moving them takes.

The tensor is laid out as in kv_memory.py, so a block is one region here too, and moves in one copy. One block more lies
at its end: `dummy_block`, which no pool hands out and padded rows of a CUDA graph may write.

Any torch device will do. On the CPU this is memory that no transport can see: the whole way of a hand-over through the
staging ring (kvtransfer/staging.py) is tested so. On a GPU it is unmeasured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from engine.dispatch import KVPlace
from engine.kernels.block_digest import reference as digest_reference
from engine.kv_memory import KVShape, check_shape

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of a GPU, as its driver says: all processes count."""

    free_bytes: int
    total_bytes: int


def read_device_memory(device: torch.device) -> DeviceMemory:
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, total)


class DeviceKVMemory:
    """All KV blocks of a worker in a device's memory. As kvtransfer sees it: a kvtransfer.staging.DeviceBlocks."""

    place: Final[Literal[KVPlace.DEVICE]] = KVPlace.DEVICE

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        """Raises: ValueError for a shape that cannot be, torch.OutOfMemoryError."""
        check_shape(shape, num_blocks)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        self.block_bytes = shape.block_bytes
        self.dummy_block = num_blocks
        # Zeros: where memory is not initialised there may be a NaN, which no mask multiplies away.
        self.tensor: Tensor = torch.zeros(
            (num_blocks + 1, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim),
            dtype=getattr(torch, shape.dtype),
            device=device,
        )
        self._device = self.tensor.device
        self._rows = self.tensor.view(torch.uint8).view(num_blocks + 1, self.block_bytes)
        self._copies = torch.cuda.Stream(self._device) if self._is_cuda else None

    @property
    def address(self) -> int:
        """Where the first block begins, in the device's memory."""
        return self.tensor.data_ptr()

    @property
    def device_id(self) -> int | None:
        """The GPU's number; None on the CPU."""
        return self._device.index if self._is_cuda else None

    @property
    def architecture(self) -> str:
        """What the numbers in it depend on, beside the kernels."""
        if not self._is_cuda:
            return self._device.type
        major, minor = torch.cuda.get_device_capability(self._device)
        return f"sm_{major}{minor}"

    # ------------------------------------------------------------ for the runner, on the engine's thread

    def copy_block(self, source: int, destination: int) -> None:
        """Copy-on-write: make `destination` equal to `source`."""
        self._rows[destination].copy_(self._rows[source])

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots from `first_slot` on in every layer, so that a tail block tells nothing of earlier tenants."""
        self.tensor[block_id, :, :, :, first_slot:].zero_()

    # ------------------------------------------------------------ for transfers, on any thread

    def wait_for_writes(self) -> None:
        """Until the steps that were launched before the call write no block any more.

        A runner that is a step ahead may still write a block that the engine has given away since, or has told as
        filled. Steps run on the default stream. Costs this thread the rest of the step under way, and the engine
        nothing: no step behind it waits.
        """
        if self._is_cuda:
            torch.cuda.default_stream(self._device).record_event().synchronize()

    def copy_out(self, block_ids: Sequence[int], into: Sequence[memoryview]) -> None:
        """Read whole blocks into host memory; returns when they are there. Asynchronous side by side where pinned."""
        with torch.cuda.stream(self._copies):
            for block_id, memory in zip(block_ids, into, strict=True):
                _bytes(memory).copy_(self._row(block_id), non_blocking=True)
        self._finish_copies()

    def copy_in(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> None:
        """Write whole blocks from host memory; returns when they are there, before any step that reads them."""
        with torch.cuda.stream(self._copies):
            for memory, block_id in zip(sources, block_ids, strict=True):
                self._row(block_id).copy_(_bytes(memory), non_blocking=True)
        self._finish_copies()

    def digests(self, block_ids: Sequence[int]) -> list[bytes]:
        """By the block_digest kernel where the blocks are; on the CPU by its reference, which is the same function."""
        if not self._is_cuda:
            return [digest_reference.block_digest(self._row(block_id).numpy().data) for block_id in block_ids]
        from engine.kernels.block_digest.launch import block_digest  # imports Triton, which a machine may lack

        with torch.cuda.stream(self._copies):
            wanted = torch.tensor(block_ids, dtype=torch.int32, device=self._device)
            digests = block_digest(self.tensor, wanted).cpu().numpy()
        return [digest.tobytes() for digest in digests]

    def pin(self, memory: memoryview) -> None:
        """Let the device read and write this host memory by itself. Without it copies go through the driver's own."""
        if not self._is_cuda:
            return
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(address, memory.nbytes, 0)
        if int(status):
            log.warning("the staging ring is not pinned (cudaHostRegister: %s): copies are slower", status)

    # ------------------------------------------------------------ parts

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _row(self, block_id: int) -> Tensor:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        return self._rows[block_id]

    def _finish_copies(self) -> None:
        """The stream is shared by the threads of a transport: one may wait for what another has begun."""
        if self._copies is not None:
            self._copies.synchronize()


def _bytes(memory: memoryview) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
