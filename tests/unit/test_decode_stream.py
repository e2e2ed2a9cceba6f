"""A gateway's stream at the decode worker: how it ends when the gateway does not help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, ClassVar, cast

import pytest

from decode_service import app, remote
from decode_service.app import DecodeServicer
from decode_service.remote import PrefillPool
from kvtransfer.protocol import baton_pb2 as pb
from tests.unit.engine_world import make_engine


class Attempts:
    """Who was left."""

    is_draining = False

    def __init__(self) -> None:
        self.left: list[object] = []
        self.num_faults = 0

    def leave(self, stream: object) -> None:
        self.left.append(stream)

    def start(self, stream: object, message: object) -> None:
        raise KeyError("a bug")

    def count_stream_fault(self) -> None:
        self.num_faults += 1


class LoadOnly:
    """The part of an EngineClient that heartbeats read."""

    load = make_engine()[0].load()


class StuckContext:
    """A gateway whose receive window is full: a write never returns."""

    def __init__(self) -> None:
        self.is_writing = asyncio.Event()

    async def send_initial_metadata(self, metadata: object) -> None:
        """Sent."""

    async def write(self, message: object) -> None:
        self.is_writing.set()
        await asyncio.Event().wait()


async def says_nothing() -> AsyncGenerator[pb.GenerateUp]:
    await asyncio.Event().wait()
    yield pb.GenerateUp()


async def starts_one() -> AsyncGenerator[pb.GenerateUp]:
    yield pb.GenerateUp(start=pb.GenerateRequest(key=1))
    await asyncio.Event().wait()


async def test_a_reader_that_dies_of_a_bug_is_logged_counted_and_ends_its_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "CUT_GRACE_S", 0.0)
    attempts = Attempts()
    servicer = DecodeServicer(cast(Any, attempts), cast(Any, LoadOnly()), pb.WorkerInfo())
    await asyncio.wait_for(servicer._generate(starts_one(), StuckContext()), 5.0)
    assert attempts.left
    assert attempts.num_faults == 1
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [KeyError]


class StubbornClient:
    """Cannot be closed."""

    ignored: ClassVar[dict[str, int]] = {}
    fallbacks: ClassVar[dict[str, int]] = {}

    def start(self) -> None:
        """Nothing to start."""

    async def aclose(self) -> None:
        raise OSError("a bug")


async def test_a_client_that_does_not_close_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "MAX_CLIENTS", 1)
    pool = PrefillPool(cast(Any, lambda address: StubbornClient()))
    pool._client("one:1")
    pool._client("two:2")  # closes the other
    while pool._closing:
        await asyncio.sleep(0)
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [OSError]


async def test_a_gateway_that_stopped_reading_loses_its_attempts_when_its_stream_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "CUT_GRACE_S", 0.0)
    attempts, context = Attempts(), StuckContext()
    servicer = DecodeServicer(cast(Any, attempts), cast(Any, LoadOnly()), pb.WorkerInfo())
    handler = asyncio.create_task(servicer._generate(says_nothing(), context))
    await context.is_writing.wait()
    assert not attempts.left
    await servicer.aclose()  # as `beat` does for a silent one
    await asyncio.wait_for(handler, 5.0)
    assert attempts.left
