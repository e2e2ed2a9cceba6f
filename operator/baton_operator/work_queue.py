"""Which service is to be looked at, and when: each by one task at a time, the soonest of all requests wins. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Timer(Protocol):
    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """An event loop's clock; a fake one in tests."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer: ...


class WorkQueue(Generic[K]):
    """Keys that wait for their time, and keys that are worked on. Many requests for a key are one."""

    def __init__(self, work: Callable[[K], Awaitable[None]], scheduler: Scheduler, max_running: int) -> None:
        self._work = work
        self._scheduler = scheduler
        self._max_running = max_running
        self._blocked: dict[K, None] = {}  # due, without a free slot; in the order in which they will start
        self._waiting: dict[K, tuple[float, Timer]] = {}
        self._running: dict[K, asyncio.Task[None]] = {}
        self._is_closed = False

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Have the key worked on after the delay; sooner if that was asked for already."""
        due = self._scheduler.time() + delay_s
        known = self._waiting.get(key)
        if self._is_closed or (known is not None and known[0] <= due):
            return
        if known is not None:
            known[1].cancel()
        self._waiting[key] = (due, self._scheduler.call_at(due, lambda: self._start(key)))

    def drop(self, key: K) -> None:
        """Forget what waits for this key."""
        self._blocked.pop(key, None)
        known = self._waiting.pop(key, None)
        if known is not None:
            known[1].cancel()

    @property
    def num_due(self) -> int:
        """How many wait although their time has come, or are worked on."""
        now = self._scheduler.time()
        return len(self._running) + sum(due <= now for due, _ in self._waiting.values())

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        self._is_closed = True
        for key in list(self._waiting):
            self.drop(key)
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, key: K) -> None:
        """Its time has come. While it is worked on, or all slots are taken, it waits on."""
        if key in self._running:
            return
        if len(self._running) >= self._max_running:
            self._blocked[key] = None
            return
        self._waiting.pop(key, None)
        task = asyncio.ensure_future(self._work(key))
        self._running[key] = task
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: K) -> None:
        task = self._running.pop(key)
        known = self._waiting.get(key)
        if known is not None and known[0] <= self._scheduler.time():
            self._blocked[key] = None  # behind those that wait already
        while self._blocked and len(self._running) < self._max_running and not self._is_closed:
            following = next(iter(self._blocked))
            del self._blocked[following]
            self._start(following)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # to the event loop's handler: `work` lets nothing through but bugs
