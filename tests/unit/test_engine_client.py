"""The engine as a service's loop sees it: order of calls, and long prompts that stall nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from engine.engine import Engine
from engine.errors import EngineCrashed, RequestInvalid
from engine.messages import EndReason, EngineRequest, Event, RequestEnded, TokenEvent
from engine.request import SamplingParams
from tests.unit.engine_world import make_engine
from workerkit import engine_client
from workerkit.engine_client import EngineClient, StepEvents

LONG = tuple(1 + i % 7 for i in range(40))
SHORT = (1, 2, 3)


@dataclass
class Service:
    """A client with an engine whose hashing waits for the test."""

    engine: Engine
    client: EngineClient
    may_hash: threading.Event
    hashing_threads: list[str] = field(default_factory=list[str])
    heard: asyncio.Queue[Event] = field(default_factory=asyncio.Queue[Event])

    def on_step(self, step: StepEvents) -> None:
        for event in step.events:
            self.heard.put_nowait(event)

    async def next_end(self) -> RequestEnded:
        while not isinstance(event := await self.heard.get(), RequestEnded):
            assert isinstance(event, TokenEvent)
        return event


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Service]:
    monkeypatch.setattr(engine_client, "HASHED_AT_ONCE_TOKENS", len(LONG) - 1)
    engine, _ = make_engine()
    service = Service(engine, EngineClient(engine), threading.Event())
    hashed = engine.hashed

    def hash_when_told(request: EngineRequest) -> EngineRequest:
        service.hashing_threads.append(threading.current_thread().name)
        assert service.may_hash.wait(10.0)
        return hashed(request)

    monkeypatch.setattr(engine, "hashed", hash_when_told)
    service.client.start(service.on_step, lambda: None)
    yield service
    service.may_hash.set()
    assert await service.client.stop()


def request(key: int, prompt: tuple[int, ...]) -> EngineRequest:
    return EngineRequest(key, f"r{key}", prompt, SamplingParams(max_tokens=3, ignore_eos=True))


async def serve(client: EngineClient, asked: EngineRequest) -> None:
    await client.begin(asked, Engine.match)
    await client.call(lambda engine: engine.start_local(asked.key))


async def test_others_are_served_while_a_long_prompt_is_hashed(service: Service) -> None:
    long = asyncio.create_task(serve(service.client, request(1, LONG)))
    await serve(service.client, request(2, SHORT))
    ended = await asyncio.wait_for(service.next_end(), 10.0)
    assert (ended.key, ended.reason) == (2, EndReason.FINISHED)
    assert not long.done()
    service.may_hash.set()
    assert (await asyncio.wait_for(service.next_end(), 10.0)).key == 1
    assert [name.rsplit("_", 1)[0] for name in service.hashing_threads] == ["hash-prompts"]


async def test_a_cancel_that_comes_while_a_prompt_is_hashed_finds_the_request(service: Service) -> None:
    matched = service.client.begin(request(1, LONG), Engine.match)
    service.client.post(1, lambda engine: engine.cancel(1))
    await service.client.call(Engine.load)  # a round trip: it would have run by now
    assert service.heard.empty()
    service.may_hash.set()
    assert (await matched).num_cached_tokens == 0
    assert (await asyncio.wait_for(service.next_end(), 10.0)).reason is EndReason.CANCELLED
    assert await service.client.call(lambda engine: engine.num_requests) == 0


async def test_a_refused_long_prompt_is_the_callers_error_and_later_calls_still_run(service: Service) -> None:
    service.may_hash.set()
    refused = service.client.begin(request(1, LONG * 9), Engine.match)
    later = threading.Event()
    service.client.post(1, lambda _: later.set())
    with pytest.raises(RequestInvalid):
        await refused
    await service.client.call(Engine.load)
    assert later.is_set()


async def test_the_end_of_the_worker_fails_what_is_not_hashed_yet(service: Service) -> None:
    begun = [service.client.begin(request(key, LONG), Engine.match) for key in (1, 2)]
    assert await service.client.stop()
    service.may_hash.set()
    for answer in begun:
        with pytest.raises(EngineCrashed):
            await answer


def test_the_engine_does_not_hash_again_what_was_hashed_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    asked = engine.hashed(request(1, LONG))
    plain = make_engine()[0]
    for each, given in ((engine, asked), (plain, request(1, LONG))):
        each.match(given)
        each.start_local(1)
    extended: list[int] = []
    extend = engine._memory.cache.extend
    monkeypatch.setattr(
        engine._memory.cache, "extend", lambda links, *rest: (extended.append(len(links)), extend(links, *rest))
    )
    while engine.has_work:
        engine.step()
    while plain.has_work:
        plain.step()
    assert all(start >= len(LONG) // 4 for start in extended)
    assert engine._memory.cache._blocks.keys() == plain._memory.cache._blocks.keys()
