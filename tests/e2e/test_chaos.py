"""Real processes die, stop, come back as zombies or lose their clients: no stream changes, and nothing stays behind.

The model is tiny and random, so that a worker is back in seconds; test_soak.py does hundreds, and SmolLM2 too.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.service import Service, Worker, running_service
from tests.e2e import census
from tests.e2e.chaos import PROMPT, Chaos, kill, run_kills, wait_enough_ready, wait_until_gone, workloads

pytestmark = pytest.mark.timeout(600)

NUM_TOKENS = 96
CHUNK = {"maxBatchedTokens": 128, "maxModelLen": 2048}
SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))


@contextmanager
def tiny_service(model: Path, *, deterministic: bool = True) -> Generator[Service]:
    with running_service(
        prefill=2, decode=2, disaggregation="Always", deterministic=deterministic, num_threads=1,
        model=str(model), kv_memory="8Mi", engine=CHUNK,
    ) as service:  # fmt: skip
        yield service


@pytest.fixture(scope="module")
def service(tiny_llama: Path) -> Generator[Service]:
    with tiny_service(tiny_llama) as service:
        yield service


@pytest.fixture(scope="module")
def chaos(service: Service) -> Chaos:
    chaos = Chaos(service, workloads(NUM_TOKENS))
    asyncio.run(chaos.learn())
    return chaos


@pytest.fixture(autouse=True)
def at_rest_afterwards(request: pytest.FixtureRequest) -> Generator[None]:
    """Whatever a test did: every block comes back, and no process complained of more than its peers' end."""
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        census.at_rest(service)
        assert census.errors_in_logs(service) == []


def workers_of(service: Service, role: str) -> list[Worker]:
    return [worker for worker in service.wait_all_ready() if worker.role == role]


def test_random_kills_change_no_stream(service: Service) -> None:
    report = asyncio.run(run_kills(Chaos(service, workloads(NUM_TOKENS)), 8, SEED, NUM_TOKENS))
    assert not report.failed
    assert not report.diverged
    assert census.total(service, "baton_gateway_prefill_path_total", role="gateway", path="remote") > 0


def test_fast_mode_loses_and_doubles_nothing(tiny_llama: Path) -> None:
    with tiny_service(tiny_llama, deterministic=False) as service:
        chaos = Chaos(service, workloads(NUM_TOKENS), deterministic=False)
        report = asyncio.run(run_kills(chaos, 4, SEED, NUM_TOKENS))
        assert not report.failed
        census.at_rest(service)
        assert census.errors_in_logs(service) == []


def test_a_prefill_and_a_decode_worker_killed_at_once_change_no_stream(service: Service, chaos: Chaos) -> None:
    victims = [workers_of(service, "prefill")[0], workers_of(service, "decode")[0]]
    assert asyncio.run(chaos.round(lambda: kill(*victims), after_tokens=NUM_TOKENS // 2, kinds=6)) == []


def test_workers_that_stop_and_come_back_as_zombies_add_no_token(service: Service, chaos: Chaos) -> None:
    """Stopped for longer than the limit of silence (10 s): other workers finish; what the zombies say is too late."""
    service.wait_all_ready()  # a worker that still starts again after the test before has no stream to lose
    prefill, decode = workers_of(service, "prefill"), workers_of(service, "decode")
    before = _zombies_seen(service)
    for i in range(len(decode)):  # short prompts all go to the P that measured fastest, so each has its turn
        stopped = [prefill[i % len(prefill)], decode[i]]
        try:
            os.kill(stopped[0].pid, signal.SIGSTOP)
            strike = lambda victim=decode[i]: os.kill(victim.pid, signal.SIGSTOP)  # noqa: E731
            assert asyncio.run(chaos.round(strike, after_tokens=NUM_TOKENS // 4, kinds=6)) == []
        finally:
            for worker in stopped:
                os.kill(worker.pid, signal.SIGCONT)
    failovers, fallbacks = _zombies_seen(service)
    assert failovers > before[0]
    assert fallbacks > before[1]  # by silence or by timeout
    pids = {worker.worker_id: worker.pid for worker in service.workers()}
    assert {worker.worker_id: worker.pid for worker in [*prefill, *decode]}.items() <= pids.items()
    assert asyncio.run(chaos.round(lambda: None, after_tokens=None, kinds=6)) == []


def _zombies_seen(service: Service) -> tuple[float, float]:
    """Streams that left a silent decode worker, and prompts that left a prefill worker, so far."""
    silent = {"name": "baton_gateway_failovers_total", "cause": "worker_silent"}
    failovers = census.scrape(service.workers("gateway")[0]).value(**silent)
    return failovers, census.total(service, "baton_prefill_fallbacks_total", role="decode")


def test_a_killed_gateway_breaks_its_streams_frees_the_workers_and_comes_back(service: Service, chaos: Chaos) -> None:
    (gateway,) = service.workers("gateway")
    wrong = asyncio.run(chaos.round(lambda: kill(gateway), after_tokens=8, kinds=3))
    assert wrong
    assert all(word.startswith("failed") for word in wrong)
    census.at_rest(service)
    assert asyncio.run(chaos.round(lambda: None, after_tokens=None, kinds=3)) == []


def test_work_stops_when_the_client_leaves(service: Service) -> None:
    """Many clients leave while their prompts are prefilled, six while their tokens come.

    So many prompts that they take seconds: on a busy machine this process may lose its turn for one, between two calls.
    """
    gateway = service.workers("gateway")[0]
    gone, computed = "baton_gateway_client_disconnects_total", "vllm:iteration_tokens_total_sum"
    gone_before = census.scrape(gateway).value(gone)
    for role, num_clients, num_events, num_prompt_tokens, num_tokens in (
        ("prefill", 24, 0, 1800, 1800),
        ("decode", 6, 3, 200, 1700),
    ):
        before = census.total(service, computed, role=role)
        clients = [_open(service, number, num_prompt_tokens) for number in range(num_clients)]
        for client in clients:
            _leave(client, num_events)
        census.at_rest(service)
        done = census.total(service, computed, role=role) - before
        asked = num_clients * num_tokens
        assert done < asked / 2, f"{done} of {asked} tokens were computed for nobody ({role})"
    census.eventually(
        "every client that left is counted", lambda: census.scrape(gateway).value(gone) - gone_before == 30
    )


def _open(service: Service, number: int, num_prompt_tokens: int) -> socket.socket:
    """Ask for as many tokens as there may be."""
    body = {
        "model": "model", "prompt": [3 + (i * 7 + number) % 250 for i in range(num_prompt_tokens)], "stream": True,
        "max_tokens": 1900 - num_prompt_tokens, "ignore_eos": True, "cache_salt": f"leave-{number}-{time.time()}",
    }  # fmt: skip
    payload = json.dumps(body).encode()
    client = socket.create_connection((service.host, service.port))
    client.settimeout(60)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    client.sendall(head.encode() + b"\r\n\r\n" + payload)
    return client


def _leave(client: socket.socket, num_events: int) -> None:
    """Close once so many events came; with none, while the prompt is on its way or at work."""
    heard = b""
    while heard.count(b"data: ") < num_events:
        part = client.recv(4096)
        assert part, heard
        heard += part
    client.close()


def test_kills_leave_no_descriptor_thread_mapping_or_socket_at_the_survivors(service: Service, chaos: Chaos) -> None:
    """Growth over two deaths of peers must be less than one each."""
    rng = random.Random(SEED)
    for survivors, victims in (("decode", "prefill"), ("prefill", "decode")):
        pids = [worker.pid for worker in workers_of(service, survivors)]
        before = _settled_holdings(service, chaos, pids)
        for _ in range(2):
            victim = rng.choice(workers_of(service, victims))
            assert asyncio.run(chaos.round(lambda victim=victim: kill(victim), after_tokens=None, kinds=4)) == []
        after = _settled_holdings(service, chaos, pids)
        assert [worker.pid for worker in workers_of(service, survivors)] == pids
        announced = {path.stem for path in (service.run_dir / service.name / "registry").iterdir()}
        assert announced == {worker.worker_id for worker in service.workers() if worker.role != "gateway"}
        for was, now in zip(before, after, strict=True):
            # A decode worker maps two files of each prefill worker that lives, and has its own KV.
            assert now.num_memory_files <= 6, (survivors, was, now)
            assert now.num_descriptors - was.num_descriptors < 2, (survivors, was, now)
            assert now.num_threads - was.num_threads < 6, (survivors, was, now)  # the pools of a client fill up lazily


def _settled_holdings(service: Service, chaos: Chaos, pids: list[int]) -> list[census.Holdings]:
    """What the workers hold once every pair has met: the same after two rounds of requests."""
    known: list[census.Holdings] = []
    for _ in range(12):
        assert asyncio.run(chaos.round(lambda: None, after_tokens=None, kinds=6)) == []
        census.at_rest(service)
        now = [census.holdings(pid) for pid in pids]
        if [each.num_descriptors for each in now] == [each.num_descriptors for each in known]:
            return now
        known = now
    raise AssertionError(f"holdings keep changing: {known}")


def test_down_leaves_nothing_but_logs(tiny_llama: Path) -> None:
    with running_service(prefill=1, decode=1, num_threads=1, model=str(tiny_llama), kv_memory="8Mi") as service:
        asyncio.run(Chaos(service, workloads(16)).learn())
        kill(workers_of(service, "prefill")[0])
        workers = service.wait_all_ready()
        pids = [worker.pid for worker in workers]
        ports = [service.port, *(int(worker.http.rsplit(":", 1)[1]) for worker in workers)]
        sockets = census.abstract_sockets(pids)
        assert any(name.startswith("baton-kv-") for name in sockets), sockets
        service.baton("down")
        assert wait_until_gone(pids, timeout_s=60) == []
        census.eventually("the files are gone", lambda: _files(service) == {"logs"})
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"somebody listens on {port}"
    assert not sockets & census.every_abstract_socket()
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


def _files(service: Service) -> set[str]:
    return {path.name for path in (service.run_dir / service.name).iterdir()}


def test_there_are_always_enough_workers_to_choose_from(service: Service) -> None:
    assert len(wait_enough_ready(service)) >= 3
    assert len(PROMPT) > 4 * CHUNK["maxBatchedTokens"]  # several chunks, so that a kill can fall between two
