"""Prefill and decode workers whose KV no transport may touch, as in a GPU's memory: through the ring, or read directly.

The model sees every memory fault, so each token that is right proves that its KV came through.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from decode_service import worker as decode_worker_module
from decode_service.config import DecodeConfig
from engine.dispatch import Device
from engine.worker import OnProgress, Replica, ReplicaSpec, load_replica
from kvtransfer import nixl_agent, ucx
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.staging import StagingRing, StagingUnusable
from prefill_service import worker as prefill_worker_module
from prefill_service.config import PrefillConfig
from prefill_service.memory import make_readable
from servicekit.failpoints import Failpoints
from tests.worker_processes import FAKE, Processes
from tests.workers_harness import BLOCK_SIZE, TRANSPORTS, FakeModel, RunningWorker, Workers, gateway_to, until
from workerkit import gpu_transfer

LOCAL = pb.DISAGGREGATION_NEVER
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 31, 90)
DEVICE = FakeModel(on_device=True)
SLOW = dataclasses.replace(DEVICE, step_s=0.01)
BLOCK_BYTES = 8 * BLOCK_SIZE
LONGEST = 128 // BLOCK_SIZE


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> list[StagingRing]:
    """Those of the workers that a test starts, in order."""
    made = list[StagingRing]()

    def make(num_slots: int, block_bytes: int) -> StagingRing:
        made.append(StagingRing(num_slots, block_bytes))
        return made[-1]

    monkeypatch.setattr(gpu_transfer, "StagingRing", make)
    return made


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [3 + (start * 7 + i * i) % 50 for i in range(length)]


async def at_baseline(rings: list[StagingRing], *workers: RunningWorker) -> None:
    """Every block is free or cached, every slot is free."""
    for worker in workers:
        await worker.at_baseline()
    await until(lambda: all(ring.num_free == ring.num_slots for ring in rings))


@pytest.mark.parametrize(("p_model", "d_model"), [(DEVICE, DEVICE), (DEVICE, FakeModel()), (FakeModel(), DEVICE)])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_goes_through_the_ring_at_every_length(
    workers: Workers, rings: list[StagingRing], transport: str, p_model: FakeModel, d_model: FakeModel
) -> None:
    """A worker whose KV is in host memory pairs with one whose KV is not: the bytes and digests are the same."""
    ways = {"transports": (transport,)}
    p, d = await workers.prefill(p_model, **ways), await workers.decode(d_model, **ways)
    assert len(rings) == p_model.on_device + d_model.on_device
    async with gateway_to(d) as gateway:
        for length in LENGTHS:
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, salt=b"local")
            remote = await gateway.ask(prompt_of(length), [p.candidate], salt=b"remote%d" % length)
            ended = await remote.end()
            assert (ended.stats.prefill_path, ended.stats.transport) == ("remote", transport), (length, ended)
            assert remote.ids == local.ids
        again = await gateway.ask(prompt_of(90), [p.candidate], salt=b"remote90")
        assert again.ids == remote.ids, "blocks of the prefix cache are staged once more"
    assert d.metric("baton_transfers_total", transport=transport, outcome="committed") >= len(LENGTHS)
    await at_baseline(rings, p, d)


@pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")
async def test_kv_is_read_where_it_lies_and_digested_there(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """With host memory in the GPU's place: what differs on a GPU is the word VRAM and who copies."""
    model = dataclasses.replace(DEVICE, digests_on_device=True)
    ways: dict[str, Any] = {"transports": ("nixl",)}
    p, d = await workers.prefill(model, **ways), await workers.decode(model, **ways)
    async with gateway_to(d) as gateway:
        for length in LENGTHS:
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, salt=b"local")
            remote = await gateway.ask(prompt_of(length), [p.candidate], salt=b"remote%d" % length)
            assert ((await remote.end()).stats.prefill_path, remote.ids) == ("remote", local.ids)
        staged = await workers.prefill(DEVICE, **ways)
        other = await gateway.ask(prompt_of(40), [staged.candidate], salt=b"other")
        assert (await other.end()).stats.prefill_path == "local", "another kind of digest is another layout"
    await at_baseline([], p, d)


async def test_a_slot_that_changed_under_its_digest_is_found_and_its_prompt_goes_elsewhere(
    workers: Workers, rings: list[StagingRing]
) -> None:
    bad = await workers.prefill(DEVICE, faults={"corrupt-published-block": 2})
    good, d = await workers.prefill(DEVICE), await workers.decode(DEVICE)
    async with gateway_to(d) as gateway:
        local = await gateway.ask(prompt_of(40), disaggregation=LOCAL, salt=b"l")
        remote = await gateway.ask(prompt_of(40), [bad.candidate, good.candidate], salt=b"r")
        ended = await remote.end()
        assert (ended.stats.prefill_worker_id, remote.ids) == (good.process.config.worker_id, local.ids)
    assert d.metric("baton_verification_failures_total", kind="corrupt") == 1
    await at_baseline(rings, bad, good, d)


async def test_prompts_that_fill_the_ring_together_wait_and_all_end(workers: Workers, rings: list[StagingRing]) -> None:
    """One of the longest fits, so each waits for the one before; D lands them all in a single slot."""
    p = await workers.prefill(SLOW, staging_memory=LONGEST * BLOCK_BYTES)
    d = await workers.decode(dataclasses.replace(DEVICE, num_blocks=512), staging_memory=BLOCK_BYTES)
    assert [ring.num_slots for ring in rings] == [LONGEST, 1]
    async with gateway_to(d) as gateway:
        asked = [await gateway.start(prompt_of(90, i), [p.candidate], salt=b"%d" % i, seed=i) for i in range(8)]
        await until(lambda: p.metric("baton_staging_waiting") > 0 and p.metric("baton_staging_slots", state="used") > 0)
        remote = [(await answer.end(), answer.ids) for _, answer in asked]
        assert [ended.stats.prefill_path for ended, _ in remote] == ["remote"] * 8
        for i, (_, ids) in enumerate(remote):
            local = await gateway.ask(prompt_of(90, i), disaggregation=LOCAL, salt=b"l%d" % i, seed=i)
            assert local.ids == ids
    await at_baseline(rings, p, d)
    for worker, num_slots in ((p, LONGEST), (d, 1)):
        slots = {state: worker.metric("baton_staging_slots", state=state) for state in ("free", "used")}
        assert (slots, worker.metric("baton_staging_waiting")) == ({"free": num_slots, "used": 0}, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_two_hundred_hand_overs_with_cancels_leave_every_slot_free(
    workers: Workers, rings: list[StagingRing], transport: str
) -> None:
    rng = random.Random(transport)
    tiny = dataclasses.replace(DEVICE, num_blocks=96, step_s=0.001)
    p = await workers.prefill(tiny, transports=(transport,), staging_memory=LONGEST * BLOCK_BYTES)
    d = await workers.decode(tiny, transports=(transport,), staging_memory=4 * BLOCK_BYTES)

    async def one(number: int) -> int:
        prompt = prompt_of(rng.randrange(8, 90), number)
        key, answer = await gateway.start(prompt, [p.candidate], salt=b"%d" % number, seed=number, max_tokens=2)
        if number % 2:
            await asyncio.sleep(rng.random() * 0.1)
            await gateway.cancel(key)
        return (await answer.end()).reason

    async with gateway_to(d) as gateway:
        reasons = list[int]()
        for first in range(0, 200, 10):
            reasons += await asyncio.gather(*(one(number) for number in range(first, first + 10)))
        assert reasons[::2] == [pb.END_FINISHED] * 100
        assert reasons.count(pb.END_CANCELLED) > 10, "some were cancelled in time"
        await at_baseline(rings, p, d)
        last = await gateway.ask(prompt_of(90, 777), [p.candidate], salt=b"last")
        assert (await last.end()).stats.prefill_path == "remote"
    await at_baseline(rings, p, d)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_prefill_worker_that_dies_under_a_pull_leaves_no_slot_taken(
    workers: Workers, processes: Processes, rings: list[StagingRing], transport: str
) -> None:
    flags = ("--failpoints", "kill-after-block-published=9", "--transports", transport)
    victim = await processes.start("tests.fake_worker", "prefill+device", *FAKE, flags=flags)
    good, d = (
        await workers.prefill(DEVICE, transports=(transport,)),
        await workers.decode(DEVICE, transports=(transport,), staging_memory=2 * BLOCK_BYTES),
    )
    async with gateway_to(d) as gateway:
        local = await gateway.ask(prompt_of(90), disaggregation=LOCAL, salt=b"l")
        answer = await gateway.ask(prompt_of(90), [victim.candidate, good.candidate])
        assert await victim.ended() == -signal.SIGKILL
        assert ((await answer.end()).stats.prefill_worker_id, answer.ids) == (good.process.config.worker_id, local.ids)
    await at_baseline(rings, good, d)


async def test_a_decode_worker_that_dies_under_a_pull_leaves_no_slot_of_its_prefill_worker_taken(
    workers: Workers, processes: Processes, rings: list[StagingRing]
) -> None:
    p = await workers.prefill(SLOW)
    flags = ("--failpoints", "kill-after-block-pulled=7")
    victim = await processes.start("tests.fake_worker", "decode+device", *FAKE, flags=flags)
    async with gateway_to(victim) as gateway:
        await gateway.start(prompt_of(90), [p.candidate])
        assert await victim.ended() == -signal.SIGKILL
    await at_baseline(rings, p)


def test_a_ring_that_holds_no_longest_prompt_is_refused_at_the_start() -> None:
    replica = DEVICE(ReplicaSpec(model=Path()), lambda phase, fraction: None)
    with pytest.raises(StagingUnusable, match=f"{LONGEST} must fit: give it {LONGEST * BLOCK_BYTES} bytes"):
        make_readable(replica, bytes(16), Failpoints(), (LONGEST - 1) * BLOCK_BYTES)


async def test_direct_transfer_without_cuda_in_ucx_falls_back_to_the_ring_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": tmp_path, "worker_id": "w", "secret_file": tmp_path}
    config = PrefillConfig(**settings, gpu_transfer="direct", device=Device.CUDA, transports=("nixl",))
    monkeypatch.setattr(ucx, "resources", lambda: ("tcp/lo", "sysv/memory"))
    assert not gpu_transfer.reads_device_memory(config)
    assert "it sees tcp/lo, sysv/memory" in caplog.text
    monkeypatch.setattr(ucx, "resources", lambda: ("tcp/lo", "cuda_copy/cuda"))
    assert gpu_transfer.reads_device_memory(config)


async def test_a_real_models_tokens_are_the_same_through_the_ring(
    workers: Workers, rings: list[StagingRing], tiny_llama: Path
) -> None:
    def load(spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
        small = dataclasses.replace(spec, separate_kv=True, max_model_len=256, max_num_seqs=4, num_threads=1)
        return load_replica(dataclasses.replace(small, model=tiny_llama), on_progress)

    p = await workers._start(
        PrefillConfig(**workers._settings("p", {})), pb.ROLE_PREFILL, load, {}, prefill_worker_module.serve
    )
    d = await workers._start(
        DecodeConfig(**workers._settings("d", {})), pb.ROLE_DECODE, load, {}, decode_worker_module.serve
    )
    async with gateway_to(d) as gateway:
        for length in (1, 16, 17, 100):
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, salt=b"local")
            remote = await gateway.ask(prompt_of(length), [p.candidate], salt=b"remote%d" % length)
            assert ((await remote.end()).stats.prefill_path, remote.ids) == ("remote", local.ids)
    assert d.metric("baton_transfers_total", transport="shm", outcome="committed") == 4
    await at_baseline(rings, p, d)
