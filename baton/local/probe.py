"""Ask a process how it is, and the whole service for one token. Blocking calls for threads, each with a deadline."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any, cast

from baton.local.errors import StartFailed


@dataclass(frozen=True, slots=True)
class Health:
    """What a probe said. `is_good` is the answer; the rest is for people."""

    is_good: bool
    state: str = ""
    phase: str = ""
    percent: float = 0.0
    transports: tuple[str, ...] = ()  # the ways by which KV comes to this worker, most pairs first


def ask_health(address: str, probe: str, *, timeout_s: float) -> Health | None:
    """GET `probe` of the process at `host:port`; None if it does not answer."""
    try:
        status, text = _get(address, probe, timeout_s=timeout_s, max_bytes=65536)
        body: object = json.loads(text or b"{}")
    except (OSError, http.client.HTTPException, ValueError):
        return None
    fields = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    return Health(
        is_good=status == 200,
        state=str(fields.get("state", "")),
        phase=str(fields.get("phase", "")),
        percent=float(fields.get("percent") or 0.0),
        transports=_ways(fields.get("transports")),
    )


def _ways(pairs: object) -> tuple[str, ...]:
    counts = cast("dict[str, int]", pairs) if isinstance(pairs, dict) else {}
    return tuple(sorted(counts, key=lambda way: (-counts[way], way)))


def ask_connected_workers(address: str, *, timeout_s: float) -> dict[str, int]:
    """How many workers the gateway at `host:port` has met, by pool, as its metrics say; empty if it does not answer."""
    try:
        _, text = _get(address, "/metrics", timeout_s=timeout_s, max_bytes=1 << 20)
        lines = text.decode().splitlines()
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    values = dict(
        line.rsplit(" ", 1)
        for line in lines
        if line.startswith(("baton_gateway_decode_workers ", "baton_gateway_prefill_workers "))
    )
    return {name.split("_")[2]: int(float(value)) for name, value in values.items()}


def _get(address: str, path: str, *, timeout_s: float, max_bytes: int) -> tuple[int, bytes]:
    """Status and body. Raises: OSError, HTTPException."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(max_bytes)
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class FirstToken:
    text: str
    seconds: float


def stream_first_token(address: str, model_id: str, api_key: str | None, *, timeout_s: float) -> FirstToken:
    """Send one tiny streamed completion and time its first token.

    Raises: StartFailed with what the service said instead.
    """
    host, _, port = address.rpartition(":")
    body = {"model": model_id, "prompt": "Once upon a time", "max_tokens": 2, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    started = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise StartFailed(f"the first request was answered with {response.status}: {response.read(2000).decode()}")
        while line := response.readline(1 << 20):
            text = _text_of(line)
            if text:
                return FirstToken(text, time.monotonic() - started)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StartFailed(f"the first request failed: {error!r}") from error
    finally:
        connection.close()
    raise StartFailed("the first request ended without a token")


def _text_of(line: bytes) -> str:
    """The text of one server-sent event of a completion stream, "" if it carries none."""
    data = line.removeprefix(b"data:").strip()
    if data == line.strip() or data == b"[DONE]":
        return ""
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise StartFailed(f"the first request failed: {event['error']}")
    return "".join(str(choice.get("text", "")) for choice in event.get("choices", ()))
