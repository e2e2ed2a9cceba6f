"""The product on the Triton kernels, in Triton's interpreter: `baton up --device cpu --kernels triton` on a tiny model.

A prefill worker runs chunked attention, its KV is handed over, a decode worker runs paged attention; every token is the
one that the native kernels draw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.service import Service, running_service
from tests.e2e import census

pytestmark = pytest.mark.timeout(400)

ENGINE = {"maxModelLen": 96, "maxNumSeqs": 4, "blockSize": 8}
ROLES = ("prefill", "decode")
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "The quick brown fox jumps over", "temperature": 0, "max_tokens": 5, "logprobs": 1},
    {
        "prompt": "Call me Ishmael. ", "temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 4, "n": 2,
        "extra_body": {"min_p": 0.02},
    },
]  # fmt: skip


@contextlib.contextmanager
def serving(model: Path, kernels: str, *, deterministic: bool) -> Iterator[Service]:
    """One prefill and one decode worker, every prompt handed over."""
    with running_service(
        model=str(model),
        disaggregation="Always",
        deterministic=deterministic,
        num_threads=1,
        kv_memory="16Mi",
        engine={**ENGINE, "kernels": kernels, "device": "cpu"},
    ) as service:
        yield service


def answers(service: Service) -> list[list[tuple[str, Any]]]:
    """Greedy, seeded, and two choices of one prompt."""
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    given = []
    for request in REQUESTS:
        answer = client.completions.create(model=service.model_id, timeout=120, **request)
        given.append([(choice.text, choice.finish_reason) for choice in answer.choices])
    return given


@pytest.fixture(scope="module")
def wanted(tiny_llama: Path) -> list[list[tuple[str, Any]]]:
    """What the native kernels answer, which is the same in either mode."""
    with serving(tiny_llama, "native", deterministic=False) as service:
        return answers(service)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_prefill_and_decode_on_triton_draw_the_tokens_of_the_native_kernels(
    tiny_llama: Path, wanted: list[list[tuple[str, Any]]], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")  # the workers ask for the interpreter themselves
    with serving(tiny_llama, "triton", deterministic=deterministic) as service:
        before = attention_calls(service)
        assert answers(service) == wanted
        after = attention_calls(service)
        for role in ROLES:
            assert census.total(service, "baton_kernels_info", role=role, kernels="triton", device="cpu") == 1
        assert census.total(service, "baton_transfers_total", role="decode", outcome="committed") >= len(REQUESTS)
    assert {name for name in after if after[name] > before[name]} == {
        ("prefill", "chunked_prefill"),
        ("decode", "paged_decode"),
    }


def attention_calls(service: Service) -> dict[tuple[str, str], float]:
    """What was run by the workers so far, their warm-up included."""
    return {
        (role, kernel): census.total(service, "baton_attention_calls_total", role=role, kernel=kernel)
        for role in ROLES
        for kernel in ("chunked_prefill", "paged_decode")
    }
