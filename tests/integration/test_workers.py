"""Prefill and decode workers together, over real ports and shared memory, with a model that sees memory faults."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import grpc.aio
import pytest

from decode_service import app, attempts
from decode_service.config import DecodeConfig
from decode_service.messages import engine_request
from decode_service.stream import GatewayStream
from decode_service.worker import serve as serve_decode
from engine.worker import LoadPhase, OnProgress, Replica, ReplicaSpec
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.protocol import baton_pb2_grpc as stubs
from prefill_service.backend import EngineBackend
from tests.workers_harness import (
    BLOCK_SIZE,
    PATIENCE_S,
    TRANSPORTS,
    FakeModel,
    RunningWorker,
    Workers,
    gateway_to,
    until,
)
from workerkit.process import EXIT_ENGINE_FAILED, WorkerProcess

LOCAL = pb.DISAGGREGATION_NEVER
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 8, 31, 90)


def prompt_of(length: int, start: int = 3) -> list[int]:
    return [3 + (start * 7 + i * i) % 50 for i in range(length)]


async def at_baseline(*workers: RunningWorker) -> None:
    for worker in workers:
        await worker.at_baseline()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_remote_prefill_gives_the_tokens_of_local_prefill_at_every_length(
    workers: Workers, transport: str
) -> None:
    p, d = await workers.prefill(transports=(transport,)), await workers.decode(transports=(transport,))
    async with gateway_to(d) as gateway:
        for length in LENGTHS:
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, salt=b"local")
            remote = await gateway.ask(prompt_of(length), [p.candidate], salt=b"remote%d" % length)
            ended = await remote.end()
            assert (ended.stats.prefill_path, ended.stats.transport) == ("remote", transport), (length, ended)
            assert remote.ids == local.ids
    assert d.metric("baton_transfers_total", transport=transport, outcome="committed") == len(LENGTHS)
    await at_baseline(p, d)


async def test_many_choices_share_one_remote_prefill_and_equal_local_ones(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    async with gateway_to(d) as gateway:
        for length in (7, 8, 30):
            local = await gateway.ask(prompt_of(length), disaggregation=LOCAL, logs=((), (), ()), salt=b"l")
            remote = await gateway.ask(prompt_of(length), [p.candidate], logs=((), (), ()), salt=b"r%d" % length)
            assert (await remote.end()).stats.prefill_path == "remote"
            assert remote.ids == local.ids
            assert len({tuple(ids) for ids in remote.ids.values()}) == 3, "choices must differ"
    await at_baseline(p, d)


async def test_logprobs_of_the_first_token_travel_with_the_manifest(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    async with gateway_to(d) as gateway:
        local = await gateway.ask(prompt_of(9), disaggregation=LOCAL, num_logprobs=2, salt=b"l")
        remote = await gateway.ask(prompt_of(9), [p.candidate], num_logprobs=2)
        first, expected = remote.tokens[0][0], local.tokens[0][0]
        assert len(first.top_logprobs) == 2
        assert (first.logprob, list(first.top_logprobs)) == (expected.logprob, list(expected.top_logprobs))


async def test_blocks_that_d_holds_are_not_sent_again(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    prompt = prompt_of(33)
    async with gateway_to(d) as gateway:
        first = await (await gateway.ask(prompt, [p.candidate])).end()
        again = await gateway.ask(prompt, [p.candidate])
        ended = await again.end()
        assert ended.stats.prefill_path == "remote"
        assert ended.stats.num_cached_tokens >= 32
        assert ended.stats.transfer_bytes < first.stats.transfer_bytes
        fresh = await gateway.ask(prompt, disaggregation=LOCAL, salt=b"other tenant")
        assert again.ids == fresh.ids
    await at_baseline(p, d)


async def test_a_replay_with_committed_logs_continues_the_same_streams(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    prompt = prompt_of(21)
    async with gateway_to(d) as gateway:
        whole = await gateway.ask(prompt, disaggregation=LOCAL, logs=((), ()), salt=b"l")
        logs = [whole.ids[0][:3], whole.ids[1][:5]]
        for candidates, salt in (([p.candidate], b"remote"), ([], b"local")):
            replay = await gateway.ask(prompt, candidates, logs=logs, salt=salt)
            assert (await replay.end()).stats.prefill_path == salt.decode()
            assert replay.ids == {0: whole.ids[0][3:], 1: whole.ids[1][5:]}
    await at_baseline(p, d)


# ---------------------------------------------------------------- ends before the end


@pytest.mark.parametrize(("after_tokens", "delay_s"), [(0, 0.0), (0, 0.02), (0, 0.05), (0, 0.1), (1, 0.0), (5, 0.0)])
async def test_cancel_at_any_stage_frees_every_block_of_both_workers(
    workers: Workers, after_tokens: int, delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FakeModel(step_s=0.02)
    p, d = await workers.prefill(slow), await workers.decode(slow)
    at_cancel = list[int]()  # steps that were done when the worker was told
    cancel = attempts.Attempts.cancel

    def note_cancel(self: attempts.Attempts, stream: GatewayStream, message: pb.CancelAttempt) -> None:
        cancel(self, stream, message)
        at_cancel.append(d.replica.engine.counters.steps)

    monkeypatch.setattr(attempts.Attempts, "cancel", note_cancel)
    async with gateway_to(d) as gateway:
        key, answer = await gateway.start(prompt_of(40), [p.candidate], max_tokens=60)
        await asyncio.sleep(delay_s)
        await until(lambda: len(answer.tokens[0]) >= after_tokens)
        await gateway.cancel(key)
        assert (await answer.end()).reason == pb.END_CANCELLED
        assert d.replica.engine.counters.steps <= at_cancel[0] + 1, "a cancel takes effect within a step"
        await at_baseline(p, d)
        again = await gateway.ask(prompt_of(40), [p.candidate])
        assert (await again.end()).reason == pb.END_FINISHED


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2])
async def test_a_gateway_that_is_gone_leaves_nothing_behind_and_costs_at_most_the_step_at_hand(
    workers: Workers, delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FakeModel(step_s=0.02)
    p, d = await workers.prefill(slow), await workers.decode(slow)
    at_leave, at_release = list[int](), list[int]()  # steps that were done when the worker was told
    leave, release = attempts.Attempts.leave, EngineBackend.release

    def note_leave(self: attempts.Attempts, stream: GatewayStream) -> None:
        at_leave.append(d.replica.engine.counters.steps)
        leave(self, stream)

    def note_release(self: EngineBackend, key: int, ok: bool, is_suspect: bool) -> None:
        at_release.append(p.replica.engine.counters.steps)
        release(self, key, ok, is_suspect)

    monkeypatch.setattr(attempts.Attempts, "leave", note_leave)
    monkeypatch.setattr(EngineBackend, "release", note_release)
    async with gateway_to(d) as gateway:
        for seed in range(4):
            await gateway.start(prompt_of(30, seed), [p.candidate], max_tokens=60, seed=seed)
        await asyncio.sleep(delay_s)
    await until(lambda: bool(at_leave))  # with no delay the engines may not have heard of anything yet
    await until(lambda: d.replica.engine.num_requests == 0 and p.replica.engine.num_requests == 0)
    assert d.replica.engine.counters.steps <= at_leave[0] + 1
    assert not at_release or p.replica.engine.counters.steps <= at_release[-1] + 1
    await at_baseline(p, d)


async def test_the_deadline_ends_an_attempt_that_waits_for_prefill(workers: Workers) -> None:
    p, d = await workers.prefill(FakeModel(step_s=0.3)), await workers.decode()
    async with gateway_to(d) as gateway:
        answer = await gateway.ask(prompt_of(60), [p.candidate], deadline_s=0.4)
        assert (await answer.end()).reason == pb.END_DEADLINE
    await at_baseline(p, d)


@pytest.mark.parametrize(
    ("deadline_s", "reason"),
    [(0.0, pb.END_DEADLINE), (-1.0, pb.END_DEADLINE), (float("nan"), pb.END_INVALID), (float("inf"), pb.END_INVALID)],
)
async def test_an_attempt_without_a_deadline_is_refused(workers: Workers, deadline_s: float, reason: int) -> None:
    """A deadline of 0, which is what a gateway has left for a late request, meant that there was none."""
    d = await workers.decode()
    async with gateway_to(d) as gateway:
        async with asyncio.timeout(20):
            ended = await (await gateway.ask(prompt_of(10), deadline_s=deadline_s)).end()
        assert ended.reason == reason
        assert "deadline_s" in ended.message
    await at_baseline(d)


def test_no_deadline_is_further_than_a_day() -> None:
    """1e300 s, which the engine's clock refuses, ended the worker."""
    request = engine_request(pb.GenerateRequest(deadline_s=1e300), engine_key=1, now=5.0)
    assert request.deadline == 5.0 + 86_400.0


# ---------------------------------------------------------------- prefill workers that fail


async def test_a_corrupted_block_is_detected_counted_and_fetched_elsewhere(workers: Workers) -> None:
    bad = await workers.prefill(faults={"corrupt-published-block": 2})
    good, d = await workers.prefill(), await workers.decode()
    async with gateway_to(d) as gateway:
        local = await gateway.ask(prompt_of(30), disaggregation=LOCAL, salt=b"l")
        answer = await gateway.ask(prompt_of(30), [bad.candidate, good.candidate])
        ended = await answer.end()
        assert ended.stats.prefill_worker_id == good.process.config.worker_id
        assert answer.ids == local.ids
    assert d.metric("baton_verification_failures_total", kind="corrupt") == 1
    await at_baseline(bad, good, d)


async def test_a_truncated_block_is_detected_counted_and_prefilled_here(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode(faults={"truncate-pulled-block": 3})
    async with gateway_to(d) as gateway:
        local = await gateway.ask(prompt_of(30), disaggregation=LOCAL, salt=b"l")
        answer = await gateway.ask(prompt_of(30), [p.candidate])
        ended = await answer.end()
        assert (ended.stats.prefill_path, ended.stats.path_reason) == ("local", "candidates_failed")
        assert answer.ids == local.ids
    assert d.metric("baton_verification_failures_total", kind="truncated") == 1
    await at_baseline(p, d)


async def test_unreachable_foreign_and_unproven_workers_are_passed_over(workers: Workers, tmp_path: Path) -> None:
    other_secret = tmp_path / "other"
    other_secret.write_text("wrong battery")
    foreign = await workers.prefill(FakeModel(digest="another model"))
    stranger = await workers.prefill(secret_file=other_secret)
    good, d = await workers.prefill(), await workers.decode()
    nowhere = pb.PrefillCandidate(worker_id="nowhere", address="127.0.0.1:9")
    async with gateway_to(d) as gateway:
        candidates = [nowhere, foreign.candidate, stranger.candidate, good.candidate]
        ended = await (await gateway.ask(prompt_of(12), candidates)).end()
        assert ended.stats.prefill_worker_id == good.process.config.worker_id
    assert d.metric("baton_prefill_fallbacks_total", reason="unreachable") == 3


async def test_a_worker_that_restarted_since_the_gateway_looked_is_used_under_its_new_boot_id(
    workers: Workers,
) -> None:
    p, d = await workers.prefill(), await workers.decode()
    stale = pb.PrefillCandidate(worker_id="p0", address=p.address, boot_id=b"\0" * 16)
    async with gateway_to(d) as gateway:
        ended = await (await gateway.ask(prompt_of(12), [stale])).end()
        assert ended.stats.prefill_path == "remote"


async def test_a_caller_without_the_secret_is_refused(workers: Workers) -> None:
    d = await workers.decode()
    async with grpc.aio.insecure_channel(d.address) as channel:
        call = stubs.DecodeWorkerStub(channel).Generate(metadata=(("baton-secret", "guess"),))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


# ---------------------------------------------------------------- limits, liveness, drain


async def test_the_limit_of_requests_refuses_with_its_numbers(workers: Workers) -> None:
    d = await workers.decode(FakeModel(step_s=0.02), max_num_requests=1)
    async with gateway_to(d) as gateway:
        _, first = await gateway.start(prompt_of(5), disaggregation=LOCAL, max_tokens=30)
        refused = await (await gateway.ask(prompt_of(5), disaggregation=LOCAL)).end()
        assert refused.reason == pb.END_OVERLOADED
        assert "the limit is 1" in refused.message
        assert (await first.end()).reason == pb.END_FINISHED


async def test_a_request_that_can_never_run_is_told_field_value_and_limit(workers: Workers) -> None:
    d = await workers.decode()
    async with gateway_to(d) as gateway:
        answer = await gateway.ask(prompt_of(200), disaggregation=LOCAL)
        ended = await answer.end()
        assert (ended.reason, answer.is_accepted) == (pb.END_INVALID, False)
        assert "the limit is 127" in ended.message


async def test_heartbeats_come_without_asking_and_tell_the_load(workers: Workers) -> None:
    d = await workers.decode()
    async with gateway_to(d) as gateway:
        await until(lambda: len(gateway.loads) >= 2)
        assert gateway.loads[-1].num_blocks_total == 64


async def test_a_drain_finishes_what_runs_refuses_new_ones_and_hands_over_the_rest(workers: Workers) -> None:
    d = await workers.decode(FakeModel(step_s=0.05), drain_s=2.0)
    async with gateway_to(d) as gateway:
        _, short = await gateway.start(prompt_of(5), disaggregation=LOCAL, max_tokens=5)
        _, endless = await gateway.start(prompt_of(6), disaggregation=LOCAL, max_tokens=100)
        await until(lambda: len(endless.tokens[0]) > 0)
        ending = asyncio.create_task(d.end())
        await until(lambda: not d.process.health.is_ready)
        late = await gateway.ask(prompt_of(5), disaggregation=LOCAL)
        assert (await late.end()).reason == pb.END_DRAINING
        assert (await short.end()).reason == pb.END_FINISHED
        assert (await endless.end()).reason == pb.END_DRAINING
        assert await ending == 0


async def test_a_prefill_worker_drains_until_its_tickets_are_closed(workers: Workers) -> None:
    p, d = await workers.prefill(FakeModel(step_s=0.05)), await workers.decode()
    async with gateway_to(d) as gateway:
        _, answer = await gateway.start(prompt_of(60), [p.candidate])
        await until(lambda: p.replica.engine.has_work)
        ending = asyncio.create_task(p.end())
        ended = await answer.end()
        assert (ended.reason, ended.stats.prefill_path) == (pb.END_FINISHED, "remote")
        assert await ending == 0
        late = await gateway.ask(prompt_of(9), [p.candidate])
        assert (await late.end()).stats.prefill_path == "local"


async def test_auto_counts_its_decisions_with_their_reason(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    async with gateway_to(d) as gateway:
        await gateway.ask(prompt_of(3), [p.candidate], disaggregation=pb.DISAGGREGATION_AUTO)
        await gateway.ask(prompt_of(60), [], disaggregation=pb.DISAGGREGATION_AUTO)
    assert d.metric("baton_placements_total", path="local", reason="one_block") == 1
    assert d.metric("baton_placements_total", path="local", reason="no_candidate") == 1


async def test_an_engine_that_fails_ends_every_attempt_for_replay_elsewhere_and_the_process(workers: Workers) -> None:
    d = await workers.decode(FakeModel(step_s=0.01))
    async with gateway_to(d) as gateway:
        _, answer = await gateway.start(prompt_of(9), disaggregation=LOCAL, max_tokens=100)
        await until(lambda: len(answer.tokens[0]) > 0)
        d.replica.kv.buffer[:] = bytes(len(d.replica.kv.buffer))  # the fake model sees its KV gone
        assert (await answer.end()).reason == pb.END_INTERNAL
        assert await d.task == EXIT_ENGINE_FAILED
        assert not d.process.health.is_live


@pytest.mark.parametrize(("seed", "num_host_blocks"), [(1, 0), (2, 0), (3, 0), (4, 200)])
async def test_a_crowd_in_tiny_pools_gets_its_tokens_or_its_cancel_and_leaves_nothing(
    workers: Workers, seed: int, num_host_blocks: int
) -> None:
    """Pools that hold a fraction of what is asked for: promises, reservations and preemptions in every order."""
    rng = random.Random(seed)
    swap = {"num_host_blocks": num_host_blocks, "constant_estimate": 2} if num_host_blocks else {}
    tiny = FakeModel(num_blocks=40, max_num_seqs=6, overrides=swap)
    first, second = await workers.prefill(tiny), await workers.prefill(tiny, transports=("grpc",))
    d, calm = await workers.decode(tiny), await workers.decode(FakeModel(num_blocks=512))

    async def one(number: int) -> None:
        prompt, num_choices = prompt_of(rng.randrange(1, 90), number % 5), rng.choice((1, 1, 2))
        how = {"logs": ((),) * num_choices, "max_tokens": rng.randrange(1, 20), "seed": number}
        candidates = rng.sample([first.candidate, second.candidate], 2)
        await asyncio.sleep(rng.random() * 0.3)
        mode = rng.choice((pb.DISAGGREGATION_ALWAYS, pb.DISAGGREGATION_ALWAYS, LOCAL))
        key, answer = await gateway.start(prompt, candidates, disaggregation=mode, **how)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.1)
            await gateway.cancel(key)
        ended = await answer.end()
        expected = (await reference.ask(prompt, disaggregation=LOCAL, **how)).ids
        assert ended.reason in (pb.END_FINISHED, pb.END_CANCELLED), ended
        for choice, ids in answer.ids.items():
            assert ids == expected[choice][: len(ids)]
            assert ended.reason == pb.END_CANCELLED or len(ids) == how["max_tokens"]

    def has_swapped() -> bool:
        d.process.refresh_metrics()
        return d.metric("baton_swap_outs_total") > 0

    async with gateway_to(d) as gateway, gateway_to(calm) as reference:
        for _ in range(8):  # whether a sequence is preempted is a matter of timing: in one crowd of eight none is
            await asyncio.gather(*(one(number) for number in range(40)))
            if has_swapped() == (num_host_blocks > 0):
                break
    assert d.metric("baton_placements_total", path="remote", reason="policy_always") > 10
    await at_baseline(first, second, d)
    assert has_swapped() == (num_host_blocks > 0)
    assert d.metric("baton_host_blocks", state="used") == d.metric("baton_swapped_sequences") == 0


VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:iteration_tokens_total_count",
    "vllm:request_success_total",
}


async def test_both_roles_show_vllms_metrics_and_their_queues(workers: Workers) -> None:
    p, d = await workers.prefill(), await workers.decode()
    async with gateway_to(d) as gateway:
        await gateway.ask(prompt_of(20), [p.candidate])
    for worker, queues in (
        (p, {"baton_prefill_queue_requests", "baton_prefill_held_requests", "baton_kv_blocks"}),
        (d, {"baton_decode_promised_requests", "baton_decode_filling_requests"}),
    ):
        await worker.at_baseline()
        worker.process.refresh_metrics()
        shown = {sample.name for family in worker.process.metrics.registry.collect() for sample in family.samples}
        assert VLLM_NAMES | queues <= shown
    labels = {"model_name": d.process.config.served_model_id, "engine": d.process.config.worker_id}
    assert d.metric("vllm:generation_tokens_total", **labels) == 8
    assert d.metric("vllm:request_success_total", finished_reason="length", **labels) == 1


async def test_probes_answer_with_the_phase_while_the_weights_load(tmp_path: Path, workers: Workers) -> None:
    gate = threading.Event()

    def load(spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
        on_progress(LoadPhase.LOAD_WEIGHTS, 0.5)
        assert gate.wait(60)
        return FakeModel()(spec, on_progress)

    config = DecodeConfig(model=tmp_path, worker_id="d", secret_file=workers.secret_file)
    process = WorkerProcess(config, pb.ROLE_DECODE, load)
    task = asyncio.create_task(serve_decode(config, process))
    await until(lambda: process.health.phase == "load_weights")
    report = process.health.report()
    assert (process.health.is_live, process.health.is_ready, process.health.is_started) == (True, False, False)
    assert report["state"] == "starting"
    assert 0 < process.health.percent < 100
    gate.set()
    await until(lambda: process.health.is_ready)
    process.drain_signal.request()
    assert await task == 0


async def test_a_drain_before_the_weights_are_there_does_not_wait_for_them(tmp_path: Path, workers: Workers) -> None:
    gate = threading.Event()

    def load(spec: ReplicaSpec, on_progress: OnProgress) -> Replica:
        gate.wait(60)
        raise ValueError("never seen")

    config = DecodeConfig(model=tmp_path, worker_id="d", secret_file=workers.secret_file)
    process = WorkerProcess(config, pb.ROLE_DECODE, load)
    task = asyncio.create_task(serve_decode(config, process))
    await until(lambda: process.health.report()["state"] == "starting")
    process.drain_signal.request()
    assert await asyncio.wait_for(task, 20) == 0
    gate.set()


async def test_a_large_replay_does_not_end_the_stream_of_the_others(workers: Workers) -> None:
    d = await workers.decode()
    async with gateway_to(d) as gateway:
        large = await gateway.ask([5] * ((4 << 20) + 100_000), disaggregation=LOCAL)
        assert (await large.end()).reason == pb.END_INVALID
        assert (await (await gateway.ask(prompt_of(5), disaggregation=LOCAL)).end()).reason == pb.END_FINISHED


async def test_a_drain_whose_engine_hangs_still_tells_the_gateway_and_ends_cleanly(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "HAND_OVER_S", 0.05)
    d = await workers.decode(FakeModel(step_s=1.0), drain_s=0.0)
    async with gateway_to(d) as gateway:
        _, answer = await gateway.start(prompt_of(5), disaggregation=LOCAL)
        await until(lambda: answer.is_accepted)
        assert await d.end() == 0, "78 would say that starting again is of no use"
        assert (await answer.end()).reason == pb.END_DRAINING


async def test_a_worker_whose_heartbeats_died_does_not_stay_and_look_alive(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    d = await workers.decode()

    def fail(servicer: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.DecodeServicer, "_load", fail)
    assert await asyncio.wait_for(d.task, PATIENCE_S) == EXIT_ENGINE_FAILED
    assert not d.process.health.is_live
    assert "heartbeats" in caplog.text


async def test_a_step_that_could_not_be_told_ends_the_worker_instead_of_leaving_requests_without_an_end(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = await workers.decode()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(attempts, "token_message", fail)
    async with gateway_to(d) as gateway:
        _, answer = await gateway.start(prompt_of(5), disaggregation=LOCAL)
        assert (await answer.end()).reason == pb.END_INTERNAL
        assert await asyncio.wait_for(d.task, PATIENCE_S) == EXIT_ENGINE_FAILED
