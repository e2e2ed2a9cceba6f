"""In which order does a prefill worker take prompts?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefill_service.urgency import BASE_S, SLACK, due_in_s

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
