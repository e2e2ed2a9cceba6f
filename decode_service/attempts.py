"""The way of an attempt through a decode worker: match -> place -> prefill here or fetch its KV -> tokens -> end.

Each attempt has a task for the part before its first token; tokens and ends come from engine steps and touch no task.
The step loop never waits for a peer: everything awaited here is awaited beside it.

One release path. Whatever ends a remote prefill early (a failed candidate, a cancel, the deadline, a lost gateway), the
client of kvtransfer returns only when nothing writes into our blocks any more, and only then `_let_go` frees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from decode_service.attempt import Attempt, RemoteOutcome
from decode_service.messages import (
    deadline_refusal,
    end_reason,
    engine_request,
    first_token_choices,
    token_message,
)
from decode_service.placement import (
    CandidateFacts,
    LocalFacts,
    Placement,
    Policy,
    PrefillPath,
    PromptFacts,
    Reason,
    place,
)
from decode_service.remote import RemotePrefill
from decode_service.stream import GatewayStream
from engine.engine import Engine
from engine.errors import EngineCrashed, EngineDraining, RequestInvalid, RequestUnknown
from engine.messages import (
    EngineLoad,
    Event,
    PrefixMatch,
    RemotePromised,
    RemoteReserved,
    RequestEnded,
    RequestStats,
    TokenEvent,
)
from engine.request import SampledToken
from engine.worker import ReplicaIdentity
from kvtransfer.candidates import Candidate, CandidatePlan
from kvtransfer.decode_side import PrefillOrder
from kvtransfer.errors import TransferFailed
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import Destination
from servicekit.failpoints import Failpoints
from servicekit.logs import request_scope
from workerkit.engine_client import EngineClient, StepEvents
from workerkit.messages import first_tokens
from workerkit.metrics import DecodeQueueMetrics, EngineMetrics

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A cancel takes effect within a step; a drain waits this long for the last ones to be told.
HAND_OVER_S = 10.0

# Weight of the newest measurement in the running mean of transfer speed.
_SPEED_WEIGHT = 0.2


class Attempts:
    """All attempts of this worker. Lives on the asyncio loop; only its methods assign to an Attempt."""

    def __init__(
        self,
        engine: EngineClient,
        remote: RemotePrefill,
        destination: Callable[[int], Destination],
        identity: ReplicaIdentity,
        *,
        default_policy: Policy,
        max_num_requests: int,
        engine_metrics: EngineMetrics,
        metrics: DecodeQueueMetrics,
        failpoints: Failpoints,
    ) -> None:
        """`destination`: where a block is, by its id, as kvtransfer names it."""
        self.is_draining = False
        self._engine = engine
        self._remote = remote
        self._destination = destination
        self._identity = identity
        self._default_policy = default_policy
        self._max_num_requests = max_num_requests
        self._engine_metrics = engine_metrics
        self._metrics = metrics
        self._failpoints = failpoints
        self._by_key: dict[int, Attempt] = {}
        self._next_key = itertools.count(1)
        self._transfer_bytes_per_s = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------ what gateways say

    def start(self, stream: GatewayStream, message: pb.GenerateRequest) -> None:
        """Take an attempt, or refuse it with its only Ended."""
        if message.key in stream.keys:
            self._metrics.ignored.count("repeated_start")
            return
        if self.is_draining:
            return _refuse(stream, message.key, pb.END_DRAINING, "this worker is draining")
        if len(self._by_key) >= self._max_num_requests:
            limit = f"requests on this worker: {len(self._by_key)}, the limit is {self._max_num_requests}"
            return _refuse(stream, message.key, pb.END_OVERLOADED, limit)
        refusal = deadline_refusal(message)
        if refusal is not None:
            return _refuse(stream, message.key, *refusal)
        now = time.monotonic()
        engine_key = next(self._next_key)
        attempt = Attempt(engine_key, stream, message, engine_request(message, engine_key, now), now)
        self._by_key[engine_key] = attempt
        self._idle.clear()
        stream.keys[message.key] = engine_key
        # Submitted here, not in the task: a cancel that is read right behind it must find the request.
        matched = self._engine.begin(attempt.request, Engine.match)
        attempt.task = asyncio.create_task(self._run(attempt, matched), name=f"attempt-{engine_key}")

    def cancel(self, stream: GatewayStream, message: pb.CancelAttempt) -> None:
        """Takes effect before the engine's next step."""
        engine_key = stream.keys.get(message.key)
        if engine_key is None:
            self._metrics.ignored.count("late_cancel")
            return
        choices = tuple(message.choices)
        self._engine.post(engine_key, lambda engine: engine.cancel(engine_key, choices))

    def leave(self, stream: GatewayStream) -> None:
        """The gateway is gone: cancel all that it asked for. Nothing is told to it any more."""
        stream.is_cut = True
        for engine_key in stream.keys.values():
            self._engine.post(engine_key, lambda engine, key=engine_key: engine.cancel(key))

    def count_stream_fault(self) -> None:
        """A stream was cut because we could not handle what came on it."""
        self._metrics.count_stream_fault()

    # ------------------------------------------------------------ what the engine says

    def on_step(self, step: StepEvents) -> None:
        """Hand one step's events to the streams they belong to: one message per stream."""
        touched: set[GatewayStream] = set()
        num_tokens = 0
        for event in step.events:
            attempt = self._by_key.get(event.key)
            if attempt is None:
                continue
            num_tokens += isinstance(event, TokenEvent)
            self._on_event(attempt, event)
            touched.add(attempt.stream)
        for stream in touched:
            stream.flush()
        self._engine_metrics.observe_step(step.num_decode_tokens + step.num_prefill_tokens, num_tokens)
        self._failpoints.kill_if_due("kill-after-token", num_tokens)
        self._failpoints.kill_if_due("kill-after-chunk", int(step.num_prefill_tokens > 0))

    def _on_event(self, attempt: Attempt, event: Event) -> None:
        match event:
            case TokenEvent():
                attempt.stream.add_token(token_message(attempt.gateway_key, event))
            case RequestEnded():
                self._on_ended(attempt, event)
            case RemotePromised():
                _resolve(attempt.promised, event.match)
            case RemoteReserved():
                _resolve(attempt.reserved, event.blocks)
            case _:
                raise AssertionError(f"a decode worker's engine said {type(event).__name__}")

    def _on_ended(self, attempt: Attempt, ended: RequestEnded) -> None:
        reason = end_reason(ended)
        if self.is_draining and reason == pb.END_CANCELLED and attempt.is_handed_over:
            reason = pb.END_DRAINING
        self._end(attempt, reason, ended.message, ended.stats)
        self._engine_metrics.observe_end(ended.stats)

    def on_crash(self) -> None:
        """The engine is gone: every attempt ends here, and may be replayed elsewhere."""
        for attempt in list(self._by_key.values()):
            self._end(attempt, pb.END_INTERNAL, "the engine failed", RequestStats())
            attempt.stream.flush()

    def _end(self, attempt: Attempt, reason: pb.EndReason, message: str, stats: RequestStats) -> None:
        """The attempt's one end: tell it, forget it, stop a hand-over that still runs."""
        ended = pb.Ended(key=attempt.gateway_key, reason=reason, message=message, stats=attempt.stats(stats))
        attempt.stream.add_end(ended)
        attempt.is_ended = True
        attempt.stream.keys.pop(attempt.gateway_key, None)
        self._by_key.pop(attempt.engine_key, None)
        if attempt.task is not None:
            attempt.task.cancel()
        if not self._by_key:
            self._idle.set()

    # ------------------------------------------------------------ before the first token

    async def _run(self, attempt: Attempt, matched: asyncio.Future[PrefixMatch]) -> None:
        """One attempt until its KV is there or its local prefill is queued."""
        with request_scope(attempt.message.request_id):
            try:
                match = await matched
                attempt.stream.accept(attempt.gateway_key)
                placement = self._place(attempt, match)
                if placement.path is PrefillPath.REMOTE and await self._prefill_remote(attempt):
                    return
                await self._prefill_local(attempt, placement)
            except RequestInvalid as error:
                self._end_unstarted(attempt, pb.END_INVALID, str(error))
            except EngineDraining as error:
                self._end_unstarted(attempt, pb.END_DRAINING, str(error))
            except RequestUnknown:
                pass  # cancelled or expired meanwhile; its RequestEnded says so
            except EngineCrashed:
                pass  # on_crash ends every attempt
            except Exception:  # the task's boundary: a bug here is the attempt's end, which the gateway must hear
                log.exception("attempt failed")
                self._engine.post(attempt.engine_key, lambda engine: engine.cancel(attempt.engine_key))
                self._end_unstarted(attempt, pb.END_INTERNAL, "the decode worker failed")

    def _place(self, attempt: Attempt, match: PrefixMatch) -> Placement:
        policy = Policy(attempt.message.disaggregation)
        load = self._engine.load
        placement = place(
            self._default_policy if policy is Policy.AUTO else policy,
            PromptFacts(len(attempt.request.prompt_token_ids), match.num_cached_tokens),
            self._local_facts(load),
            [CandidateFacts(c.predicted_queue_s, c.prefill_tokens_per_s) for c in attempt.message.prefill_candidates],
        )
        if placement.path is PrefillPath.REMOTE:
            self._count_placement(attempt, placement.path, placement.reason)
        return placement

    async def _prefill_local(self, attempt: Attempt, placement: Placement) -> None:
        reason = Reason.CANDIDATES_FAILED if placement.path is PrefillPath.REMOTE else placement.reason
        self._count_placement(attempt, PrefillPath.LOCAL, reason)
        await self._engine.call(lambda engine: engine.start_local(attempt.engine_key))

    async def _prefill_remote(self, attempt: Attempt) -> bool:
        """Try the candidates in order, each under a fresh ticket; False if none delivered."""
        candidates = [Candidate(c.worker_id, c.address, c.boot_id) for c in attempt.message.prefill_candidates]
        plan = CandidatePlan(candidates)
        while (candidate := plan.next()) is not None:
            match = await self._promise(attempt)
            try:
                attempt.remote, tokens = await self._fetch(attempt, candidate, match)
            except TransferFailed as failed:
                self._metrics.count_failure(failed.failure.kind.value)
                log.warning("prefill failed", extra={"worker_id": candidate.worker_id, "failure": str(failed.failure)})
                await self._engine.call(lambda engine: _let_go(engine, attempt.engine_key))
                plan.failed(failed.failure)
            except BaseException:
                self._engine.post(attempt.engine_key, lambda engine: _let_go(engine, attempt.engine_key))
                raise
            else:
                await self._commit(attempt, tokens)
                return True
        return False

    async def _promise(self, attempt: Attempt) -> PrefixMatch:
        """Wait until admission has room for the request; nothing is held by the transfer yet."""
        attempt.promised = asyncio.get_running_loop().create_future()
        await self._engine.call(lambda engine: engine.promise_remote(attempt.engine_key))
        return await attempt.promised

    async def _fetch(
        self, attempt: Attempt, candidate: Candidate, match: PrefixMatch
    ) -> tuple[RemoteOutcome, dict[int, SampledToken]]:
        """Have one candidate prefill the prompt and pull its KV into our blocks. Raises: TransferFailed."""
        now = time.monotonic()
        ttft_s = attempt.message.ttft_objective_s
        order = PrefillOrder(
            request_id=attempt.message.request_id,
            token_ids=attempt.request.prompt_token_ids,
            num_blocks_held=match.num_cached_blocks,
            sampling=attempt.message.sampling,
            choices=first_token_choices(attempt.request),
            cache_salt=attempt.message.cache_salt,
            deadline_s=max(0.0, attempt.request.deadline - now),
            ttft_left_s=max(0.0, ttft_s - (now - attempt.received_at)) if ttft_s > 0 else 0.0,
        )
        fetched = await self._remote.fetch(candidate, order, lambda: self._reserve(attempt))
        self._note_speed(fetched.num_bytes, fetched.pull_s)
        self._metrics.count_transfer(fetched.transport, fetched.num_bytes, fetched.commit.transfer_s)
        return RemoteOutcome(
            worker_id=candidate.worker_id,
            transport=fetched.transport,
            num_bytes=fetched.num_bytes,
            num_cached_tokens=fetched.commit.num_cached_tokens,
            queue_s=fetched.commit.queue_s,
            prefill_s=fetched.commit.prefill_s,
            transfer_s=fetched.commit.transfer_s,
        ), first_tokens(fetched.commit.first_tokens)

    async def _reserve(self, attempt: Attempt) -> list[Destination]:
        """The blocks to pull into, as soon as admission gives them."""
        attempt.reserved = asyncio.get_running_loop().create_future()
        slots = await self._engine.call(lambda engine: engine.try_reserve_remote(attempt.engine_key))
        if slots is None:
            slots = await attempt.reserved
        return [self._destination(slot.block_id) for slot in slots]

    async def _commit(self, attempt: Attempt, tokens: dict[int, SampledToken]) -> None:
        """All KV is here and verified (T2): from now on this attempt may have tokens (T3)."""

        def commit(engine: Engine) -> None:
            try:
                engine.commit_remote(attempt.engine_key, tokens or None)
            except RequestUnknown:
                engine.release_transfer(attempt.engine_key, ok=False)
                raise

        await self._engine.call(commit)

    # ------------------------------------------------------------ the end of the worker

    async def drain(self, patience_s: float) -> None:
        """Take nothing new, let what runs finish for `patience_s`, hand over the rest (END_DRAINING)."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), patience_s)
        except TimeoutError:
            log.info("handing over", extra={"num_requests": len(self._by_key)})
            for attempt in self._by_key.values():
                attempt.is_handed_over = True
                key = attempt.engine_key
                self._engine.post(key, lambda engine, key=key: engine.cancel(key))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), HAND_OVER_S)
            self._abandon()

    def _abandon(self) -> None:
        """The engine did not even take a cancel: tell the gateways, so that they replay elsewhere at no cost."""
        if self._by_key:
            log.error("the engine did not end in time", extra={"num_requests": len(self._by_key)})
        for attempt in list(self._by_key.values()):
            self._end(attempt, pb.END_DRAINING, "this worker is draining", RequestStats())
            attempt.stream.flush()

    @property
    def num_live(self) -> int:
        return len(self._by_key)

    # ------------------------------------------------------------ parts

    def _end_unstarted(self, attempt: Attempt, reason: pb.EndReason, message: str) -> None:
        if not attempt.is_ended:
            attempt.task = None  # it is the caller: it ends by returning
            self._end(attempt, reason, message, RequestStats())
            attempt.stream.flush()

    def _local_facts(self, load: EngineLoad) -> LocalFacts:
        return LocalFacts(
            block_size=self._identity.block_size,
            kv_bytes_per_token=self._identity.kv_bytes_per_token,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            num_waiting_tokens=load.num_waiting_tokens,
            num_running=load.num_running,
            transfer_bytes_per_s=self._transfer_bytes_per_s,
        )

    def _count_placement(self, attempt: Attempt, path: PrefillPath, reason: Reason) -> None:
        attempt.path, attempt.path_reason = path, reason.value
        self._metrics.count_placement(path.value, reason.value)

    def _note_speed(self, num_bytes: int, pull_s: float) -> None:
        if pull_s <= 0 or num_bytes == 0:
            return
        speed = num_bytes / pull_s
        old = self._transfer_bytes_per_s
        self._transfer_bytes_per_s = speed if old == 0 else old + _SPEED_WEIGHT * (speed - old)


def _let_go(engine: Engine, key: int) -> None:
    """The transfer no longer touches the blocks of `key`: back to matched, or freed if the request ended meanwhile."""
    try:
        engine.abort_remote(key)
    except RequestUnknown:
        engine.release_transfer(key, ok=False)


def _resolve(future: asyncio.Future[_T] | None, value: _T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _refuse(stream: GatewayStream, gateway_key: int, reason: pb.EndReason, message: str) -> None:
    stream.add_end(pb.Ended(key=gateway_key, reason=reason, message=message))
    stream.flush()
