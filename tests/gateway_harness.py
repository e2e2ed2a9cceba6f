"""A gateway over real HTTP in front of fake decode workers, all in the test's own event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI

from gateway import process
from gateway.app import Gateway
from gateway.config import GatewayConfig
from gateway.fake_decode_worker import FakeDecodeWorker
from gateway.fake_model import write_fake_model
from servicekit.health import HttpServer

MODEL_ID = "fake-model"


@dataclass(slots=True)
class Harness:
    """What a test talks to."""

    gateway: Gateway
    server: HttpServer
    http: httpx2.AsyncClient
    workers: list[FakeDecodeWorker]
    internal_url: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def worker(self) -> FakeDecodeWorker:
        return self.workers[0]

    def openai(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    async def complete(self, **body: Any) -> httpx2.Response:
        return await self.http.post("/v1/completions", json={"prompt": "hello", "seed": 7} | body)

    async def chat(self, **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.http.post(
            "/v1/chat/completions", json={"messages": messages, "seed": 7, "max_tokens": 8} | body
        )

    async def metric(self, line_start: str) -> float:
        """The value of the metric line that starts like this; 0 where there is none."""
        for line in (await self.http.get("/metrics")).text.splitlines():
            if line.startswith(line_start):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def events(response: httpx2.Response) -> list[Any]:
    """The data of an event stream; "[DONE]" as text."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def streamed_text(chunks: list[Any], choice: int = 0) -> str:
    parts: list[str] = []
    for chunk in chunks:
        for body in chunk["choices"] if chunk != "[DONE]" else ():
            if body["index"] == choice:
                parts.append(body["text"] if "text" in body else body["delta"].get("content", ""))
    return "".join(parts)


@asynccontextmanager
async def running(
    tmp_path: Path, *workers: FakeDecodeWorker, wait_for: int | None = None, model: Path | None = None, **settings: Any
) -> AsyncIterator[Harness]:
    """Start workers and gateway; yields when `wait_for` workers (all of them) are connected."""
    model = model or write_fake_model(tmp_path / "model")
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        defaults: dict[str, Any] = {"model_id": MODEL_ID, "http": ("127.0.0.1", 0), "request_timeout": 60.0}
        seeds = tuple(worker.address for worker in workers)
        config = GatewayConfig(model=model, **({"workers_seed": seeds} | defaults | settings))
        gateway, server, stop = await process.start(config)
        stack.push_async_callback(stop)
        pool = gateway.services.pool
        wanted = len(workers) if wait_for is None else wait_for
        async with asyncio.timeout(60):
            while len(pool.connections) < wanted:
                await pool.wait_for_change(1.0)
        url = f"http://127.0.0.1:{server.port}"
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=60))
        yield Harness(gateway, server, client, list(workers))
