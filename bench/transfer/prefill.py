"""P of the transfer bench: blocks that every transport serves, a raw TCP server over them, an engine in steps."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
import numpy as np
import xxhash

from bench.transfer.cases import BLOCK_SIZE, STEP_S, STEP_TOKENS, Shape, ids_of
from kvtransfer import nixl_agent, rpc
from kvtransfer.auth import Secret, SecretInterceptor
from kvtransfer.fake_backend import FakePrefillBackend
from kvtransfer.nixl_transport import NixlMemory
from kvtransfer.prefill_events import BlocksFilled, PrefillDone
from kvtransfer.prefill_server import PrefillServer
from kvtransfer.prefill_side import HeldTokens, PrefillLimits
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.shm_transport import ShmBlockServer, host_id
from kvtransfer.transport import BlockSource, SourceBlock, sealed_memory

SECRET = Secret("bench")
STEPPED = "stepped"
MIB = 1 << 20
REQUEST_BYTES = 16
WITH_DIGESTS, WITHOUT_DIGESTS = "digests", "no digests"
_TAKEN = xxhash.xxh3_128_digest


async def serve(shapes: Sequence[Shape]) -> None:
    """Says "ready", then obeys lines on stdin; end of file -> exit.

    All shapes lie over the same memory, which is touched once: page faults of gigabytes take a busy machine minutes.
    One is served at a time ("use NUMBER" -> where it is), for each NIXL agent has a thread that polls.
    "FIRST COUNT STRIDE" publishes blocks and answers with their ticket.
    """
    num_bytes = max(shape.num_bytes for shape in shapes)
    fd = sealed_memory("kv", num_bytes)
    memory = memoryview(mmap.mmap(fd, num_bytes))
    _fill(memory)
    pool: Pool | None = None
    print("ready", flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        word, *rest = line.split()
        if line in (WITH_DIGESTS, WITHOUT_DIGESTS):
            take_digests(line)
            print(line, flush=True)
        elif word == "use":
            if pool is not None:
                pool.close()
            shape = shapes[int(rest[0])]
            pool = Pool(shape, fd, memory[: shape.num_bytes])
            print(json.dumps(await pool.start()), flush=True)
        else:
            assert pool is not None, line
            print(pool.open(*map(int, line.split())).hex(), flush=True)
    os._exit(0)


class Pool:
    """The blocks of one shape, behind every transport."""

    def __init__(self, shape: Shape, fd: int, memory: memoryview) -> None:
        self._shape = shape
        self._memory = memory
        self._source = BlockSource(memory, shape.block_bytes, secrets.token_bytes(16))
        self._shm = ShmBlockServer(self._source, fd, SECRET)
        self._nixl = NixlMemory(self._source) if nixl_agent.is_available() else None
        self._grpc = grpc.aio.server(interceptors=[SecretInterceptor(SECRET)], options=rpc.DATA_OPTIONS)

    async def start(self) -> dict[str, Any]:
        """Says where everything is."""
        worker = pb.WorkerInfo(
            worker_id="p",
            role=pb.ROLE_PREFILL,
            boot_id=self._source.boot_id,
            layout_fingerprint="bench",
            block_size=BLOCK_SIZE,
            block_bytes=self._shape.block_bytes,
            num_blocks=self._shape.num_blocks,
            shared_memory_socket=await self._shm.start(),
            host_id=host_id(),
            nixl=self._nixl.info if self._nixl else None,
        )
        backend = SteppingBackend(self._shape.num_blocks, BLOCK_SIZE)
        server = PrefillServer(worker, backend, self._source, PrefillLimits(1 << 20), HeldTokens(1 << 30))
        backend.deliver = server.deliver
        server.add_to(self._grpc)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        await self._grpc.start()
        raw_port = _serve_raw(self._memory, self._shape)
        return {"port": port, "raw_port": raw_port, "worker": worker.SerializeToString().hex()}

    def close(self) -> None:
        """Its streams have ended; the agent's thread ends here."""
        if self._nixl is not None:
            self._nixl.close()

    def open(self, first: int, count: int, stride: int) -> bytes:
        ticket = secrets.token_bytes(16)
        self._source.open(ticket)
        self._source.publish(ticket, source_blocks(ids_of(first, count, stride, self._shape.num_blocks)))
        return ticket


def take_digests(how: str) -> None:
    """For this process: as ever, or as if they cost nothing. Both ends must do the same."""
    xxhash.xxh3_128_digest = _TAKEN if how == WITH_DIGESTS else lambda block: bytes(16)


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


def source_blocks(ids: Sequence[int]) -> list[SourceBlock]:
    return [SourceBlock(i, block_id, 1) for i, block_id in enumerate(ids)]


def _fill(memory: memoryview) -> None:
    """No two places alike, in pieces: the memory is there once."""
    words = np.frombuffer(memory, np.uint64)
    pattern = np.arange(MIB, dtype=np.uint64)
    for first in range(0, len(words), MIB):
        piece = words[first : first + MIB]
        np.add(pattern[: len(piece)], np.uint64(first), out=piece)


def _serve_raw(memory: memoryview, shape: Shape) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        while request := connection.recv(REQUEST_BYTES):
            first, count = map(int, request.split())
            for block_id in ids_of(first, count, 1, shape.num_blocks):
                start = block_id * shape.block_bytes
                for offset in range(start, start + shape.block_bytes, MIB):
                    connection.sendall(memory[offset : min(offset + MIB, start + shape.block_bytes)])

    threading.Thread(target=answer, daemon=True).start()
    return listener.getsockname()[1]
