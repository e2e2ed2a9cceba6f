"""The engine as the hand-over's P side sees it: orders in, events out. No decision is made here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from engine.engine import Engine
from engine.errors import EngineCrashed, EngineDraining, RequestInvalid
from engine.messages import (
    BlocksFilled,
    ChoiceStart,
    EndReason,
    EngineRequest,
    Event,
    PrefillDone,
    PrefillStarting,
    RequestEnded,
)
from kvtransfer import prefill_events as wire
from kvtransfer.protocol import baton_pb2 as pb
from prefill_service.urgency import due_in_s
from servicekit.failpoints import Failpoints
from workerkit.engine_client import EngineClient, StepEvents
from workerkit.messages import first_token_messages, sampling_params, worker_load
from workerkit.metrics import EngineMetrics

log = logging.getLogger(__name__)

_FAILURES = {
    EndReason.DEADLINE: pb.PREFILL_FAILURE_DEADLINE,
    EndReason.INVALID: pb.PREFILL_FAILURE_INVALID,
    EndReason.INTERNAL: pb.PREFILL_FAILURE_INTERNAL,
}


class EngineBackend:
    """A kvtransfer.prefill_server.PrefillBackend. Lives on the asyncio loop."""

    def __init__(self, engine: EngineClient, metrics: EngineMetrics, failpoints: Failpoints) -> None:
        self._engine = engine
        self._metrics = metrics
        self._failpoints = failpoints
        self._deliver: Callable[[Sequence[wire.BackendEvent]], None] = lambda events: None
        self._live: set[int] = set()

    def connect(self, deliver: Callable[[Sequence[wire.BackendEvent]], None]) -> None:
        """Where events go; the server is made after its backend."""
        self._deliver = deliver

    def disconnect(self) -> None:
        """The server is closed: what the engine still says concerns nobody."""
        self._deliver = lambda events: None

    # ------------------------------------------------------------ what D wants, by way of the server

    def start_prefill(self, key: int, start: pb.StartPrefill) -> None:
        now = time.monotonic()
        request = EngineRequest(
            key=key,
            request_id=start.request_id,
            prompt_token_ids=tuple(start.token_ids),
            sampling=sampling_params(start.sampling),
            choices=tuple(ChoiceStart(choice) for choice in start.choices),
            cache_salt=start.cache_salt,
            deadline=now + start.deadline_s,
        )
        due = now + due_in_s(len(start.token_ids), self._engine.load.prefill_tokens_per_s, start.ttft_left_s)

        def begin(engine: Engine, request: EngineRequest) -> None:
            engine.start_prefill(request, start.num_blocks_held, due)

        self._live.add(key)
        self._failpoints.kill_if_due("kill-after-prompt-queued")
        self._engine.begin(request, begin).add_done_callback(lambda begun: self._on_begun(key, begun.exception()))

    def grant_credit(self, key: int, num_blocks: int) -> None:
        self._engine.post(key, lambda engine: engine.grant_credit(key, num_blocks))

    def release(self, key: int, ok: bool, is_suspect: bool) -> None:
        if is_suspect:
            log.error("a decode worker read other bytes than were announced: these blocks are forgotten")
        self._live.discard(key)
        self._engine.post(key, lambda engine: engine.release_transfer(key, ok, is_suspect))

    def load(self) -> pb.WorkerLoad:
        return worker_load(self._engine.load)

    # ------------------------------------------------------------ what the engine says

    def on_step(self, step: StepEvents) -> None:
        """Pass one step's events on, in order."""
        for event in step.events:
            if isinstance(event, RequestEnded):
                self._metrics.observe_end(event.stats)
        self._deliver([told for event in step.events if (told := _translate(event)) is not None])
        self._metrics.observe_step(step.num_decode_tokens + step.num_prefill_tokens)
        self._failpoints.kill_if_due("kill-after-chunk", int(step.num_prefill_tokens > 0))
        num_done = sum(isinstance(event, PrefillDone) for event in step.events)
        self._failpoints.kill_if_due("kill-after-prefill-done", num_done)

    def on_crash(self) -> None:
        """Nothing that is queued or running here will finish."""
        self._deliver([_given_up(key, pb.PREFILL_FAILURE_INTERNAL, "the engine failed") for key in self._live])

    def _on_begun(self, key: int, error: BaseException | None) -> None:
        match error:
            case None:
                return
            case RequestInvalid():
                reason = pb.PREFILL_FAILURE_INVALID
            case EngineDraining():
                reason = pb.PREFILL_FAILURE_DRAINING
            case EngineCrashed():
                reason = pb.PREFILL_FAILURE_INTERNAL
            case _:
                log.error("a prompt could not be queued", exc_info=error)
                reason = pb.PREFILL_FAILURE_INTERNAL
        self._deliver([_given_up(key, reason, str(error))])


def _given_up(key: int, reason: pb.PrefillFailure, message: str) -> wire.PrefillGivenUp:
    return wire.PrefillGivenUp(key, reason, message)


def _translate(event: Event) -> wire.BackendEvent | None:
    match event:
        case PrefillStarting():
            return wire.PrefillStarting(event.key, event.num_blocks, event.num_cached_tokens)
        case BlocksFilled():
            return wire.BlocksFilled(event.key, event.blocks)
        case PrefillDone():
            tokens = first_token_messages(event.first_tokens)
            return wire.PrefillDone(event.key, event.tail, tokens, event.queue_s, event.prefill_s)
        case RequestEnded() if event.reason in _FAILURES:
            return wire.PrefillGivenUp(event.key, _FAILURES[event.reason], event.message)
        case RequestEnded():
            return None  # finished or cancelled: the transfer let go, the server knows
        case _:
            raise AssertionError(f"a prefill worker's engine said {type(event).__name__}")
