"""What a client of the product saw of one streamed request, whole: every choice, its token ids, the usage, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.client import HttpRefused, post_events


@dataclass(slots=True)
class Choice:
    """What does not depend on how the tokens were cut into events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float | None] = field(default_factory=list[float | None])
    finish: str | None = None


@dataclass(slots=True)
class Stream:
    """One request. Complete: every choice has a finish reason, the usage came, and then `[DONE]`."""

    kind: str
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    num_usage_tokens: int | None = None
    is_done: bool = False
    error: str = ""
    first_gap_s: float = 0.0  # until the first event
    slowest_gap_s: float = 0.0
    tokens_before_gap: int = 0
    request_id: str = ""  # that of the chunks

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def complaint(self, num_choices: int) -> str:
        """Why it is not complete, or its counts do not agree; empty if all is well."""
        if self.error or not self.is_done:
            return self.error or "no [DONE]"
        if sorted(self.choices) != list(range(num_choices)):
            return f"choices {sorted(self.choices)} instead of {num_choices}"
        if any(choice.finish is None for choice in self.choices.values()):
            return "a choice without a finish reason"
        if self.num_usage_tokens != self.num_tokens:
            return f"usage says {self.num_usage_tokens} tokens, {self.num_tokens} came"
        return ""


OnTokens = Callable[[Stream], None]


async def open_stream(
    host: str,
    port: int,
    path: str,
    body: dict[str, Any],
    *,
    kind: str = "",
    timeout_s: float = 120.0,
    on_tokens: OnTokens | None = None,
) -> Stream:
    """Send a request, read it to its end and keep all of it; `on_tokens` hears of each event. Never raises."""
    stream = Stream(kind)
    asked = {**body, "stream_options": {"include_usage": True}, "return_token_ids": True}
    heard_at = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            async for event in post_events(host, port, path, asked):
                now = time.perf_counter()
                stream.first_gap_s = stream.first_gap_s or now - heard_at
                if now - heard_at > stream.slowest_gap_s:
                    stream.slowest_gap_s, stream.tokens_before_gap = now - heard_at, stream.num_tokens
                heard_at = now
                if event == "[DONE]":
                    stream.is_done = True
                    break
                _take(stream, json.loads(event))
                if on_tokens is not None:
                    on_tokens(stream)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, HttpRefused, IndexError) as error:
        stream.error = stream.error or f"{type(error).__name__}: {error}"
    return stream


def _take(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    if chunk.get("usage"):
        stream.num_usage_tokens = chunk["usage"]["completion_tokens"]
    stream.request_id = chunk["id"]
    for said in chunk["choices"]:
        choice = stream.choices.setdefault(said["index"], Choice())
        choice.text += said["text"] if "text" in said else said["delta"].get("content") or ""
        choice.token_ids += said.get("token_ids") or []
        choice.finish = said.get("finish_reason") or choice.finish
        choice.logprobs += _logprobs(said.get("logprobs"))


def _logprobs(said: dict[str, Any] | None) -> list[float | None]:
    if not said:
        return []
    if "content" in said:
        return [entry["logprob"] for entry in said["content"]]
    return list(said["token_logprobs"])
