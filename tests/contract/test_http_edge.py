"""What arrives below the API: raw bytes, slow and broken clients, old protocols. There is always an answer or a cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from gateway import app as gateway_app
from gateway import http_protocol
from gateway.fake_decode_worker import FakeDecodeWorker, Script
from gateway.http_protocol import MAX_HEADER_BYTES, BoundedHttpProtocol
from servicekit.health import HealthState, Phase, start_http
from tests.gateway_harness import PATIENCE_S, Harness, running

BODY = {"prompt": "hello", "max_tokens": 3}


def request(body: dict[str, Any] | bytes = b"", *, version: str = "1.1", headers: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


async def exchange(harness: Harness, *pieces: bytes, wait_s: float = 10.0) -> bytes:
    """Send pieces as they are; everything that comes back until the gateway closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), wait_s)
    finally:
        writer.close()


def parse(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01hello\r\n\r\n",
        b"GET /v1/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        request(BODY, headers="x-request-id: a\x00b\r\n"),
    ],
    ids=["tls", "path bytes", "negative length", "two lengths", "http2", "nul in a header"],
)
async def test_what_is_not_http_gets_an_error_body(tmp_path: Path, data: bytes) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        status, headers, body = parse(await exchange(harness, data))
        assert (status, headers["content-type"]) == (400, "application/json")
        assert json.loads(body)["error"] == {
            "message": "request: not valid HTTP/1.1", "type": "BadRequestError", "param": None, "code": 400,
        }  # fmt: skip
        assert harness.worker.requests == []


async def test_an_http_1_0_client_gets_its_stream_without_chunks(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        status, headers, body = parse(await exchange(harness, request(BODY | {"stream": True}, version="1.0")))
        assert (status, headers["connection"]) == (200, "close")
        assert "transfer-encoding" not in headers
        lines = [line for line in body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        status, headers, body = parse(await exchange(harness, request(BODY, version="1.0")))
        assert int(headers["content-length"]) == len(body)


async def test_headers_without_an_end_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        pieces = [b"GET /health HTTP/1.1\r\nx-big: "] + [b"a" * 4096] * (MAX_HEADER_BYTES // 4096 + 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
        answer = asyncio.create_task(reader.readuntil(b"}}"))
        with contextlib.suppress(ConnectionError):  # it need not read to the end
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
        assert parse(await asyncio.wait_for(answer, PATIENCE_S))[0] == 431
        writer.close()


async def test_slow_headers_are_a_408_and_slow_bodies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(gateway_app, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_protocol, "LEFTOVER_TIMEOUT_S", 0.2)
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        status, _, body = parse(await exchange(harness, b"GET /health HTTP/1.1\r\nx: "))
        assert (status, json.loads(body)["error"]["code"]) == (408, 408)
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
        writer.write(request(BODY)[:-3])
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 408")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):  # and the rest is not waited for long
            await asyncio.wait_for(reader.readexactly(1 << 20), 5)
        writer.close()


async def test_a_pipelined_request_waits_for_the_one_before(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        last = request(BODY, headers="connection: close\r\n")
        answer = await exchange(harness, request(BODY) + request(BODY | {"stream": True}) + last)
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.index(b"[DONE]") > answer.index(b"text/event-stream")
        assert len(harness.worker.requests) == 3


async def test_garbage_behind_a_request_never_lands_in_its_answer(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(step_s=0.01))) as harness:
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
        writer.write(request(BODY | {"stream": True, "max_tokens": 500}))
        await reader.readuntil(b"data: ")
        writer.write(b"\x00garbage\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert b"HTTP/1.1 400" not in rest
        async with asyncio.timeout(PATIENCE_S):
            await harness.worker.was_cancelled.wait()
        writer.close()


async def test_bodies_may_come_in_chunks(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        data = json.dumps(BODY).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:5], data[5:])]
        assert parse(await exchange(harness, head, *chunks, b"0\r\n\r\n"))[0] == 200


async def test_a_client_that_leaves_while_sending_costs_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        for end in (10, 60, -1):
            _, writer = await asyncio.open_connection("127.0.0.1", harness.server.port)
            writer.write(request(BODY)[:end])
            await writer.drain()
            writer.close()
        assert (await harness.complete()).status_code == 200
        assert len(harness.worker.requests) == 1


async def test_a_connection_too_many_is_a_503_but_probes_get_through(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(), max_connections=4) as harness:
        idle = [await asyncio.open_connection("127.0.0.1", harness.server.port) for _ in range(4)]
        status, headers, body = parse(await exchange(harness, request(BODY)))
        assert (status, headers["retry-after-ms"]) == (503, "1000")
        assert "limit of 4" in json.loads(body)["error"]["message"]
        probe = await exchange(harness, b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert parse(probe)[0] == 200
        for _, writer in idle:
            writer.close()


async def test_a_gateway_that_starts_says_so_in_the_apis_shape() -> None:
    health = HealthState((Phase("load_tokenizer", 1.0),))
    app = gateway_app.build_starting_app(health, lambda: b"")
    server = await start_http(app, "127.0.0.1", 0, http=BoundedHttpProtocol)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request(BODY, headers="connection: close\r\n"))
    status, headers, body = parse(await reader.read())
    assert (status, headers["x-should-retry"]) == (503, "true")
    assert "is starting" in json.loads(body)["error"]["message"]
    writer.close()
    await server.stop()


async def test_the_same_request_id_twice_at_once_is_two_requests(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(step_s=0.01))) as harness:
        post = harness.http.post
        both = [post("/v1/completions", json=BODY, headers={"x-request-id": "same"}) for _ in range(2)]
        assert [answer.status_code for answer in await asyncio.gather(*both)] == [200, 200]


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧", "e\u0301\u0323", "שלום עולם", "\u202eabc\u202c", "日本語", "\u0000", "ﷺ"])
async def test_any_text_goes_in_and_comes_back(tmp_path: Path, text: str) -> None:
    async with running(tmp_path, FakeDecodeWorker()) as harness:
        body = (await harness.complete(prompt=text, echo=True, stop=[text + "!"], max_tokens=1)).json()
        assert body["choices"][0]["text"].startswith(text)
