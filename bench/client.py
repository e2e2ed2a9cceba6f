"""A streaming client thin enough to share two cores with what it measures: raw asyncio, no HTTP library."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """What one request felt like. Times are on the client's clock; `sent_s` is when it was due, not when it left."""

    kind: str
    sent_s: float
    token_times_s: list[float] = field(default_factory=list[float])
    text: str = ""
    finished: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        num_gaps = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / num_gaps if num_gaps > 0 else 0.0

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether every objective of the request held; an unfinished request meets none."""
        return self.finished and bool(self.token_times_s) and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


async def stream_completion(
    host: str,
    port: int,
    body: dict[str, object],
    kind: str = "",
    due_s: float | None = None,
    timeout_s: float = 300.0,
    on_text: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Send one streaming /v1/completions request and note when each token's text arrived; `on_text` hears of each."""
    outcome = Outcome(kind=kind, sent_s=time.perf_counter() if due_s is None else due_s)
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(host, port, body, outcome, on_text)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"
    return outcome


async def _stream(
    host: str, port: int, body: dict[str, object], outcome: Outcome, on_text: Callable[[Outcome], None] | None
) -> None:
    try:
        async for event in post_events(host, port, "/v1/completions", body):
            if event == "[DONE]":
                outcome.finished = not outcome.error
                return
            chunk = json.loads(event)
            if "error" in chunk:
                outcome.error = str(chunk["error"])
                continue
            if chunk["choices"] and chunk["choices"][0]["text"]:
                outcome.token_times_s.append(time.perf_counter())
                outcome.text += chunk["choices"][0]["text"]
                if on_text is not None:
                    on_text(outcome)
    except HttpRefused as refused:
        outcome.error = str(refused)


class HttpRefused(Exception):
    """The answer was not 200."""


async def post_events(host: str, port: int, path: str, body: dict[str, object]) -> AsyncIterator[str]:
    """The data of each server-sent event of a streaming request. Raises: HttpRefused, OSError, IncompleteReadError."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    try:
        payload = json.dumps({**body, "stream": True}).encode()
        writer.write(
            b"POST " + path.encode() + b" HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: " + str(len(payload)).encode() + b"\r\n\r\n" + payload
        )
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = await _headers(reader)
        if status != 200:
            raise HttpRefused(f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}")
        assert headers.get("transfer-encoding") == "chunked", headers
        async for event in _events(reader):
            yield event
    finally:
        writer.close()


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return headers


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    buffered = b""
    while (size := int((await reader.readline()).strip() or b"0", 16)) > 0:
        buffered += (await reader.readexactly(size + 2))[:-2]
        *complete, buffered = buffered.split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: "):
                yield event[len(b"data: ") :].decode()


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]
