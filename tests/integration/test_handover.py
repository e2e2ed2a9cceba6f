"""PrefillClient and PrefillServer over real sockets: whole hand-overs, damaged ones, cancelled ones, lost ones."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np
import pytest

from kvtransfer.auth import Secret, SecretInterceptor
from kvtransfer.decode_side import DecodeLimits, PrefillOrder
from kvtransfer.errors import FailureKind, TransferFailed
from kvtransfer.fake_backend import FakeBlock, FakePrefillBackend
from kvtransfer.faulty_transport import Fault, FaultPlan, FaultyTransport
from kvtransfer.memory_transport import MemoryBlockTransport
from kvtransfer.prefill_client import DecodeIdentity, Fetched, PrefillClient
from kvtransfer.prefill_server import PrefillServer
from kvtransfer.prefill_side import HeldTokens, PrefillLimits
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.rpc import DATA_OPTIONS
from kvtransfer.shm_transport import ShmBlockServer, host_id
from kvtransfer.transport import BlockSource, sealed_memory

BLOCK_SIZE = 4
BLOCK_BYTES = 4096
NUM_BLOCKS = 64
SECRET = Secret("integration")
PATIENCE_S = 60.0  # of waits that end early when all is well


class PrefillWorker:
    """A prefill worker with a fake engine and everything else real."""

    def __init__(self, port: int = 0) -> None:
        self.fd = sealed_memory("kv", NUM_BLOCKS * BLOCK_BYTES)
        self.memory = memoryview(mmap.mmap(self.fd, NUM_BLOCKS * BLOCK_BYTES))
        self.source = BlockSource(self.memory, BLOCK_BYTES, secrets.token_bytes(16))
        self.backend = FakePrefillBackend(NUM_BLOCKS, BLOCK_SIZE, self._fill)
        self.held = HeldTokens(10_000)
        self._port = port

    async def start(self) -> None:
        self.shm = ShmBlockServer(self.source, self.fd, SECRET)
        worker = pb.WorkerInfo(
            worker_id="p0",
            role=pb.ROLE_PREFILL,
            boot_id=self.source.boot_id,
            layout_fingerprint="layout",
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_BYTES,
            num_blocks=NUM_BLOCKS,
            shared_memory_socket=await self.shm.start(),
            host_id=host_id(),
        )
        self.server = PrefillServer(worker, self.backend, self.source, PrefillLimits(max_prompt_tokens=512), self.held)
        self.backend.deliver = self.server.deliver
        self._grpc = grpc.aio.server(interceptors=[SecretInterceptor(SECRET)], options=DATA_OPTIONS)
        self.server.add_to(self._grpc)
        self.port = self._grpc.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._grpc.start()

    async def stop(self) -> None:
        await self._grpc.stop(None)
        await self.server.aclose()
        await self.shm.aclose()
        os.close(self.fd)

    def block(self, block_id: int) -> bytes:
        return bytes(self.source.block(block_id))

    def _fill(self, block: FakeBlock, start: pb.StartPrefill) -> None:
        self.source.block(block.block_id)[:] = expected_block(start.token_ids, block.index)


def expected_block(token_ids: Sequence[int], index: int) -> bytes:
    """What the fake engine computes for a block: a function of the prompt up to its end."""
    seed = [index, *token_ids[: (index + 1) * BLOCK_SIZE]]
    return np.random.default_rng(seed).bytes(BLOCK_BYTES)


@pytest.fixture
async def worker() -> AsyncIterator[PrefillWorker]:
    worker = PrefillWorker()
    await worker.start()
    yield worker
    await worker.stop()


@dataclass
class Decode:
    """A decode worker's memory for one prompt."""

    blocks: list[memoryview]

    @classmethod
    def with_blocks(cls, num_blocks: int) -> Decode:
        return cls([memoryview(bytearray(BLOCK_BYTES)) for _ in range(num_blocks)])

    async def reserve(self) -> list[memoryview]:
        return self.blocks


def order(num_tokens: int = 10, held: int = 0, **changes: object) -> PrefillOrder:
    fields: dict[str, object] = {
        "request_id": "r",
        "token_ids": list(range(1, num_tokens + 1)),
        "num_blocks_held": held,
        "sampling": pb.SamplingParams(max_tokens=4),
        "choices": (0, 1),
        "cache_salt": b"",
        "deadline_s": PATIENCE_S,
    }
    return PrefillOrder(**{**fields, **changes})  # type: ignore[arg-type]  # a table of overrides


@contextlib.asynccontextmanager
async def connected(
    worker: PrefillWorker, transports: tuple[str, ...] = ("shm", "grpc"), **options: object
) -> AsyncIterator[PrefillClient]:
    identity = DecodeIdentity("d0", secrets.token_bytes(16), "layout", BLOCK_SIZE, BLOCK_BYTES, transports)
    client = PrefillClient(f"127.0.0.1:{worker.port}", identity, SECRET, pb.WorkerLoad, **options)  # type: ignore[arg-type]  # same
    client.start()
    yield client
    await client.aclose()


async def until(condition: Callable[[], object]) -> None:
    """Wait for the other end of a real socket."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def idle(worker: PrefillWorker) -> None:
    """P has heard of every release."""
    await until(lambda: not worker.server.num_tickets)
    assert len(worker.backend.free) == NUM_BLOCKS
    assert worker.source.num_open_tickets == 0
    assert worker.held.num_tokens == 0


@pytest.mark.parametrize("transports", [("shm",), ("grpc",), ("shm", "grpc")])
@pytest.mark.parametrize(("num_tokens", "held"), [(1, 0), (3, 0), (4, 0), (5, 0), (10, 0), (10, 1), (12, 3), (200, 7)])
async def test_the_prompts_kv_arrives_whole(
    worker: PrefillWorker, transports: tuple[str, ...], num_tokens: int, held: int
) -> None:
    asked = order(num_tokens, held)
    decode = Decode.with_blocks(-(-num_tokens // BLOCK_SIZE) - held)
    async with connected(worker, transports) as client:
        fetched = await client.fetch(asked, decode.reserve)
        await idle(worker)
    assert [bytes(b) for b in decode.blocks] == [
        expected_block(asked.token_ids, held + i) for i in range(len(decode.blocks))
    ]
    assert sorted((t.choice, t.token_id) for t in fetched.commit.first_tokens) == [(0, 1), (1, 2)]
    assert fetched.num_bytes == len(decode.blocks) * BLOCK_BYTES
    assert fetched.transport == (transports[0] if decode.blocks else "")
    assert worker.backend.released == [(1, True)]


async def test_many_prompts_share_the_stream(worker: PrefillWorker) -> None:
    async with connected(worker) as client:
        decodes = [Decode.with_blocks(3) for _ in range(16)]
        orders = [order(9, token_ids=[i] * 9) for i in range(16)]
        await asyncio.gather(*(client.fetch(o, d.reserve) for o, d in zip(orders, decodes, strict=True)))
        await idle(worker)
    for asked, decode in zip(orders, decodes, strict=True):
        assert [bytes(b) for b in decode.blocks] == [expected_block(asked.token_ids, i) for i in range(3)]


async def test_credit_below_the_prompt_still_moves_all_of_it(worker: PrefillWorker) -> None:
    limits = DecodeLimits(max_outstanding_bytes=2 * BLOCK_BYTES, min_window_tokens=1)
    decode = Decode.with_blocks(13)
    async with connected(worker, limits=limits) as client:
        await client.fetch(order(50), decode.reserve)
        await idle(worker)
    assert bytes(decode.blocks[12]) == expected_block(order(50).token_ids, 12)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.CORRUPT, FailureKind.CORRUPT),
        (Fault.TRUNCATE, FailureKind.TRUNCATED),
        (Fault.STALE_GENERATION, FailureKind.STALE),
        (Fault.OTHER_BOOT, FailureKind.STALE),
        (Fault.SWAP, FailureKind.CORRUPT),
        (Fault.DUPLICATE, FailureKind.PROTOCOL),
        (Fault.LOSE, FailureKind.PULL),
    ],
)
@pytest.mark.parametrize("position", [0, 3])
async def test_damaged_hand_overs_never_commit_and_the_next_one_does(
    worker: PrefillWorker, fault: Fault, kind: FailureKind, position: int
) -> None:
    plan = FaultPlan({position: fault})
    make: Callable[[pb.WorkerInfo], list[FaultyTransport]] = lambda info: [  # noqa: E731  a fixture in one line
        FaultyTransport(MemoryBlockTransport(worker.source), plan)
    ]
    decode = Decode.with_blocks(5)
    async with connected(worker, make_transports=make) as client:
        with pytest.raises(TransferFailed) as failed:
            await client.fetch(order(20), decode.reserve)
        assert failed.value.failure.kind is kind
        await client.fetch(order(20), decode.reserve)
        await idle(worker)
    assert [bytes(b) for b in decode.blocks] == [expected_block(order(20).token_ids, i) for i in range(5)]
    assert [ok for _, ok in worker.backend.released] == [False, True]
    assert worker.backend.suspects == ([1] if kind.is_wrong_bytes else [])


async def test_three_corrupt_hand_overs_in_a_row_quarantine_the_pair(worker: PrefillWorker) -> None:
    plan = FaultPlan(dict.fromkeys(range(100), Fault.CORRUPT))
    async with connected(
        worker, make_transports=lambda info: [FaultyTransport(MemoryBlockTransport(worker.source), plan)]
    ) as client:
        kinds = []
        for _ in range(4):
            with pytest.raises(TransferFailed) as failed:
                await client.fetch(order(), Decode.with_blocks(3).reserve)
            kinds.append(failed.value.failure.kind)
        await idle(worker)
    assert kinds == [FailureKind.CORRUPT] * 3 + [FailureKind.UNREACHABLE]


async def test_cancel_during_transfer_releases_both_ends(worker: PrefillWorker) -> None:
    plan = FaultPlan({1: Fault.DROP})
    decode = Decode.with_blocks(5)
    async with connected(
        worker, make_transports=lambda info: [FaultyTransport(MemoryBlockTransport(worker.source), plan)]
    ) as client:
        fetching = asyncio.create_task(client.fetch(order(20), decode.reserve))
        await until(lambda: plan.num_seen >= 2)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await idle(worker)
        assert client.num_transfers == 0


@pytest.mark.parametrize("is_paused", [True, False])
async def test_cancel_while_queued_or_reserving_releases_both_ends(worker: PrefillWorker, is_paused: bool) -> None:
    worker.backend.is_paused = is_paused
    waiting = asyncio.Event()

    async def never() -> list[memoryview]:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with connected(worker) as client:
        fetching = asyncio.create_task(client.fetch(order(20), never))
        await until(lambda: worker.server.num_tickets if is_paused else waiting.is_set())
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await idle(worker)


async def test_an_error_while_reserving_reaches_the_caller(worker: PrefillWorker) -> None:
    async def refuse() -> list[memoryview]:
        raise ZeroDivisionError

    async with connected(worker) as client:
        with pytest.raises(ZeroDivisionError):
            await client.fetch(order(20), refuse)
        await idle(worker)


async def test_a_lost_decode_worker_frees_its_tickets(worker: PrefillWorker) -> None:
    worker.backend.is_paused = True
    async with connected(worker) as client:
        fetching = asyncio.create_task(client.fetch(order(20), Decode.with_blocks(5).reserve))
        await until(lambda: worker.server.num_tickets)
        await client.aclose()
        with pytest.raises(TransferFailed):
            await fetching
        await idle(worker)


async def test_a_restarted_prefill_worker_is_used_again() -> None:
    first = PrefillWorker()
    await first.start()
    async with connected(first) as client:
        await client.fetch(order(), Decode.with_blocks(3).reserve)
        first.backend.is_paused = True
        fetching = asyncio.create_task(client.fetch(order(), Decode.with_blocks(3).reserve))
        await until(lambda: first.server.num_tickets)
        await first.stop()
        with pytest.raises(TransferFailed) as failed:
            await fetching
        assert failed.value.failure.kind is FailureKind.STREAM_LOST
        second = PrefillWorker(first.port)
        await second.start()
        decode = Decode.with_blocks(3)
        fetched: Fetched | None = None
        async with asyncio.timeout(PATIENCE_S):
            while fetched is None:
                with contextlib.suppress(TransferFailed):
                    fetched = await client.fetch(order(), decode.reserve)
                await asyncio.sleep(0.02)
        assert bytes(decode.blocks[0]) == expected_block(order().token_ids, 0)
        await second.stop()


async def test_a_wrong_secret_or_layout_makes_the_worker_unusable(worker: PrefillWorker) -> None:
    for secret, layout in ((Secret("guess"), "layout"), (SECRET, "other")):
        identity = DecodeIdentity("d0", secrets.token_bytes(16), layout, BLOCK_SIZE, BLOCK_BYTES)
        client = PrefillClient(f"127.0.0.1:{worker.port}", identity, secret, pb.WorkerLoad)
        client.start()
        with pytest.raises(TransferFailed) as failed:
            await client.fetch(order(), Decode.with_blocks(3).reserve)
        assert failed.value.failure.kind is FailureKind.UNREACHABLE
        await client.aclose()


async def test_a_draining_worker_refuses_new_prompts(worker: PrefillWorker) -> None:
    async with connected(worker) as client:
        await client.fetch(order(), Decode.with_blocks(3).reserve)
        worker.server.drain()
        with pytest.raises(TransferFailed) as failed:
            await client.fetch(order(), Decode.with_blocks(3).reserve)
    assert failed.value.failure.kind is FailureKind.DRAINING


async def test_a_broken_first_transport_gives_way_to_the_next(worker: PrefillWorker) -> None:
    await worker.shm.aclose()
    decode = Decode.with_blocks(3)
    async with connected(worker) as client:
        fetched = await client.fetch(order(), decode.reserve)
    assert fetched.transport == "grpc"
    assert bytes(decode.blocks[2]) == expected_block(order().token_ids, 2)


@pytest.mark.parametrize("breaks", ["digest", "publish", "state"])
async def test_a_bug_in_ps_handling_of_an_engine_event_fails_that_prompt_at_once(
    worker: PrefillWorker, breaks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was swallowed; D waited its 30 s for blocks."""

    def broken(*args: object, **kwargs: object) -> bytes:
        raise ZeroDivisionError

    async with connected(worker) as client:
        with monkeypatch.context() as patched:
            if breaks == "digest":
                patched.setattr("kvtransfer.exposure.block_digest", broken)
            elif breaks == "publish":
                patched.setattr(worker.source, "publish", broken)
            else:
                patched.setattr("kvtransfer.prefill_side.PrefillSide.blocks_filled", broken)
            with pytest.raises(TransferFailed) as failed:
                async with asyncio.timeout(20):
                    await client.fetch(order(20), Decode.with_blocks(5).reserve)
        assert failed.value.failure.kind is FailureKind.INTERNAL
        decode = Decode.with_blocks(5)
        await client.fetch(order(20), decode.reserve)
        await idle(worker)
    assert bytes(decode.blocks[4]) == expected_block(order(20).token_ids, 4)
    assert worker.server.num_event_failures == 1
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["kvtransfer.prefill_server"]
