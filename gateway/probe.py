"""Does a revision really answer? One short prompt through its prefill and decode workers, and what came of it.

The operator asks this before it sends users to a revision, so a probe goes to no other revision, takes no place in the
users' queue, is not counted among their requests, and ends in bounded time. One runs at a time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from gateway import dialect
from gateway.admission import Admission, AdmissionLimits
from gateway.dialect import CompletionBody, ModelLimits
from gateway.errors import GatewayError
from gateway.generation import Generation, GenerationRequest
from gateway.metrics import GatewayMetrics
from gateway.revisions import complete_revisions
from gateway.serve import Services, serve
from gateway.text import TextService
from gateway.token_log import Finish
from gateway.worker_pool import WorkerPool
from kvtransfer.protocol import baton_pb2 as pb

TIMEOUT_S = 15.0
MAX_TOKENS = 4
TTFT_OBJECTIVE_S = 0.1  # puts a probe before users' prompts at the prefill worker, which orders by what is left of it
PROMPT = "A relay race is won by the hand-over: " + "one runner brings the baton, the next one takes it on. " * 3


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`error` is empty where the revision answered as its users would want it to."""

    revision: str
    error: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = ""
    num_bytes: int = 0
    handover_s: float = 0.0
    ttft_s: float = 0.0
    num_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """The answer of POST /internal/probe."""
        answer: dict[str, Any] = {
            "ok": not self.error,
            "revision": self.revision,
            "prefillWorker": self.prefill_worker,
            "decodeWorker": self.decode_worker,
            "transport": self.transport,
            "bytes": self.num_bytes,
            "handoverMs": round(self.handover_s * 1000, 3),
            "ttftMs": round(self.ttft_s * 1000, 3),
            "tokens": self.num_tokens,
        }
        return answer | {"error": self.error} if self.error else answer


class Prober:
    """Runs probes with the gateway's own workers, tokenizer and limits."""

    def __init__(self, pool: WorkerPool, text: TextService, limits: ModelLimits) -> None:
        self._pool = pool
        self._text = text
        self._limits = limits
        self._turn = asyncio.Lock()

    async def probe(self, revision: str) -> ProbeResult:
        """Wait for the turn, then run one; both within the time limit."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._turn:
                return await self._run(revision)
        except TimeoutError:
            return ProbeResult(revision, f"no answer in {TIMEOUT_S:g} s")
        except GatewayError as error:
            return ProbeResult(revision, f"{error.type}: {error.message}")

    async def _run(self, revision: str) -> ProbeResult:
        missing = self._what_is_missing(revision)
        if missing:
            return ProbeResult(revision, missing)
        metrics = GatewayMetrics("probe")  # never shown: users' latencies are not mixed with these
        generation = Generation(await self._request(revision), _Drop(), self._text.detokenizer, metrics)
        alone = Admission(AdmissionLimits(1, self._limits.max_model_len), time.monotonic)
        await serve(generation, Services(alone, self._pool, metrics))
        return self._result(revision, generation)

    def _what_is_missing(self, revision: str) -> str:
        missing = self._missing_worker(revision)
        return ": ".join([missing, *self._pool.refusals(revision)[:1]]) if missing else ""

    def _missing_worker(self, revision: str) -> str:
        decode = [worker for worker in self._pool.decode_states() if worker.revision == revision]
        if not any(not worker.is_draining for worker in decode):
            return f"revision {revision!r} has no decode worker that takes requests"
        needs_prefill = self._pool.preference.needs_prefill
        if needs_prefill and revision not in complete_revisions(decode, self._pool.prefill_states()):
            return f"revision {revision!r} has no prefill worker whose KV fits its decode workers"
        return ""

    async def _request(self, revision: str) -> GenerationRequest:
        asked = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "seed": 0}
        body, _ = dialect.parse(CompletionBody, asked)
        room = max(1, self._max_model_len(revision) - MAX_TOKENS)
        token_ids = dialect.checked_prompt(body, (await self._text.encode(PROMPT, True))[:room], self._limits)
        length = dialect.asked_length(body, len(token_ids))
        sampling, stop_rules, text_rules = dialect.sampling_of(body, length, self._limits)
        is_never = not self._pool.preference.needs_prefill
        return GenerationRequest(
            request_id=f"probe-{uuid.uuid4().hex}",
            prompt_token_ids=token_ids,
            length=length,
            sampling=sampling,
            num_choices=1,
            stop_rules=stop_rules,
            text_rules=text_rules,
            cache_salt=secrets.token_bytes(16),  # nothing of it is cached anywhere: it has to be computed and moved
            disaggregation=pb.DISAGGREGATION_NEVER if is_never else pb.DISAGGREGATION_ALWAYS,
            timeout_s=TIMEOUT_S,
            ttft_objective_s=TTFT_OBJECTIVE_S,
            only_revision=revision,
        )

    def _max_model_len(self, revision: str) -> int:
        """The least that any worker of the revision takes."""
        workers = (*self._pool.decode_states(), *self._pool.prefill_states())
        stated = [w.max_model_len for w in workers if w.revision == revision and w.max_model_len]
        return min([self._limits.max_model_len, *stated])

    def _result(self, revision: str, generation: Generation) -> ProbeResult:
        timing, stats = generation.timing, generation.stats
        answered = ProbeResult(
            revision,
            decode_worker=generation.worker_id,
            ttft_s=timing.first_token_at - timing.received_at,
            num_tokens=generation.log.num_committed,
        )
        if stats is None:
            return replace(answered, error="the decode worker did not say where the prompt was prefilled")
        answered = replace(
            answered,
            prefill_worker=stats.prefill_worker_id,
            transport=stats.transport,
            num_bytes=stats.transfer_bytes,
            handover_s=stats.transfer_s,
        )
        if self._pool.preference.needs_prefill and stats.prefill_path != "remote":
            return replace(answered, error=f"the decode worker prefilled for itself: {stats.path_reason}")
        return answered


class _Drop:
    """A sink for text that nobody reads."""

    def on_token(self, choice: int, text: str, token: pb.Token, finish: Finish | None) -> None:
        pass
