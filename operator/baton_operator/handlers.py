"""Triggers: kopf's watches feed the cache, and whatever changes a service has it looked at. No finalizer, no patch of
kopf's own: handlers of low-level events and of the process's life are all that is registered here.

kopf's watches show no deletion that fell into a gap between two of its lists, and no list tells a handler that it is
complete. So everything is listed once before the first pass, again shortly after whenever kopf lists again, and every
`resync_s` besides; what such a list shows and no event had counts as missed (and is put right).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import kopf

from baton_operator.api import Api
from baton_operator.cache import Cache, Key
from baton_operator.errors import ApiError, Refused
from baton_operator.kinds import Kind, watched
from baton_operator.metrics import Metrics
from baton_operator.objects import SERVICE_KIND
from baton_operator.reconcile import Reconciler
from baton_operator.work_queue import WorkQueue

log = logging.getLogger(__name__)

TICK_S = 5.0
_SETTLED_S = 10.0
"""After kopf's list has begun, its watch shows everything from then on; what was deleted before, a list."""
_MAX_PASSES = 64
"""At once: each holds some 400 KB of parsed objects. Many more than calls in flight, since some wait for gateways."""
_BURST_S = 0.03
"""A child's change is looked at so much later: rollouts change many children at once."""


class Watcher:
    """Cache and queue behind kopf's handlers."""

    def __init__(
        self,
        api: Api,
        cache: Cache,
        reconciler: Reconciler,
        metrics: Metrics,
        *,
        namespaces: tuple[str, ...],
        apis: frozenset[str],
        resync_s: float,
    ) -> None:
        self._api = api
        self._cache = cache
        self._reconciler = reconciler
        self._metrics = metrics
        self._kinds = watched(apis)
        self._namespaces = namespaces
        self._resync_s = resync_s
        self._queue = WorkQueue[Key](self._work, asyncio.get_running_loop(), _MAX_PASSES)
        self._due = dict.fromkeys(self._kinds, 0.0)
        self._ticks: asyncio.Task[None] | None = None
        self.is_synced = False
        self.ticked_at = time.time()

    def register(self, registry: kopf.OperatorRegistry) -> None:
        kopf.on.startup(registry=registry, id="listing")(self._start)
        kopf.on.cleanup(registry=registry, id="stopping")(self._stop)
        for kind in self._kinds:
            watch = kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id=f"watch-{kind.plural}")
            watch(self._handler(kind))

    def configure(self, settings: kopf.OperatorSettings) -> None:
        """kopf's settings: watch what is labelled as ours, write nothing, never give up on the API server."""
        settings.scanning.disabled = True  # watching CRDs and namespaces would need rights over the whole cluster
        settings.posting.enabled = False  # Events are ours
        settings.peering.standalone = True
        settings.watching.chunk_size = 100
        settings.watching.server_timeout = 240
        settings.watching.reconnect_backoff = 0.5
        settings.networking.error_backoffs = _Forever()
        settings.queueing.idle_timeout = 0.2  # of a task that holds its object: a list of thousands makes as many
        for kind in self._kinds:
            if kind.selector:
                settings.watching.label_selectors[kind.group, kind.version, kind.plural] = kind.selector

    def _handler(self, kind: Kind) -> Any:
        async def on_event(event: Mapping[str, Any], **_: object) -> None:
            self._take(kind, event["type"], event["object"])

        return on_event

    def _take(self, kind: Kind, change: str | None, manifest: Any) -> None:
        """One event of a watch; `change` is None for what kopf lists."""
        now = time.time()
        self._metrics.watch_events.labels(kind.kind).inc()
        self._metrics.last_event.set(now)
        if change is None:  # of every kind: one of which nothing is left shows nothing
            self._due = {each: min(due, now + _SETTLED_S) for each, due in self._due.items()}
        key = self._cache.remove(manifest) if change == "DELETED" else self._cache.put(manifest)
        if key is not None:
            self._wake(key, 0.0 if kind.kind == SERVICE_KIND else _BURST_S)

    def _wake(self, key: Key, delay_s: float) -> None:
        if self.is_synced:
            self._queue.add(key, delay_s)

    async def _work(self, key: Key) -> None:
        try:
            delay_s = await self._reconciler.reconcile(key)
        except Exception:  # a bug of ours must stop neither the queue nor the other services
            log.exception("%s/%s: the pass failed", *key)
            self._metrics.errors.labels("Bug").inc()
            delay_s = 60.0
        if delay_s is not None:
            self._queue.add(key, delay_s)

    # ------------------------------------------------------------ lists

    async def _start(self, **_: object) -> None:
        """Before kopf watches: know everything. Raises: ApiError (kopf tries again, or ends if we may not)."""
        try:
            for kind in self._kinds:
                await self._list(kind)
        except Refused as error:
            raise kopf.PermanentError(str(error)) from error
        except ApiError as error:
            raise kopf.TemporaryError(str(error), delay=1.0 + random.random()) from error
        self.is_synced = True
        self._wake_all()
        self._ticks = asyncio.create_task(self._tick_for_ever(), name="resyncs")

    async def _stop(self, **_: object) -> None:
        if self._ticks is not None:
            self._ticks.cancel()
            await asyncio.gather(self._ticks, return_exceptions=True)
        await self._queue.close()

    async def _tick_for_ever(self) -> None:
        looked_at = time.time()
        while True:
            await asyncio.sleep(TICK_S * (0.75 + 0.5 * random.random()))
            self.ticked_at = now = time.time()
            self._metrics.queue.set(self._queue.num_due)
            counts = self._cache.counts()
            for kind in self._kinds:
                self._metrics.managed.labels(kind.kind).set(counts.get(kind.kind, 0))
            await self._list_what_is_due(now)
            if now - looked_at > self._resync_s:
                looked_at = now
                self._wake_all()

    async def _list_what_is_due(self, now: float) -> None:
        for kind in [kind for kind, due in self._due.items() if due <= now]:
            try:
                missed = await self._list(kind)
            except ApiError as error:
                log.warning("cannot list %s: %s", kind.plural, error)
                return
            for key in missed:
                self._metrics.missed.labels(kind.kind).inc()
                self._wake(key, 0.0)

    async def _list(self, kind: Kind) -> set[Key]:
        """Put the cache right by a whole list. Returns the services that looked different. Raises: ApiError."""
        found: set[Key] = set()
        self._due[kind] = time.time() + self._resync_s
        for namespace in self._namespaces or (None,):
            listed: set[tuple[str, str]] = set()
            version = -1
            async for page in self._api.list(kind, namespace):
                version = page.version
                listed |= {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in page.items}
                found |= {key for key in map(self._cache.put, page.items) if key is not None}
            found |= self._cache.reconcile_with(kind.api_version, kind.kind, namespace, listed, version)
        self._metrics.last_resync.set(time.time())
        return found

    def _wake_all(self) -> None:
        """Every service, spread over a second for each hundred of them."""
        services = list(self._cache.services())
        for number, key in enumerate(services):
            self._queue.add(key, number / 100.0)


class _Forever:
    """Delays between tries of a list or watch: doubling to half a minute, jittered, without an end."""

    def __iter__(self) -> Iterator[float]:
        longest = 0.5
        while True:
            yield longest * (0.5 + 0.5 * random.random())
            longest = min(30.0, longest * 2.0)
