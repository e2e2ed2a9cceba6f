"""Between the Generate stream and the engine: requests in, tokens and ends out. Conversions only."""

from __future__ import annotations

import math

from engine.messages import ChoiceStart, EndReason, EngineRequest, RequestEnded, TokenEvent
from engine.request import FinishReason
from kvtransfer.protocol import MAX_REQUEST_S
from kvtransfer.protocol import baton_pb2 as pb
from workerkit.messages import sampling_params, token_logprobs

_END_REASONS = {
    EndReason.FINISHED: pb.END_FINISHED,
    EndReason.CANCELLED: pb.END_CANCELLED,
    EndReason.DEADLINE: pb.END_DEADLINE,
    EndReason.INVALID: pb.END_INVALID,
    EndReason.INTERNAL: pb.END_INTERNAL,
}


_FINISH_REASONS = {FinishReason.STOP: pb.FINISH_STOP, FinishReason.LENGTH: pb.FINISH_LENGTH}


def deadline_refusal(message: pb.GenerateRequest) -> tuple[pb.EndReason, str] | None:
    """Why a request without a usable deadline is not taken; None if it has one."""
    if message.deadline_s <= 0:
        return pb.END_DEADLINE, f"deadline_s is {message.deadline_s:g}: no time is left"
    if not math.isfinite(message.deadline_s):
        return pb.END_INVALID, f"deadline_s is {message.deadline_s:g}, expected a number of seconds"
    return None


def engine_request(message: pb.GenerateRequest, engine_key: int, now: float) -> EngineRequest:
    """`now` is the engine's clock. The message's deadline is one that `deadline_refusal` let pass."""
    return EngineRequest(
        key=engine_key,
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_params(message.sampling),
        choices=tuple(
            ChoiceStart(log.choice, tuple(log.committed_token_ids)) for log in message.choices if not log.finished
        ),
        cache_salt=message.cache_salt,
        deadline=now + min(message.deadline_s, MAX_REQUEST_S),
    )


def first_token_choices(request: EngineRequest) -> tuple[int, ...]:
    """Choices whose first token P may draw: all of them, or none if any log holds tokens (failover)."""
    if any(choice.committed_token_ids for choice in request.choices):
        return ()
    return tuple(choice.choice for choice in request.choices)


def token_message(gateway_key: int, event: TokenEvent) -> pb.Token:
    return pb.Token(
        key=gateway_key,
        choice=event.choice,
        index=event.index,
        token_id=event.token.token_id,
        finish=_FINISH_REASONS[event.finish] if event.finish is not None else pb.FINISH_NONE,
        logprob=event.token.logprob,
        top_logprobs=token_logprobs(event.token) if event.token.top_logprobs else None,
    )


def end_reason(ended: RequestEnded) -> pb.EndReason:
    return _END_REASONS[ended.reason]
