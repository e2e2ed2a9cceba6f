"""A gateway's stream at the decode worker: how it ends when the gateway does not help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from decode_service import app
from decode_service.app import DecodeServicer
from kvtransfer.protocol import baton_pb2 as pb
from tests.unit.engine_world import make_engine


class Attempts:
    """Who was left."""

    is_draining = False

    def __init__(self) -> None:
        self.left: list[object] = []

    def leave(self, stream: object) -> None:
        self.left.append(stream)


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
