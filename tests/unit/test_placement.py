"""Where a prompt is prefilled, and the reason that is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_service.placement import (
    CandidateFacts,
    LocalFacts,
    Policy,
    PrefillPath,
    PromptFacts,
    Reason,
    place,
    predict_local_s,
    predict_remote_s,
)

LOCAL = LocalFacts(
    block_size=16,
    kv_bytes_per_token=46080,
    prefill_tokens_per_s=500.0,
    num_waiting_tokens=0,
    num_running=0,
    transfer_bytes_per_s=1e9,
)
LONG = PromptFacts(num_prompt_tokens=2000, num_cached_tokens=0)
IDLE = CandidateFacts(predicted_queue_s=0.0, prefill_tokens_per_s=500.0)


def test_never_is_local_even_with_candidates() -> None:
    assert place(Policy.NEVER, LONG, LOCAL, [IDLE]).reason is Reason.POLICY_NEVER


def test_always_is_remote_even_for_a_short_prompt() -> None:
    placement = place(Policy.ALWAYS, PromptFacts(3, 0), LOCAL, [IDLE])
    assert (placement.path, placement.reason) == (PrefillPath.REMOTE, Reason.POLICY_ALWAYS)


@pytest.mark.parametrize("policy", [Policy.AUTO, Policy.ALWAYS])
def test_without_a_candidate_it_is_local(policy: Policy) -> None:
    placement = place(policy, LONG, LOCAL, [])
    assert (placement.path, placement.reason) == (PrefillPath.LOCAL, Reason.NO_CANDIDATE)


def test_a_prompt_that_is_cached_but_for_a_block_stays() -> None:
    assert place(Policy.AUTO, PromptFacts(2000, 1990), LOCAL, [IDLE]).reason is Reason.ONE_BLOCK


def test_an_idle_decode_worker_prefills_itself() -> None:
    assert place(Policy.AUTO, LONG, LOCAL, [IDLE]).reason is Reason.LOCAL_FASTER


def test_running_sequences_send_a_long_prompt_away() -> None:
    assert place(Policy.AUTO, LONG, replace(LOCAL, num_running=8), [IDLE]).reason is Reason.REMOTE_FASTER


def test_a_busy_prefill_pool_brings_it_back() -> None:
    busy = replace(IDLE, predicted_queue_s=60.0)
    assert place(Policy.AUTO, LONG, replace(LOCAL, num_running=8), [busy]).reason is Reason.LOCAL_FASTER


def test_a_slow_wire_brings_it_back() -> None:
    slow = replace(LOCAL, num_running=8, transfer_bytes_per_s=1e6)
    assert place(Policy.AUTO, LONG, slow, [IDLE]).reason is Reason.LOCAL_FASTER


def test_the_wire_of_an_unmeasured_transfer_is_taken_to_be_a_loopback_one() -> None:
    unmeasured = replace(LOCAL, transfer_bytes_per_s=0.0)
    assert predict_remote_s(LONG, unmeasured, IDLE) == predict_remote_s(LONG, LOCAL, IDLE)
    assert predict_remote_s(LONG, replace(LOCAL, transfer_bytes_per_s=1e7), IDLE) > predict_remote_s(LONG, LOCAL, IDLE)


def test_before_anything_was_measured_it_is_local() -> None:
    unknown = replace(LOCAL, prefill_tokens_per_s=0.0, num_running=8)
    assert place(Policy.AUTO, LONG, unknown, [IDLE]).reason is Reason.SPEED_UNKNOWN


@given(
    prompt=st.integers(17, 100_000),
    running=st.integers(0, 64),
    waiting=st.integers(0, 100_000),
    queue=st.floats(0, 100),
    speed=st.floats(0, 1e5),
)
def test_auto_takes_the_smaller_cost_and_reports_both(
    prompt: int, running: int, waiting: int, queue: float, speed: float
) -> None:
    facts, local = PromptFacts(prompt, 0), replace(LOCAL, num_running=running, num_waiting_tokens=waiting)
    candidate = CandidateFacts(queue, speed)
    placement = place(Policy.AUTO, facts, local, [candidate])
    assert placement.local_s == predict_local_s(facts, local)
    assert placement.remote_s == predict_remote_s(facts, local, candidate)
    assert (placement.path is PrefillPath.REMOTE) == (placement.remote_s < placement.local_s)
