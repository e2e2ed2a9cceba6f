"""P: from a block that the engine filled to one that can be published, wherever the KV lies.

    HostExposure     transports read the KV memory itself; a digest is all that is missing
    StagedExposure   copied out into the staging ring, digested and published there
    DirectExposure   in the device's memory, for one-sided reads; digested by the device

All of it runs on the digest thread of one PrefillServer, which also is the only owner of the ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.digest import block_digest
from kvtransfer.prefill_events import (
    BackendEvent,
    BlocksFilled,
    FilledBlock,
    PrefillGivenUp,
    PrefillStarting,
    blocks_of,
)
from kvtransfer.prefill_side import ReadyBlock
from kvtransfer.staging import DeviceBlocks, StagingRing
from kvtransfer.transport import BlockSource


class Exposure(Protocol):
    """Between the engine's events and PrefillSide. On the digest thread alone, but for `num_waiting`."""

    @property
    def num_waiting(self) -> int:
        """Prompts that wait for memory."""
        ...

    def arrive(self, event: BackendEvent) -> list[BackendEvent]:
        """What may be made ready now, in order: the event, or nothing as long as it must wait for memory."""
        ...

    def ready(self, event: BackendEvent) -> list[ReadyBlock]:
        """The event's blocks, where transports can read them, with digests."""
        ...

    def release(self, key: int) -> list[BackendEvent]:
        """The ticket of `key` is closed: its blocks may change. Returns what of other prompts need not wait any more.

        Nothing of `key` arrives behind this.
        """
        ...


class HostExposure:
    """KV in host memory: nothing moves, nothing waits."""

    num_waiting = 0

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._digests = _KnownDigests()

    def arrive(self, event: BackendEvent) -> list[BackendEvent]:
        return [event]

    def ready(self, event: BackendEvent) -> list[ReadyBlock]:
        known = self._digests.of(event, lambda missing: [block_digest(self._source.block(b.block_id)) for b in missing])
        return [_ready(block, digest) for block, digest in zip(blocks_of(event), known, strict=True)]

    def release(self, key: int) -> list[BackendEvent]:
        return []


class DirectExposure:
    """KV in the device's memory, registered where it lies."""

    num_waiting = 0

    def __init__(self, device: DeviceBlocks) -> None:
        self._device = device
        self._digests = _KnownDigests()

    def arrive(self, event: BackendEvent) -> list[BackendEvent]:
        if blocks_of(event):
            self._device.wait_for_writes()
        return [event]

    def ready(self, event: BackendEvent) -> list[ReadyBlock]:
        known = self._digests.of(event, lambda missing: self._device.digests([block.block_id for block in missing]))
        return [_ready(block, digest) for block, digest in zip(blocks_of(event), known, strict=True)]

    def release(self, key: int) -> list[BackendEvent]:
        return []


class StagedExposure:
    """KV in the device's memory, published out of the ring. See kvtransfer/staging.py for why nobody waits for ever.

    A prompt that finds the ring full has not started yet as D sees it: D grants no credit, the engine computes nothing.
    """

    def __init__(self, device: DeviceBlocks, ring: StagingRing) -> None:
        assert device.block_bytes == ring.block_bytes
        self._device = device
        self._ring = ring
        self._digests = _KnownDigests()
        self._slots: dict[int, list[int]] = {}  # of prompts that have theirs
        self._num_used: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._held: dict[int, list[BackendEvent]] = {}  # of those that wait; the first is a PrefillStarting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def arrive(self, event: BackendEvent) -> list[BackendEvent]:
        if blocks_of(event):
            self._device.wait_for_writes()  # once, not for each group of blocks
        match event:
            case PrefillStarting():
                if event.num_blocks > self._ring.num_slots:
                    raise ValueError(f"{event.num_blocks} blocks for a ring of {self._ring.num_slots} slots")
                self._waiting.append(event.key)
                self._held[event.key] = [event]
                return self._admit()
            case PrefillGivenUp():
                return [event]  # its release clears what waits
            case _ if event.key in self._held:
                self._held[event.key].append(event)
                return []
            case _:
                return [event]

    def ready(self, event: BackendEvent) -> list[ReadyBlock]:
        blocks = blocks_of(event)
        if not blocks:
            return []
        slots = self._next_slots(event.key, len(blocks))
        places = [self._ring.block(slot) for slot in slots]
        self._device.copy_out([block.block_id for block in blocks], places)
        place_of = {block.block_id: place for block, place in zip(blocks, places, strict=True)}
        known = self._digests.of(event, lambda missing: [block_digest(place_of[b.block_id]) for b in missing])
        return [
            ReadyBlock(block.index, slot, self._ring.generation(slot), block.num_tokens, digest)
            for block, slot, digest in zip(blocks, slots, known, strict=True)
        ]

    def release(self, key: int) -> list[BackendEvent]:
        if self._held.pop(key, None) is not None:
            self._waiting.remove(key)
        self._ring.give_back(self._slots.pop(key, []))
        self._num_used.pop(key, None)
        return self._admit()

    def _admit(self) -> list[BackendEvent]:
        """First come, first served: a short prompt behind a long one waits too, or the long one might for ever."""
        events: list[BackendEvent] = []
        while self._waiting:
            starting = self._held[self._waiting[0]][0]
            assert isinstance(starting, PrefillStarting)
            if starting.num_blocks > self._ring.num_free:
                break
            key = self._waiting.popleft()
            self._slots[key], self._num_used[key] = self._ring.take(starting.num_blocks), 0
            events += self._held.pop(key)
        return events

    def _next_slots(self, key: int, count: int) -> list[int]:
        first = self._num_used[key]
        slots = self._slots[key][first : first + count]
        assert len(slots) == count, f"more blocks than the prompt said: {first} + {count}"
        self._num_used[key] += count
        return slots


class _KnownDigests:
    """A full block that is published again (prefix cache) is not digested again.

    One digest per block id, valid for one generation: the bytes of a full block do not change within it. A tail's do:
    its sequence may go on.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, bytes]] = {}

    def of(self, event: BackendEvent, take: Callable[[Sequence[FilledBlock]], list[bytes]]) -> list[bytes]:
        """Digests of the event's blocks; `take` is asked for those that are not known."""
        blocks = blocks_of(event)
        if not isinstance(event, BlocksFilled):
            return take(blocks) if blocks else []
        missing = [b for b in blocks if self._known.get(b.block_id, (-1, b""))[0] != b.generation]
        if missing:
            for block, digest in zip(missing, take(missing), strict=True):
                self._known[block.block_id] = (block.generation, digest)
        return [self._known[block.block_id][1] for block in blocks]


def _ready(block: FilledBlock, digest: bytes) -> ReadyBlock:
    return ReadyBlock(block.index, block.block_id, block.generation, block.num_tokens, digest)
