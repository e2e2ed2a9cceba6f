"""Hand-over bandwidth and latency against a raw copy over the same medium, in one run: `make bench-transfer`.

Two processes on this machine. P holds the KV blocks (and a raw TCP server over the same memory); D, this process, moves
them by every path in turn, each round over other blocks than the last, so that neither end finds them in its caches:

    tcp raw    1 MiB writes, recv_into a preallocated buffer          the medium of grpc
    grpc       the Pull stream, with and without digest verification
    copy raw   numpy copyto from the mapped memory, one thread         the medium of shm
    shm        the shared memory transport, with and without digest verification
    nixl raw   one read of all blocks at once, the agent itself         the medium of nixl (UCX: see UCX_TLS)
    nixl       the NIXL transport, with and without digest verification; only where the extra is installed
    fetch      the whole hand-over, start to commit, over the real control stream and an engine that computes nothing:
               what is left after subtracting the raw copy of the same bytes is the protocol
    hand-over  the same in the order of a real prefill: the prompt's blocks are filled a step of 192 tokens at a time,
               0.4 s apart, and published as they are digested. From the last block's last byte at P to the commit at
               D, less the raw copy of the last step's bytes: what disaggregation adds to a prompt's first token
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import math
import mmap
import os
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from kvtransfer import nixl_agent, rpc
from kvtransfer.auth import Secret, SecretInterceptor
from kvtransfer.decode_side import PrefillOrder
from kvtransfer.digest import block_digest
from kvtransfer.fake_backend import FakePrefillBackend
from kvtransfer.grpc_transport import GrpcBlockTransport
from kvtransfer.nixl_agent import ReadState
from kvtransfer.nixl_transport import NixlBlockTransport, NixlMemory, NixlReader
from kvtransfer.prefill_client import DecodeIdentity, PrefillClient
from kvtransfer.prefill_events import BlocksFilled, PrefillDone
from kvtransfer.prefill_server import PrefillServer
from kvtransfer.prefill_side import HeldTokens, PrefillLimits
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import ShmBlockServer, ShmBlockTransport, host_id
from kvtransfer.transport import BlockRead, BlockSource, BlockTransport, SourceBlock, sealed_memory
from workerkit.process import SWITCH_INTERVAL_S

SECRET = Secret("bench")
SHAPES = {"135M": 737_280, "1B": 524_288, "8B": 2_097_152}
"""Bytes of a block of 16 tokens: SmolLM2-135M in float32; Llama 3.2 1B (16 layers, 8 KV heads of 64) and Llama 3.1 8B
(32 layers, 8 KV heads of 128) in 16 bits.
"""
BLOCK_SIZE = 16
MEMORY_BYTES = 9 << 28  # of each end: 1,024 of the largest blocks, and room to rotate
STEPPED = "stepped"
RAW = {"grpc": "tcp raw", "shm": "copy raw", "nixl": "nixl raw"}
FRAGMENT_STRIDE = 2  # every other block: no two are neighbours
STEP_TOKENS, STEP_S = 192, 0.4  # a prefill worker's default step, at SmolLM2's 500 tokens/s
MIB = 1 << 20
_REQUEST_BYTES = 16

# ---------------------------------------------------------------- P


def blocks_of(block_bytes: int) -> int:
    """How many blocks each end has."""
    return MEMORY_BYTES // block_bytes


async def serve_prefill(block_bytes: int) -> None:
    """P: prints one line of JSON, then obeys lines on stdin ("FIRST COUNT STRIDE" -> ticket; end of file -> exit)."""
    num_blocks, block_size = blocks_of(block_bytes), BLOCK_SIZE
    fd = sealed_memory("kv", num_blocks * block_bytes)
    memory = memoryview(mmap.mmap(fd, num_blocks * block_bytes))
    np.frombuffer(memory, np.uint64)[:] = np.arange(len(memory) // 8, dtype=np.uint64)
    source = BlockSource(memory, block_bytes, secrets.token_bytes(16))
    backend = SteppingBackend(num_blocks, block_size)
    shm = ShmBlockServer(source, fd, SECRET)
    nixl = NixlMemory(source) if nixl_agent.is_available() else None
    worker = pb.WorkerInfo(
        worker_id="p",
        role=pb.ROLE_PREFILL,
        boot_id=source.boot_id,
        layout_fingerprint="bench",
        block_size=block_size,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        shared_memory_socket=await shm.start(),
        host_id=host_id(),
        nixl=nixl.info if nixl else None,
    )
    server = PrefillServer(worker, backend, source, PrefillLimits(1 << 20), HeldTokens(1 << 30))
    backend.deliver = server.deliver
    grpc_server = grpc.aio.server(interceptors=[SecretInterceptor(SECRET)], options=rpc.DATA_OPTIONS)
    server.add_to(grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    hello = {"port": port, "raw_port": _serve_raw(memory, block_bytes), "worker": worker.SerializeToString().hex()}
    print(json.dumps(hello), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        ids = _ids(*map(int, line.split()), num_blocks)
        ticket = secrets.token_bytes(16)
        source.open(ticket)
        source.publish(ticket, _blocks(ids))
        print(ticket.hex(), flush=True)
    os._exit(0)


class SteppingBackend(FakePrefillBackend):
    """Fills a prompt whose request id is STEPPED as a prefill would, and notes when it had filled the last block.

    Both processes read the same clock (CLOCK_MONOTONIC), so the time travels as the prompt's `prefill_s`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._running: set[asyncio.Task[None]] = set()

    def _run(self, key: int, prompt: Any) -> None:
        is_stepped = prompt.start.request_id == STEPPED
        if not is_stepped:
            super()._run(key, prompt)
        elif prompt.num_filled == 0:
            prompt.num_filled = len(prompt.blocks)  # the grants that follow start nothing
            task = asyncio.create_task(self._run_in_steps(key, prompt))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run_in_steps(self, key: int, prompt: Any) -> None:
        size = STEP_TOKENS // self._block_size
        steps = [prompt.blocks[first : first + size] for first in range(0, len(prompt.blocks), size)]
        for number, blocks in enumerate(steps, 1):
            await asyncio.sleep(STEP_S)
            events: list[Any] = [BlocksFilled(key, blocks)]
            if number == len(steps):
                tokens = [pb.FirstToken(choice=choice, token_id=1) for choice in prompt.start.choices]
                events.append(PrefillDone(key, None, tokens, 0.0, time.perf_counter()))
            self.deliver(events)


def _ids(first: int, count: int, stride: int, num_blocks: int) -> list[int]:
    return [(first + i * stride) % num_blocks for i in range(count)]


def _blocks(ids: Sequence[int]) -> list[SourceBlock]:
    return [SourceBlock(i, block_id, 1) for i, block_id in enumerate(ids)]


def _serve_raw(memory: memoryview, block_bytes: int) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        while request := connection.recv(_REQUEST_BYTES):
            first, count = map(int, request.split())
            for block_id in _ids(first, count, 1, blocks_of(block_bytes)):
                start = block_id * block_bytes
                for offset in range(start, start + block_bytes, MIB):
                    connection.sendall(memory[offset : min(offset + MIB, start + block_bytes)])

    threading.Thread(target=answer, daemon=True).start()
    return listener.getsockname()[1]


# ---------------------------------------------------------------- D


@dataclass
class Row:
    """One cell of the table: medians over the rounds, and the ratio of the best rounds (what a busy machine hides)."""

    path: str
    block_bytes: int
    num_blocks: int
    gb_per_s: float
    ratio: float | None = None  # of the raw copy over the same medium
    ratio_best: float | None = None
    cpu_s_per_gb: float | None = None  # of both processes, user and system
    overhead_ms_p50: float | None = None  # of a whole hand-over beyond the raw copy
    overhead_ms_p99: float | None = None


class Peer:
    """The P process."""

    def __init__(self, process: asyncio.subprocess.Process, hello: dict[str, Any]) -> None:
        self.process = process
        self.address = f"127.0.0.1:{hello['port']}"
        self.worker = pb.WorkerInfo.FromString(bytes.fromhex(hello["worker"]))
        self.raw = socket.create_connection(("127.0.0.1", hello["raw_port"]))

    def cpu_s(self) -> float:
        """Of the processors, by both processes, so far."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, system = file.read().rsplit(") ", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") + time.process_time()

    async def open(self, first: int, count: int, stride: int) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{first} {count} {stride}\n".encode())
        return bytes.fromhex((await self.process.stdout.readline()).decode())


class Bench:
    def __init__(self, peer: Peer, rounds: int) -> None:
        self._peer = peer
        self._rounds = rounds
        self._block_bytes = peer.worker.block_bytes
        self._num_blocks = peer.worker.num_blocks
        buffer = np.ones(self._num_blocks * self._block_bytes, np.uint8)  # touched: page faults are not what we measure
        self._destinations = memoryview(buffer)
        self._next = 0
        self._shm = ShmBlockTransport(peer.worker, SECRET)
        self._grpc = GrpcBlockTransport(peer.address, SECRET, self._block_bytes)
        self._transports: dict[str, BlockTransport] = {"grpc": self._grpc, "shm": self._shm}
        self._reader: NixlReader | None = None
        if nixl_agent.is_available():
            self._reader = NixlReader("bench", self._destinations, self._block_bytes)
            self._transports["nixl"] = NixlBlockTransport(peer.address, peer.worker, SECRET, self._reader)

    def _rotate(self, count: int, stride: int = 1) -> tuple[int, list[memoryview]]:
        """The next blocks at both ends: neither in the caches."""
        first, self._next = self._next, (self._next + count * stride + 16) % self._num_blocks
        ids = _ids(first, count, stride, self._num_blocks)
        size = self._block_bytes
        return first, [self._destinations[i * size : (i + 1) * size] for i in ids]

    async def warm(self) -> None:
        """Connections, mappings, first-touch faults."""
        for transport in self._transports.values():
            await self.pull(transport, False, self._num_blocks, 1)

    async def raw_tcp(self, count: int) -> float:
        first, destinations = self._rotate(count)
        return await asyncio.to_thread(self._raw_tcp, first, count, destinations)

    def _raw_tcp(self, first: int, count: int, destinations: Sequence[memoryview]) -> float:
        started = time.perf_counter()
        self._peer.raw.sendall(f"{first} {count}".encode().ljust(_REQUEST_BYTES))
        for destination in destinations:
            received = 0
            while received < len(destination):
                received += self._peer.raw.recv_into(destination[received : received + MIB])
        return time.perf_counter() - started

    async def raw_copy(self, count: int) -> float:
        first, destinations = self._rotate(count)
        memory, _ = self._shm._link.mapped  # type: ignore[union-attr]  # mapped by warm()
        arrays = [np.frombuffer(destination, np.uint8) for destination in destinations]

        def copy() -> float:
            started = time.perf_counter()
            for i, array in enumerate(arrays):
                np.copyto(array, memory[(first + i) % self._num_blocks])
            return time.perf_counter() - started

        return await asyncio.to_thread(copy)

    async def raw_nixl(self, count: int) -> float:
        """As little as a read can be: prepared lists, one post, a look every 20 us."""
        first, destinations = self._rotate(count)
        ids = _ids(first, count, 1, self._num_blocks)
        assert self._reader is not None
        to = [self._reader.block_id(destination) for destination in destinations]
        life = self._reader._life
        assert life is not None
        peer = life.peers[self._peer.worker.boot_id]

        def read() -> float:
            started = time.perf_counter()
            posted = life.agent.post_read(life.blocks, to, peer.blocks, ids)
            while life.agent.state(posted) is ReadState.RUNNING:
                time.sleep(20e-6)
            elapsed = time.perf_counter() - started
            life.agent.release(posted)
            return elapsed

        return await asyncio.to_thread(read)

    async def pull(self, transport: BlockTransport, verified: bool, count: int, stride: int) -> float:
        first, destinations = self._rotate(count, stride)
        ticket = await self._peer.open(first, count, stride)
        puller = await transport.open(ticket, self._peer.worker.boot_id)

        def verify(read: BlockRead) -> None:
            block_digest(destinations[read.index])

        started = time.perf_counter()
        blocks = _blocks(_ids(first, count, stride, self._num_blocks))
        await puller.pull(blocks, destinations, verify if verified else lambda read: None)
        elapsed = time.perf_counter() - started
        await puller.aclose()
        return elapsed

    async def fetch(self, client: PrefillClient, count: int, request_id: str = "bench") -> float:
        """Seconds from the order to the commit; for a stepped prompt from its last block."""
        _, destinations = self._rotate(count)
        order = PrefillOrder(
            request_id, [7] * (count * self._peer.worker.block_size), 0, pb.SamplingParams(), (0,), b"", 60.0
        )

        async def reserve() -> Sequence[memoryview]:
            return destinations

        started = time.perf_counter()
        fetched = await client.fetch(order, reserve)
        return time.perf_counter() - (fetched.commit.prefill_s if request_id == STEPPED else started)

    async def bandwidth(self, counts: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        raws = {"grpc": self.raw_tcp, "shm": self.raw_copy, "nixl": self.raw_nixl}
        for count in counts:
            measures: dict[str, Callable[[], Awaitable[float]]] = {}
            for name, transport in self._transports.items():
                measures[RAW[name]] = functools.partial(raws[name], count)
                measures[name] = functools.partial(self.pull, transport, False, count, 1)
                measures[f"{name} + digest"] = functools.partial(self.pull, transport, True, count, 1)
                if count > 1 and FRAGMENT_STRIDE * count <= self._num_blocks:
                    measures[f"{name} fragmented"] = functools.partial(
                        self.pull, transport, False, count, FRAGMENT_STRIDE
                    )
            samples, cpu_s = await self._interleaved(measures, count)
            for path, times in samples.items():
                cpu_s_per_gb = sum(cpu_s[path]) / (len(times) * count * self._block_bytes / 1e9)
                raw = samples[RAW.get(path.split()[0], path)]
                elapsed = statistics.median(times)
                gb_per_s = count * self._block_bytes / elapsed / 1e9
                ratio, best = statistics.median(raw) / elapsed, min(raw) / min(times)
                rows.append(Row(path, self._block_bytes, count, gb_per_s, ratio, best, cpu_s_per_gb))
        return rows

    async def _interleaved(
        self, measures: dict[str, Callable[[], Awaitable[float]]], count: int
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Seconds by the clock and of both processes' processors."""
        samples: dict[str, list[float]] = {path: [] for path in measures}
        cpu_s: dict[str, list[float]] = {path: [] for path in measures}
        rounds = self._rounds if count >= 64 else 3 * self._rounds
        for _ in range(rounds):
            for path, measure in measures.items():
                before = self._peer.cpu_s()
                samples[path].append(await measure())
                cpu_s[path].append(self._peer.cpu_s() - before)
        return samples, cpu_s

    async def handover(self, counts: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        raw_measures = {"grpc": self.raw_tcp, "shm": self.raw_copy, "nixl": self.raw_nixl}
        for transport in self._transports:
            raw_measure = raw_measures[transport]
            identity = DecodeIdentity(
                "d", bytes(16), "bench", self._peer.worker.block_size, self._block_bytes, (transport,)
            )
            client = PrefillClient(self._peer.address, identity, SECRET, pb.WorkerLoad, nixl=self._reader)
            client.start()
            await self.fetch(client, 1)
            for count in counts:
                raws, wholes = [], []
                for _ in range(10 * self._rounds if count <= 8 else 3 * self._rounds):
                    raws.append(await raw_measure(count))
                    wholes.append(await self.fetch(client, count))
                raw = statistics.median(raws)
                beyond = sorted(1000 * (whole - raw) for whole in wholes)
                gb_per_s = count * self._block_bytes / statistics.median(wholes) / 1e9
                p50, p99 = statistics.median(beyond), beyond[min(len(beyond) - 1, int(0.99 * len(beyond)))]
                row = Row(f"fetch {transport}", self._block_bytes, count, gb_per_s, None, None, None, p50, p99)
                rows.append(row)
            for count in (num_tokens // self._peer.worker.block_size for num_tokens in (512, 1536)):
                rows.append(await self._stepped(client, transport, raw_measure, count))
            await client.aclose()
        return rows

    async def _stepped(
        self, client: PrefillClient, transport: str, raw_measure: Callable[[int], Awaitable[float]], count: int
    ) -> Row:
        size = STEP_TOKENS // self._peer.worker.block_size
        num_last = count % size or size
        raws, exposed = [], []
        for _ in range(self._rounds):
            raws.append(await raw_measure(num_last))
            exposed.append(await self.fetch(client, count, STEPPED))
        beyond = sorted(1000 * (each - statistics.median(raws)) for each in exposed)
        gb_per_s = num_last * self._block_bytes / statistics.median(exposed) / 1e9
        return Row(
            f"hand-over {transport}",
            self._block_bytes,
            count,
            gb_per_s,
            None,
            None,
            None,
            statistics.median(beyond),
            beyond[-1],
        )


async def run(block_bytes: int, counts: Sequence[int], rounds: int) -> list[Row]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.transfer",
        "--serve",
        str(block_bytes),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while not (line := await process.stdout.readline()).startswith(b"{"):
            assert line, "P did not start"  # UCX writes its warnings to stdout
        peer = Peer(process, json.loads(line))
        bench = Bench(peer, rounds)
        await bench.warm()
        fitting = [count for count in counts if count <= peer.worker.num_blocks]
        return [*await bench.bandwidth(fitting), *await bench.handover([count for count in fitting if count <= 64])]
    finally:
        process.stdin.close()
        await process.wait()


def show(rows: Sequence[Row]) -> None:
    print(
        f"{'path':<16}{'block':>10}{'blocks':>8}{'GB/s':>8}{'of raw':>8}{'best':>8}{'CPU s/GB':>10}"
        f"{'beyond raw p50':>16}{'p99':>8}"
    )
    for row in rows:
        ratio = f"{100 * row.ratio:.0f} %" if row.ratio is not None else ""
        best = f"{100 * row.ratio_best:.0f} %" if row.ratio_best is not None else ""
        cpu = f"{row.cpu_s_per_gb:.2f}" if row.cpu_s_per_gb is not None else ""
        p50 = f"{row.overhead_ms_p50:.2f} ms" if row.overhead_ms_p50 is not None else ""
        p99 = f"{row.overhead_ms_p99:.2f}" if row.overhead_ms_p99 is not None else ""
        print(
            f"{row.path:<16}{row.block_bytes:>10}{row.num_blocks:>8}{row.gb_per_s:>8.2f}{ratio:>8}{best:>8}"
            f"{cpu:>10}{p50:>16}{p99:>8}"
        )


def svg(rows: Sequence[Row]) -> str:
    """GB/s over the bytes of a transfer, a line for each path that moves neighbours: enough to see where one bends."""
    width, height, margin = 720, 420, 50
    colours = {"grpc": "#1f77b4", "shm": "#2ca02c", "nixl": "#d62728", "tcp": "#9ecae1", "copy": "#a1d99b"}
    drawn = [row for row in rows if row.ratio is not None and "+" not in row.path and "fragmented" not in row.path]
    most = max(row.gb_per_s for row in drawn)
    sizes = [math.log2(row.num_blocks * row.block_bytes) for row in drawn]
    low, high = min(sizes), max(sizes)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    for number, path in enumerate(dict.fromkeys(row.path for row in drawn)):
        of_path = sorted((math.log2(r.num_blocks * r.block_bytes), r.gb_per_s) for r in drawn if r.path == path)
        points = " ".join(
            f"{margin + (x - low) / max(high - low, 1) * (width - 2 * margin):.1f},"
            f"{height - margin - y / most * (height - 2 * margin):.1f}"
            for x, y in of_path
        )
        colour, dash = colours[path.split()[0]], ' stroke-dasharray="5"' if "raw" in path else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="{margin + 8}" y="{margin + 16 * number}" fill="{colour}">{path}</text>')
    labels = f"0 to {most:.1f} GB/s over 2^{low:.1f} to 2^{high:.1f} bytes"
    return "\n".join([*parts, f'<text x="{margin}" y="{height - 16}">{labels}</text>', "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--plot", type=Path, help="draw GB/s by transfer size here, as SVG")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the workers do
    if arguments.serve is not None:
        asyncio.run(serve_prefill(arguments.serve))
        return
    rows: list[Row] = []
    for shape in arguments.shapes:
        rows += asyncio.run(run(SHAPES[shape], arguments.blocks, arguments.rounds))
    show(rows)
    if arguments.plot is not None:
        arguments.plot.write_text(svg(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
