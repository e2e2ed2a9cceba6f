"""One prompt's generation: what was asked, what the log holds, and what its tokens become.

`Generation.on_token` is the commit point. It runs synchronously in the reader of the Generate stream, so a token is
logged, detokenized and rendered before the next message is looked at, and no slow client can delay it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway.detokenize import Detokenizer, TextStream
from gateway.failover import History
from gateway.length import AskedLength
from gateway.metrics import GatewayMetrics
from gateway.router import Candidate
from gateway.token_log import Finish, FinishReason, StopRules, TokenLog, Verdict
from kvtransfer.protocol import baton_pb2 as pb


@dataclass(frozen=True, slots=True)
class TextRules:
    """How ids become the text that the client sees."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request for one prompt. `tenant` is the API key's hash; `received_at` is on the gateway's clock."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    length: AskedLength
    sampling: pb.SamplingParams
    num_choices: int
    stop_rules: StopRules
    text_rules: TextRules = TextRules()
    tenant: str = ""
    cache_salt: bytes = b""
    disaggregation: pb.Disaggregation = pb.DISAGGREGATION_AUTO
    timeout_s: float = 600.0
    ttft_objective_s: float = 0.0
    received_at: float = 0.0
    only_worker: str | None = None  # set by the internal port alone, as is
    only_revision: str | None = None


class Sink(Protocol):
    """Where committed text goes: a stream of SSE frames, or a collector."""

    def on_token(self, choice: int, text: str, token: pb.Token, finish: Finish | None) -> None:
        """One committed token and the text it made showable. Must not block and must not raise."""
        ...


@dataclass(slots=True)
class Timing:
    """When things happened, on the gateway's clock; 0 while they have not."""

    received_at: float
    routed_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    last_of_choice: list[float] = field(default_factory=list[float])


class Generation:
    """The mutable side of one prompt: log, text streams, timing, history of attempts."""

    def __init__(
        self,
        request: GenerationRequest,
        sink: Sink,
        detokenizer: Detokenizer,
        metrics: GatewayMetrics,
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.request = request
        self.log = TokenLog(request.num_choices, request.stop_rules)
        self.history = History()
        self.stats: pb.AttemptStats | None = None
        self.worker_id = ""
        self.prefix_chain: list[int] | None = None  # the router's; computed when first routed
        self.layout_fingerprint: str | None = None
        self.numerics_fingerprint: str | None = None
        self.timing = Timing(request.received_at or time.monotonic(), last_of_choice=[0.0] * request.num_choices)
        self.on_first_token = on_first_token
        self._sink = sink
        self._metrics = metrics
        rules = request.text_rules
        self._include_stop = rules.include_stop
        self._texts = [
            TextStream(
                detokenizer.decoder(rules.skip_special_tokens),
                rules.stops,
                rules.include_stop,
                request.sampling.min_tokens,
            )
            for _ in range(request.num_choices)
        ]

    @property
    def deadline(self) -> float:
        return self.timing.received_at + self.request.timeout_s

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in a cache. A worker that went on with a log may have found some of that log too."""
        return min(self.stats.num_cached_tokens, len(self.request.prompt_token_ids)) if self.stats else 0

    @property
    def num_output_tokens(self) -> int:
        """For how many tokens of output a worker must have room, so that each choice comes to its end or goes on."""
        asked = self.request.length.num_output_tokens
        return asked or 1 + max(len(choice.token_ids) for choice in self.log.choices)

    def on_token(self, attempt: int, token: pb.Token, now: float) -> bool:
        """Commit a token, make its text, hand it on. True if the choice ended here without the worker knowing it yet.

        Raises: TokenGap.
        """
        choice = token.choice
        verdict = self.log.append(attempt, choice, token.index, token.token_id)
        if verdict is not Verdict.COMMITTED:
            self._metrics.dropped.labels(verdict.value).inc()
            return False
        self._metrics.count_token()
        self._note_time(choice, now)
        record = self.log.choices[choice]
        if record.finish is None and token.finish:
            self.log.finish(choice, self._finish_by_worker(token))
        text = self._text_of(choice, token.token_id)
        self._sink.on_token(choice, text, token, record.finish)
        return record.finish is not None and not token.finish

    def wire_request(self, key: int, attempt: int, candidates: Sequence[Candidate], now: float) -> pb.GenerateRequest:
        """The replay of everything committed so far, as one message."""
        request = self.request
        return pb.GenerateRequest(
            key=key,
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            choices=[
                pb.ChoiceLog(choice=number, committed_token_ids=record.token_ids, finished=record.finish is not None)
                for number, record in enumerate(self.log.choices)
            ],
            prefill_candidates=[
                pb.PrefillCandidate(
                    worker_id=candidate.worker_id,
                    address=candidate.address,
                    boot_id=candidate.boot_id,
                    predicted_queue_s=candidate.predicted_queue_s,
                    prefill_tokens_per_s=candidate.prefill_tokens_per_s,
                )
                for candidate in candidates
            ],
            disaggregation=request.disaggregation,
            deadline_s=max(0.0, self.deadline - now),
            cache_salt=request.cache_salt,
            ttft_objective_s=request.ttft_objective_s,
        )

    def _text_of(self, choice: int, token_id: int) -> str:
        """Text to show now. A token that ended the choice by its id is not text, unless the client asked for it."""
        stream = self._texts[choice]
        finish = self.log.choices[choice].finish
        if finish is None:
            delta = stream.push(token_id)
            if delta.stop is not None:
                self.log.finish(choice, Finish(FinishReason.STOP, delta.stop))
            return delta.text
        is_id_hidden = finish.reason is FinishReason.STOP and not self._include_stop
        text = ""
        if not is_id_hidden:
            delta = stream.push(token_id)
            text = delta.text
            if delta.stop is not None:
                self.log.refine_finish(choice, Finish(FinishReason.STOP, delta.stop))
                return text
        rest = stream.finish()
        if rest.stop is not None:
            self.log.refine_finish(choice, Finish(FinishReason.STOP, rest.stop))
        return text + rest.text

    def _finish_by_worker(self, token: pb.Token) -> Finish:
        if token.finish == pb.FINISH_LENGTH:
            return Finish(FinishReason.LENGTH)
        is_stop_id = token.token_id in self.request.stop_rules.stop_token_ids
        return Finish(FinishReason.STOP, token.token_id if is_stop_id else None)

    def _note_time(self, choice: int, now: float) -> None:
        timing = self.timing
        last = timing.last_of_choice[choice]
        if last:
            self._metrics.itl.observe(now - last)
        elif not timing.first_token_at:
            timing.first_token_at = now
            self._metrics.ttft.observe(now - timing.received_at)
            self.on_first_token()
        timing.last_of_choice[choice] = now
        timing.last_token_at = now
