"""What decode workers may read of this worker: its KV memory, the staging ring beside a GPU's, or the GPU's itself."""

from __future__ import annotations

from dataclasses import dataclass

from engine.dispatch import KVPlace
from engine.worker import Replica
from kvtransfer.exposure import DirectExposure, Exposure, HostExposure, StagedExposure
from kvtransfer.nixl_agent import Region
from kvtransfer.staging import DEFAULT_SOURCE_BYTES, StagingRing
from kvtransfer.transport import BlockSource
from prefill_service.faults import FaultyBlockSource
from servicekit.failpoints import Failpoints
from workerkit.gpu_transfer import device_region, make_ring


@dataclass(frozen=True, slots=True)
class ReadableMemory:
    """`fd`: the memfd behind the source's blocks; `device`: where they are if that is not this process's memory;
    `ring`: what lies between."""

    source: BlockSource
    exposure: Exposure
    fd: int | None = None
    device: Region | None = None
    ring: StagingRing | None = None


def make_readable(
    replica: Replica, boot_id: bytes, failpoints: Failpoints, staging_bytes: int | None
) -> ReadableMemory:
    """Raises: StagingUnusable if the ring would not hold the longest prompt."""
    kv, identity = replica.kv, replica.identity
    if kv.place is KVPlace.HOST:
        source = _source(kv.buffer, identity.block_bytes, boot_id, failpoints)
        return ReadableMemory(source, HostExposure(source), fd=kv.fd)
    if identity.digests_on_device:
        source = BlockSource(kv.num_blocks, identity.block_bytes, boot_id)
        return ReadableMemory(source, DirectExposure(kv), device=device_region(replica))
    longest = -(-identity.max_model_len // identity.block_size)
    ring = make_ring(replica, min_slots=longest, default_bytes=DEFAULT_SOURCE_BYTES, requested_bytes=staging_bytes)
    source = _source(ring.memory, identity.block_bytes, boot_id, failpoints)
    return ReadableMemory(source, StagedExposure(kv, ring), fd=ring.fd, ring=ring)


def _source(memory: memoryview, block_bytes: int, boot_id: bytes, failpoints: Failpoints) -> BlockSource:
    if failpoints.active:
        return FaultyBlockSource(memory, block_bytes, boot_id, failpoints)
    return BlockSource(memory, block_bytes, boot_id)
