"""The prefill workers that this decode worker talks to: one kvtransfer client per address, kept while it is used."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.candidates import Candidate
from kvtransfer.decode_side import PrefillOrder
from kvtransfer.prefill_client import Fetched, PrefillClient, ReserveBlocks

log = logging.getLogger(__name__)

IDLE_S = 300.0
"""A client that served nobody for so long is closed: its worker may have moved or gone."""

MAX_CLIENTS = 256


class RemotePrefill(Protocol):
    """What an attempt needs of the pool."""

    async def fetch(self, candidate: Candidate, order: PrefillOrder, reserve: ReserveBlocks) -> Fetched:
        """Raises: TransferFailed. However it ends, nothing writes into the reserved blocks afterwards."""
        ...


@dataclass(slots=True)
class _Known:
    client: PrefillClient
    used_at: float
    num_fetches: int = 0


class PrefillPool:
    """Lives on the asyncio loop. `make_client` makes one that is not started yet."""

    def __init__(self, make_client: Callable[[str], PrefillClient]) -> None:
        self._make_client = make_client
        self._known: dict[str, _Known] = {}
        self._past_fallbacks: Counter[str] = Counter()  # of clients that are closed
        self._closing: set[asyncio.Task[None]] = set()

    async def fetch(self, candidate: Candidate, order: PrefillOrder, reserve: ReserveBlocks) -> Fetched:
        known = self._client(candidate.address)
        known.num_fetches += 1
        try:
            return await known.client.fetch(order, reserve)
        finally:
            known.num_fetches -= 1
            known.used_at = asyncio.get_running_loop().time()

    def ignored(self) -> dict[str, int]:
        """Messages without effect (T4), by kind, of all clients that are known now."""
        totals: dict[str, int] = {}
        for known in self._known.values():
            for kind, count in known.client.ignored.items():
                totals[kind] = totals.get(kind, 0) + count
        return totals

    def fallbacks(self) -> dict[str, int]:
        """Transports that were wanted and did not work, by name, ever."""
        totals = Counter(self._past_fallbacks)
        for known in self._known.values():
            totals.update(known.client.fallbacks)
        return dict(totals)

    def transports(self) -> dict[str, int]:
        """How many prefill workers are connected by each way of moving KV."""
        return dict(Counter(known.client.transport for known in self._known.values() if known.client.transport))

    async def aclose(self) -> None:
        """End every stream; fetches under way fail."""
        known, self._known = self._known, {}
        await asyncio.gather(*(each.client.aclose() for each in known.values()), *self._closing)

    def _client(self, address: str) -> _Known:
        now = asyncio.get_running_loop().time()
        known = self._known.get(address)
        if known is None:
            self._forget_idle(now)
            known = self._known[address] = _Known(self._make_client(address), now)
            known.client.start()
        return known

    def _forget_idle(self, now: float) -> None:
        """Close what was not used for long; at the cap, the one that was used longest ago."""
        idle = sorted((k.used_at, address) for address, k in self._known.items() if k.num_fetches == 0)
        too_many = len(self._known) - MAX_CLIENTS + 1
        for rank, (used_at, address) in enumerate(idle):
            if rank < too_many or now - used_at > IDLE_S:
                client = self._known.pop(address).client
                self._past_fallbacks.update(client.fallbacks)
                task = asyncio.create_task(client.aclose())
                self._closing.add(task)
                task.add_done_callback(self._on_closed)

    def _on_closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("the stream to an idle prefill worker did not close cleanly", exc_info=error)
