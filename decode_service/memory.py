"""Where KV that this worker fetches arrives: in its KV memory, or on its way into a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.dispatch import KVPlace
from engine.worker import Replica
from kvtransfer.landing import DirectLanding, HostLanding, Landing, StagedLanding
from kvtransfer.nixl_agent import Region
from kvtransfer.staging import DEFAULT_LANDING_BYTES, StagingRing
from kvtransfer.transport import Destination, DeviceBlock
from workerkit.gpu_transfer import device_region, make_ring


@dataclass(frozen=True, slots=True)
class WritableMemory:
    """`region`: what transports write, to be registered; `destination`: of a block by its id; `ring`: what lies between
    transports and a GPU's memory."""

    landing: Landing
    region: memoryview | Region
    destination: Callable[[int], Destination]
    ring: StagingRing | None = None


def make_writable(replica: Replica, staging_bytes: int | None) -> WritableMemory:
    """Raises: StagingUnusable if the ring would hold no block."""
    kv = replica.kv
    if kv.place is KVPlace.HOST:
        return WritableMemory(HostLanding(), kv.buffer, kv.block)
    if replica.identity.digests_on_device:
        return WritableMemory(DirectLanding(kv), device_region(replica), DeviceBlock)
    ring = make_ring(replica, min_slots=1, default_bytes=DEFAULT_LANDING_BYTES, requested_bytes=staging_bytes)
    return WritableMemory(StagedLanding(kv, ring), ring.memory, DeviceBlock, ring)
