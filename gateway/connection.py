"""One multiplexed Generate stream to one decode worker: attempts, heartbeats, liveness. The stream is the lease.

connect -> (start, tokens, ended)* -> broken or silent: every attempt on it ends
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from gateway import rpc
from gateway.errors import TokenGap
from gateway.failover import AttemptEnd, EndKind
from kvtransfer.protocol import baton_pb2 as pb
from servicekit.health import ProgressWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.generation import Generation
    from gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_S = 10.0

_END_KINDS = {
    pb.END_FINISHED: EndKind.FINISHED,
    pb.END_CANCELLED: EndKind.CANCELLED,
    pb.END_DEADLINE: EndKind.DEADLINE,
    pb.END_INVALID: EndKind.INVALID,
    pb.END_OVERLOADED: EndKind.OVERLOADED,
    pb.END_DRAINING: EndKind.DRAINING,
    pb.END_INTERNAL: EndKind.INTERNAL,
}


class Attempt:
    """One try at a generation on one worker: SENT -> ACCEPTED -> (tokens)* -> ENDED."""

    __slots__ = ("_committed_before", "completed", "connection", "ended", "generation", "is_accepted", "key", "number")

    def __init__(self, key: int, generation: Generation, connection: DecodeConnection) -> None:
        self.key = key
        self.generation = generation
        self.connection = connection
        self.number = generation.log.begin_attempt()
        self.is_accepted = False
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[AttemptEnd] = loop.create_future()
        self.completed: asyncio.Future[None] = loop.create_future()  # the log has all it needs; no end was heard yet
        self._committed_before = generation.log.num_committed

    @property
    def has_committed(self) -> bool:
        return self.generation.log.num_committed > self._committed_before

    def end(self, kind: EndKind, message: str = "") -> None:
        """The one terminal event; later ones have no effect."""
        if not self.ended.done():
            committed = self.generation.log.num_committed - self._committed_before
            worker_id = self.connection.worker.worker_id
            self.ended.set_result(AttemptEnd(kind, worker_id, committed, self.is_accepted or committed > 0, message))


class DecodeConnection:
    """A live stream. `run` drives it; everything else is synchronous."""

    def __init__(
        self,
        call: rpc.Call,
        worker: pb.WorkerInfo,
        load: pb.WorkerLoad,
        metrics: GatewayMetrics,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.load = load
        self.attempts: dict[int, Attempt] = {}
        self.reserved_by: Generation | None = None
        self.is_live = True
        self._call = call
        self._metrics = metrics
        self._on_change = on_change
        self._clock = clock
        self._keys = itertools.count(1)
        self._outgoing: deque[pb.GenerateUp] = deque()
        self._has_outgoing = asyncio.Event()
        self._heard_at = clock()
        self._progress = ProgressWatch(clock())

    @property
    def num_inflight_tokens(self) -> int:
        """Prompt tokens sent here whose first token has not come."""
        return sum(
            len(attempt.generation.request.prompt_token_ids)
            for attempt in self.attempts.values()
            if not attempt.has_committed
        )

    # ------------------------------------------------------------ what serve asks

    def start(self, generation: Generation, candidates: Sequence[Any]) -> Attempt:
        """Send the generation (its prompt and what the log holds) to this worker."""
        attempt = Attempt(next(self._keys), generation, self)
        self.attempts[attempt.key] = attempt
        message = generation.wire_request(attempt.key, attempt.number, candidates, self._clock())
        self._send(pb.GenerateUp(start=message))
        if not self.is_live:
            self._forget(attempt)
            attempt.end(EndKind.WORKER_LOST, "the stream had just ended")
        return attempt

    def cancel(self, attempt: Attempt, choices: Sequence[int] = ()) -> None:
        """Tell the worker that nobody wants these choices (none named: the whole attempt) any more."""
        if attempt.key in self.attempts and self.is_live:
            self._send(pb.GenerateUp(cancel=pb.CancelAttempt(key=attempt.key, choices=choices)))

    def abandon(self, attempt: Attempt) -> None:
        """Cancel and forget: later messages for its key only count."""
        self.cancel(attempt)
        self._forget(attempt)

    # ------------------------------------------------------------ the stream

    async def run(self) -> EndKind:
        """Serve the stream until it breaks or goes silent; then end every attempt. Returns why."""
        tasks = [asyncio.create_task(part()) for part in (self._read, self._write, self._watch)]
        kind, message = EndKind.WORKER_LOST, "the stream ended"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            first = next(iter(done))
            error = first.exception()
            if error is not None:
                message = rpc.describe(error)
            elif isinstance(outcome := first.result(), str):
                kind, message = EndKind.WORKER_SILENT, outcome
        finally:
            self.is_live = False
            for task in tasks:
                task.cancel()
            self._call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._end_all(kind, message)
        log.warning("Generate stream ended", extra={"worker_id": self.worker.worker_id, "reason": message})
        self._metrics.stream_ends.labels(kind.value).inc()
        return kind

    async def _read(self) -> None:
        read = self._call.read
        while True:
            down = await read()
            if down is rpc.END_OF_STREAM:
                return
            self._heard_at = self._clock()
            match down.WhichOneof("kind"):
                case "step":
                    self._on_step(down.step)
                case "accepted":
                    self._on_accepted(down.accepted.key)
                case "heartbeat":
                    self.load = down.heartbeat.load
                    self._on_change()
                case _:
                    log.warning("message of an unknown kind dropped", extra={"worker_id": self.worker.worker_id})

    async def _write(self) -> None:
        while True:
            while self._outgoing:
                await self._call.write(self._outgoing.popleft())
            self._has_outgoing.clear()
            await self._has_outgoing.wait()

    async def _watch(self) -> str:
        """Heartbeat each second; returns in words why the worker counts as silent."""
        while True:
            self._send(pb.GenerateUp(heartbeat=pb.Heartbeat(num_pending=len(self.attempts))))
            await asyncio.sleep(HEARTBEAT_S)
            now = self._clock()
            if now - self._heard_at > SILENCE_S:
                return f"nothing heard for {now - self._heard_at:.1f} s"
            load = self.load
            # Only what the engine itself could step counts: a prompt that waits for a prefill worker needs no step.
            num_pending = load.num_running + load.num_waiting if self.attempts else 0
            if self._progress.observe(now, load.step_counter, num_pending, load.predicted_step_s):
                return f"{num_pending} requests pending and no step made (step {load.step_counter})"

    def _on_accepted(self, key: int) -> None:
        attempt = self.attempts.get(key)
        if attempt is not None:
            attempt.is_accepted = True

    def _on_step(self, step: pb.Step) -> None:
        """Commit every token of one engine step. One request's failure is its own."""
        now = self._clock()
        attempts = self.attempts
        for token in step.tokens:
            attempt = attempts.get(token.key)
            if attempt is None:
                self._metrics.dropped.labels("unknown_attempt").inc()
                continue
            generation = attempt.generation
            try:
                is_cancel_due = generation.on_token(attempt.number, token, now)
            except TokenGap as gap:
                self._metrics.dropped.labels("gap").inc()
                self.abandon(attempt)
                attempt.end(EndKind.TOKEN_GAP, str(gap))
                continue
            except Exception:  # the loop's boundary: one request's bug must not end the others' stream
                log.exception("token could not be processed", extra={"request_id": generation.request.request_id})
                self.abandon(attempt)
                attempt.end(EndKind.GATEWAY_FAULT)
                continue
            is_complete = generation.log.is_complete
            if is_cancel_due:
                self.cancel(attempt, () if is_complete else (token.choice,))
            if is_complete and not attempt.completed.done():
                attempt.completed.set_result(None)
        for ended in step.ended:
            self._on_ended(ended)

    def _on_ended(self, ended: pb.Ended) -> None:
        attempt = self.attempts.get(ended.key)
        if attempt is None:
            return
        if ended.HasField("stats"):
            attempt.generation.stats = ended.stats
        self._forget(attempt)
        attempt.end(_END_KINDS.get(ended.reason, EndKind.INTERNAL), ended.message)

    def _forget(self, attempt: Attempt) -> None:
        if self.attempts.pop(attempt.key, None) is not None:
            self._on_change()

    def _end_all(self, kind: EndKind, message: str) -> None:
        for attempt in list(self.attempts.values()):
            self._forget(attempt)
            attempt.end(kind, message)
        self._on_change()

    def _send(self, message: pb.GenerateUp) -> None:
        self._outgoing.append(message)
        self._has_outgoing.set()
