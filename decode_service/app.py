"""The gRPC face of a decode worker: Hello and the Generate streams. No decision is made here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from decode_service.attempts import Attempts
from decode_service.stream import GatewayStream
from kvtransfer import rpc
from kvtransfer.liveness import HEARTBEAT_INTERVAL_S
from kvtransfer.protocol import PROTOCOL_VERSION
from kvtransfer.protocol import baton_pb2 as pb
from workerkit.engine_client import EngineClient
from workerkit.messages import worker_load

log = logging.getLogger(__name__)

MAX_STREAMS = 256

CUT_GRACE_S = 1.0
"""How long a stream that was cut may take to hand over what was queued on it."""


class DecodeServicer:
    """Streams in and out; `Attempts` does the work."""

    def __init__(self, attempts: Attempts, engine: EngineClient, info: pb.WorkerInfo) -> None:
        self._attempts = attempts
        self._engine = engine
        self._info = info
        self._streams: set[GatewayStream] = set()

    def add_to(self, server: Any) -> None:
        """Register DecodeWorker's methods on a grpc.aio server (before it starts)."""
        methods = {
            "Hello": rpc.unary_handler(self._hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString),
            "Generate": rpc.stream_handler(self._generate, pb.GenerateUp.FromString, pb.GenerateDown.SerializeToString),
        }
        server.add_generic_rpc_handlers((rpc.service_handler("baton.v1.DecodeWorker", methods),))

    async def aclose(self) -> None:
        """End every stream, after what was queued on it."""
        for stream in list(self._streams):
            stream.cut()

    async def beat(self) -> None:
        """Say each second that we live, with the engine's step counter; cut gateways that fell silent."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            load, now = self._load(), time.monotonic()
            for stream in list(self._streams):
                if stream.is_silent(now):
                    log.warning("gateway fell silent", extra={"num_attempts": len(stream.keys)})
                    stream.cut()
                stream.heartbeat(load)

    async def _hello(self, request: pb.HelloRequest, context: rpc.Context) -> pb.HelloReply:
        return pb.HelloReply(protocol_version=PROTOCOL_VERSION, worker=self._info, load=self._load())

    async def _generate(self, requests: AsyncIterator[pb.GenerateUp], context: rpc.Context) -> None:
        """One gateway's stream. Its end, however it comes, cancels every attempt on it.

        A gateway that stopped reading blocks the writer for as long as it likes, so nobody waits for the writer.
        """
        if len(self._streams) >= MAX_STREAMS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"streams: the limit is {MAX_STREAMS}")
        await context.send_initial_metadata(())  # before the first write, which would send it at the same time
        stream = GatewayStream(time.monotonic())
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, requests), name="generate-read")
        writer = asyncio.create_task(self._write(stream, context), name="generate-write")
        try:
            stream.heartbeat(self._load())
            await stream.until_cut()
            self._attempts.leave(stream)
            await asyncio.wait([writer], timeout=CUT_GRACE_S)
        finally:
            self._streams.discard(stream)
            self._attempts.leave(stream)
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _write(self, stream: GatewayStream, context: rpc.Context) -> None:
        try:
            async for message in stream.messages():
                await context.write(message)
        finally:
            stream.cut()

    async def _read(self, stream: GatewayStream, requests: AsyncIterator[pb.GenerateUp]) -> None:
        try:
            async for message in requests:
                stream.liveness.heard(time.monotonic())
                try:
                    self._take(stream, message)
                except Exception:  # a fault of ours, not the connection's end: nobody awaits this task to see it
                    log.exception("a gateway's message could not be handled: its stream is cut")
                    self._attempts.count_stream_fault()
                    return
        finally:
            stream.cut()  # the gateway closed its half, or the connection broke

    def _take(self, stream: GatewayStream, message: pb.GenerateUp) -> None:
        match message.WhichOneof("kind"):
            case "start":
                self._attempts.start(stream, message.start)
            case "cancel":
                self._attempts.cancel(stream, message.cancel)
            case _:
                pass  # a heartbeat, or a kind of a newer gateway: it lives

    def _load(self) -> pb.WorkerLoad:
        load = worker_load(self._engine.load)
        load.draining = load.draining or self._attempts.is_draining
        return load
