"""The registry on a real redis-server: what it holds, who is believed, and that losing it loses no request."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gateway.status import status_of
from kvtransfer.auth import Secret
from registry import redis_membership
from registry.config import RegistryConfig
from registry.entry import SIGNING_PURPOSE, Entry, decode, encode
from registry.errors import Refused, RegistryError, Unreachable
from registry.keeper import Keeper
from registry.membership import Hint
from registry.redis_membership import RedisMembership
from registry.redis_url import read_address
from tests.gateway_harness import Harness, events, running, streamed_text
from tests.redis_server import PASSWORD, RedisServer, Tls, needs_redis, redis_server
from tests.workers_harness import PATIENCE_S, SECRET, FakeModel, RunningWorker, Workers, until

pytestmark = needs_redis

T = TypeVar("T")
KEY = b"key of this service"
ENTRY = Entry("p0", "prefill", "10.0.0.7:7000", "10.0.0.7:7001", "rev", "layout", "0f" * 16, 7)
OTHER = replace(ENTRY, worker_id="d0", role="decode", address="10.0.0.8:7000")
LEASE_S = 60.0  # longer than any test, however busy the machine
SHORT_LEASE_S = 3.0  # of workers that renew it


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as server:
        yield server


@asynccontextmanager
async def membership(redis: RedisServer, key: bytes = KEY, **settings: Any) -> AsyncGenerator[RedisMembership]:
    config = RegistryConfig(**redis.settings)
    patient = {"timeout_s": PATIENCE_S} | settings
    opened = RedisMembership(lambda: read_address(config), redis.prefix, key, **patient)
    yield opened
    await opened.close()


# ---------------------------------------------------------------- what it holds


async def test_a_worker_is_found_while_announced_and_not_after(redis: RedisServer) -> None:
    async with membership(redis) as worker, membership(redis) as gateway:
        assert await gateway.snapshot() == {}
        await worker.announce(ENTRY, LEASE_S)
        await worker.announce(OTHER, LEASE_S)
        assert await gateway.snapshot() == {
            "10.0.0.7:7000": Hint("10.0.0.7:7000", "prefill", "p0", "rev"),
            "10.0.0.8:7000": Hint("10.0.0.8:7000", "decode", "d0", "rev"),
        }
        await worker.withdraw(ENTRY)
        await worker.withdraw(ENTRY)
        assert list(await gateway.snapshot()) == ["10.0.0.8:7000"]
        assert 0 < int(redis.cli("PTTL", "baton:worker:d0")) <= LEASE_S * 1000
        assert redis.cli("SMEMBERS", "baton:workers") == "d0"


async def test_a_lease_that_ends_takes_the_worker_away_and_its_name_is_swept(redis: RedisServer) -> None:
    class Always(random.Random):
        def random(self) -> float:
            return 0.0

    async with membership(redis, rng=Always()) as worker:
        await worker.announce(ENTRY, 0.05)
        while redis.cli("EXISTS", "baton:worker:p0") == "1":
            await asyncio.sleep(0.01)
        assert await worker.snapshot() == {}
        await worker.announce(OTHER, LEASE_S)
        assert redis.cli("SMEMBERS", "baton:workers") == "d0"


async def test_a_successor_under_the_same_name_keeps_its_entry(redis: RedisServer) -> None:
    async with membership(redis) as old, membership(redis) as new:
        await old.announce(ENTRY, LEASE_S)
        await new.announce(replace(ENTRY, boot_id="11" * 16, address="10.0.0.9:7000"), LEASE_S)
        await old.withdraw(ENTRY)
        assert list(await new.snapshot()) == ["10.0.0.9:7000"]


async def test_who_can_write_to_redis_can_send_a_gateway_nowhere(redis: RedisServer) -> None:
    """R4: every field forged, keys of other types, values of megabytes, names by the thousand."""
    async with membership(redis) as gateway:
        await gateway.announce(ENTRY, LEASE_S)
        signed = json.loads(encode(ENTRY, KEY))
        forged: dict[str, str] = {
            "unsigned": encode(replace(ENTRY, worker_id="unsigned", address="6.6.6.6:1")).decode(),
            "foreign": encode(replace(ENTRY, worker_id="foreign", address="6.6.6.6:2"), b"other").decode(),
            "copied": encode(ENTRY, KEY).decode(),  # a true entry under another's name
            "changed": json.dumps(signed | {"worker_id": "changed", "address": "6.6.6.6:3"}),
            "noise": "not json",
        }
        for worker_id, text in forged.items():
            redis.cli("SET", f"baton:worker:{worker_id}", text)
            redis.cli("SADD", "baton:workers", worker_id)
        redis.cli("LPUSH", "baton:worker:list", "x")
        redis.cli("SETRANGE", "baton:worker:huge", str(64 << 20), "x")
        redis.cli("SADD", "baton:workers", "list", "huge", "no key", "../x", "x" * 300)
        assert list(await gateway.snapshot()) == [ENTRY.address]
        redis.cli("SADD", "baton:workers", *(f"w{n}" for n in range(5000)))
        with pytest.raises(RegistryError, match="more than 4096"):
            await gateway.snapshot()
        redis.cli("DEL", "baton:workers")
        redis.cli("SET", "baton:workers", "x")
        with pytest.raises(Refused, match="WRONGTYPE"):
            await gateway.snapshot()


async def test_services_that_share_a_redis_see_nothing_of_each_other(redis: RedisServer) -> None:
    redis.cli("ACL", "SETUSER", "baton", "~other:*")
    config = RegistryConfig(**redis.settings)
    other = RedisMembership(lambda: read_address(config), "other", KEY, timeout_s=PATIENCE_S)
    async with membership(redis) as ours:
        await other.announce(ENTRY, LEASE_S)
        assert await ours.snapshot() == {}
    await other.close()


# ---------------------------------------------------------------- passwords and TLS


async def test_a_wrong_password_is_said_without_showing_it_and_a_changed_file_is_read(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with membership(redis) as gateway:
        redis.password_file.write_text("wrong-and-secret")
        with pytest.raises(Refused) as refused:
            await gateway.snapshot()
        redis.password_file.write_text(PASSWORD)
        assert await gateway.snapshot() == {}
        redis.password_file.unlink()
        await gateway.close()
        with pytest.raises(Unreachable, match="redis-password"):
            await gateway.snapshot()
    assert not any(secret in f"{refused.value!r} {caplog.text}" for secret in ("wrong-and-secret", PASSWORD))


async def test_commands_beyond_the_documented_are_not_needed_and_not_allowed(redis: RedisServer) -> None:
    import redis.asyncio as client_library

    client: Any = client_library.Redis(port=redis.port, username="baton", password=PASSWORD)
    for command in (("KEYS", "*"), ("EVAL", "return 1", "0"), ("FLUSHALL",), ("GET", "elsewhere")):
        with pytest.raises(client_library.ResponseError, match=r"(?i)no permission|NOPERM|permissions"):
            await client.execute_command(*command)
    await client.aclose()


async def test_tls_needs_the_right_authority(tmp_path: Path) -> None:
    tls, stranger = Tls.make(tmp_path / "tls"), Tls.make(tmp_path / "stranger")
    with redis_server(tmp_path / "redis", tls=tls) as redis:
        async with membership(redis) as worker:
            await worker.announce(ENTRY, LEASE_S)
            assert list(await worker.snapshot()) == [ENTRY.address]
        for settings in ({"registry_ca_file": stranger.ca_file}, {"registry_ca_file": None}):
            config = RegistryConfig(**(redis.settings | settings))
            refused = RedisMembership(lambda config=config: read_address(config), "baton", KEY, timeout_s=PATIENCE_S)
            with pytest.raises(Unreachable, match="certificate verify failed"):
                await refused.snapshot()


async def test_a_server_that_hangs_is_given_up_in_time(redis: RedisServer) -> None:
    async with membership(redis, timeout_s=redis_membership.TIMEOUT_S) as worker:
        await worker.announce(ENTRY, LEASE_S)
        redis.freeze()
        async with asyncio.timeout(60):
            for _ in range(2):  # on the old connection, and on a new one
                with pytest.raises(Unreachable, match=r"imeout|no answer"):
                    await worker.announce(ENTRY, LEASE_S)
            await Keeper(worker, ENTRY).withdraw()  # a worker that drains just then
        redis.thaw()
        await worker.announce(ENTRY, LEASE_S)


async def test_an_entry_that_stays_the_same_is_checked_once(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []

    def counting(text: bytes, key: bytes) -> Entry:
        checked.append(text)
        return decode(text, key)

    monkeypatch.setattr(redis_membership, "decode", counting)
    async with membership(redis) as gateway:
        await gateway.announce(ENTRY, LEASE_S)
        for _ in range(3):
            assert list(await gateway.snapshot()) == ["10.0.0.7:7000"]
        assert len(checked) == 1
        await gateway.announce(replace(ENTRY, address="10.0.0.9:7000"), LEASE_S)
        assert list(await gateway.snapshot()) == ["10.0.0.9:7000"]
        assert len(checked) == 2


# ---------------------------------------------------------------- under traffic


class Service:
    """Two workers of each role, a gateway that knows them from Redis alone, and clients that never stop."""

    def __init__(self, redis: RedisServer, workers: Workers, harness: Harness) -> None:
        self.redis = redis
        self.workers = workers
        self.harness = harness
        self.ending: list[RunningWorker] = []
        self.texts: list[str] = []
        self._is_over = False
        self._clients: list[asyncio.Task[None]] = []

    @property
    def registry(self) -> dict[str, Any]:
        return status_of(self.harness.gateway.services.pool)["registry"]

    async def whole(self, max_tokens: int = 20) -> str:
        answer = await self.harness.complete(max_tokens=max_tokens, stream=True, ignore_eos=True)
        assert answer.status_code == 200, answer.text
        chunks = events(answer)
        assert chunks[-1] == "[DONE]", chunks
        return streamed_text(chunks)

    def begin(self, num_clients: int = 4) -> None:
        async def client() -> None:
            while not self._is_over:
                self.texts.append(await self.whole())

        self._clients = [asyncio.create_task(client()) for _ in range(num_clients)]

    async def more(self, num_texts: int = 12) -> None:
        """Until so many more requests have been answered."""
        wanted = len(self.texts) + num_texts
        async with asyncio.timeout(PATIENCE_S):
            while len(self.texts) < wanted:
                for client in self._clients:
                    if client.done():
                        client.result()
                await asyncio.sleep(0.02)

    async def end(self) -> set[str]:
        self._is_over = True
        await asyncio.gather(*self._clients)
        return set(self.texts)

    async def until_connected(self, connected: bool, members: int | None = None) -> None:
        def is_so() -> bool:
            (source,) = self.registry["sources"]
            return source["connected"] is connected and members in (None, source["members"])

        await until(is_so)


async def aside(work: Callable[..., T], *arguments: str) -> T:
    """In a thread: gateway and workers live in this loop, and fall silent while a busy machine runs a redis-cli."""
    return await asyncio.to_thread(work, *arguments)


def worker_settings(redis: RedisServer) -> dict[str, Any]:
    return redis.settings | {"registry_lease_s": SHORT_LEASE_S, "model_id": "fake-model"}


@asynccontextmanager
async def service_on(redis: RedisServer, tmp_path: Path) -> AsyncGenerator[Service]:
    workers = Workers(tmp_path)
    try:
        for _ in range(2):
            prefill = await workers.prefill(**worker_settings(redis))
            decode = await workers.decode(model=FakeModel(step_s=0.003), **worker_settings(redis))
        gateway = redis.settings | {"secret_file": workers.secret_file}
        async with running(tmp_path, wait_for=2, **gateway) as harness:
            pool = harness.gateway.services.pool
            await until(lambda: len(pool.prefill) == 2)
            service = Service(redis, workers, harness)
            service.ending = [prefill, decode]
            yield service
    finally:
        await workers.aclose()


async def test_losing_redis_in_any_way_fails_no_request(redis: RedisServer, tmp_path: Path) -> None:
    """F5: killed, back empty, frozen, flushed, with another password; streams run all the while."""
    async with service_on(redis, tmp_path) as service:
        whole = await service.whole()
        service.begin()
        await service.until_connected(True, 4)
        # kill -9, and gone for longer than any lease
        await aside(redis.kill)
        await service.until_connected(False)
        assert (await service.harness.metric("baton_gateway_registry_connected ")) == 0.0
        await asyncio.sleep(SHORT_LEASE_S + 1)
        await service.more()
        # back, and empty: everybody announces itself again
        await aside(redis.start)
        await service.until_connected(True, 4)
        assert (await service.harness.metric("baton_gateway_registry_connected ")) == 1.0
        # flushed, also between two reads of the gateway
        for _ in range(3):
            await aside(redis.cli, "FLUSHALL")
            await service.more(3)
        await service.until_connected(True, 4)
        # frozen: connections stay open and nothing is said
        await aside(redis.freeze)
        await service.until_connected(False)
        await service.more()
        await aside(redis.thaw)
        await service.until_connected(True, 4)
        # back with another password, which comes into the file later
        await aside(redis.kill)
        redis.password = "another-password"
        await aside(redis.start)
        await service.until_connected(False)
        await service.more()
        redis.password_file.write_text("another-password")
        await service.until_connected(True, 4)
        await service.more()
        pool = service.harness.gateway.services.pool
        assert (len(pool.connections), len(pool.prefill)) == (2, 2)
        assert await service.harness.metric("baton_gateway_failovers_total") == 0
        # gone once more, and one worker of each role ends meanwhile
        await aside(redis.kill)
        await asyncio.gather(*(worker.end() for worker in service.ending))
        await service.more()
        assert await service.end() == {whole}
        await until(lambda: len(pool.connections) == 1)


async def test_what_a_stale_replica_says_fails_no_request(redis: RedisServer, tmp_path: Path) -> None:
    """A failover brings back who is long gone, and forgets who is there; writes are refused at first."""
    async with service_on(redis, tmp_path) as service:
        whole = await service.whole()
        service.begin()
        gone = replace(OTHER, worker_id="gone", address="127.0.0.1:1")
        await aside(redis.cli, "FLUSHALL")
        signed = encode(gone, Secret(SECRET).signing_key(SIGNING_PURPOSE)).decode()
        await aside(redis.cli, "SET", "baton:worker:gone", signed)  # first: a name without an entry may be pruned
        await aside(redis.cli, "SADD", "baton:workers", "gone")
        await aside(redis.cli, "REPLICAOF", "127.0.0.1", "1")  # READONLY to every announcement
        await service.until_connected(True, 1)
        await asyncio.sleep(SHORT_LEASE_S)
        await service.more()
        await aside(redis.cli, "REPLICAOF", "NO", "ONE")
        await service.until_connected(True, 5)
        await service.more()
        assert await service.end() == {whole}
        assert len(service.harness.gateway.services.pool.connections) == 2


async def test_a_gateway_started_without_redis_finds_its_workers_by_dns(redis: RedisServer, tmp_path: Path) -> None:
    """Also a worker that comes while Redis is away; and when Redis is back, both know the same."""
    workers = Workers(tmp_path)
    prefill = await workers.prefill(**worker_settings(redis))
    decode = await workers.decode(**worker_settings(redis))
    await aside(redis.kill)
    late = await workers.decode(**worker_settings(redis))  # is ready, though nobody can be told
    names = tuple(f"localhost:{worker.address.rpartition(':')[2]}" for worker in (prefill, decode, late))
    settings = redis.settings | {"secret_file": workers.secret_file, "registry_dns": names}
    async with running(tmp_path, wait_for=2, **settings) as harness:
        pool = harness.gateway.services.pool
        await until(lambda: len(pool.prefill) == 1)
        assert (await harness.complete()).status_code == 200
        sources = {s["name"]: s["connected"] for s in status_of(pool)["registry"]["sources"]}
        assert sources == {"redis": False, "dns localhost": True}
        await aside(redis.start)
        await until(lambda: status_of(pool)["registry"]["connected"])
        await until(lambda: status_of(pool)["registry"]["sources"][0]["members"] == 3)
        assert len(pool.connections) == 2
        assert late.metric("baton_registry_connected") == 1.0
        await late.end()
        assert await aside(redis.cli, "EXISTS", "baton:worker:d2") == "0"  # withdrawn at drain
    await workers.aclose()
