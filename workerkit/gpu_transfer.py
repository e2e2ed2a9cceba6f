"""How KV in a GPU's memory leaves and enters a worker: what was asked for, and what is there."""

from __future__ import annotations

import logging

from engine.dispatch import KVPlace
from engine.sizing import read_host_limits
from engine.worker import Replica
from kvtransfer import ucx
from kvtransfer.nixl_agent import NixlError, Region
from kvtransfer.staging import StagingRing, size_of_ring
from workerkit.config import DIRECT, WorkerConfig

log = logging.getLogger(__name__)


def reads_device_memory(config: WorkerConfig) -> bool:
    """Whether KV is read where it lies. Decided before the model is loaded: the digest's kind depends on it.

    Without the means it goes through host memory. Workers that decide differently never pair: their layout
    fingerprints differ, and prompts are prefilled where they are decoded.
    """
    if config.gpu_transfer != DIRECT:
        return False
    try:
        lack = ucx.why_no_device_memory(ucx.resources())
    except NixlError as error:
        lack = str(error)
    if lack:
        log.warning("gpu_transfer = direct cannot be had, KV goes through host memory: %s", lack)
    return not lack


def device_region(replica: Replica) -> Region:
    """The KV in a GPU's memory, to be registered."""
    kv = replica.kv
    assert kv.place is KVPlace.DEVICE
    return Region(kv.address, kv.num_blocks * kv.block_bytes, kv.device_id)


def make_ring(replica: Replica, *, min_slots: int, default_bytes: int, requested_bytes: int | None) -> StagingRing:
    """The staging ring beside a GPU's memory, pinned. Raises: StagingUnusable."""
    kv = replica.kv
    assert kv.place is KVPlace.DEVICE
    size = size_of_ring(
        kv.block_bytes,
        min_slots=min_slots,
        default_bytes=default_bytes,
        max_slots=kv.num_blocks,
        available_bytes=read_host_limits().available_bytes,
        requested_bytes=requested_bytes,
    )
    ring = StagingRing(size.num_slots, kv.block_bytes)
    kv.pin(ring.memory)
    log.info("staging ring: %s", size.explanation)
    return ring
