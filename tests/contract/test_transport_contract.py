"""What every transport must do. The real ones run over real sockets and real memfds.

A new transport joins by a context manager in `_PAIRS` that yields its D end for a given source.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from kvtransfer import nixl_agent, rpc, shm_transport
from kvtransfer.auth import Secret, SecretInterceptor
from kvtransfer.digest import block_digest
from kvtransfer.errors import PullError, TicketRefused, TransportLost
from kvtransfer.grpc_transport import GrpcBlockServer, GrpcBlockTransport
from kvtransfer.memory_transport import MemoryBlockTransport
from kvtransfer.nixl_transport import NixlBlockTransport, NixlMemory, NixlReader
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import ShmBlockServer, ShmBlockTransport, is_available
from kvtransfer.transport import BlockRead, BlockSource, BlockTransport, SourceBlock, sealed_memory

BLOCK_BYTES = (1 << 20) + 4096  # more than one piece, and not a multiple of it
NUM_BLOCKS = 8
SECRET = Secret("contract")


@dataclass(frozen=True)
class Memory:
    """P's KV memory: a real memfd with random content."""

    fd: int
    view: memoryview


@pytest.fixture
def memory() -> Memory:
    import mmap

    fd = sealed_memory("test-kv", NUM_BLOCKS * BLOCK_BYTES)
    view = memoryview(mmap.mmap(fd, NUM_BLOCKS * BLOCK_BYTES))
    view[:] = np.random.default_rng(0).integers(0, 256, NUM_BLOCKS * BLOCK_BYTES, np.uint8).data
    yield Memory(fd, view)
    os.close(fd)


@pytest.fixture
def source(memory: Memory) -> BlockSource:
    return BlockSource(memory.view, BLOCK_BYTES, secrets.token_bytes(16))


@contextlib.asynccontextmanager
async def _memory_pair(source: BlockSource, memory: Memory) -> AsyncIterator[BlockTransport]:
    transport = MemoryBlockTransport(source)
    yield transport
    await transport.aclose()


@contextlib.asynccontextmanager
async def _grpc_pair(source: BlockSource, memory: Memory) -> AsyncIterator[BlockTransport]:
    server = grpc.aio.server(interceptors=[SecretInterceptor(SECRET)], options=rpc.DATA_OPTIONS)
    methods = {"Pull": GrpcBlockServer(source).method_handler}
    server.add_generic_rpc_handlers((rpc.service_handler("baton.v1.PrefillWorker", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcBlockTransport(f"127.0.0.1:{port}", SECRET, BLOCK_BYTES)
    yield transport
    await transport.aclose()
    await server.stop(None)


@contextlib.asynccontextmanager
async def _shm_pair(source: BlockSource, memory: Memory) -> AsyncIterator[BlockTransport]:
    server = ShmBlockServer(source, memory.fd, SECRET)
    worker = pb.WorkerInfo(
        boot_id=source.boot_id,
        num_blocks=source.num_blocks,
        block_bytes=source.block_bytes,
        shared_memory_socket=await server.start(),
    )
    transport = ShmBlockTransport(worker, SECRET)
    try:
        yield transport
    finally:
        await transport.aclose()
        await server.aclose()


@contextlib.asynccontextmanager
async def _nixl_pair(source: BlockSource, memory: Memory) -> AsyncIterator[BlockTransport]:
    server = grpc.aio.server(interceptors=[SecretInterceptor(SECRET)], options=rpc.DATA_OPTIONS)
    methods = {"Pull": GrpcBlockServer(source).method_handler}
    server.add_generic_rpc_handlers((rpc.service_handler("baton.v1.PrefillWorker", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registered = NixlMemory(source)
    reader = NixlReader("contract", _ARENA, BLOCK_BYTES)
    worker = pb.WorkerInfo(boot_id=source.boot_id, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, nixl=registered.info)
    transport = NixlBlockTransport(f"127.0.0.1:{port}", worker, SECRET, reader)
    await transport.warm_up()
    yield transport
    await transport.aclose()
    reader.close()
    registered.close()
    await server.stop(None)


_PAIRS: dict[str, Callable[..., contextlib.AbstractAsyncContextManager[BlockTransport]]] = {
    "memory": _memory_pair,
    "grpc": _grpc_pair,
    "shm": _shm_pair,
    "nixl": _nixl_pair,
}


@pytest.fixture(params=list(_PAIRS))
async def transport(
    request: pytest.FixtureRequest, source: BlockSource, memory: Memory
) -> AsyncIterator[BlockTransport]:
    if request.param == "shm" and not is_available():
        pytest.skip("needs memfd and abstract unix sockets")
    if request.param == "nixl" and not nixl_agent.is_available():
        pytest.skip("needs the extra nixl")
    async with _PAIRS[request.param](source, memory) as pair:
        yield pair


def _published(source: BlockSource, block_ids: list[int]) -> tuple[bytes, list[SourceBlock]]:
    ticket = secrets.token_bytes(16)
    source.open(ticket)
    blocks = [SourceBlock(index, block_id, 7 + block_id) for index, block_id in enumerate(block_ids)]
    source.publish(ticket, blocks)
    return ticket, blocks


_ARENA = memoryview(bytearray(4 * NUM_BLOCKS * BLOCK_BYTES))
"""D's KV memory: what a one-sided transport has registered."""

_free_blocks = itertools.cycle(range(4 * NUM_BLOCKS))


def _destinations(num_blocks: int) -> list[memoryview]:
    """Zeroed blocks of D's, none of them handed out lately."""
    starts = [next(_free_blocks) * BLOCK_BYTES for _ in range(num_blocks)]
    blocks = [_ARENA[start : start + BLOCK_BYTES] for start in starts]
    for block in blocks:
        block[:] = bytes(BLOCK_BYTES)
    return blocks


class Reads:
    """Collects what `on_read` is told, with the digest that a verifier would take."""

    def __init__(self, destinations: list[memoryview]) -> None:
        self.reads: list[BlockRead] = []
        self.digests: list[bytes] = []
        self._destinations = destinations

    def __call__(self, read: BlockRead) -> None:
        self.reads.append(read)
        self.digests.append(block_digest(self._destinations[len(self.reads) - 1]))


async def test_moves_scattered_blocks_and_reports_each_in_order(transport: BlockTransport, source: BlockSource) -> None:
    ticket, blocks = _published(source, [5, 0, 3])
    destinations = _destinations(3)
    reads = Reads(destinations)
    puller = await transport.open(ticket, source.boot_id)
    await puller.pull(blocks, destinations, reads)
    await puller.aclose()
    assert reads.reads == [BlockRead(b.index, source.boot_id, b.generation, BLOCK_BYTES) for b in blocks]
    assert reads.digests == [block_digest(source.block(b.block_id)) for b in blocks], "in place when it is reported"


async def test_pulls_again_on_one_ticket_what_is_published_later(
    transport: BlockTransport, source: BlockSource
) -> None:
    ticket, blocks = _published(source, [1])
    puller = await transport.open(ticket, source.boot_id)
    first = _destinations(1)
    await puller.pull(blocks, first, Reads(first))
    later = SourceBlock(1, 6, 99)
    source.publish(ticket, [later])
    second = _destinations(1)
    reads = Reads(second)
    await puller.pull([later], second, reads)
    await puller.aclose()
    assert second[0] == source.block(6)
    assert reads.reads[0].generation == 99


async def test_a_ticket_is_used_once(transport: BlockTransport, source: BlockSource) -> None:
    ticket, _ = _published(source, [1])
    puller = await transport.open(ticket, source.boot_id)
    with pytest.raises(TicketRefused):
        await transport.open(ticket, source.boot_id)
    await puller.aclose()


async def test_unknown_and_closed_tickets_are_refused(transport: BlockTransport, source: BlockSource) -> None:
    closed, _ = _published(source, [1])
    source.close(closed)
    for ticket in (secrets.token_bytes(16), closed):
        with pytest.raises(TicketRefused):
            await transport.open(ticket, source.boot_id)


async def test_a_ticket_for_another_incarnation_is_refused(transport: BlockTransport, source: BlockSource) -> None:
    ticket, _ = _published(source, [1])
    with pytest.raises(TicketRefused):
        await transport.open(ticket, secrets.token_bytes(16))


async def test_an_unpublished_block_is_refused(transport: BlockTransport, source: BlockSource) -> None:
    ticket, _ = _published(source, [1])
    puller = await transport.open(ticket, source.boot_id)
    destinations = _destinations(1)
    reads = Reads(destinations)
    with pytest.raises(PullError):
        await puller.pull([SourceBlock(1, 2, 9)], destinations, reads)
    await puller.aclose()
    assert reads.reads == []
    assert not any(destinations[0]), "nothing of another block leaks into the destination"


async def test_a_ticket_closed_between_pulls_yields_nothing_valid(
    transport: BlockTransport, source: BlockSource
) -> None:
    ticket, blocks = _published(source, [1, 2])
    puller = await transport.open(ticket, source.boot_id)
    first = _destinations(1)
    await puller.pull(blocks[:1], first, Reads(first))
    source.close(ticket)
    with pytest.raises(PullError):
        await puller.pull(blocks[1:], _destinations(1), lambda read: None)
    await puller.aclose()


async def test_a_block_that_was_reused_is_reported_with_its_new_generation(
    transport: BlockTransport, source: BlockSource
) -> None:
    ticket, blocks = _published(source, [1])
    puller = await transport.open(ticket, source.boot_id)
    source.generation_table[1] = 1234
    destinations = _destinations(1)
    reads = Reads(destinations)
    await puller.pull(blocks, destinations, reads)
    await puller.aclose()
    assert [read.generation for read in reads.reads] == [1234]


async def test_a_cancelled_pull_lets_go_of_its_destinations(transport: BlockTransport, source: BlockSource) -> None:
    ticket, blocks = _published(source, list(range(NUM_BLOCKS)))
    puller = await transport.open(ticket, source.boot_id)
    destinations = _destinations(NUM_BLOCKS)
    loop = asyncio.get_running_loop()
    started = asyncio.Event()
    pulling = asyncio.create_task(
        puller.pull(blocks, destinations, lambda read: loop.call_soon_threadsafe(started.set))
    )
    await started.wait()
    pulling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pulling
    for destination in destinations:
        destination[:] = bytes(BLOCK_BYTES)
    await puller.aclose()
    for _ in range(3):  # whoever still wrote would have had turns for it
        await asyncio.get_running_loop().run_in_executor(None, os.sched_yield)
    assert not any(np.frombuffer(destination, np.uint8).any() for destination in destinations)


async def test_a_pull_that_is_cancelled_again_still_lets_go_first(
    transport: BlockTransport, source: BlockSource
) -> None:
    if transport.name == "memory":
        pytest.skip("has no thread of its own")
    ticket, blocks = _published(source, [1])
    puller = await transport.open(ticket, source.boot_id)
    loop, is_reading, may_go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def on_read(read: BlockRead) -> None:
        loop.call_soon_threadsafe(is_reading.set)
        may_go.wait(5.0)

    pulling = asyncio.create_task(puller.pull(blocks, _destinations(1), on_read))
    await is_reading.wait()
    for _ in range(3):
        pulling.cancel()
        await asyncio.sleep(0.01)
    was_done = pulling.done()
    may_go.set()
    with contextlib.suppress(asyncio.CancelledError):
        await pulling
    await puller.aclose()
    assert not was_done, "its thread still had the destination"


async def test_an_error_in_the_verifier_fails_the_pull(transport: BlockTransport, source: BlockSource) -> None:
    ticket, blocks = _published(source, [1, 2])
    puller = await transport.open(ticket, source.boot_id)

    def refuse(read: BlockRead) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await puller.pull(blocks, _destinations(2), refuse)
    await puller.aclose()


async def test_transfers_run_side_by_side(transport: BlockTransport, source: BlockSource) -> None:
    async def one(block_id: int) -> bool:
        ticket, blocks = _published(source, [block_id])
        puller = await transport.open(ticket, source.boot_id)
        destinations = _destinations(1)
        await puller.pull(blocks, destinations, Reads(destinations))
        await puller.aclose()
        source.close(ticket)
        return destinations[0] == source.block(block_id)

    assert all(await asyncio.gather(*(one(block_id) for block_id in range(NUM_BLOCKS))))


async def test_a_closed_transport_opens_nothing(transport: BlockTransport, source: BlockSource) -> None:
    ticket, _ = _published(source, [1])
    await transport.aclose()
    with pytest.raises(TransportLost):
        await transport.open(ticket, source.boot_id)


# ------------------------------------------------------------------ what only some of them have


async def test_grpc_refuses_the_wrong_secret(source: BlockSource, memory: Memory) -> None:
    async with _grpc_pair(source, memory) as good:
        address = good._address  # the pair's own server
        stranger = GrpcBlockTransport(address, Secret("guess"), BLOCK_BYTES)
        ticket, _ = _published(source, [1])
        with pytest.raises(TransportLost, match="UNAUTHENTICATED"):
            await stranger.open(ticket, source.boot_id)
        await stranger.aclose()


async def test_shm_refuses_the_wrong_secret_and_the_wrong_boot_id(source: BlockSource, memory: Memory) -> None:
    server = ShmBlockServer(source, memory.fd, SECRET)
    name = await server.start()
    ticket, _ = _published(source, [1])
    for boot_id, secret in ((source.boot_id, Secret("guess")), (secrets.token_bytes(16), SECRET)):
        worker = pb.WorkerInfo(
            boot_id=boot_id, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, shared_memory_socket=name
        )
        stranger = ShmBlockTransport(worker, secret)
        with pytest.raises(TransportLost):
            await stranger.open(ticket, boot_id)
        await stranger.aclose()
    await server.aclose()


async def test_shm_memory_cannot_be_written_by_the_reader(source: BlockSource, memory: Memory) -> None:
    async with _shm_pair(source, memory) as transport:
        ticket, _ = _published(source, [1])
        puller = await transport.open(ticket, source.boot_id)
        assert not any(array.flags.writeable for array in puller._link.mapped)
        await puller.aclose()


async def test_shm_mappings_go_with_the_transport_whoever_remembers_it(source: BlockSource, memory: Memory) -> None:
    """Tracebacks and pullers kept a dead worker's memory mapped until a garbage collection; idle workers have none."""
    gc.collect()  # tracebacks of the tests before may still hold theirs
    before = _num_mappings()
    async with _shm_pair(source, memory) as transport:
        ticket, blocks = _published(source, [1])
        puller = await transport.open(ticket, source.boot_id)
        assert _num_mappings() == before + 2
        await transport.aclose()
        assert _num_mappings() == before
        with pytest.raises(TransportLost):
            await puller.pull(blocks, _destinations(1), lambda read: None)


def _num_mappings() -> int:
    """Shared memory that this process maps read-only."""
    return sum("memfd:" in line and " r--s " in line for line in Path("/proc/self/maps").read_text().splitlines())


async def test_shm_joins_that_wait_when_the_transport_closes_fail_as_lost(source: BlockSource) -> None:
    """A cancelled join would leave its transfer without an end until a deadline: its caller was not cancelled."""
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(f"\0{name}")
        mute.listen(4)
        transport = ShmBlockTransport(pb.WorkerInfo(boot_id=source.boot_id, shared_memory_socket=name), SECRET)
        joins = [asyncio.create_task(transport.open(secrets.token_bytes(16), source.boot_id)) for _ in range(3)]
        await asyncio.get_running_loop().run_in_executor(None, lambda: mute.accept()[0].close())
        await transport.aclose()
        outcomes = await asyncio.gather(*joins, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TransportLost] * 3


async def test_shm_does_not_take_a_late_answer_for_the_next_ticket(source: BlockSource, memory: Memory) -> None:
    async with _shm_pair(source, memory) as transport:
        first, late = (_published(source, [block_id])[0] for block_id in (1, 2))
        await (await transport.open(first, source.boot_id)).aclose()
        connection = transport._link._connection
        connection.settimeout(0.0)
        with pytest.raises(TransportLost):
            await transport.open(late, source.boot_id)
        await asyncio.sleep(0.05)  # now the answer is there
        with contextlib.suppress(OSError):
            connection.settimeout(1.0)
        with pytest.raises(TicketRefused):
            await transport.open(secrets.token_bytes(16), source.boot_id)


async def test_shm_serves_nobody_of_another_user(
    source: BlockSource, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _shm_pair(source, memory) as transport:
        ticket, _ = _published(source, [1])
        monkeypatch.setattr("kvtransfer.shm_transport.os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(TransportLost):
            await transport.open(ticket, source.boot_id)


async def test_shm_callers_that_say_nothing_keep_no_worker_out(source: BlockSource, memory: Memory) -> None:
    """256 of them did, for two seconds."""
    async with _shm_pair(source, memory) as transport:
        name = transport._worker.shared_memory_socket
        with contextlib.ExitStack() as mutes:
            for _ in range(300):
                mute = mutes.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                mute.setblocking(False)
                await asyncio.get_running_loop().sock_connect(mute, f"\0{name}")
            ticket, _ = _published(source, [1])
            await (await transport.open(ticket, source.boot_id)).aclose()


async def test_shm_memory_that_could_shrink_under_its_reader_is_refused(source: BlockSource, memory: Memory) -> None:
    """A read behind the end of a file that shrank kills the reader (SIGBUS)."""
    for fd in (memory.fd, source.generation_table.fd):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, NUM_BLOCKS * BLOCK_BYTES)
    async with _shm_pair(source, Memory(unsealed, memory.view)) as transport:
        with pytest.raises(TransportLost, match="sealed"):
            await transport.open(_published(source, [1])[0], source.boot_id)
    os.close(unsealed)


async def test_shm_connections_made_while_the_transport_closes_are_hung_up(
    source: BlockSource, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_connect, is_connecting = threading.Event(), threading.Event()
    links = []

    def late_connect(worker: pb.WorkerInfo, secret: Secret) -> object:
        is_connecting.set()
        may_connect.wait(5.0)
        links.append(connect(worker, secret))
        return links[0]

    connect = shm_transport._connect
    monkeypatch.setattr(shm_transport, "_connect", late_connect)
    async with _shm_pair(source, memory) as transport:
        opening = asyncio.create_task(transport.open(_published(source, [1])[0], source.boot_id))
        await asyncio.to_thread(is_connecting.wait, 5.0)
        await transport.aclose()
        may_connect.set()
        with pytest.raises(TransportLost):
            await opening
    assert links[0].mapped is None
    assert links[0]._connection.fileno() == -1


# ------------------------------------------------------------------ no wait without an end


async def test_grpc_gives_up_a_prefill_worker_that_does_not_answer_a_join(source: BlockSource) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        transport = GrpcBlockTransport(f"127.0.0.1:{mute.getsockname()[1]}", SECRET, BLOCK_BYTES, join_s=0.2)
        with pytest.raises(TransportLost, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"):
            await transport.open(secrets.token_bytes(16), source.boot_id)
        await transport.aclose()


async def test_grpc_ends_a_pull_that_nobody_reads(source: BlockSource) -> None:
    class Stuck:
        """A decode worker whose receive window is full."""

        ended: tuple[grpc.StatusCode, str] | None = None

        async def write(self, piece: bytes) -> None:
            await asyncio.Event().wait()

        async def abort(self, code: grpc.StatusCode, details: str) -> None:
            self.ended = code, details

    ticket, _ = _published(source, [1])
    context = Stuck()
    request = pb.PullBlocks(ticket=ticket, boot_id=source.boot_id, path=b"p" * 16, indices=[0])
    async with asyncio.timeout(5):
        await GrpcBlockServer(source, pull_s=0.05).pull(request, context)
    assert context.ended is not None
    assert context.ended[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_grpc_ticket_is_bound_to_the_path_that_joined_it(source: BlockSource) -> None:
    ticket, _ = _published(source, [1])
    source.join(ticket, source.boot_id, b"p" * 16)
    source.join(ticket, source.boot_id, b"p" * 16)
    for other in (b"q" * 16, b""):
        with pytest.raises(TicketRefused):
            source.join(ticket, source.boot_id, other)
