"""Each service is looked at by one task at a time, at the soonest time that anybody asked for."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from baton_operator.work_queue import WorkQueue


class FakeTimer:
    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeScheduler:
    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Callable[[], object], FakeTimer]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> FakeTimer:
        timer = FakeTimer()
        heapq.heappush(self._timers, (when, len(self._timers), callback, timer))
        return timer

    async def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            self.now, _, callback, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                callback()
            await settle()
        self.now = until


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Work:
    """Notes when which key was begun; each waits until it is let go."""

    def __init__(self, scheduler: FakeScheduler) -> None:
        self.begun: list[tuple[str, float]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.num_running = 0
        self._scheduler = scheduler

    async def __call__(self, key: str) -> None:
        self.begun.append((key, self._scheduler.time()))
        self.num_running += 1
        try:
            if key in self.gates:
                await self.gates[key].wait()
        finally:
            self.num_running -= 1


async def test_many_requests_are_one_at_the_soonest_time() -> None:
    scheduler = FakeScheduler()
    work = Work(scheduler)
    queue = WorkQueue[str](work, scheduler, 8)
    for delay_s in (5.0, 1.0, 3.0):
        queue.add("a", delay_s)
    await scheduler.advance(10.0)
    assert work.begun == [("a", 1.0)]


async def test_a_key_that_changes_while_it_is_worked_on_is_worked_on_again_and_never_twice_at_once() -> None:
    scheduler = FakeScheduler()
    work = Work(scheduler)
    work.gates["a"] = asyncio.Event()
    queue = WorkQueue[str](work, scheduler, 8)
    queue.add("a")
    await scheduler.advance(0.0)
    queue.add("a")
    queue.add("b")
    await scheduler.advance(1.0)
    assert [key for key, _ in work.begun] == ["a", "b"]
    work.gates["a"].set()
    await settle()
    assert [key for key, _ in work.begun] == ["a", "b", "a"]
    assert work.num_running == 0


async def test_a_later_request_made_meanwhile_waits_for_its_time() -> None:
    scheduler = FakeScheduler()
    work = Work(scheduler)
    work.gates["a"] = asyncio.Event()
    queue = WorkQueue[str](work, scheduler, 8)
    queue.add("a")
    await scheduler.advance(0.0)
    queue.add("a", 7.0)
    work.gates["a"].set()
    await settle()
    assert len(work.begun) == 1
    await scheduler.advance(7.0)
    assert work.begun[1] == ("a", 7.0)


async def test_closing_cancels_what_runs_and_what_waits() -> None:
    scheduler = FakeScheduler()
    work = Work(scheduler)
    work.gates["a"] = asyncio.Event()
    queue = WorkQueue[str](work, scheduler, 8)
    queue.add("a")
    queue.add("b", 5.0)
    await scheduler.advance(0.0)
    assert queue.num_due == 1
    await queue.close()
    queue.add("c")
    await scheduler.advance(10.0)
    assert [key for key, _ in work.begun] == ["a"]
    assert work.num_running == 0


async def test_no_more_run_at_once_than_there_are_slots_and_each_gets_its_turn() -> None:
    scheduler = FakeScheduler()
    work = Work(scheduler)
    work.gates = {key: asyncio.Event() for key in "ab"}
    queue = WorkQueue[str](work, scheduler, 2)
    for key in "abcd":
        queue.add(key)
    await scheduler.advance(0.0)
    queue.add("a")
    await scheduler.advance(1.0)
    assert [key for key, _ in work.begun] == ["a", "b"]
    assert queue.num_due == 5
    work.gates["a"].set()
    await settle()
    assert [key for key, _ in work.begun] == ["a", "b", "c", "d", "a"]
