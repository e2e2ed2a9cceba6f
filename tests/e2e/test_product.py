"""The product as a user has it: `baton up`, real processes, the real SmolLM2, the real openai client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import Generator
from typing import Any

import openai
import pytest

from bench.service import Service, running_service
from tests.e2e import census
from tests.e2e.chaos import Chaos, run_kills, wait_until_gone, workloads
from tests.e2e.reference import PROMPTS, reference_texts

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service() -> Generator[Service]:
    """Two prefill and two decode workers, every prompt handed over, deterministic."""
    with running_service(
        prefill=2, decode=2, disaggregation="Always", deterministic=True, kv_memory="384Mi"
    ) as service:
        yield service


@pytest.fixture(scope="module")
def colocated() -> Generator[Service]:
    """One decode worker that prefills for itself, deterministic, with another chunk size and without prefix caching."""
    engine = {"maxBatchedTokens": 72, "maxNumSeqs": 8, "prefixCaching": False}
    with running_service(
        prefill=0, decode=1, disaggregation="Never", deterministic=True, engine=engine, kv_memory="384Mi"
    ) as service:
        yield service


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def test_twenty_chats_stream_the_tokens_of_transformers_through_the_hand_over(service: Service) -> None:
    expected = reference_texts()
    client, before = client_of(service), census.total(service, "baton_placements_total", role="decode", path="remote")
    for prompt in PROMPTS:
        chunks = client.chat.completions.create(
            model=service.model_id,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=64,
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected[prompt], prompt
    assert census.total(service, "baton_placements_total", role="decode", path="remote") - before == len(PROMPTS)


def test_disaggregated_equals_colocated_byte_for_byte(service: Service, colocated: Service) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "Once upon a time", "temperature": 0.8, "seed": 5, "n": 3},
        {"prompt": "word " * 300, "temperature": 1.0, "top_p": 0.9, "seed": 6, "presence_penalty": 0.4},
        {"prompt": "The list: 1, 2, 3,", "temperature": 0, "logprobs": 3},
        {"prompt": [100], "temperature": 0.5, "top_k": 20, "min_p": 0.05, "seed": 9},
    ]
    for request in requests:
        answers = [
            client_of(s).completions.create(
                model=s.model_id, max_tokens=32, extra_body=_extras(request), **_plain(request)
            )
            for s in (service, colocated)
        ]
        split, alone = ([choice.model_dump() for choice in answer.choices] for answer in answers)
        assert split == alone, request


_EXTRAS = ("top_k", "min_p")  # vLLM's fields, which the client does not know


def _extras(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key in _EXTRAS}


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in _EXTRAS}


def test_a_batch_of_many_gives_each_what_it_gets_alone(service: Service) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await client.completions.create(
            model=service.model_id, prompt=prompt, max_tokens=24, temperature=0.9, seed=3
        )
        return answer.choices[0].text

    async def ask_all(at_once: int) -> list[str]:
        gate = asyncio.Semaphore(at_once)
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                async with gate:
                    return await ask(client, prompt)

            return await asyncio.gather(*(one(prompt * (1 + i % 7)) for i, prompt in enumerate(PROMPTS)))

    assert asyncio.run(ask_all(1)) == asyncio.run(ask_all(20))


def test_half_a_dozen_random_kills_change_no_stream(service: Service) -> None:
    seed = int(os.environ.get("BATON_CHAOS_SEED", "1"))
    report = asyncio.run(run_kills(Chaos(service, workloads(48)), num_kills=6, seed=seed, num_tokens=48))
    assert not report.failed
    assert not report.diverged


def test_every_block_comes_back_when_all_is_quiet(service: Service) -> None:
    census.at_rest(service)


def test_kill_9_of_the_supervisor_leaves_nothing() -> None:
    with running_service(prefill=1, decode=1) as service:
        pids = [worker.pid for worker in service.workers()]
        supervisors = {_parent(pid) for pid in pids}
        for pid in supervisors:
            os.kill(pid, signal.SIGKILL)
        assert wait_until_gone(pids, timeout_s=60) == []
        assert wait_until_gone([*supervisors], timeout_s=60) == []
        run = service.run_dir / service.name  # the janitor removes files once the last process is gone
        census.eventually("only logs are left", lambda: {path.name for path in run.iterdir()} == {"logs"})


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(") ", 1)[1].split()[1])


def test_models_and_health_answer(service: Service) -> None:
    with urllib.request.urlopen(f"{service.url}/v1/models") as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == [service.model_id]
    for path in ("health", "livez", "readyz", "startupz", "metrics", "version"):
        with urllib.request.urlopen(f"{service.url}/{path}") as reply:
            assert reply.status == 200, path
