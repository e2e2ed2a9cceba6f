"""One gateway's Generate stream, as seen by the rest of the worker: a bounded way out, and who is on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvtransfer.liveness import LivenessMonitor, Verdict
from kvtransfer.protocol import baton_pb2 as pb

# A gateway always drains us (design §2.3), so a queue this long means that it is stuck, not slow: at 100 steps a second
# it is 40 s of output.
MAX_QUEUED_MESSAGES = 4096


class GatewayStream:
    """Collects what one engine step gave to this gateway, and hands it out as one message."""

    def __init__(self, now: float) -> None:
        self.keys: dict[int, int] = {}  # gateway's key -> engine's key, while the attempt lives
        self.is_cut = False
        self.liveness = LivenessMonitor(now)
        self._outgoing: asyncio.Queue[pb.GenerateDown | None] = asyncio.Queue()
        self._step = pb.Step()
        self._is_over = asyncio.Event()

    def accept(self, gateway_key: int) -> None:
        self._put(pb.GenerateDown(accepted=pb.Accepted(key=gateway_key)))

    def add_token(self, token: pb.Token) -> None:
        """Part of the step being collected; `flush` sends it."""
        self._step.tokens.append(token)

    def add_end(self, ended: pb.Ended) -> None:
        """Part of the step being collected; `flush` sends it."""
        self._step.ended.append(ended)

    def flush(self) -> None:
        if self._step.tokens or self._step.ended:
            step, self._step = self._step, pb.Step()
            self._put(pb.GenerateDown(step=step))

    def heartbeat(self, load: pb.WorkerLoad) -> None:
        self._put(pb.GenerateDown(heartbeat=pb.Heartbeat(load=load, num_pending=0)))

    def cut(self) -> None:
        """End the stream; what was queued before is still sent if the gateway reads it."""
        self.is_cut = True
        if not self._is_over.is_set():
            self._is_over.set()
            self._outgoing.put_nowait(None)

    async def until_cut(self) -> None:
        await self._is_over.wait()

    def is_silent(self, now: float) -> bool:
        return self.liveness.verdict(now) is Verdict.SILENT

    async def messages(self) -> AsyncIterator[pb.GenerateDown]:
        """What is to be written, until the stream is cut."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def _put(self, message: pb.GenerateDown) -> None:
        if self.is_cut:
            return
        if self._outgoing.qsize() >= MAX_QUEUED_MESSAGES:
            self.cut()
            return
        self._outgoing.put_nowait(message)
