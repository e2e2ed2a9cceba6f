"""Two revisions side by side: probes, the switch under traffic, and never a prompt between the two.

Workers are real but for their model, in this loop; so is the gateway.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.app import build_app
from servicekit.health import start_http
from tests.gateway_harness import Harness, events, running, streamed_text
from tests.workers_harness import PATIENCE_S, SECRET, FakeModel, RunningWorker, Workers

MODEL_ID = "fake-model"
PROMPT = "what the prefill worker reads, and the decode worker does not"


@dataclass
class Service:
    """A gateway and what a test does to its workers."""

    harness: Harness
    internal: httpx2.AsyncClient
    workers: Workers
    routing_file: Path
    registry: Path

    async def prefill(self, revision: str, **settings: Any) -> RunningWorker:
        return await self.workers.prefill(**self._settings(revision, settings))

    async def decode(self, revision: str, **settings: Any) -> RunningWorker:
        return await self.workers.decode(**self._settings(revision, settings))

    def _settings(self, revision: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {"revision": revision, "registry_dir": self.registry, "model_id": MODEL_ID} | settings

    async def probe(self, revision: str) -> dict[str, Any]:
        answer = await self.internal.post("/internal/probe", json={"revision": revision})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def status(self) -> dict[str, Any]:
        return (await self.internal.get("/internal/status")).json()

    def serve(self, revision: str) -> None:
        self.routing_file.write_text(json.dumps({"servingRevision": revision}))

    async def until_ready(self, **wanted: tuple[int, int]) -> None:
        """Wait for revision=(prefill, decode) workers that are ready."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = (await self.status())["revisions"]
                ready = {name: (c["prefill"]["ready"], c["decode"]["ready"]) for name, c in found.items()}
                if all(ready.get(name) == counts for name, counts in wanted.items()):
                    return
                await asyncio.sleep(0.05)

    async def until_serving(self, revision: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.status())["servingRevision"] != revision:
                await asyncio.sleep(0.05)

    async def text(self, **body: Any) -> str:
        asked = {"prompt": PROMPT, "max_tokens": 6, "seed": 7, "stream": True, "ignore_eos": True}
        answer = await self.harness.complete(**(asked | body))
        assert answer.status_code == 200, answer.text
        chunks = events(answer)
        assert chunks[-1] == "[DONE]", chunks
        return streamed_text(chunks)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncGenerator[Service]:
    workers = Workers(tmp_path)
    registry, routing_file = tmp_path / "registry", tmp_path / "routing.json"
    settings: dict[str, Any] = {"registry_dir": registry, "routing_file": routing_file}
    settings |= {"secret_file": workers.secret_file, "internal_http": None}
    async with running(tmp_path, **settings) as harness:
        server = await start_http(build_app(harness.gateway, is_internal=True), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.port}"
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, headers={"baton-secret": SECRET}) as internal:
            yield Service(harness, internal, workers, routing_file, registry)
        await server.stop()
        await workers.aclose()


async def test_a_probe_goes_through_prefill_and_decode_of_the_revision_it_names(service: Service) -> None:
    service.serve("old")
    for revision in ("old", "new"):
        await service.prefill(revision)
        await service.decode(revision)
    await service.until_ready(old=(1, 1), new=(1, 1))
    for revision, prefill, decode in (("new", "p2", "d3"), ("old", "p0", "d1"), ("new", "p2", "d3")):
        answer = await service.probe(revision)
        assert answer.pop("handoverMs") >= 0
        assert answer.pop("ttftMs") > 0
        assert answer.pop("bytes") > 0
        assert answer.pop("transport") in ("shm", "grpc")
        assert answer == {
            "ok": True,
            "revision": revision,
            "prefillWorker": prefill,
            "decodeWorker": decode,
            "tokens": 4,
        }
    assert "vllm:request_success_total{" not in (await service.harness.http.get("/metrics")).text


async def test_a_probe_says_why_the_gateway_refuses_the_workers_of_a_revision(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes into the service's condition: such an upgrade is rolled back with these words."""
    service.serve("old")
    monkeypatch.setattr("decode_service.app.PROTOCOL_VERSION", 99)
    await service.decode("new")
    async with asyncio.timeout(PATIENCE_S):
        while "speaks protocol 99" not in (answer := await service.probe("new"))["error"]:
            await asyncio.sleep(0.05)
    assert not answer["ok"]
    assert "speaks protocol" not in (await service.probe("old"))["error"]


async def test_a_probe_of_what_is_not_there_says_what_is_missing(service: Service) -> None:
    service.serve("old")
    await service.decode("new")
    await service.prefill("old")
    await service.until_ready(old=(1, 0), new=(0, 1))
    for revision, words in (
        ("new", "'new' has no prefill worker whose KV fits"),
        ("old", "'old' has no decode worker"),
        ("other", "'other' has no decode worker"),
    ):
        answer = await service.probe(revision)
        assert answer["ok"] is False
        assert words in answer["error"]
    bad = await service.internal.post("/internal/probe", json={"revision": 7})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "revision"


async def test_a_probe_waits_for_no_users_request(service: Service) -> None:
    """The users' queue is full; the operator still learns whether the revision answers."""
    service.serve("old")
    await service.prefill("old")
    await service.decode("old", model=FakeModel(step_s=0.05))
    await service.until_ready(old=(1, 1))
    admission = service.harness.gateway.services.admission
    places = [admission.admit(1, "") for _ in range(512)]
    assert (await service.harness.complete()).status_code == 503
    assert (await service.probe("old"))["ok"] is True
    for place in places:
        admission.leave(place)


async def test_probes_and_status_ask_for_the_services_secret(service: Service) -> None:
    for method, path in (("GET", "/internal/status"), ("POST", "/internal/probe")):
        answer = await service.internal.request(method, path, headers={"baton-secret": "wrong"}, json={"revision": ""})
        assert answer.status_code == 401
        assert (await service.harness.http.request(method, path, json={})).status_code == 404


async def test_a_rollout_under_traffic_loses_nothing_and_mixes_nothing(service: Service) -> None:
    """Old pair, traffic, new pair beside it, probe, switch, old pair drained: as the operator does it."""
    service.serve("old")
    old = [await service.prefill("old"), await service.decode("old", model=FakeModel(step_s=0.005))]
    await service.until_ready(old=(1, 1))
    whole = await service.text(max_tokens=30)
    texts: list[str] = []
    is_over = False

    async def traffic(number: int) -> None:
        while not is_over:
            texts.append(await service.text(max_tokens=30))

    clients = [asyncio.create_task(traffic(number)) for number in range(4)]
    new = [await service.prefill("new"), await service.decode("new", model=FakeModel(step_s=0.005))]
    await service.until_ready(old=(1, 1), new=(1, 1))
    num_before = len(texts)
    assert new[1].metric("baton_placements_total", path="remote", reason="policy_always") == 0  # not a request yet
    assert (await service.probe("new"))["ok"] is True
    service.serve("new")
    await service.until_serving("new")
    await asyncio.gather(*(worker.end() for worker in old))
    num_after_drain = len(texts)
    while len(texts) < num_after_drain + 8:
        await asyncio.sleep(0.02)
        assert not any(client.done() for client in clients), "a request failed"
    is_over = True
    await asyncio.gather(*clients)
    assert num_after_drain > num_before
    assert set(texts) == {whole}
    async with asyncio.timeout(PATIENCE_S):
        while list((status := await service.status())["revisions"]) != ["new"]:
            await asyncio.sleep(0.05)
    assert (status["servingRevision"], status["routedRevision"]) == ("new", "new")
    assert status["registry"]["connected"] is True


async def test_a_revision_that_loses_its_prefill_workers_hands_over_to_the_complete_one(service: Service) -> None:
    service.serve("new")
    for revision in ("old", "new"):
        prefill = await service.prefill(revision)
        await service.decode(revision)
    await service.until_ready(old=(1, 1), new=(1, 1))
    await service.until_serving("new")
    whole = await service.text()
    assert (await service.status())["routedRevision"] == "new"
    await prefill.end()
    await service.until_ready(old=(1, 1), new=(0, 1))
    assert (await service.status())["routedRevision"] == "old"
    assert await service.text() == whole
