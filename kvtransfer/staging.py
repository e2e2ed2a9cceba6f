"""KV that transports may not touch, in a GPU's memory say: how it is named, and the ring of host memory beside it.

    P   filled blocks are copied out into slots of the ring, digested and published there     kvtransfer/exposure.py
    D   published blocks are pulled into slots, digested, copied in; then they are verified   kvtransfer/landing.py

The ring is a memfd, so that every transport works from it as from KV in host memory. A slot has one owner from `take`
to `give_back` and a generation of its own, raised by each `take`, as blocks have: a reader who comes too late notices.

Bounds. P gives a prompt all of its slots when it starts, first come first served, and takes them back when its ticket
closes: what has begun needs nothing more to end, and every ticket ends by a deadline of its own, so whoever waits gets
its turn. One prompt of the greatest length must fit, which `size_of_ring` checks at the start. D needs slots for what
one pull has under way and holds nothing else while it waits for them: one slot is enough.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.transport import MAX_OUTSTANDING_BYTES, sealed_memory

DEFAULT_SOURCE_BYTES = 1 << 30
"""P's ring where it is not stated, unmeasured: what is published and not yet released, for all decode workers."""

DEFAULT_LANDING_BYTES = 2 * MAX_OUTSTANDING_BYTES
"""D's: two windows of credit, so that one is copied in while the next arrives."""


class DeviceBlocks(Protocol):
    """KV blocks on a device (engine.device_kv.DeviceKVMemory). Thread-safe; each call returns when its work is done."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def address(self) -> int:
        """Where block 0 begins, for those who register it."""
        ...

    @property
    def device_id(self) -> int | None:
        """The GPU's number; None: host memory that only its owner touches."""
        ...

    def wait_for_writes(self) -> None:
        """Until the steps that were launched before the call write no block any more."""
        ...

    def copy_out(self, block_ids: Sequence[int], into: Sequence[memoryview]) -> None:
        """Read whole blocks into host memory."""
        ...

    def copy_in(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> None:
        """Write whole blocks from host memory."""
        ...

    def digests(self, block_ids: Sequence[int]) -> list[bytes]:
        """The device's own digest of blocks (not xxh3: layout fingerprints tell the two kinds apart)."""
        ...


class StagingUnusable(ValueError):
    """The ring would not do; the message names what it needs and the setting."""


@dataclass(frozen=True, slots=True)
class RingSize:
    """The decision and its arithmetic in words, for the log."""

    num_slots: int
    explanation: str


def size_of_ring(
    block_bytes: int,
    *,
    min_slots: int,
    default_bytes: int,
    max_slots: int,
    available_bytes: int,
    requested_bytes: int | None,
) -> RingSize:
    """Slots for one worker; without a request the default or, if that is more, the least that works.

    `max_slots` caps it: more could never be used. It must fit in `available_bytes` of the host, for it is pinned.
    Raises: StagingUnusable.
    """
    assert min_slots > 0, min_slots
    if requested_bytes is not None:
        slots = requested_bytes // block_bytes
        explanation = f"asked for {_mib(requested_bytes)} / {block_bytes} bytes per block = {slots} slots"
        if slots < min_slots:
            raise StagingUnusable(
                f"staging_memory: {explanation}, but {min_slots} must fit: give it {min_slots * block_bytes} bytes, or "
                "state a smaller max_model_len"
            )
    else:
        slots = max(min_slots, default_bytes // block_bytes)
        explanation = f"max({_mib(default_bytes)} / {block_bytes} bytes per block, {min_slots}) = {slots} slots"
    capped = max(min_slots, min(slots, max_slots))
    if capped < slots:
        explanation += f", capped at {capped}: more could never be used"
    if capped * block_bytes > available_bytes:
        raise StagingUnusable(
            f"staging_memory: {explanation} = {_mib(capped * block_bytes)}, but {_mib(available_bytes)} of host memory "
            f"are available, and {_mib(min_slots * block_bytes)} would do"
        )
    return RingSize(capped, f"{explanation} = {_mib(capped * block_bytes)}")


class StagingRing:
    """Slots of one block each. Not thread-safe: P's digest thread owns it, or D's event loop.

    Slots are handed out in the order in which they came back: a late reader's is reused last, and what comes back
    together goes out together, as neighbours that one-sided reads merge.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        assert num_slots > 0, num_slots
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self.fd = sealed_memory("baton-staging", num_slots * block_bytes)
        self._mapping = mmap.mmap(self.fd, num_slots * block_bytes)
        self.memory = memoryview(self._mapping)
        self._free = deque(range(num_slots))
        self._is_taken = bytearray(num_slots)
        self._generations = [0] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    def generation(self, slot: int) -> int:
        """How often the slot was taken."""
        return self._generations[slot]

    def block(self, slot: int) -> memoryview:
        """The bytes of a slot, writable."""
        return self.memory[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def take(self, count: int) -> list[int]:
        """Slots for one owner, who has asked `num_free`."""
        assert count <= len(self._free), f"{count} slots asked for, {len(self._free)} free"
        slots = [self._free.popleft() for _ in range(count)]
        for slot in slots:
            self._is_taken[slot] = 1
            self._generations[slot] += 1
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """The owner touches them no more, and neither does who read or wrote them for it."""
        for slot in slots:
            assert self._is_taken[slot], f"slot {slot} was given back twice"
            self._is_taken[slot] = 0
        self._free.extend(slots)

    def close(self) -> None:
        """Give up the file. The mapping lives until its last view is gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _mib(size: int) -> str:
    return f"{size / 1024**2:.0f} MiB"
