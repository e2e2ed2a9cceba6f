"""In which order does a prefill worker take prompts, and how much of one in a step?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from prefill_service.config import PrefillConfig
from prefill_service.urgency import BASE_S, SLACK, due_in_s
from prefill_service.worker import step_tokens

SPEED = 400.0


def test_a_feasible_objective_is_the_due_time() -> None:
    assert due_in_s(400, SPEED, ttft_left_s=1.5) == 1.5


def test_an_objective_that_cannot_be_met_gives_no_precedence() -> None:
    assert due_in_s(4000, SPEED, ttft_left_s=1.5) == due_in_s(4000, SPEED, ttft_left_s=0.0)


def test_without_an_objective_a_prompt_gets_time_in_proportion_to_its_length() -> None:
    assert due_in_s(400, SPEED, 0.0) == BASE_S + SLACK * 1.0
    assert due_in_s(64, SPEED, 0.0) < due_in_s(1536, SPEED, 0.0)


def test_an_unknown_speed_still_orders_by_length() -> None:
    assert due_in_s(64, 0.0, 0.0) < due_in_s(1536, 0.0, 0.0)


@given(
    shorter=st.integers(1, 10_000),
    more=st.integers(0, 10_000),
    speed=st.floats(0, 1e6),
    objective=st.floats(0, 100),
)
def test_a_longer_prompt_is_never_due_before_a_shorter_one_with_the_same_objective(
    shorter: int, more: int, speed: float, objective: float
) -> None:
    assert due_in_s(shorter, speed, objective) <= due_in_s(shorter + more, speed, objective)


@given(tokens=st.integers(1, 1 << 20), speed=st.floats(1, 1e6), objective=st.floats(0, 1e6))
def test_the_allowance_is_bounded_by_length_and_objective(tokens: int, speed: float, objective: float) -> None:
    assert 0 < due_in_s(tokens, speed, objective) <= 1.0001 * max(objective, BASE_S + SLACK * tokens / speed)


@pytest.mark.parametrize(("max_num_seqs", "step"), [(8, 192), (128, 192), (256, 320)])
def test_a_step_has_room_for_what_the_engine_demands_whatever_the_number_of_sequences(
    max_num_seqs: int, step: int
) -> None:
    config = PrefillConfig(model=Path("m"), worker_id="p", secret_file=Path("s"), max_num_seqs=max_num_seqs)
    assert step_tokens(config) == step
    EngineConfig(num_blocks=8, max_num_seqs=max_num_seqs, max_num_batched_tokens=step)
