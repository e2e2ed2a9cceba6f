"""A transport that misbehaves on order: wraps a real one and damages what it delivers. Ships for tests and chaos runs.

Every fault is one that the verification above the transports must catch (T2) or the deadlines must end (T7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from kvtransfer.errors import TransportLost
from kvtransfer.transport import BlockPuller, BlockRead, BlockTransport, Destination, OnRead, SourceBlock, host_memory


class Fault(Enum):
    CORRUPT = "corrupt"  # one bit of the destination is flipped
    TRUNCATE = "truncate"  # the last byte did not arrive
    STALE_GENERATION = "stale_generation"  # the block was reused while it was read
    OTHER_BOOT = "other_boot"  # another incarnation's memory was read
    SWAP = "swap"  # the bytes of the next block of the same pull
    DUPLICATE = "duplicate"  # reported twice
    DROP = "drop"  # never reported, and the pull never ends
    LOSE = "lose"  # the connection breaks
    DELAY = "delay"  # the whole pull waits for `FaultyTransport.resume`


@dataclass(slots=True)
class FaultPlan:
    """Which block, counted over all pulls from 0, suffers which fault."""

    faults: dict[int, Fault]
    num_seen: int = 0

    def next(self) -> Fault | None:
        fault = self.faults.get(self.num_seen)
        self.num_seen += 1
        return fault


class FaultyTransport:
    """A BlockTransport whose pulls follow a FaultPlan."""

    def __init__(self, inner: BlockTransport, plan: FaultPlan) -> None:
        self.resume = asyncio.Event()
        self._inner = inner
        self._plan = plan

    @property
    def name(self) -> str:
        return self._inner.name

    async def warm_up(self) -> None:
        await self._inner.warm_up()

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        return _FaultyPuller(await self._inner.open(ticket, boot_id), self._plan, self.resume)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _FaultyPuller:
    def __init__(self, inner: BlockPuller, plan: FaultPlan, resume: asyncio.Event) -> None:
        self._inner = inner
        self._plan = plan
        self._resume = resume

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        for position, block in enumerate(blocks):
            await self._pull_one(self._plan.next(), block, blocks, destinations, position, on_read)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _pull_one(
        self,
        fault: Fault | None,
        block: SourceBlock,
        blocks: Sequence[SourceBlock],
        destinations: Sequence[Destination],
        position: int,
        on_read: OnRead,
    ) -> None:
        destination = destinations[position]
        source = block
        if fault is Fault.DELAY:
            await self._resume.wait()
        elif fault is Fault.DROP:
            await asyncio.Event().wait()  # until cancelled
        elif fault is Fault.LOSE:
            raise TransportLost("fault injected")
        elif fault is Fault.SWAP:
            source = blocks[(position + 1) % len(blocks)]
        await self._inner.pull([source], [destination], self._damaging(fault, block, destination, on_read))

    def _damaging(self, fault: Fault | None, block: SourceBlock, destination: Destination, on_read: OnRead) -> OnRead:
        damage: Callable[[BlockRead], Iterator[BlockRead]] = _DAMAGE.get(fault, _nothing) if fault else _nothing

        def damaged(read: BlockRead) -> None:
            if fault is Fault.CORRUPT:
                arrived = host_memory(destination)
                arrived[block.index % arrived.nbytes] ^= 1
            if fault is Fault.SWAP:
                read = replace(read, index=block.index, generation=block.generation)
            for reported in damage(read):
                on_read(reported)

        return damaged


def _nothing(read: BlockRead) -> Iterator[BlockRead]:
    yield read


def _truncated(read: BlockRead) -> Iterator[BlockRead]:
    yield replace(read, num_bytes=read.num_bytes - 1)


def _stale(read: BlockRead) -> Iterator[BlockRead]:
    yield replace(read, generation=read.generation + 1)


def _other_boot(read: BlockRead) -> Iterator[BlockRead]:
    yield replace(read, boot_id=bytes(len(read.boot_id)))


def _twice(read: BlockRead) -> Iterator[BlockRead]:
    yield read
    yield read


_DAMAGE = {
    Fault.TRUNCATE: _truncated,
    Fault.STALE_GENERATION: _stale,
    Fault.OTHER_BOOT: _other_boot,
    Fault.DUPLICATE: _twice,
}
