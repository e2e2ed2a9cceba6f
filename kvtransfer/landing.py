"""D: where the blocks of a pull come to rest, and what the transport writes into until then.

    HostLanding     into their destinations at once
    StagedLanding   into slots of the staging ring, and from there into the device's memory, block by block
    DirectLanding   into the device's memory by one-sided reads; digested by the device

One per worker. `land` runs on a transport's thread, the rest on the event loop, which owns the ring. A block is
reported as read only after `land`, so whatever is verified, and committed, is in place (T2, T3); and a pull does not
end while it lands, so that afterwards nothing writes into the destinations (T1).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from kvtransfer.digest import block_digest
from kvtransfer.staging import DeviceBlocks, StagingRing
from kvtransfer.transport import MAX_OUTSTANDING_BYTES, Destination, DeviceBlock, host_memory


class Landing(Protocol):
    """A decode worker's memory as its pulls see it."""

    @property
    def max_blocks(self) -> int | None:
        """That one pull may have under way; None: what D's credit allows."""
        ...

    @property
    def num_waiting(self) -> int:
        """Pulls that wait for memory."""
        ...

    async def settle(self) -> None:
        """Wait until nobody else writes into blocks that were reserved before the call."""
        ...

    def lend(self, destinations: Sequence[Destination]) -> AbstractAsyncContextManager[Sequence[Destination]]:
        """What the transport may write into, one for each destination, until the context ends."""
        ...

    def land(self, lent: Destination, destination: Destination) -> bytes:
        """A block has arrived in what was lent: bring it to its destination. Returns its digest, as it arrived."""
        ...


class HostLanding:
    """KV in host memory, which transports write themselves."""

    max_blocks = None
    num_waiting = 0

    async def settle(self) -> None:
        """A step writes host memory before it ends."""

    @asynccontextmanager
    async def lend(self, destinations: Sequence[Destination]) -> AsyncGenerator[Sequence[Destination]]:
        yield destinations

    def land(self, lent: Destination, destination: Destination) -> bytes:
        return block_digest(host_memory(lent))


class DirectLanding:
    """KV in the device's memory, registered where it lies."""

    max_blocks = None
    num_waiting = 0

    def __init__(self, device: DeviceBlocks) -> None:
        self._device = device

    async def settle(self) -> None:
        await asyncio.to_thread(self._device.wait_for_writes)

    @asynccontextmanager
    async def lend(self, destinations: Sequence[Destination]) -> AsyncGenerator[Sequence[Destination]]:
        yield destinations

    def land(self, lent: Destination, destination: Destination) -> bytes:
        return self._device.digests([_block_id(destination)])[0]


class StagedLanding:
    """KV in the device's memory, through the ring.

    Each block is copied in by itself: it is one region, and the slots of a pull are full as soon as it ends.
    """

    def __init__(self, device: DeviceBlocks, ring: StagingRing) -> None:
        assert device.block_bytes == ring.block_bytes
        # Half of the ring: one pull is copied in while the next one's blocks arrive.
        self.max_blocks: int | None = max(1, min(ring.num_slots // 2, MAX_OUTSTANDING_BYTES // ring.block_bytes))
        self._device = device
        self._ring = ring
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def settle(self) -> None:
        await asyncio.to_thread(self._device.wait_for_writes)

    @asynccontextmanager
    async def lend(self, destinations: Sequence[Destination]) -> AsyncGenerator[Sequence[Destination]]:
        slots = await self._take(len(destinations))
        try:
            yield [self._ring.block(slot) for slot in slots]
        finally:
            self._give_back(slots)

    def land(self, lent: Destination, destination: Destination) -> bytes:
        arrived = host_memory(lent)
        digest = block_digest(arrived)
        self._device.copy_in([arrived], [_block_id(destination)])
        return digest

    async def _take(self, count: int) -> list[int]:
        """First come, first served. Bounded by the transfer's own deadlines, which cancel the pull."""
        assert count <= self._ring.num_slots
        turn: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove((count, turn))
                self._serve()
            raise

    def _give_back(self, slots: Sequence[int]) -> None:
        self._ring.give_back(slots)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._ring.num_free:
            count, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(self._ring.take(count))


def _block_id(destination: Destination) -> int:
    assert isinstance(destination, DeviceBlock), "a block of the device is meant"
    return destination.block_id
