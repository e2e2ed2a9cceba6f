"""The transport seam: how the bytes of published blocks get from P's memory into D's.

    P: BlockSource     one per worker: which ticket may read which block, and the memory itself
    D: BlockTransport  one per (D, P) pair and kind of transport; opens a BlockPuller per ticket
       BlockPuller     moves blocks into destinations that the caller owns

Transports only move bytes and report what they saw (`BlockRead`); nothing here decides whether the bytes are right.
That is done once, above all transports: the digest is taken over the destination in `on_read`, and boot id,
generation, length and digest are compared by kvtransfer.decode_side. Every transport passes
tests/contract/test_transport_contract.py:

    memory   in process, the fake that ships                     kvtransfer/memory_transport.py
    grpc     Pull calls, over any network                        kvtransfer/grpc_transport.py
    shm      one host: P's memfd mapped read-only, D copies      kvtransfer/shm_transport.py
    nixl     one-sided reads over UCX, RDMA where there is any   kvtransfer/nixl_transport.py
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from kvtransfer import frames
from kvtransfer.errors import BlockNotPublished, TicketRefused, TransportLost

MAX_PIECE_BYTES = 1 << 20
"""Largest piece of a block in one message or one copy: the bound on how long a cancel waits."""

MAX_OUTSTANDING_BYTES = 64 << 20
"""Largest sum of published blocks that D has granted credit for and not yet verified."""

TICKET_BYTES = 16
BOOT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A published block in P's memory, as P announced it."""

    index: int  # position in the prompt, in blocks
    block_id: int
    generation: int


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """A block of D's in a memory that only one-sided reads can write, a GPU's."""

    block_id: int


Destination = memoryview | DeviceBlock
"""Where a block goes. Transports that copy write memory of their own process only."""


def host_memory(destination: Destination) -> memoryview:
    """The destination as a transport needs it that copies."""
    assert isinstance(destination, memoryview), f"{destination} cannot be copied into"
    return destination


@dataclass(frozen=True, slots=True)
class BlockRead:
    """What a transport saw while it moved one block; compared with the announcement by decode_side."""

    index: int
    boot_id: bytes  # of the process whose memory was read
    generation: int  # of the block, read after its last byte was copied
    num_bytes: int  # that arrived


OnRead = Callable[[BlockRead], None]
"""Called once per block, in order, as soon as its last byte is in place, on the transport's own thread (so that the
digest is taken while the bytes are in its cache). Must not raise for wrong bytes; if it raises, the pull fails."""


class BlockPuller(Protocol):
    """D's end of one ticket. Not for concurrent pulls."""

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        """Copy each block into its destination (writable, contiguous, exactly one block long).

        Ownership: from the moment this returns, raises or is cancelled, nothing writes into the destinations; a
        cancelled pull ends within the time of one piece.
        Raises: TicketRefused, BlockNotPublished, TransportLost. Afterwards the puller is only good for closing.
        """
        ...

    async def aclose(self) -> None:
        """Give the ticket's data path back. Idempotent."""
        ...


_T = TypeVar("_T")


async def on_thread(threads: ThreadPoolExecutor, work: Callable[[], _T], stop: Callable[[], None]) -> _T:
    """Run `work` on a transport's own thread. When cancelled, `stop` it and wait until the thread has let go.

    Raises: TransportLost if the threads were shut down; whatever `work` raises.
    """
    try:
        task = threads.submit(work)
    except RuntimeError as error:
        raise TransportLost("the transport is closed") from error
    running = asyncio.wrap_future(task)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop()
        if not task.cancel():
            await _until_let_go(running)
        raise


async def _until_let_go(copying: asyncio.Future[Any]) -> None:
    """Wait for a copy thread to end, however often we are cancelled meanwhile: it writes where others would read."""
    while not copying.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([copying])
    if not copying.cancelled():
        copying.exception()  # retrieved: who asked to stop is not told why it stopped


class BlockTransport(Protocol):
    """D's end of one way to one prefill worker's memory."""

    @property
    def name(self) -> str: ...

    async def warm_up(self) -> None:
        """Do what the first transfer would have to wait for. Bounded in time. Raises: TransportLost."""
        ...

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        """Join a ticket of the worker incarnation `boot_id`. A ticket can be joined once.

        Raises: TicketRefused, TransportLost.
        """
        ...

    async def aclose(self) -> None: ...


@dataclass(slots=True)
class _OpenTicket:
    blocks: dict[int, SourceBlock] = field(default_factory=dict[int, SourceBlock])
    path: bytes | None = None  # the data path that joined it


class BlockSource:
    """P's end for all transports: serves published blocks of joined tickets from one memory region.

    Thread-safe. Owns no KV: `memory` is borrowed for the life of the process. A ticket is opened when it is minted,
    published into after each chunk, and closed before its blocks lose their transfer owner: when `close` has returned,
    no read of the ticket through this object is under way, and `generation_table` no longer names generations that only
    this ticket had published (a same-host reader sees that after its copy).
    """

    def __init__(self, memory: memoryview | int, block_bytes: int, boot_id: bytes) -> None:
        """`memory`: the blocks, or how many there are of them in a memory that is not this process's to read."""
        assert block_bytes > 0, block_bytes
        assert len(boot_id) == BOOT_ID_BYTES
        self.boot_id = boot_id
        self.block_bytes = block_bytes
        if isinstance(memory, memoryview):
            assert memory.nbytes % block_bytes == 0, (memory.nbytes, block_bytes)
            self.num_blocks = memory.nbytes // block_bytes
            self._memory = memory.cast("B")
        else:
            self.num_blocks = memory
            self._memory = None
        self._lock = threading.Lock()
        self._tickets: dict[bytes, _OpenTicket] = {}
        self._num_publications = [0] * self.num_blocks
        self.generation_table = GenerationTable(self.num_blocks, boot_id)

    @property
    def address(self) -> int:
        """Where block 0 begins in this process."""
        assert self._memory is not None, "the blocks are not in this process's memory"
        return address_of(self._memory)

    def open(self, ticket: bytes) -> None:
        with self._lock:
            assert ticket not in self._tickets, "a ticket is minted once"
            self._tickets[ticket] = _OpenTicket()

    def publish(self, ticket: bytes, blocks: Iterable[SourceBlock]) -> None:
        """Let the holder of `ticket` read these blocks. Their bytes do not change until `close`."""
        with self._lock:
            published = self._tickets[ticket].blocks
            for block in blocks:
                assert block.index not in published, f"block {block.index} was published twice"
                published[block.index] = block
                self._num_publications[block.block_id] += 1
                self.generation_table[block.block_id] = block.generation

    def close(self, ticket: bytes) -> None:
        """Forget the ticket and end its reads. Idempotent."""
        with self._lock:
            closed = self._tickets.pop(ticket, None)
            for block in closed.blocks.values() if closed is not None else ():
                self._num_publications[block.block_id] -= 1
                if self._num_publications[block.block_id] == 0:
                    self.generation_table[block.block_id] = NOT_PUBLISHED

    def join(self, ticket: bytes, boot_id: bytes, path: bytes = b"") -> None:
        """Bind the one data path of a ticket to it. A path with a name may say so again; others come too late.

        Raises: TicketRefused if the ticket is unknown, closed or joined before, or meant for another incarnation.
        """
        with self._lock:
            opened = self._tickets.get(ticket)
            if opened is None or not hmac.compare_digest(boot_id, self.boot_id):
                raise TicketRefused("unknown, used or closed ticket")
            if opened.path is not None and not (path and hmac.compare_digest(path, opened.path)):
                raise TicketRefused("unknown, used or closed ticket")
            opened.path = path

    def lookup(self, ticket: bytes, index: int) -> SourceBlock:
        """The published block at `index`.

        Raises: TicketRefused once the ticket is closed, BlockNotPublished.
        """
        with self._lock:
            return self._lookup(ticket, index)

    def read_frame(self, ticket: bytes, index: int, offset: int, length: int) -> bytes:
        """A piece of a block as one PullDown message, made with one copy.

        The lock is held over the copy of at most MAX_PIECE_BYTES, so that `close` waits for it, and so that the
        generation in the header is the one that the bytes had.
        Raises: TicketRefused, BlockNotPublished.
        """
        assert 0 < length <= MAX_PIECE_BYTES, length
        with self._lock:
            block = self._lookup(ticket, index)
            if self._memory is None:
                raise BlockNotPublished("blocks in a device's memory are read one-sidedly, and no other way")
            start = block.block_id * self.block_bytes + offset
            header = frames.encode_header(index, offset, self.generation_table[block.block_id], length)
            return b"".join((header, self._memory[start : start + length]))

    def block(self, block_id: int) -> memoryview:
        """The bytes of a block (to digest them before they are published)."""
        assert self._memory is not None, "the blocks are not in this process's memory"
        return self._memory[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    @property
    def num_open_tickets(self) -> int:
        with self._lock:
            return len(self._tickets)

    def _lookup(self, ticket: bytes, index: int) -> SourceBlock:
        opened = self._tickets.get(ticket)
        if opened is None or opened.path is None:
            raise TicketRefused("unknown, unjoined or closed ticket")
        block = opened.blocks.get(index)
        if block is None:
            raise BlockNotPublished(f"block {index} is not published under this ticket")
        return block


def address_of(memory: memoryview) -> int:
    """Where the memory begins in this process, for those who are told addresses."""
    return np.frombuffer(memory, np.uint8).ctypes.data


def sealed_memory(name: str, num_bytes: int) -> int:
    """A memfd of a size that nobody can change any more: a reader of what was cut off would be killed (SIGBUS)."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


NOT_PUBLISHED = 2**64 - 1
"""Entry of the generation table for a block that no open ticket has published."""


class GenerationTable:
    """One 64-bit generation per block in a memfd, so that readers on the same host see it change under their copy.

    The boot id follows the last: who reads this memory from afar learns whose it is. Written by P only. An aligned
    64-bit store is atomic on every platform we run on.
    """

    def __init__(self, num_blocks: int, boot_id: bytes) -> None:
        self.num_bytes = num_blocks * 8 + BOOT_ID_BYTES
        self.fd = sealed_memory("baton-generations", self.num_bytes)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self._words = memoryview(self._map).cast("Q")
        for block_id in range(num_blocks):
            self._words[block_id] = NOT_PUBLISHED
        self._map[num_blocks * 8 :] = boot_id

    @property
    def address(self) -> int:
        """Where the first entry is in this process."""
        return address_of(self._words)

    def __getitem__(self, block_id: int) -> int:
        return self._words[block_id]

    def __setitem__(self, block_id: int, generation: int) -> None:
        self._words[block_id] = generation

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)
