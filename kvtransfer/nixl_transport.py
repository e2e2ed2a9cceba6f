"""One-sided reads: D reads published blocks out of P's registered memory, and P's processor has no part in it.

    P: NixlMemory    registers the KV memory and the generation table once; says in WorkerInfo where they are
    D: NixlReader    one per process: registers the KV memory once, does all reads; NixlBlockTransport is one pair of it

"The KV memory" is the worker's own, the staging ring beside a GPU's (kvtransfer/staging.py), or the GPU's itself.

A pull, on a thread of the reader's:

    1. read the generations of all blocks and the boot id behind them: what is not published is not read at all
    2. read the blocks in groups, two under way, so that a group is digested while the next one arrives
    3. read the generations and the boot id of each group again, then report its blocks

The ticket is joined by a Pull call, as for gRPC. Release travels on the control stream, as for every transport: it also
ends what D gave up, which no notification behind a read could tell, and it is not lost where nobody polls for it.

A posted read cannot be taken back. Its destinations stay in quarantine, that is to say the pull does not return, until
it is terminal. If it is not so `teardown_s` after the pull was stopped (P is frozen, say), the reader destroys its
agent, which is what ends a read for certain (nixl_agent.py), and makes another for the next pair. Reads of other pairs
get `teardown_s` to end by themselves; after that their pulls fail with it, and their prompts go to the next candidate.
If even that cannot be proved, the process ends: its supervisor starts a new one, whose memory is another.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtransfer.auth import Secret
from kvtransfer.errors import BlockNotPublished, TicketRefused, TransportLost
from kvtransfer.grpc_transport import GrpcBlockTransport
from kvtransfer.negotiation import NixlUse
from kvtransfer.nixl_agent import MAX_METADATA_BYTES, NixlAgent, NixlError, ReadState, Region, open_agent
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import (
    BOOT_ID_BYTES,
    NOT_PUBLISHED,
    BlockPuller,
    BlockRead,
    BlockSource,
    Destination,
    DeviceBlock,
    OnRead,
    SourceBlock,
    address_of,
    on_thread,
)

log = logging.getLogger(__name__)

TEARDOWN_S = 5.0
"""How long a stopped pull waits for its reads before the agent is destroyed. A frozen peer was silent 10 s by then."""

WARM_UP_S = 5.0

GROUP_BYTES = 16 << 20
"""Read as one, and digested while the next is under way: also what a cancel waits for where the peer answers."""

MAX_GROUP_BLOCKS = 512
_GROUPS_UNDER_WAY = 2
_NUM_THREADS = 8

_WORD_BYTES = 8
_BOOT_ID_WORDS = BOOT_ID_BYTES // _WORD_BYTES
_SLOT_WORDS = MAX_GROUP_BLOCKS + _BOOT_ID_WORDS
_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 100e-6
_MAX_ADDRESS = 1 << 63
MAX_BLOCKS = 1 << 24

EXIT_NOT_TORN_DOWN = 70  # EX_SOFTWARE
OpenAgent = Callable[[str, Sequence[Region]], NixlAgent]


# ---------------------------------------------------------------- P


class NixlMemory:
    """P's end: registered once, read by whoever Hello told of it. Has nothing to do afterwards."""

    def __init__(
        self,
        source: BlockSource,
        use: NixlUse = NixlUse.ANY,
        device: Region | None = None,
        make_agent: OpenAgent = open_agent,
    ) -> None:
        """`device`: where the source's blocks are if not in its own memory. Raises: NixlError."""
        blocks = device or Region(source.address, source.num_blocks * source.block_bytes)
        assert blocks.num_bytes == source.num_blocks * source.block_bytes
        control = Region(source.generation_table.address, source.generation_table.num_bytes)
        self._agent = make_agent(f"baton-{source.boot_id.hex()}", [blocks, control])
        self.info = pb.NixlMemory(
            agent_metadata=self._agent.metadata,
            blocks_address=blocks.address,
            control_address=control.address,
            only_rdma=use is NixlUse.RDMA,
            device_id=blocks.device_id,
        )

    def close(self) -> None:
        self._agent.close()


# ---------------------------------------------------------------- D


def _end_process(reason: str) -> None:
    """A read may land whenever it likes: no block of this process is safe to use again."""
    log.critical("%s: this worker ends, to be started again", reason)
    os._exit(EXIT_NOT_TORN_DOWN)


class _Stop:
    """Whether a pull shall end, and since when: at the first request, or at its deadline."""

    def __init__(self, deadline: float | None = None) -> None:
        self._at = deadline

    def request(self) -> None:
        now = time.monotonic()
        self._at = now if self._at is None else min(self._at, now)

    def is_requested(self, patience_s: float = 0.0) -> bool:
        return self._at is not None and time.monotonic() >= self._at + patience_s


@dataclass(eq=False, slots=True)
class _Peer:
    """A prefill worker's memory as one life of our agent knows it."""

    name: str
    boot_id: bytes
    num_blocks: int
    blocks: int  # descriptors: one per block
    control: int  # one per word: generations, boot id
    num_users: int = 0


@dataclass(eq=False, slots=True)
class _Life:
    """One agent from its making to its destruction."""

    agent: NixlAgent
    blocks: int  # descriptors of our own: one per block
    control: int  # one per word of the scratch memory
    peers: dict[bytes, _Peer] = field(default_factory=dict[bytes, _Peer])
    reads: dict[int, _Stop] = field(default_factory=dict[int, _Stop])  # under way
    is_condemned: bool = False  # nothing more is posted
    is_over: bool = False  # nothing lands any more


class NixlReader:
    """D's agent, with the memory that blocks are read into. Thread-safe; made once per process."""

    def __init__(
        self,
        name: str,
        memory: memoryview | Region,
        block_bytes: int,
        teardown_s: float = TEARDOWN_S,
        make_agent: OpenAgent = open_agent,
        end_process: Callable[[str], None] = _end_process,
        use: NixlUse = NixlUse.ANY,
    ) -> None:
        """`memory` is all that D reads into, borrowed for the life of the process. Raises: NixlError."""
        region = Region(address_of(memory), memory.nbytes) if isinstance(memory, memoryview) else memory
        assert region.num_bytes % block_bytes == 0, (region.num_bytes, block_bytes)
        self.block_bytes = block_bytes
        self.threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="nixl-read")
        self.nixl_use = use
        self.num_agents = 0
        self._name = name
        self._region = region
        self._num_blocks = region.num_bytes // block_bytes
        self._teardown_s = teardown_s
        self._make_agent = make_agent
        self._end_process = end_process
        self._scratch = np.zeros((_NUM_THREADS, _SLOT_WORDS), np.uint64)
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_NUM_THREADS):
            self._slots.put(slot)
        self._lock = threading.Lock()  # over every use of the agent: it is destroyed under it
        self._is_closed = False
        self._life: _Life | None = self._new_life()

    def close(self) -> None:
        """Destroy the agent; reads still under way end with it. Idempotent."""
        self.threads.shutdown(wait=False)
        with self._lock:
            self._is_closed = True
            if self._life is not None:
                self._destroy(self._life)

    @property
    def num_peers(self) -> int:
        with self._lock:
            return len(self._life.peers) if self._life is not None else 0

    # ------------------------------------------------------------ peers

    def attach(self, worker: pb.WorkerInfo) -> Pair:
        """Know a worker's memory, and prove that it can be read. On a thread of the reader's. Raises: TransportLost."""
        _check(worker, self.block_bytes)
        with self._lock:
            life = self._living()
            peer = life.peers.get(worker.boot_id)
            try:
                if peer is None:
                    peer = life.peers[worker.boot_id] = _add_peer(life.agent, worker)
            except NixlError as error:
                raise TransportLost(f"nixl: {error}") from error
            peer.num_users += 1
        pair = Pair(self, life, peer)
        try:
            pair.read((), (), lambda read: None, _Stop(time.monotonic() + WARM_UP_S))
        except BaseException:
            self.detach(life, peer)
            raise
        return pair

    def use(self, life: _Life, peer: _Peer) -> None:
        """Keep the peer known until `detach`."""
        with self._lock:
            if life.is_condemned or peer.num_users == 0:
                raise TransportLost("nixl: the prefill worker's memory is no longer known")
            peer.num_users += 1

    def detach(self, life: _Life, peer: _Peer) -> None:
        """The last user's leaving makes the agent forget the peer."""
        with self._lock:
            peer.num_users -= 1
            if peer.num_users or life.is_over:
                return
            del life.peers[peer.boot_id]
            try:
                life.agent.drop(peer.blocks)
                life.agent.drop(peer.control)
                life.agent.remove_peer(peer.name)
            except NixlError as error:
                log.warning("nixl did not forget a peer: %s", error)

    # ------------------------------------------------------------ reads

    @contextlib.contextmanager
    def scratch(self) -> Generator[_Scratch]:
        """Memory for the words of one pull. There is one per thread, so one is free."""
        slot = self._slots.get_nowait()
        try:
            yield _Scratch(self._scratch[slot], slot * _SLOT_WORDS)
        finally:
            self._slots.put(slot)

    def block_id(self, destination: Destination) -> int:
        """Which of our blocks a destination is."""
        if isinstance(destination, DeviceBlock):
            assert 0 <= destination.block_id < self._num_blocks, "not a block of the registered memory"
            return destination.block_id
        block_id, rest = divmod(address_of(destination) - self._region.address, self.block_bytes)
        assert destination.nbytes == self.block_bytes, (destination.nbytes, self.block_bytes)
        assert rest == 0, "not a block of the registered memory"
        assert 0 <= block_id < self._num_blocks, "not a block of the registered memory"
        return block_id

    def post(self, life: _Life, to: tuple[int, Sequence[int]], source: tuple[int, Sequence[int]], stop: _Stop) -> int:
        """Start a read. Raises: TransportLost."""
        with self._lock:
            if life.is_condemned:
                raise TransportLost("nixl: the agent is being replaced")
            try:
                read = life.agent.post_read(*to, *source)
            except NixlError as error:
                raise TransportLost(f"nixl: {error}") from error
            life.reads[read] = stop
            return read

    def until_terminal(self, life: _Life, read: int, stop: _Stop) -> ReadState:
        """Wait as long as it takes: the destinations are not ours before. Afterwards the read is forgotten."""
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._lock:
                if life.is_over:
                    return ReadState.FAILED
                state = life.agent.state(read)
                if state is not ReadState.RUNNING:
                    life.agent.release(read)
                    del life.reads[read]
                    return state
            if stop.is_requested(self._teardown_s):
                self._tear_down(life)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _tear_down(self, life: _Life) -> None:
        """End reads that do not end, by the end of their agent. Those of other pairs may finish before."""
        with self._lock:
            if life.is_condemned:
                return  # another thread is at it
            life.is_condemned = True
            if self._life is life:
                self._life = None  # the next pair makes a new one
            grace = _Stop(time.monotonic() + self._teardown_s)
        log.error("a one-sided read does not end: its agent is destroyed", extra={"num_reads": len(life.reads)})
        while not grace.is_requested():
            with self._lock:
                if all(stop.is_requested(self._teardown_s) for stop in life.reads.values()):
                    break
            time.sleep(_LONGEST_PAUSE_S)
        with self._lock:
            self._destroy(life)

    def _destroy(self, life: _Life) -> None:
        """Under the lock. Afterwards no read of this life can land any more."""
        if life.is_over:
            return
        try:
            life.agent.close()
        except NixlError as error:
            self._end_process(f"one-sided reads could not be torn down ({error})")
        life.is_condemned = life.is_over = True

    def _living(self) -> _Life:
        if self._is_closed:
            raise TransportLost("the transport is closed")
        if self._life is None:
            try:
                self._life = self._new_life()
            except NixlError as error:
                raise TransportLost(f"nixl: {error}") from error
        return self._life

    def _new_life(self) -> _Life:
        region, scratch = self._region, self._scratch.ctypes.data
        self.num_agents += 1
        name = f"{self._name}-{self.num_agents}"
        agent = self._make_agent(name, [region, Region(scratch, self._scratch.nbytes)])
        blocks = agent.prepare(None, region.address, self.block_bytes, self._num_blocks, region.device_id)
        return _Life(agent, blocks, agent.prepare(None, scratch, _WORD_BYTES, self._scratch.size))


@dataclass(frozen=True, slots=True)
class _Scratch:
    words: np.ndarray[Any, np.dtype[np.uint64]]
    first_id: int  # of its descriptors


def _check(worker: pb.WorkerInfo, block_bytes: int) -> None:
    """What a worker says of itself, before anything is allocated or addressed by it. Raises: TransportLost."""
    info = worker.nixl
    num_bytes = worker.num_blocks * worker.block_bytes
    if worker.block_bytes != block_bytes:
        raise TransportLost(f"blocks of {worker.block_bytes} bytes, here {block_bytes}")
    if (
        not 0 < worker.num_blocks <= MAX_BLOCKS
        or max(info.blocks_address, info.control_address) + num_bytes > _MAX_ADDRESS
    ):
        raise TransportLost(f"{worker.num_blocks} blocks at {info.blocks_address:#x} cannot be")
    if len(worker.boot_id) != BOOT_ID_BYTES or not 0 < len(info.agent_metadata) <= MAX_METADATA_BYTES:
        raise TransportLost(f"{len(info.agent_metadata)} bytes of agent metadata, the limit is {MAX_METADATA_BYTES}")


def _add_peer(agent: NixlAgent, worker: pb.WorkerInfo) -> _Peer:
    info = worker.nixl
    name = agent.add_peer(info.agent_metadata)
    try:
        device_id = info.device_id if info.HasField("device_id") else None
        blocks = agent.prepare(name, info.blocks_address, worker.block_bytes, worker.num_blocks, device_id)
        control = agent.prepare(name, info.control_address, _WORD_BYTES, worker.num_blocks + _BOOT_ID_WORDS)
    except NixlError:
        agent.remove_peer(name)
        raise
    return _Peer(name, worker.boot_id, worker.num_blocks, blocks, control)


class Pair:
    """A worker's memory, known and proved readable."""

    def __init__(self, reader: NixlReader, life: _Life, peer: _Peer) -> None:
        self._reader = reader
        self._life = life
        self._peer = peer

    @property
    def is_usable(self) -> bool:
        return not self._life.is_condemned

    def leave(self) -> None:
        self._reader.detach(self._life, self._peer)

    def read(
        self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead, stop: _Stop
    ) -> None:
        """On a thread of the reader's. However it ends, nothing lands in the destinations afterwards.

        Raises: BlockNotPublished, TransportLost, whatever `on_read` raises.
        """
        self._reader.use(self._life, self._peer)
        try:
            with self._reader.scratch() as scratch:
                _Pull(self._reader, self._life, self._peer, scratch, stop).run(blocks, destinations, on_read)
        finally:
            self._reader.detach(self._life, self._peer)


class _Pull:
    """One pull, on one thread."""

    def __init__(self, reader: NixlReader, life: _Life, peer: _Peer, scratch: _Scratch, stop: _Stop) -> None:
        self._reader = reader
        self._life = life
        self._peer = peer
        self._scratch = scratch
        self._stop = stop
        self._stale: dict[int, int] = {}  # index of a block that is another by now -> its generation
        self._under_way: deque[tuple[Sequence[SourceBlock], int | None]] = deque()

    def run(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        size = max(1, min(MAX_GROUP_BLOCKS, GROUP_BYTES // self._reader.block_bytes))
        try:
            for first in range(0, max(1, len(blocks)), MAX_GROUP_BLOCKS):
                self._check_published(blocks[first : first + MAX_GROUP_BLOCKS])
            for first in range(0, len(blocks), size):
                self._post(blocks[first : first + size], destinations[first : first + size])
                if len(self._under_way) == _GROUPS_UNDER_WAY:
                    self._finish_oldest(on_read)
            while self._under_way:
                self._finish_oldest(on_read)
        except BaseException:
            self._stop.request()  # what is left to wait for is not wanted any more
            raise
        finally:
            for _, read in self._under_way:
                if read is not None:
                    self._reader.until_terminal(self._life, read, self._stop)

    def _check_published(self, blocks: Sequence[SourceBlock]) -> None:
        """Nothing of a block that is not ours to read shall reach a destination."""
        boot_id, generations = self._control(blocks)
        if boot_id != self._peer.boot_id:
            raise TransportLost("another incarnation of the worker is at the other end")
        for block, generation in zip(blocks, generations, strict=True):
            if generation == NOT_PUBLISHED:
                raise BlockNotPublished(f"block {block.index} is not published")
            if generation != block.generation:
                self._stale[block.index] = generation

    def _post(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination]) -> None:
        pairs = zip(blocks, destinations, strict=True)
        wanted = [(b.block_id, self._reader.block_id(d)) for b, d in pairs if b.index not in self._stale]
        read = None
        if wanted:
            to, source = [into for _, into in wanted], [block_id for block_id, _ in wanted]
            read = self._start((self._life.blocks, to), (self._peer.blocks, source))
        self._under_way.append((blocks, read))

    def _finish_oldest(self, on_read: OnRead) -> None:
        blocks, read = self._under_way.popleft()
        if read is not None:
            self._finish(read)
        boot_id, generations = self._control(blocks)
        for block, generation in zip(blocks, generations, strict=True):
            stale = self._stale.get(block.index)
            if stale is not None:
                on_read(BlockRead(block.index, boot_id, stale, 0))
            else:
                on_read(BlockRead(block.index, boot_id, generation, self._reader.block_bytes))

    def _control(self, blocks: Sequence[SourceBlock]) -> tuple[bytes, list[int]]:
        """The boot id and the generations as they are in P's memory now."""
        for block in blocks:
            if not 0 <= block.block_id < self._peer.num_blocks:
                raise BlockNotPublished(f"block {block.index} is not in the worker's memory")
        count = len(blocks)
        first, end = self._scratch.first_id, self._peer.num_blocks
        source = [*(block.block_id for block in blocks), *range(end, end + _BOOT_ID_WORDS)]
        to = (self._life.control, range(first, first + len(source)))
        self._finish(self._start(to, (self._peer.control, source)))
        words = self._scratch.words[: len(source)]
        return words[count:].tobytes(), [int(word) for word in words[:count]]

    def _start(self, to: tuple[int, Sequence[int]], source: tuple[int, Sequence[int]]) -> int:
        if self._stop.is_requested():
            raise TransportLost("the pull was stopped")
        return self._reader.post(self._life, to, source, self._stop)

    def _finish(self, read: int) -> None:
        if self._reader.until_terminal(self._life, read, self._stop) is not ReadState.DONE:
            raise TransportLost("the prefill worker's memory cannot be read any more")


class NixlBlockTransport:
    """D's end of one pair: tickets are joined by gRPC, blocks are read."""

    name = "nixl"

    def __init__(self, address: str, worker: pb.WorkerInfo, secret: Secret, reader: NixlReader) -> None:
        self._worker = worker
        self._reader = reader
        self._joins = GrpcBlockTransport(address, secret, reader.block_bytes)
        self._attaching = asyncio.Lock()
        self._pair: Pair | None = None
        self._pulls: set[_NixlPuller] = set()
        self._is_closed = False

    async def warm_up(self) -> None:
        """Attach, once per incarnation of P and life of our agent."""
        await self._usable_pair()

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        pair = await self._usable_pair()
        if boot_id != self._worker.boot_id:
            raise TicketRefused("the ticket belongs to another incarnation of the worker")
        join = await self._joins.open(ticket, boot_id)
        puller = _NixlPuller(self._reader.threads, pair, join, self._pulls.discard)
        self._pulls.add(puller)
        return puller

    async def aclose(self) -> None:
        """The agent forgets the peer when the pulls that may be under way have ended."""
        self._is_closed = True
        for puller in list(self._pulls):
            puller.stop()
        await self._joins.aclose()
        async with self._attaching:
            pair, self._pair = self._pair, None
            self._leave(pair)

    async def _usable_pair(self) -> Pair:
        async with self._attaching:
            if self._is_closed:
                raise TransportLost("the transport is closed")
            if self._pair is None or not self._pair.is_usable:
                pair, self._pair = self._pair, None
                self._leave(pair)
                attach = functools.partial(self._reader.attach, self._worker)
                self._pair = await on_thread(self._reader.threads, attach, lambda: None)
            return self._pair

    def _leave(self, pair: Pair | None) -> None:
        if pair is not None:
            with contextlib.suppress(RuntimeError):  # the reader is closed, and with it the agent
                self._reader.threads.submit(pair.leave)


class _NixlPuller:
    def __init__(
        self, threads: ThreadPoolExecutor, pair: Pair, join: BlockPuller, forget: Callable[[_NixlPuller], None]
    ) -> None:
        self._threads = threads
        self._pair = pair
        self._join = join
        self._forget = forget
        self._stop = _Stop()

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        work = functools.partial(self._pair.read, blocks, destinations, on_read, self._stop)
        await on_thread(self._threads, work, self.stop)

    async def aclose(self) -> None:
        self.stop()
        self._forget(self)
        await self._join.aclose()

    def stop(self) -> None:
        self._stop.request()
