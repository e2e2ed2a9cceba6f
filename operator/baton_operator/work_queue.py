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

    def __init__(self, work: Callable[[K], Awaitable[None]], scheduler: Scheduler) -> None:
        self._work = work
        self._scheduler = scheduler
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
        """Its time has come. While the key is worked on it waits on, and starts when that ends."""
        if key in self._running:
            return
        self._waiting.pop(key, None)
        task = asyncio.ensure_future(self._work(key))
        self._running[key] = task
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: K) -> None:
        task = self._running.pop(key)
        known = self._waiting.get(key)
        if known is not None and known[0] <= self._scheduler.time() and not self._is_closed:
            self._start(key)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # to the event loop's handler: `work` lets nothing through but bugs
