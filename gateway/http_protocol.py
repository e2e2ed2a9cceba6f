"""uvicorn's HTTP/1.1 protocol with the two things that must happen below ASGI: a bound on headers, and a way to cut."""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 16 * 1024
HEADER_TIMEOUT_S = 20.0
ABORT = "baton.abort"  # scope key: a function that drops the connection without waiting for the client to read


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses more than 16 KiB of headers before they are all in memory, and headers that take longer than 20 s."""

    _header_bytes = 0
    _header_timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_took_too_long)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]  # ASGI allows further keys
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_took_too_long)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._header_bytes <= MAX_HEADER_BYTES:
            super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        was_within = self._header_bytes <= MAX_HEADER_BYTES
        self._header_bytes += num_bytes
        if was_within and self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(
                431, "Request Header Fields Too Large", f"headers: more than {MAX_HEADER_BYTES} bytes; send fewer"
            )

    def _headers_took_too_long(self) -> None:
        self._header_timer = None
        self._refuse(408, "Request Timeout", f"headers: not complete after {HEADER_TIMEOUT_S:g} s")

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "x-should-retry: false\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
