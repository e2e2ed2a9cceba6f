"""Prefill and decode workers together, over real ports and shared memory, with a model that sees memory faults."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from kvtransfer.protocol import baton_pb2 as pb
from tests.workers_harness import BLOCK_SIZE, RunningWorker, Workers, gateway_to

LOCAL = pb.DISAGGREGATION_NEVER
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 8, 31, 90)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncGenerator[Workers]:
    workers = Workers(tmp_path)
    yield workers
    await workers.aclose()


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [3 + (start * 7 + i * i) % 50 for i in range(length)]


async def at_baseline(*workers: RunningWorker) -> None:
    for worker in workers:
        await worker.at_baseline()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
async def test_remote_prefill_gives_the_tokens_of_local_prefill_at_every_length(
    workers: Workers, transport: str
) -> None:
    p, d = await workers.prefill(), await workers.decode(transports=(transport,))
    async with gateway_to(d) as gateway:
        for length in LENGTHS:
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, salt=b"local")
            remote = await gateway.ask(prompt_of(length), [p.candidate], salt=b"remote%d" % length)
            ended = await remote.end()
            assert (ended.stats.prefill_path, ended.stats.transport) == ("remote", transport), (length, ended)
            assert remote.ids == local.ids
    assert d.metric("baton_transfers_total", transport=transport, outcome="committed") == len(LENGTHS)
    await at_baseline(p, d)
