"""Workers that die, stall, repeat, skip: the client's text is the same as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest

from baton.local.probe import ask_connected_workers
from gateway import connection, worker_pool
from gateway.config import Disaggregation
from gateway.detokenize import TextDelta, TextStream
from gateway.fake_decode_worker import FakeDecodeWorker, Fault, Script
from gateway.fake_model import EOS_ID, write_fake_model
from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb
from tests.gateway_harness import PATIENCE_S, Harness, events, running, streamed_text

NUM_TOKENS = 6


async def reference(tmp_path: Path, **body: Any) -> list[str]:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        return texts(await harness.complete(max_tokens=NUM_TOKENS, **body))


def texts(response: httpx2.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


async def test_a_worker_killed_at_any_token_index_changes_nothing_for_the_client(tmp_path: Path) -> None:
    """F4: two workers, the first to be asked dies at index k; n = 2, stop strings and streaming included."""
    body: dict[str, Any] = {"n": 2, "stop": ["never said"], "max_tokens": NUM_TOKENS}
    whole = await reference(tmp_path, n=2, stop=["never said"])
    for index in range(NUM_TOKENS):
        script = Script(fault=Fault.DIE, at=index)
        async with running(tmp_path, FakeDecodeWorker("d0", script), FakeDecodeWorker("d1")) as harness:
            chunks = events(await harness.complete(stream=True, stream_options={"include_usage": True}, **body))
            assert [streamed_text(chunks, choice) for choice in (0, 1)] == whole
            finishes = [c["finish_reason"] for chunk in chunks[:-1] for c in chunk["choices"] if c["finish_reason"]]
            assert finishes == ["length", "length"]
            assert chunks[-2]["usage"]["completion_tokens"] == 2 * NUM_TOKENS
            replay = harness.workers[1].requests[0]
            assert replay.attempt == 2
            assert sum(len(log.committed_token_ids) for log in replay.choices) >= 2 * index
            assert await harness.metric('baton_gateway_failovers_total{cause="worker_lost"}') == 1


@pytest.mark.parametrize(
    "fault", [Fault.SKIP, Fault.REORDER, Fault.END_EARLY, Fault.FAIL, Fault.DRAIN, Fault.DUPLICATE]
)
async def test_a_worker_that_misbehaves_changes_nothing_for_the_client(tmp_path: Path, fault: Fault) -> None:
    whole = await reference(tmp_path)
    async with running(tmp_path, FakeDecodeWorker("d0", Script(fault=fault, at=2)), FakeDecodeWorker("d1")) as harness:
        assert texts(await harness.complete(max_tokens=NUM_TOKENS)) == whole
        if fault is Fault.DUPLICATE:
            assert await harness.metric('baton_gateway_dropped_tokens_total{reason="duplicate"}') == 1
        if fault in (Fault.SKIP, Fault.REORDER):
            assert await harness.metric('baton_gateway_dropped_tokens_total{reason="gap"}') == 1
            assert await harness.metric('baton_gateway_attempts_total{end="token_gap"}') == 1


@pytest.mark.parametrize("at", [0, 2, NUM_TOKENS - 1], ids=["first token", "between", "last token"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_bug_of_the_gateway_is_blamed_on_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, stream: bool
) -> None:
    """A token that is committed and has no text cannot be drawn again: a 500, no retry, and the others go on."""
    whole = await reference(tmp_path)
    push = TextStream.push
    num_pushed = 0

    def fail_once(self: TextStream, token_id: int) -> TextDelta:
        nonlocal num_pushed
        num_pushed += 1
        if num_pushed == at + 1:
            raise RuntimeError("a bug")
        return push(self, token_id)

    async with running(tmp_path, FakeDecodeWorker()) as harness:
        monkeypatch.setattr(TextStream, "push", fail_once)
        answer = await harness.complete(max_tokens=NUM_TOKENS, stream=stream)
        if stream and at:
            assert events(answer)[-1]["error"]["code"] == 500
        else:
            assert answer.status_code == 500, answer.text
            assert answer.json()["error"]["type"] == "InternalServerError"
            assert "a bug" not in answer.text
        assert len(harness.worker.requests) == 1
        assert await harness.metric('baton_gateway_attempts_total{end="gateway_fault"}') == 1
        assert texts(await harness.complete(max_tokens=NUM_TOKENS)) == whole


async def test_a_lone_worker_that_restarts_is_found_again_and_continues(tmp_path: Path) -> None:
    """No routable worker costs nothing but time."""
    whole = await reference(tmp_path)
    registry = tmp_path / "registry"
    registry.mkdir()
    script = Script(fault=Fault.DIE, at=3)
    async with FakeDecodeWorker("d0", script) as first:
        announce(registry, first)
        async with running(tmp_path, wait_for=1, registry_dir=registry) as harness:
            work = asyncio.create_task(harness.complete(max_tokens=NUM_TOKENS))
            while not first.requests:
                await asyncio.sleep(0.01)
            await first.kill()
            async with FakeDecodeWorker("d0") as second:
                announce(registry, second)
                assert texts(await work) == whole
                # How many of the first worker's three tokens got out before it was killed is the machine's choice.
                assert second.requests[0].attempt == 2
                assert len(second.requests[0].choices[0].committed_token_ids) <= 3


async def test_a_live_stream_stays_in_use_when_the_registry_forgets_it(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    async with FakeDecodeWorker() as worker:
        file = announce(registry, worker)
        async with running(tmp_path, wait_for=1, registry_dir=registry) as harness:
            file.unlink()
            await asyncio.sleep(2 * worker_pool.SCAN_S)
            assert (await harness.complete()).status_code == 200


async def test_half_written_and_foreign_registry_files_are_no_hints(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    (registry / "broken.json").write_text('{"address": "127')
    (registry / "list.json").write_text("[1]")
    (registry / "other.json").write_text('{"name": "x"}')
    async with FakeDecodeWorker() as worker:
        announce(registry, worker)
        async with running(tmp_path, wait_for=1, registry_dir=registry) as harness:
            assert (await harness.complete()).status_code == 200


async def test_looking_for_workers_survives_a_bug_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    follow = worker_pool.WorkerPool._follow_hints
    num_calls = 0

    def fail_twice(self: worker_pool.WorkerPool) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls <= 2:
            raise RuntimeError("a bug")
        follow(self)

    monkeypatch.setattr(worker_pool, "BACKOFF_MAX_S", 0.01)
    monkeypatch.setattr(worker_pool.WorkerPool, "_follow_hints", fail_twice)
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        assert (await harness.complete()).status_code == 200
    assert caplog.text.count("looking for workers failed") == 2


async def test_a_silent_worker_is_left_after_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await reference(tmp_path)
    monkeypatch.setattr(connection, "SILENCE_S", 0.3)
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.05)
    workers = FakeDecodeWorker("d0", Script(fault=Fault.MUTE, at=2)), FakeDecodeWorker("d1")
    async with running(tmp_path, *workers) as harness:
        assert texts(await harness.complete(max_tokens=NUM_TOKENS)) == whole
        assert await harness.metric('baton_gateway_failovers_total{cause="worker_silent"}') == 1


async def test_a_worker_that_makes_no_step_is_left_though_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from servicekit import health

    whole = await reference(tmp_path)
    monkeypatch.setattr(health, "STALL_MIN_S", 0.3)
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.05)
    workers = FakeDecodeWorker("d0", Script(fault=Fault.STALL, at=2)), FakeDecodeWorker("d1")
    async with running(tmp_path, *workers) as harness:
        assert texts(await harness.complete(max_tokens=NUM_TOKENS)) == whole
        assert await harness.metric('baton_gateway_failovers_total{cause="worker_silent"}') == 1


async def test_three_barren_deaths_quarantine_a_request_and_the_third_was_alone(tmp_path: Path) -> None:
    workers = [FakeDecodeWorker(f"d{n}", Script(fault=Fault.DIE, at=0)) for n in range(4)]
    async with running(tmp_path, *workers) as harness:
        response = await harness.complete()
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "RequestQuarantinedError"
        assert response.headers["x-should-retry"] == "false"
        assert sum(len(worker.requests) for worker in workers) == 3
        assert all(c.reserved_by is None for c in harness.gateway.services.pool.connections.values())


async def test_deterministic_failover_only_goes_where_the_same_bits_come_out(tmp_path: Path) -> None:
    """The idle worker of other numerics is passed over; the request waits for its own kind, here d0 come back."""
    whole = await reference(tmp_path)
    workers = FakeDecodeWorker("d0", Script(fault=Fault.DIE, at=2)), FakeDecodeWorker("d1", numerics="numerics-b")
    async with running(tmp_path, *workers, deterministic=True) as harness:
        assert texts(await harness.complete(max_tokens=NUM_TOKENS)) == whole
        assert [len(worker.requests) for worker in workers] == [2, 0]


async def test_a_client_that_goes_away_cancels_the_work_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(step_s=0.01))) as harness:
        for stream in (True, False):
            harness.worker.was_cancelled.clear()
            await leave_early(harness, stream)
            async with asyncio.timeout(PATIENCE_S):
                await harness.worker.was_cancelled.wait()
            async with asyncio.timeout(PATIENCE_S):
                while any(c.attempts for c in harness.gateway.services.pool.connections.values()):
                    await asyncio.sleep(0.01)
        assert harness.gateway.services.admission.num_requests == 0
        assert harness.gateway.live == set()
        assert harness.worker.num_tokens_sent < 200


async def leave_early(harness: Harness, stream: bool) -> None:
    """Close the connection once the worker has the request."""
    harness.worker.requests.clear()
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    while not harness.worker.requests:
        await asyncio.sleep(0.01)
    if stream:
        await reader.readuntil(b"data: ")
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_does_not_read_is_cut_and_the_worker_is_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway import app

    monkeypatch.setattr(app, "CLIENT_STALL_S", 0.2)
    model = write_fake_model(tmp_path / "long", 1_000_000)
    async with running(tmp_path, FakeDecodeWorker(max_model_len=1_000_000), model=model) as harness:
        body = json.dumps({"prompt": "x", "max_tokens": 60_000, "n": 2, "stream": True}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", harness.server.port, limit=1024)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(PATIENCE_S):
            while not await harness.metric('baton_gateway_client_disconnects_total{reason="not_reading"}'):
                await asyncio.sleep(0.2)
            while harness.gateway.live:
                await asyncio.sleep(0.05)
        writer.close()
        assert (await harness.complete()).status_code == 200


async def test_work_is_spread_over_equal_workers(tmp_path: Path) -> None:
    workers = [FakeDecodeWorker(f"d{n}", Script(step_s=0.01)) for n in range(2)]
    async with running(tmp_path, *workers) as harness:
        prompts = [f"prompt {number}" for number in range(8)]
        await asyncio.gather(*(harness.complete(prompt=prompt, max_tokens=10) for prompt in prompts))
        assert sorted(len(worker.requests) for worker in workers) == [4, 4]


async def test_a_long_shared_prefix_returns_to_the_worker_that_has_it(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker("d0"), FakeDecodeWorker("d1")) as harness:
        for number in range(4):
            await harness.complete(prompt="p" * 640 + str(number), max_tokens=2)
        assert sorted(len(worker.requests) for worker in harness.workers) == [0, 4]


async def test_a_worker_of_another_model_or_without_the_secret_is_not_used(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(secret="right"), wait_for=0, request_timeout=1.0) as harness:
        assert (await harness.complete()).status_code == 504
        assert harness.worker.requests == []


async def test_a_request_goes_only_to_a_worker_that_takes_its_length(tmp_path: Path) -> None:
    def ending(worker_id: str, max_model_len: int) -> FakeDecodeWorker:
        return FakeDecodeWorker(
            worker_id, next_token=lambda *_: EOS_ID, eos_token_ids=[EOS_ID], max_model_len=max_model_len
        )

    model = write_fake_model(tmp_path / "model", max_model_len=4096)
    async with running(tmp_path, ending("d0", 64), ending("d1", 128), model=model) as harness:
        assert (await harness.complete(max_tokens=60)).status_code == 200
        assert [len(worker.requests) for worker in harness.workers] == [0, 1]
        assert (await harness.chat(max_tokens=None)).status_code == 200  # as much as there is room for: never too long
        num_sent = sum(len(worker.requests) for worker in harness.workers)
        long_chat = [{"role": "user", "content": "x" * 128}]
        for answer, field, words in (
            (await harness.complete(max_tokens=124), "max_tokens", "5 prompt tokens + 124 exceed"),
            (await harness.complete(max_tokens=124, stream=True), "max_tokens", "ask for at most 123"),
            (await harness.complete(prompt="x" * 128, max_tokens=1), "prompt", "128 tokens leave no room"),
            (await harness.chat(max_tokens=None, messages=long_chat), "messages", "leave no room"),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field), error
            assert error["message"].startswith(f"{field}: ")
            assert words in error["message"]
            assert "this service's workers' maximum of 128;" in error["message"]
        assert sum(len(worker.requests) for worker in harness.workers) == num_sent


async def test_a_request_under_way_waits_for_a_worker_that_takes_its_length(tmp_path: Path) -> None:
    """Its worker died, and those that are left take less: nothing that the client could mend."""
    whole = await reference(tmp_path)
    registry = tmp_path / "registry"
    registry.mkdir()
    large, small = FakeDecodeWorker("large", Script(fault=Fault.DIE, at=3)), FakeDecodeWorker("small", max_model_len=8)
    async with large, small:
        announce(registry, large)
        announce(registry, small)
        async with running(tmp_path, wait_for=2, registry_dir=registry) as harness:
            work = asyncio.create_task(harness.complete(max_tokens=NUM_TOKENS))
            while not large.requests:
                await asyncio.sleep(0.01)
            await large.kill()
            async with FakeDecodeWorker("large") as second:
                announce(registry, second)
                assert texts(await work) == whole
            assert small.requests == []


async def test_the_deadline_travels_as_time_left(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(), request_timeout=600.0) as harness:
        await harness.complete()
        assert 540.0 < harness.worker.requests[0].deadline_s < 600.0


async def test_prefill_candidates_come_with_the_request(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        info = pb.WorkerInfo(worker_id="p0", boot_id=b"b", layout_fingerprint="layout-a")
        other = pb.WorkerInfo(worker_id="p1", layout_fingerprint="layout-b")
        pool = harness.gateway.services.pool
        pool.prefill = {
            worker.worker_id: worker_pool.PrefillPeer(worker, pb.WorkerLoad(), "10.0.0.1:1") for worker in (info, other)
        }
        await harness.complete()
        (candidate,) = harness.worker.requests[0].prefill_candidates
        assert (candidate.worker_id, candidate.address, candidate.boot_id) == ("p0", "10.0.0.1:1", b"b")


@asynccontextmanager
async def slow_prefill_worker(may_answer: asyncio.Event) -> AsyncIterator[str]:
    """Serves Hello once it may; yields its address."""

    async def hello(request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        await may_answer.wait()
        worker = pb.WorkerInfo(worker_id="p0", role=pb.ROLE_PREFILL, layout_fingerprint="layout-a", deterministic=True)
        return pb.HelloReply(protocol_version=PROTOCOL_VERSION, worker=worker)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("baton.v1.PrefillWorker", {"Hello": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_a_request_waits_for_prefill_workers_that_are_known_but_not_met(tmp_path: Path) -> None:
    may_answer, decode = asyncio.Event(), FakeDecodeWorker()
    async with decode, slow_prefill_worker(may_answer) as address:
        seeds = (decode.address, address)
        async with running(tmp_path, wait_for=1, workers_seed=seeds) as harness:
            pool = harness.gateway.services.pool
            request = asyncio.create_task(harness.complete())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(request), 0.2)
            assert decode.requests == []
            assert pool.is_meeting_prefill
            may_answer.set()
            assert (await request).status_code == 200
            assert [c.worker_id for c in decode.requests[0].prefill_candidates] == ["p0"]
            assert not pool.is_meeting_prefill
            address = f"127.0.0.1:{harness.server.port}"
            met = await asyncio.to_thread(ask_connected_workers, address, timeout_s=5.0)
            assert met == {"decode": 1, "prefill": 1}  # what `baton up` waits for


async def test_a_request_does_not_wait_for_prefill_workers_that_do_not_answer(tmp_path: Path) -> None:
    decode = FakeDecodeWorker()
    async with decode:
        seeds = (decode.address, "127.0.0.1:1")
        async with running(tmp_path, wait_for=1, workers_seed=seeds) as harness:
            assert (await harness.complete()).status_code == 200
            assert list(decode.requests[0].prefill_candidates) == []


async def test_a_service_that_never_hands_over_waits_for_no_prefill_worker(tmp_path: Path) -> None:
    decode = FakeDecodeWorker()
    async with decode, slow_prefill_worker(asyncio.Event()) as address:
        settings = {"workers_seed": (decode.address, address), "disaggregation": Disaggregation.NEVER}
        async with running(tmp_path, wait_for=1, **settings) as harness:
            assert (await harness.complete()).status_code == 200


def announce(registry: Path, worker: FakeDecodeWorker) -> Path:
    from registry.entry import Entry, encode
    from servicekit.lifecycle import write_atomically

    path = registry / f"{worker.worker_id}.json"
    entry = Entry(worker.worker_id, "decode", worker.address, worker.address, "", "", worker.boot_id.hex(), 1)
    write_atomically(path, encode(entry))
    return path
