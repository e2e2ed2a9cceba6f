"""uvicorn's HTTP/1.1 protocol with what must happen below ASGI: bounds on headers and connections, errors in the
API's own shape, answers that HTTP/1.0 clients can read, and a way to cut.
"""

from __future__ import annotations

from typing import Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEADER_BYTES = 16 * 1024
HEADER_TIMEOUT_S = 20.0
LEFTOVER_TIMEOUT_S = 10.0  # how long a refused body may go on arriving: closing at once would lose the answer
PROBES = (b"/livez", b"/readyz", b"/startupz", b"/metrics")
ABORT = "baton.abort"  # scope key: a function that drops the connection without waiting for the client to read


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses more than 16 KiB of headers before they are all in memory, headers that take longer than 20 s, and
    requests on more connections than allowed (probes excepted: a full gateway is alive).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's own says plain text
        self._header_bytes = 0
        self._unfinished_bytes = 0  # pieces that ended no headers: the parser keeps them and tells nobody
        self._num_heads = 0
        self._is_in_body = False
        self._is_refused = False
        self._header_timer: Any = None
        self._leftover_timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_took_too_long)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        was_in_body, num_heads = self._is_in_body, self._num_heads
        super().data_received(data)
        if was_in_body or self._is_in_body or self._num_heads != num_heads:
            self._unfinished_bytes = 0
            return
        self._unfinished_bytes += len(data)
        if self._unfinished_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

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
        self._stop_timers()
        self._num_heads += 1
        self._is_in_body = True
        is_probe = self.url.startswith(PROBES)
        if self._max_connections is not None and len(self.connections) > self._max_connections and not is_probe:
            self._refuse(503, "Service Unavailable", f"connections: the limit of {self._max_connections} is reached; "
                         "try again in a second", "retry-after: 1\r\nretry-after-ms: 1000\r\nx-should-retry: true\r\n",
                         kind="ServiceUnavailableError")  # fmt: skip
        if not self._is_refused:
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0":
                _write_until_close(self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._stop_timers()
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_in_body and self.cycle.response_complete and not self.transport.is_closing():
            self._leftover_timer = self.loop.call_later(LEFTOVER_TIMEOUT_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read."""
        self._refuse(400, "Bad Request", "request: not valid HTTP/1.1")

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

    def _refuse_headers(self) -> None:
        self._refuse(431, "Request Header Fields Too Large", f"headers: more than {MAX_HEADER_BYTES} bytes; send fewer")

    def _headers_took_too_long(self) -> None:
        self._header_timer = None
        self._refuse(408, "Request Timeout", f"headers: not complete after {HEADER_TIMEOUT_S:g} s")

    def _refuse(
        self,
        status: int,
        phrase: str,
        message: str,
        headers: str = "x-should-retry: false\r\n",
        kind: str = "BadRequestError",
    ) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        cycle = cast("RequestResponseCycle | None", self.cycle)
        is_answering = cycle is not None and not cycle.response_complete
        if not is_answering:  # else these bytes would land in the middle of another request's answer
            body = orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})
            head = (
                f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"{headers}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._leftover_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._leftover_timer = None


def _write_until_close(cycle: RequestResponseCycle) -> None:
    """Let an answer of unknown length end with the connection: HTTP/1.0 knows no chunks, and uvicorn sends them."""
    send = cycle.send
    has_length = True

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b"")) + bool(message.get("more_body"))
        await send(message)

    setattr(cycle, "send", send_plain)  # noqa: B010  an instance's own `send`, which type checkers refuse as a method
