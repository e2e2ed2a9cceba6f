"""Hundreds of random kills of prefill and decode workers: `make soak`. $BATON_SOAK_KILLS, $BATON_CHAOS_SEED."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from bench.service import running_service
from tests.e2e import census
from tests.e2e.chaos import Chaos, run_kills, workloads

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

NUM_TOKENS = 96
NUM_KILLS = int(os.environ.get("BATON_SOAK_KILLS", "300"))
SEED = int(os.environ.get("BATON_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def test_hundreds_of_kills_change_no_stream(model: str, deterministic: bool, tiny_llama: Path) -> None:
    """A tiny model makes more kills a minute; SmolLM2 has longer steps and larger blocks."""
    print(f"\n{model}: {NUM_KILLS} kills, BATON_CHAOS_SEED={SEED}", flush=True)
    engine = {"maxBatchedTokens": 128, "maxModelLen": 2048}
    is_tiny = model == "tiny"
    with running_service(
        prefill=2, decode=3, disaggregation="Always", deterministic=deterministic, num_threads=1, engine=engine,
        model=str(tiny_llama) if is_tiny else model, kv_memory="8Mi" if is_tiny else "256Mi",
    ) as service:  # fmt: skip
        chaos = Chaos(service, workloads(NUM_TOKENS if is_tiny else NUM_TOKENS // 2), deterministic)
        num_tokens = NUM_TOKENS if is_tiny else NUM_TOKENS // 2
        report = asyncio.run(run_kills(chaos, NUM_KILLS, SEED, num_tokens, lambda word: print(word, flush=True)))
        census.at_rest(service)
        errors = census.errors_in_logs(service)
    assert not errors, "\n".join(errors)
    assert not report.failed, "\n".join(report.failed)
    assert not report.diverged, "\n".join(report.diverged)
