"""Membership in Redis or Valkey: one key a worker, which dies with its lease, and a set of the names.

    <prefix>:workers        set of worker ids: what to ask for. A name that has no key is nobody
    <prefix>:worker:<id>    the entry (entry.py), SET with EX

Commands: SADD, SREM, SSCAN, SET, GET, GETRANGE, EXISTS, DEL, WATCH, UNWATCH, MULTI, EXEC, and those that make a
connection: AUTH, HELLO, CLIENT, SELECT. No Lua, no look at other people's keys.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from registry.entry import MAX_ENTRY_BYTES, Entry, decode, encode, is_worker_id
from registry.errors import BadEntry, Refused, RegistryError, Unreachable
from registry.membership import MAX_MEMBERS, Hint, Snapshot, hint_of
from registry.redis_url import RedisAddress

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
PRUNE_SHARE = 0.1
BATCH = 256

Client = Any
"""redis.asyncio.Redis, whose own hints do not reach strict checking."""


class RedisMembership:
    """One connection, made when first needed and thrown away after any failure."""

    name = "redis"

    def __init__(
        self,
        address: Callable[[], RedisAddress],
        prefix: str,
        key: bytes = b"",
        *,
        timeout_s: float = TIMEOUT_S,
        rng: random.Random | None = None,
    ) -> None:
        self._address = address
        self._names = f"{prefix}:workers"
        self._prefix = f"{prefix}:worker:"
        self._signing_key = key
        self._timeout_s = timeout_s
        self._rng = rng or random.Random()
        self._client: Client = None
        self._said_bad: set[str] = set()
        self._read: dict[str, tuple[object, Entry | None]] = {}

    async def announce(self, entry: Entry, lease_s: float) -> None:
        async with self._connected() as client:
            pipe = client.pipeline(transaction=True)
            pipe.sadd(self._names, entry.worker_id)
            pipe.set(self._key(entry.worker_id), encode(entry, self._signing_key), px=round(lease_s * 1000))
            await pipe.execute()
            if self._rng.random() < PRUNE_SHARE:  # every worker now and then: no one process has to live for it
                await self._prune(client)

    async def withdraw(self, entry: Entry) -> None:
        key = self._key(entry.worker_id)
        async with self._connected() as client, client.pipeline() as pipe:
            await pipe.watch(key)  # a successor that announces itself in between keeps its entry
            found = self._decoded(entry.worker_id, await pipe.get(key))
            if found is None or found.boot_id == entry.boot_id:
                pipe.multi()
                pipe.delete(key)
                pipe.srem(self._names, entry.worker_id)
                await self._unless_changed(pipe.execute())

    async def snapshot(self) -> Snapshot:
        async with self._connected() as client:
            worker_ids = await self._worker_ids(client)
            # No more of a value than an entry may have: a long one must not fill this process.
            texts = await self._of_each(client, worker_ids, lambda pipe, key: pipe.getrange(key, 0, MAX_ENTRY_BYTES))
        # An entry stays the same for a worker's life: checking it costs 40 us, and this is asked each second.
        before, self._read = self._read, {}
        found: dict[str, Hint] = {}
        for worker_id, text in zip(worker_ids, texts, strict=True):
            text_before, entry = before.get(worker_id, (None, None))
            if text != text_before:
                entry = self._decoded(worker_id, text)
            self._read[worker_id] = text, entry
            if entry is not None:
                found[entry.address] = hint_of(entry)
        return found

    async def close(self) -> None:
        await self._drop()

    # ------------------------------------------------------------ parts

    def _key(self, worker_id: str) -> str:
        return self._prefix + worker_id

    def _decoded(self, worker_id: str, text: object) -> Entry | None:
        """The entry, or None for what is gone or is none. Said once for each worker id."""
        if not isinstance(text, bytes) or not text:
            return None
        try:
            entry = decode(text, self._signing_key)
            if entry.worker_id != worker_id:
                raise BadEntry("it stands under another worker's name")
        except BadEntry as error:
            if worker_id not in self._said_bad and len(self._said_bad) < MAX_MEMBERS:
                self._said_bad.add(worker_id)
                log.warning("registry entry ignored", extra={"worker_id": worker_id, "reason": str(error)})
            return None
        self._said_bad.discard(worker_id)
        return entry

    async def _worker_ids(self, client: Client) -> list[str]:
        found: list[str] = []
        cursor = 0
        while True:
            cursor, names = await client.sscan(self._names, cursor, count=BATCH)
            found += [name for name in (raw.decode(errors="replace") for raw in names) if is_worker_id(name)]
            if not cursor:
                return sorted(set(found))
            if len(found) > MAX_MEMBERS:
                raise RegistryError(f"more than {MAX_MEMBERS} worker ids under {self._names}")

    async def _of_each(
        self, client: Client, worker_ids: Sequence[str], ask: Callable[[Any, str], object]
    ) -> list[object]:
        """One command for each worker. One that fails (a key of another type) fails alone."""
        answers: list[object] = []
        for start in range(0, len(worker_ids), BATCH):
            pipe = client.pipeline(transaction=False)
            for worker_id in worker_ids[start : start + BATCH]:
                ask(pipe, self._key(worker_id))
            answers += await pipe.execute(raise_on_error=False)
        return answers

    async def _prune(self, client: Client) -> None:
        """Drop names whose lease is over. A worker that announces itself meanwhile adds its name again next time."""
        worker_ids = await self._worker_ids(client)
        exists = await self._of_each(client, worker_ids, lambda pipe, key: pipe.exists(key))
        gone = [worker_id for worker_id, answer in zip(worker_ids, exists, strict=True) if answer == 0]
        if gone:
            await client.srem(self._names, *gone)

    @staticmethod
    async def _unless_changed(work: Awaitable[object]) -> None:
        from redis.exceptions import WatchError

        with suppress(WatchError):
            await work

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Client]:
        """The client, within the time limit. After a failure the next one connects anew, with the files read again.

        Raises: RegistryError.
        """
        from redis.exceptions import AuthenticationError, RedisError, ResponseError

        is_well = False
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._client is None:
                    self._client = _connect(self._address(), self._timeout_s)
                yield self._client
            is_well = True
        except TimeoutError as error:
            raise Unreachable(f"no answer in {self._timeout_s:g} s") from error
        except (ResponseError, AuthenticationError) as error:
            raise Refused(_in_words(error)) from error
        except (RedisError, OSError, ValueError) as error:
            raise Unreachable(_in_words(error)) from error
        finally:
            if not is_well:
                await self._drop()

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await client.aclose()
        except Exception as error:  # a connection that is thrown away may fail in any way
            log.debug("closing the registry's connection failed", extra={"reason": _in_words(error)})


def _connect(address: RedisAddress, timeout_s: float) -> Client:
    """A client; nothing is sent yet. Its own retries are off: ours are spread out and counted."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    untyped: Any = Redis
    tls: dict[str, object] = {"ssl": True, "ssl_ca_certs": str(address.ca_file) if address.ca_file else None}
    return untyped(
        host=address.host,
        port=address.port,
        db=address.db,
        username=address.username or None,
        password=address.password or None,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=False,
        max_connections=2,
        **(tls if address.is_tls else {}),
    )


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
