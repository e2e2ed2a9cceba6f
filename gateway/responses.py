"""Committed tokens to OpenAI's JSON: SSE frames, rendered once and filled in per token, or one whole body.

The fast path (no logprobs, no ids, no running usage) joins three byte strings and encodes the text; 1 us a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from gateway.detokenize import Detokenizer
from gateway.generation import Generation
from gateway.token_log import Finish
from kvtransfer.protocol import baton_pb2 as pb

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; vLLM's stand-in


class Style(Enum):
    """Which of the two dialects; values are the id prefixes."""

    CHAT = "chatcmpl-"
    COMPLETION = "cmpl-"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What every chunk and body of one response shares."""

    style: Style
    response_id: str
    created: int
    model: str
    fingerprint: str
    num_choices: int  # per prompt
    include_usage: bool = False
    continuous_usage: bool = False
    num_logprobs: int = -1
    return_token_ids: bool = False
    with_metrics: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether chunks differ in nothing but the choice and the text."""
        return self.num_logprobs < 0 and not self.return_token_ids and not self.continuous_usage

    def head(self, is_stream: bool) -> dict[str, Any]:
        kinds = {
            (Style.CHAT, True): "chat.completion.chunk",
            (Style.CHAT, False): "chat.completion",
            (Style.COMPLETION, True): "text_completion",
            (Style.COMPLETION, False): "text_completion",
        }
        return {
            "id": self.response_id,
            "object": kinds[self.style, is_stream],
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Outbox:
    """Frames of one HTTP response on their way to the client. Written synchronously, emptied by the response's task."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self.is_closed = False
        self.has_written = False  # from here on, an error is a frame and no longer a status
        self.is_quiet = True  # nothing was written since somebody last set it

    def write(self, frame: bytes) -> None:
        self.has_written = True
        self.is_quiet = False
        self._frames.append(frame)
        if self._waiter is not None:
            self._wake()

    def close(self) -> None:
        """Nothing more will be written."""
        self.is_closed = True
        self._wake()

    def take(self) -> bytes:
        """Everything written since the last time: a slow client gets fewer, larger pieces."""
        frames = self._frames
        if not frames:
            return b""
        self._frames = []
        return frames[0] if len(frames) == 1 else b"".join(frames)

    async def wait(self) -> None:
        """Return when there is something to take, or when the outbox is closed."""
        if not self._frames and not self.is_closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


@dataclass(slots=True)
class Usage:
    """Token counts of a whole response: the sum over its prompts."""

    num_prompt: int = 0
    num_completion: int = 0
    num_cached: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "total_tokens": self.num_prompt + self.num_completion,
            "completion_tokens": self.num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


def usage_of(generations: Sequence[Generation]) -> Usage:
    usage = Usage()
    for generation in generations:
        usage.num_prompt += len(generation.request.prompt_token_ids)
        usage.num_completion += generation.log.num_committed
        usage.num_cached += generation.num_cached_tokens
    return usage


class StreamSink:
    """Sink of one prompt of a streamed response: each token becomes at most one frame in the outbox."""

    def __init__(
        self,
        shape: ResponseFormat,
        outbox: Outbox,
        detokenizer: Detokenizer,
        *,
        first_choice: int = 0,
        echo: str = "",
        usage_now: Callable[[], Usage] | None = None,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._shape = shape
        self._outbox = outbox
        self._first_choice = first_choice
        self._echo = echo
        self._usage_now = usage_now
        self._prompt_token_ids = list(prompt_token_ids)
        self._logprobs = LogprobsFormatter(shape, detokenizer, echo)
        self._is_plain = shape.is_plain
        self._head = orjson.dumps(shape.head(is_stream=True))[:-1]
        self._has_begun = [False] * shape.num_choices
        self._prefixes = [self._prefix(choice) for choice in range(shape.num_choices)]
        tail = b',"usage":null}\n\n' if shape.include_usage else b"}\n\n"
        closing = b'},"logprobs":null,"finish_reason":null}]' if shape.style is Style.CHAT else b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'  # fmt: skip  # noqa: E501
        self._tail = tail
        self._plain_suffix = closing + tail

    def on_token(self, choice: int, text: str, token: pb.Token, finish: Finish | None) -> None:
        if not self._has_begun[choice]:
            self._has_begun[choice] = True
            text = self._begin(choice, text)
        if self._is_plain and finish is None:
            if text:
                self._outbox.write(self._prefixes[choice] + orjson.dumps(text) + self._plain_suffix)
            return
        self._write(choice, self._body(choice, text, token, finish))

    def _begin(self, choice: int, text: str) -> str:
        """Chat says the role first; completions may echo the prompt."""
        if self._shape.style is Style.COMPLETION:
            return self._echo + text
        body: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        self._write(choice, body, {"prompt_token_ids": self._prompt_token_ids} if self._shape.return_token_ids else {})
        return text

    def _body(self, choice: int, text: str, token: pb.Token, finish: Finish | None) -> dict[str, Any]:
        body: dict[str, Any] = {"delta": {"content": text}} if self._shape.style is Style.CHAT else {"text": text}
        body["logprobs"] = self._logprobs.of_tokens(choice, [token])
        body["finish_reason"] = finish.reason.value if finish else None
        if finish or self._shape.style is Style.COMPLETION:
            body["stop_reason"] = finish.stop if finish else None
        if self._shape.return_token_ids:
            body["token_ids"] = [token.token_id]
        return body

    def _write(self, choice: int, body: Mapping[str, Any], top: Mapping[str, Any] | None = None) -> None:
        """The general frame: any choice body, further fields of the chunk, running usage where asked for."""
        chunk: dict[str, Any] = {"choices": [{"index": self._first_choice + choice, **body}], **(top or {})}
        if self._usage_now is not None and self._shape.continuous_usage:
            chunk["usage"] = self._usage_now().as_json()
            tail = b"}\n\n"
        else:
            tail = self._tail
        self._outbox.write(b"data: " + self._head + b"," + orjson.dumps(chunk)[1:-1] + tail)

    def _prefix(self, choice: int) -> bytes:
        text = b'"delta":{"content":' if self._shape.style is Style.CHAT else b'"text":'
        return b"data: " + self._head + b',"choices":[{"index":%d,' % (self._first_choice + choice) + text


def usage_frame(shape: ResponseFormat, usage: Usage, metrics: Mapping[str, Any] | None) -> bytes:
    """The last chunk of a stream that asked for usage: no choices."""
    chunk: dict[str, Any] = shape.head(is_stream=True) | {"choices": [], "usage": usage.as_json()}
    if metrics is not None:
        chunk["metrics"] = metrics
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def error_frame(body: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


@dataclass(slots=True)
class _Collected:
    texts: list[str] = field(default_factory=list[str])
    tokens: list[pb.Token] = field(default_factory=list[pb.Token])
    finish: Finish | None = None


class CollectSink:
    """Sink of one prompt of a whole response."""

    def __init__(self, shape: ResponseFormat, detokenizer: Detokenizer, first_choice: int = 0, echo: str = "") -> None:
        self._shape = shape
        self._first_choice = first_choice
        self._echo = echo
        self._logprobs = LogprobsFormatter(shape, detokenizer, echo)
        self._keeps_tokens = not shape.is_plain
        self._choices = [_Collected() for _ in range(shape.num_choices)]

    def on_token(self, choice: int, text: str, token: pb.Token, finish: Finish | None) -> None:
        collected = self._choices[choice]
        collected.texts.append(text)
        if self._keeps_tokens:
            collected.tokens.append(token)
        if finish is not None:
            collected.finish = finish

    def choices(self, generation: Generation) -> Iterable[dict[str, Any]]:
        for number, collected in enumerate(self._choices):
            text = "".join(collected.texts)
            finish = collected.finish
            body: dict[str, Any] = {"index": self._first_choice + number}
            if self._shape.style is Style.CHAT:
                body["message"] = {"role": "assistant", "content": text}
            else:
                body["text"] = self._echo + text
            body["logprobs"] = self._logprobs.of_tokens(number, collected.tokens)
            body["finish_reason"] = finish.reason.value if finish else None
            body["stop_reason"] = finish.stop if finish else None
            if self._shape.return_token_ids:
                body["token_ids"] = [token.token_id for token in collected.tokens]
                body["prompt_token_ids"] = list(generation.request.prompt_token_ids)
            yield body


def whole_body(
    shape: ResponseFormat,
    sinks: Sequence[CollectSink],
    generations: Sequence[Generation],
    metrics: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The answer to a request without streaming."""
    choices = [choice for sink, run in zip(sinks, generations, strict=True) for choice in sink.choices(run)]
    body = shape.head(is_stream=False) | {"choices": choices, "usage": usage_of(generations).as_json()}
    if metrics is not None:
        body["metrics"] = metrics
    return body


def metrics_of(generation: Generation) -> dict[str, Any]:
    """Where a request's time went. Milliseconds, vLLM's names where it has them."""
    timing, stats = generation.timing, generation.stats
    num_tokens = generation.log.num_committed
    decode_s = timing.last_token_at - timing.first_token_at
    gaps = max(1, num_tokens - len(generation.log.choices))
    body: dict[str, Any] = {
        "time_to_first_token_ms": _ms(timing.first_token_at - timing.received_at),
        "generation_time_ms": _ms(timing.last_token_at - timing.received_at),
        "gateway_queue_time_ms": _ms(timing.routed_at - timing.received_at),
        "decode_time_ms": _ms(decode_s),
        "mean_itl_ms": _ms(decode_s / gaps),
        "tokens_per_second": round(num_tokens / decode_s, 2) if decode_s > 0 else None,
        "attempts": generation.log.attempt,
    }
    if stats is not None:
        body |= {
            "queue_time_ms": _ms(stats.queue_s),
            "prefill_time_ms": _ms(stats.prefill_s),
            "transfer_time_ms": _ms(stats.transfer_s),
            "transfer_bytes": stats.transfer_bytes,
            "prefill_path": stats.prefill_path,
            "prefill_path_reason": stats.path_reason,
            "transport": stats.transport or None,
            "cached_tokens": generation.num_cached_tokens,
        }
    return body


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


class LogprobsFormatter:
    """Logprobs in both dialects. Completions count text offsets, so it keeps one per choice."""

    def __init__(self, shape: ResponseFormat, detokenizer: Detokenizer, echo: str) -> None:
        self._is_wanted = shape.num_logprobs >= 0
        self._is_chat = shape.style is Style.CHAT
        self._detokenizer = detokenizer
        self._offsets = [len(echo)] * shape.num_choices

    def of_tokens(self, choice: int, tokens: Sequence[pb.Token]) -> dict[str, Any] | None:
        if not self._is_wanted:
            return None
        if self._is_chat:
            return {"content": [self._chat_entry(token) for token in tokens]}
        return self._completion_lists(choice, tokens)

    def _chat_entry(self, token: pb.Token) -> dict[str, Any]:
        return self._chat_item(token.token_id, token.logprob) | {
            "top_logprobs": [self._chat_item(top.token_id, top.logprob) for top in token.top_logprobs]
        }

    def _chat_item(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._detokenizer.token_bytes(token_id)
        return {"token": self._text(token_id), "logprob": _finite(logprob), "bytes": list(data)}

    def _completion_lists(self, choice: int, tokens: Sequence[pb.Token]) -> dict[str, Any]:
        texts = [self._text(token.token_id) for token in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "tokens": texts,
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _top(self, token: pb.Token) -> dict[str, float]:
        """vLLM's dictionary: the k most likely, and the drawn one where it is not among them."""
        top = {self._text(entry.token_id): _finite(entry.logprob) for entry in token.top_logprobs}
        top.setdefault(self._text(token.token_id), _finite(token.logprob))
        return top

    def _text(self, token_id: int) -> str:
        return self._detokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
