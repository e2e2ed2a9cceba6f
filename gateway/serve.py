"""One request from admission to its end, on one page:

    admit -> route -> generate -> log -> stream -> end

Logging and streaming of tokens happen in `Generation.on_token`, called by the reader of the worker's stream while
`serve` waits for the attempt to end. Where an attempt ends early, failover.py decides what follows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass

from gateway import failover, router
from gateway.admission import Admission, Place
from gateway.connection import Attempt, DecodeConnection
from gateway.errors import DeadlineExceeded, GatewayError, Overloaded
from gateway.failover import DEATHS, AttemptEnd, EndKind
from gateway.generation import Generation
from gateway.metrics import GatewayMetrics
from gateway.router import NoRoute, Route, RoutingRequest
from gateway.worker_pool import WorkerPool

log = logging.getLogger(__name__)

STATS_GRACE_S = 1.0  # how long a complete request waits for the worker's own account of it
_FAILURES = DEATHS | {EndKind.INTERNAL, EndKind.TOKEN_GAP}


@dataclass(frozen=True, slots=True)
class Services:
    """What `serve` works with."""

    admission: Admission
    pool: WorkerPool
    metrics: GatewayMetrics


async def serve(generation: Generation, services: Services) -> None:
    """Run one generation until its log is complete.

    Raises: GatewayError. Cancelling it (client gone) cancels the work on the workers at once.
    """
    place = _admit(generation, services)
    generation.on_first_token = lambda: services.admission.leave(place)
    try:
        while not generation.log.is_complete:
            with ExitStack() as held:
                connection, route = await _route(generation, services.pool, held)
                attempt = _start(generation, connection, route, services)
                end = await _finish(attempt)
            _note_end(end, services)
            if not generation.log.is_complete or end.kind is EndKind.GATEWAY_FAULT:
                await _prepare_retry(generation, end, services)
    except asyncio.CancelledError:
        _log_end(generation, "cancelled")
        raise
    except GatewayError as error:
        _log_end(generation, error.type)
        raise
    finally:
        services.admission.leave(place)
    if generation.prefix_chain and generation.stats and generation.stats.prefill_worker_id in services.pool.prefill:
        services.pool.prefixes.note(generation.prefix_chain, [generation.stats.prefill_worker_id])
    _account(generation, services.metrics)
    _log_end(generation, "finished")


def _admit(generation: Generation, services: Services) -> Place:
    request = generation.request
    try:
        return services.admission.admit(len(request.prompt_token_ids), request.tenant)
    except GatewayError as error:
        services.metrics.rejections.inc(reason="key_share" if error.status == 429 else "queue_full")
        raise


async def _route(generation: Generation, pool: WorkerPool, held: ExitStack) -> tuple[DecodeConnection, Route]:
    """Decide where to run; wait, at no cost but time, while nothing is routable."""
    chain = generation.prefix_chain
    if chain is None:
        chain = pool.prefixes.chain(generation.request.prompt_token_ids, generation.request.cache_salt)
        generation.prefix_chain = chain
    while True:
        wanted = _wanted(generation, pool, chain)
        if generation.history.must_run_alone:
            _hold_a_worker(generation, pool, held, wanted)
        workers = pool.decode_states(generation)
        decision = router.route(wanted, workers, pool.prefill_states())
        if isinstance(decision, Route) and not decision.candidates and pool.is_meeting_prefill:
            decision = NoRoute.MEETING  # a gateway that has just started may meet decode workers first
        if isinstance(decision, Route):
            if not wanted.is_forced:
                pool.note_revision(decision.revision)
            pool.prefixes.note(chain, [decision.worker_id])
            return pool.connections[decision.worker_id], decision
        if decision is NoRoute.TOO_LONG and not generation.log.attempt:  # later, it ran on a worker that may come back
            generation.request.length.check(max(worker.max_model_len for worker in workers), "this service's workers'")
        await _wait(generation, pool, decision)


def _wanted(generation: Generation, pool: WorkerPool, chain: list[int]) -> RoutingRequest:
    request = generation.request
    return RoutingRequest(
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=generation.num_output_tokens,
        cached_tokens=pool.prefixes.match(chain),
        avoid=generation.history.avoid,
        numerics_fingerprint=generation.numerics_fingerprint,
        layout_fingerprint=generation.layout_fingerprint,
        alone=generation.history.must_run_alone,
        ttft_objective_s=request.ttft_objective_s,
        only_worker=request.only_worker,
        only_revision=request.only_revision,
        preference=pool.preference,
    )


def _hold_a_worker(generation: Generation, pool: WorkerPool, held: ExitStack, wanted: RoutingRequest) -> None:
    """Reserve the emptiest worker for a request that two workers died with; it then waits there until it is alone."""
    if any(connection.reserved_by is generation for connection in pool.connections.values()):
        return
    states = router.of_one_revision(wanted, pool.decode_states(generation), pool.prefill_states())
    free = [pool.connections[s.worker_id] for s in states if not s.is_reserved and not s.is_draining]
    if free:
        emptiest = min(free, key=lambda connection: len(connection.attempts))
        held.enter_context(pool.hold(emptiest.worker.worker_id, generation))


async def _wait(generation: Generation, pool: WorkerPool, reason: NoRoute) -> None:
    left = generation.deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(
            f"{reason.value}; waited until the deadline of {generation.request.timeout_s:g} s", retry_after_s=1.0
        )
    await pool.wait_for_change(min(left, 1.0))


def _start(generation: Generation, connection: DecodeConnection, route: Route, services: Services) -> Attempt:
    worker = connection.worker
    generation.worker_id = worker.worker_id
    if services.pool.deterministic or worker.deterministic:
        generation.numerics_fingerprint = worker.numerics_fingerprint
    generation.layout_fingerprint = worker.layout_fingerprint
    if not generation.timing.routed_at:
        generation.timing.routed_at = time.monotonic()
    if generation.log.attempt:
        services.metrics.replayed.inc(generation.log.num_committed)
    return connection.start(generation, route.candidates)


async def _finish(attempt: Attempt) -> AttemptEnd:
    """Wait for the attempt's end. A complete log waits only a moment more, for the worker's statistics."""
    generation = attempt.generation
    try:
        left = generation.deadline - time.monotonic()
        await asyncio.wait([attempt.ended, attempt.completed], timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if attempt.completed.done() and not attempt.ended.done():
            await asyncio.wait([attempt.ended], timeout=STATS_GRACE_S)
        if not attempt.ended.done():
            attempt.end(
                EndKind.FINISHED if generation.log.is_complete else EndKind.DEADLINE, "no end was heard in time"
            )
        return attempt.ended.result()
    finally:
        attempt.connection.abandon(attempt)


async def _prepare_retry(generation: Generation, end: AttemptEnd, services: Services) -> None:
    """Count the end against the request; go on, or give the reason why not. Raises: GatewayError."""
    if end.kind in (EndKind.FINISHED, EndKind.CANCELLED):  # the worker believes it is done, the log knows better
        end = AttemptEnd(
            EndKind.INTERNAL, end.worker_id, end.num_committed, end.was_accepted, "ended before its tokens came"
        )
    decision = failover.after(generation.history, end)
    if isinstance(decision, GatewayError):
        if isinstance(decision, Overloaded):
            decision.retry_after_s = services.admission.retry_after_s()
        raise decision
    generation.history = decision.history
    generation.worker_id = ""
    services.metrics.failovers.labels(end.kind.value).inc()
    log.info(
        "failing over",
        extra={
            "request_id": generation.request.request_id,
            "worker_id": end.worker_id,
            "cause": end.kind.value,
            "num_committed": generation.log.num_committed,
            "num_charged": generation.history.num_charged,
        },
    )
    if decision.pause_s:
        await asyncio.sleep(decision.pause_s)


def _note_end(end: AttemptEnd, services: Services) -> None:
    services.metrics.attempts.labels(end.kind.value).inc()
    if end.kind in _FAILURES:
        services.pool.outliers.failed(end.worker_id)
    elif end.kind is EndKind.FINISHED:
        services.pool.outliers.succeeded(end.worker_id)


def _account(generation: Generation, metrics: GatewayMetrics) -> None:
    """What a finished request adds to the histograms."""
    timing, request = generation.timing, generation.request
    num_prompt = len(request.prompt_token_ids)
    e2e = timing.last_token_at - timing.received_at
    metrics.e2e.observe(e2e)
    metrics.decode.observe(timing.last_token_at - timing.first_token_at)
    metrics.request_prompt_tokens.observe(num_prompt)
    metrics.request_generation_tokens.observe(generation.log.num_committed)
    metrics.params_n.observe(request.num_choices)
    metrics.params_max_tokens.observe(request.sampling.max_tokens)
    metrics.prompt_tokens.inc(num_prompt)
    for record in generation.log.choices:
        assert record.finish is not None
        metrics.success.inc(finished_reason=record.finish.reason.value)
        if len(record.token_ids) > 1:
            metrics.tpot.observe((timing.last_token_at - timing.first_token_at) / (len(record.token_ids) - 1))
    stats = generation.stats
    if stats is not None:
        metrics.prompt_tokens_cached.inc(generation.num_cached_tokens)
        metrics.queue.observe(stats.queue_s)
        metrics.prefill.observe(stats.prefill_s)
        metrics.inference.observe(stats.prefill_s + timing.last_token_at - timing.first_token_at)
        metrics.paths.labels(stats.prefill_path, stats.path_reason, stats.transport).inc()


def _log_end(generation: Generation, outcome: str) -> None:
    timing = generation.timing
    log.info(
        "request ended",
        extra={
            "request_id": generation.request.request_id,
            "outcome": outcome,
            "num_prompt_tokens": len(generation.request.prompt_token_ids),
            "num_output_tokens": generation.log.num_committed,
            "num_attempts": generation.log.attempt,
            "worker_id": generation.worker_id,
            "prefill_worker_id": generation.stats.prefill_worker_id if generation.stats else "",
            "ttft_s": round(timing.first_token_at - timing.received_at, 6) if timing.first_token_at else None,
            "e2e_s": round(time.monotonic() - timing.received_at, 6),
        },
    )
