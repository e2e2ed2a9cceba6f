"""D of the transfer bench: moves P's blocks by every way and takes the time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.transfer import prefill
from bench.transfer.cases import BLOCK_SIZE, STEP_TOKENS, Pace, Shape, ids_of, most_rounds
from bench.transfer.prefill import MIB, REQUEST_BYTES, SECRET, STEPPED
from bench.transfer.table import Kind, Medium, Row
from kvtransfer import nixl_agent
from kvtransfer.decode_side import PrefillOrder
from kvtransfer.digest import block_digest
from kvtransfer.errors import PullError, TransferFailed
from kvtransfer.grpc_transport import GrpcBlockTransport
from kvtransfer.nixl_agent import ReadState, Region, open_agent
from kvtransfer.nixl_transport import NixlBlockTransport, NixlReader
from kvtransfer.prefill_client import DecodeIdentity, PrefillClient
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import ShmBlockTransport
from kvtransfer.transport import BlockRead, BlockTransport, address_of

Way = tuple[Medium, Kind]
Measure = Callable[[], Awaitable[float]]
_WORD_BYTES = 8
_BOOT_ID_WORDS = 2
_CONNECT_S = 60.0
LOST = (PullError, TransferFailed)


@dataclass
class Samples:
    """Seconds by the clock, and of both processes' processors."""

    seconds: list[float] = field(default_factory=list[float])
    cpu_s: list[float] = field(default_factory=list[float])


class Peer:
    """The P process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._clock = (~process.pid << 3) | 2  # clock_getcpuclockid(3), in nanoseconds: ticks of 10 ms are too coarse

    def cpu_s(self) -> float:
        """Of the processors, by both processes, so far."""
        return time.clock_gettime(self._clock) + time.process_time()

    async def tell(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        return (await self._process.stdout.readline()).decode().strip()

    async def use(self, number: int) -> dict[str, Any]:
        """Where the blocks of this shape are from now on."""
        return json.loads(await self.tell(f"use {number}"))

    async def take_digests(self, how: str) -> None:
        """At both ends."""
        prefill.take_digests(how)
        assert await self.tell(how) == how


@contextlib.asynccontextmanager
async def running_prefill(shapes: Sequence[Shape]) -> AsyncGenerator[Peer]:
    """P with memory for each of these shapes."""
    command = [sys.executable, "-m", "bench.transfer", "--serve", json.dumps([shape.name for shape in shapes])]
    command += ["--blocks", *(str(shape.num_blocks) for shape in shapes)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while not (line := await process.stdout.readline()).startswith(b"ready"):
            assert line, "P did not start"  # UCX writes its warnings to stdout
        yield Peer(process)
    finally:
        process.stdin.close()
        await process.wait()


class RawNixl:
    """As little as a read can be: one descriptor, one post, a look every 20 us."""

    def __init__(self, destinations: memoryview, worker: pb.WorkerInfo) -> None:
        self._ours, self._theirs = address_of(destinations), worker.nixl.blocks_address
        self._control = worker.nixl.control_address
        self._words = np.zeros(worker.num_blocks + _BOOT_ID_WORDS, np.uint64)
        regions = [Region(self._ours, destinations.nbytes), Region(self._words.ctypes.data, self._words.nbytes)]
        self._agent = open_agent("bench-raw", regions)
        self._peer = self._agent.add_peer(worker.nixl.agent_metadata)

    def read(self, to: int, source: int, num_bytes: int) -> float:
        """Offsets into both memories; seconds."""
        return self._read(self._ours + to, self._theirs + source, num_bytes)

    def read_generations(self, count: int) -> float:
        """So many words of the generation table, as a hand-over reads them; seconds."""
        return self._read(self._words.ctypes.data, self._control, (count + _BOOT_ID_WORDS) * _WORD_BYTES)

    def close(self) -> None:
        self._agent.close()

    def _read(self, to: int, source: int, num_bytes: int) -> float:
        ours, theirs = (
            self._agent.prepare(None, to, num_bytes, 1),
            self._agent.prepare(self._peer, source, num_bytes, 1),
        )
        started = time.perf_counter()
        posted = self._agent.post_read(ours, [0], theirs, [0])
        while (state := self._agent.state(posted)) is ReadState.RUNNING:
            time.sleep(20e-6)
        elapsed = time.perf_counter() - started
        assert state is ReadState.DONE, state
        self._agent.release(posted)
        self._agent.drop(ours)
        self._agent.drop(theirs)
        return elapsed


class Bench:
    """One shape's blocks at both ends, and every way between them. Close it."""

    def __init__(self, peer: Peer, shape: Shape, where: dict[str, Any], destinations: memoryview) -> None:
        self.peer = peer
        self.shape = shape
        self.worker = pb.WorkerInfo.FromString(bytes.fromhex(where["worker"]))
        self.media = [Medium.GRPC, Medium.SHM]
        self._address = f"127.0.0.1:{where['port']}"
        self._raw_socket = socket.create_connection(("127.0.0.1", where["raw_port"]))
        self._destinations = destinations[: shape.num_bytes]
        self._next = 0
        self._shm = ShmBlockTransport(self.worker, SECRET)
        grpc_transport = GrpcBlockTransport(self._address, SECRET, shape.block_bytes)
        self._transports: dict[Medium, BlockTransport] = {Medium.GRPC: grpc_transport, Medium.SHM: self._shm}
        self._reader: NixlReader | None = None
        self.raw_nixl: RawNixl | None = None
        if nixl_agent.is_available():
            self.media.append(Medium.NIXL)
            self._reader = NixlReader("bench", self._destinations, shape.block_bytes)
            self._transports[Medium.NIXL] = NixlBlockTransport(self._address, self.worker, SECRET, self._reader)
            self.raw_nixl = RawNixl(self._destinations, self.worker)
        self._clients: dict[Medium, PrefillClient] = {}

    async def start(self) -> None:
        """Connections, mappings, first-touch faults of all that will be moved."""
        await _patiently(lambda: self.pull(self._shm, False, self.shape.num_blocks, 1))
        for medium in self.media:
            transport = self._transports[medium]
            await _patiently(lambda transport=transport: self.pull(transport, False, 8, 1))
            await self.raw(medium, 8)
            identity = DecodeIdentity("d", bytes(16), "bench", BLOCK_SIZE, self.shape.block_bytes, (medium.value,))
            client = PrefillClient(self._address, identity, SECRET, pb.WorkerLoad, nixl=self._reader)
            client.start()
            self._clients[medium] = client
            await _patiently(lambda medium=medium: self.fetch(medium, 1))

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        for transport in self._transports.values():
            await transport.aclose()
        if self._reader is not None and self.raw_nixl is not None:
            self._reader.close()
            self.raw_nixl.close()
        self._raw_socket.close()

    # ------------------------------------------------------------ one move each

    def _rotate(self, count: int, stride: int = 1) -> tuple[int, list[memoryview]]:
        """The next blocks at both ends: neither in the caches."""
        if self._next + count > self.shape.num_blocks:
            self._next = 0  # neighbours are neighbours: none at the end and at the beginning
        first, self._next = self._next, self._next + count
        size = self.shape.block_bytes
        ids = ids_of(first, count, stride, self.shape.num_blocks)
        return first, [self._destinations[i * size : (i + 1) * size] for i in ids]

    def rotated(self, count: int) -> list[memoryview]:
        """D's next blocks."""
        return self._rotate(count)[1]

    async def raw(self, medium: Medium, count: int) -> float:
        first, destinations = self._rotate(count)
        match medium:
            case Medium.GRPC:
                work = functools.partial(self._raw_tcp, first, count, destinations)
            case Medium.SHM:
                work = functools.partial(self._raw_copy, first, destinations)
            case Medium.NIXL:
                assert self.raw_nixl is not None
                size = self.shape.block_bytes
                work = functools.partial(self.raw_nixl.read, first * size, first * size, count * size)
        return await asyncio.to_thread(work)

    def _raw_tcp(self, first: int, count: int, destinations: Sequence[memoryview]) -> float:
        started = time.perf_counter()
        self._raw_socket.sendall(f"{first} {count}".encode().ljust(REQUEST_BYTES))
        for destination in destinations:
            received = 0
            while received < len(destination):
                received += self._raw_socket.recv_into(destination[received : received + MIB])
        return time.perf_counter() - started

    def _raw_copy(self, first: int, destinations: Sequence[memoryview]) -> float:
        memory, _ = self._shm._link.mapped  # type: ignore[union-attr]  # mapped by start()
        arrays = [np.frombuffer(destination, np.uint8) for destination in destinations]
        started = time.perf_counter()
        for i, array in enumerate(arrays):
            np.copyto(array, memory[first + i])
        return time.perf_counter() - started

    async def pull(self, transport: BlockTransport, is_digested: bool, count: int, stride: int) -> float:
        first, destinations = self._rotate(count, stride)
        ticket = bytes.fromhex(await self.peer.tell(f"{first} {count} {stride}"))
        puller = await transport.open(ticket, self.worker.boot_id)

        def digest(read: BlockRead) -> None:
            block_digest(destinations[read.index])

        blocks = prefill.source_blocks(ids_of(first, count, stride, self.shape.num_blocks))
        started = time.perf_counter()
        await puller.pull(blocks, destinations, digest if is_digested else lambda read: None)
        elapsed = time.perf_counter() - started
        await puller.aclose()
        return elapsed

    async def fetch(self, medium: Medium, count: int, request_id: str = "bench") -> float:
        """Seconds from the order to the commit; for a stepped prompt from its last block."""
        _, destinations = self._rotate(count)
        order = PrefillOrder(request_id, [7] * (count * BLOCK_SIZE), 0, pb.SamplingParams(), (0,), b"", 60.0)

        async def reserve() -> Sequence[memoryview]:
            return destinations

        started = time.perf_counter()
        fetched = await self._clients[medium].fetch(order, reserve)
        return time.perf_counter() - (fetched.commit.prefill_s if request_id == STEPPED else started)

    # ------------------------------------------------------------ all of them in turn

    async def moves(self, count: int, pace: Pace) -> list[Row]:
        """Rows of every way for so many blocks."""
        measures: dict[Way, Measure] = {}
        for medium in self.media:
            pull = functools.partial(self.pull, self._transports[medium])
            measures[medium, Kind.RAW] = functools.partial(self.raw, medium, count)
            measures[medium, Kind.BLOCKS] = functools.partial(pull, False, count, 1)
            measures[medium, Kind.DIGEST] = functools.partial(pull, True, count, 1)
            if count > 1:
                measures[medium, Kind.FRAGMENTED] = functools.partial(pull, False, count, 2)
            measures[medium, Kind.FETCH] = functools.partial(self.fetch, medium, count)
        samples = await self.in_turn(measures, pace.rounds(most_rounds(count)))
        return [self._row(way, count, count, samples) for way in samples if (way[0], Kind.RAW) in samples]

    async def handovers(self, num_tokens: int, pace: Pace) -> list[Row]:
        """Rows of hand-overs in a prefill's order, beyond the raw copy of the last step."""
        count, num_last = num_tokens // BLOCK_SIZE, last_step_blocks(num_tokens)
        measures: dict[Way, Measure] = {}
        for medium in self.media:
            measures[medium, Kind.RAW] = functools.partial(self.raw, medium, num_last)
            measures[medium, Kind.HANDOVER] = functools.partial(self.fetch, medium, count, STEPPED)
        samples = await self.in_turn(measures, pace.rounds(most_rounds(count)))
        whole = [way for way in samples if way[1] is Kind.HANDOVER and (way[0], Kind.RAW) in samples]
        return [self._row(way, count, num_last, samples) for way in whole]

    async def in_turn(self, measures: dict[Way, Measure], rounds: Iterator[int]) -> dict[Way, Samples]:
        samples: dict[Way, Samples] = {way: Samples() for way in measures}
        for _ in rounds:
            for way, measure in measures.items():
                before = self.peer.cpu_s()
                try:
                    samples[way].seconds.append(await measure())
                except LOST as error:  # a machine that is this busy: the other rounds are still worth something
                    print(f"{way[0].value} {way[1].value}: a round was lost: {error}", flush=True)
                    continue
                samples[way].cpu_s.append(self.peer.cpu_s() - before)
        return {way: found for way, found in samples.items() if found.seconds}

    def _row(self, way: Way, count: int, num_moved: int, samples: dict[Way, Samples]) -> Row:
        """`num_moved`: the blocks that the time is about."""
        medium, kind = way
        seconds, raw = samples[way].seconds, samples[medium, Kind.RAW].seconds
        elapsed, raw_s = statistics.median(seconds), statistics.median(raw)
        num_bytes = num_moved * self.shape.block_bytes
        is_whole = kind in (Kind.FETCH, Kind.HANDOVER)
        beyond = sorted(1000 * (each - raw_s) for each in seconds)
        return Row(
            self.shape.name,
            self.shape.block_bytes,
            medium,
            kind,
            count,
            len(seconds),
            1000 * elapsed,
            num_bytes / elapsed / 1e9,
            ratio=None if is_whole else raw_s / elapsed,
            ratio_best=None if is_whole else min(raw) / min(seconds),
            cpu_s_per_gb=None if kind is Kind.HANDOVER else statistics.median(samples[way].cpu_s) / (num_bytes / 1e9),
            beyond_ms_p50=statistics.median(beyond) if is_whole else None,
            beyond_ms_p99=beyond[int(0.99 * len(beyond))] if is_whole else None,
        )


async def _patiently(move: Measure) -> None:
    """A busy machine's first connections take longer than a prompt may wait; clients go on connecting."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            await move()
            return
        except LOST:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def last_step_blocks(num_tokens: int) -> int:
    """Of a prompt's blocks those that its last step fills."""
    return (num_tokens % STEP_TOKENS or STEP_TOKENS) // BLOCK_SIZE
