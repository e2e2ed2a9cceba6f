"""The transport inside one process: the fake that tests use, and what an all-in-one process would use.

Same duties as the others: tickets are joined, pieces are bounded, a cancelled pull lets go, `on_read` per block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvtransfer.errors import TransportLost
from kvtransfer.transport import (
    MAX_PIECE_BYTES,
    BlockPuller,
    BlockRead,
    BlockSource,
    Destination,
    OnRead,
    SourceBlock,
    host_memory,
)


class MemoryBlockTransport:
    """D's end; reads straight from the source of the same process."""

    name = "memory"

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._is_closed = False

    async def warm_up(self) -> None:
        """There is nothing to connect."""

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        if self._is_closed:
            raise TransportLost("the transport is closed")
        self._source.join(ticket, boot_id)
        return _MemoryPuller(self._source, ticket)

    async def aclose(self) -> None:
        self._is_closed = True


class _MemoryPuller:
    def __init__(self, source: BlockSource, ticket: bytes) -> None:
        self._source = source
        self._ticket = ticket

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        for block, destination in zip(blocks, destinations, strict=True):
            on_read(await self._copy(block, host_memory(destination)))

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _copy(self, block: SourceBlock, destination: memoryview) -> BlockRead:
        source = self._source
        assert destination.nbytes == source.block_bytes
        for offset in range(0, source.block_bytes, MAX_PIECE_BYTES):
            await asyncio.sleep(0)  # where a cancel arrives
            published = source.lookup(self._ticket, block.index)
            end = min(offset + MAX_PIECE_BYTES, source.block_bytes)
            destination[offset:end] = source.block(published.block_id)[offset:end]
        generation = source.generation_table[source.lookup(self._ticket, block.index).block_id]
        return BlockRead(block.index, source.boot_id, generation, source.block_bytes)
