"""Too little memory, prefix cache on or off, forks, both transports: deterministic answers do not change by a bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench.service import Service, running_service
from tests.e2e import census
from tests.e2e.streams import Choice, Stream, open_stream

pytestmark = pytest.mark.timeout(600)

SYSTEM = "You are asked about rivers, towns and hills, and answer each time in the same way. "
TIGHT = "320Ki"  # 40 blocks: one request of four choices fills it
ENGINE = {"maxModelLen": 512, "maxNumSeqs": 16, "maxBatchedTokens": 80}

Answers = dict[str, dict[int, Choice]]


def requests() -> dict[str, dict[str, Any]]:
    """Prompt lengths around a block's, several chunks, a prefix in common; one to four choices."""
    prompts: list[Any] = [[100], "x" * 15, "x" * 16, "x" * 17, SYSTEM, SYSTEM + "One.", SYSTEM * 2, SYSTEM + "Two."]
    return {
        f"{number}": {
            "model": "model", "prompt": prompt, "n": 1 + number % 4, "max_tokens": 90, "ignore_eos": True,
            "temperature": 0.9, "seed": number, "logprobs": 1, "presence_penalty": 0.3 * (number % 2),
        }
        for number, prompt in enumerate(prompts)
    }  # fmt: skip


async def answers_of(service: Service, at_once: int) -> Answers:
    gate = asyncio.Semaphore(at_once)

    async def ask(kind: str, body: dict[str, Any]) -> Stream:
        async with gate:
            return await open_stream(service.host, service.port, "/v1/completions", body, kind=kind, timeout_s=240)

    asked = requests()
    streams = await asyncio.gather(*(ask(kind, body) for kind, body in asked.items()))
    for stream in streams:
        assert not stream.complaint(asked[stream.kind]["n"]), stream
    return {stream.kind: stream.choices for stream in streams}


async def teach_short_outputs(service: Service) -> None:
    """Admission guesses from lengths that it saw: with short ones it lets in more than the memory will hold."""
    body = {"model": "model", "prompt": "short", "max_tokens": 2, "ignore_eos": True, "n": 8}
    for _ in range(8):
        await open_stream(service.host, service.port, "/v1/completions", body)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Answers:
    """One worker with plenty of memory, one request after the other."""
    with running_service(
        prefill=0, decode=1, disaggregation="Never", deterministic=True, num_threads=1, model=str(tiny_llama),
        kv_memory="8Mi", engine=ENGINE | {"maxBatchedTokens": 512, "prefixCaching": False},
    ) as service:  # fmt: skip
        return asyncio.run(answers_of(service, at_once=1))


@pytest.mark.parametrize(
    ("num_prefill", "transport", "has_cache", "swap_memory"),
    [(0, "shm", True, "0"), (1, "shm", True, "0"), (1, "grpc", False, "0"), (1, "shm", True, "4MiB")],
    ids=["colocated-cache", "shm-cache", "grpc-no-cache", "shm-cache-swap"],
)
def test_tiny_memory_changes_no_bit(
    tiny_llama: Path, expected: Answers, num_prefill: int, transport: str, has_cache: bool, swap_memory: str
) -> None:
    with running_service(
        prefill=num_prefill, decode=1, disaggregation="Always" if num_prefill else "Never", deterministic=True,
        num_threads=1, model=str(tiny_llama), kv_memory=TIGHT, engine=ENGINE | {"prefixCaching": has_cache},
        environ={"BATON_TRANSPORTS": transport, "BATON_SWAP_MEMORY": swap_memory},
    ) as service:  # fmt: skip
        asyncio.run(teach_short_outputs(service))
        for _ in range(2):  # the second time the cache knows the prompts
            assert asyncio.run(answers_of(service, at_once=8)) == expected
        census.at_rest(service)
        assert census.total(service, "vllm:num_preemptions_total", role="decode") > 0
        assert census.total(service, "baton_copied_blocks_total", role="decode") > 0
        swapped = census.total(service, "baton_swapped_in_blocks_total", role="decode")
        assert (swapped > 0) == (swap_memory != "0")
        assert census.total(service, "baton_swap_ins_total") == census.total(service, "baton_swap_outs_total")
        assert census.total(service, "baton_host_blocks", state="used") == 0
        assert (census.total(service, "vllm:prefix_cache_hits_total", role="decode") > 0) == has_cache
        handed_over = census.total(service, "baton_transfers_total", transport=transport, outcome="committed")
        assert (handed_over > 0) == (num_prefill > 0)
