"""The token log: what is committed, what is dropped, what ends a choice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import TokenGap
from gateway.token_log import Finish, FinishReason, StopRules, TokenLog, Verdict


def make_log(num_choices: int = 1, **rules: object) -> TokenLog:
    log = TokenLog(num_choices, StopRules(**({"max_tokens": 100} | rules)))  # type: ignore[arg-type]
    log.begin_attempt()
    return log


def test_tokens_in_order_are_committed() -> None:
    log = make_log()
    assert [log.append(1, 0, index, 10 + index) for index in range(3)] == [Verdict.COMMITTED] * 3
    assert log.choices[0].token_ids == [10, 11, 12]
    assert log.num_committed == 3


def test_a_duplicate_is_dropped_and_changes_nothing() -> None:
    log = make_log()
    log.append(1, 0, 0, 10)
    assert log.append(1, 0, 0, 99) is Verdict.DUPLICATE
    assert log.choices[0].token_ids == [10]


def test_a_gap_fails_the_attempt_and_commits_nothing() -> None:
    log = make_log()
    log.append(1, 0, 0, 10)
    with pytest.raises(TokenGap, match="choice 0: expected index 1, got 2"):
        log.append(1, 0, 2, 12)
    assert log.choices[0].token_ids == [10]


def test_a_choice_that_was_never_asked_for_fails_the_attempt() -> None:
    with pytest.raises(TokenGap):
        make_log(2).append(1, 2, 0, 10)


@pytest.mark.parametrize("attempt", [0, 1, 3])
def test_tokens_of_another_attempt_are_dropped(attempt: int) -> None:
    log = make_log()
    log.begin_attempt()
    assert log.append(attempt, 0, 0, 10) is Verdict.OLD_ATTEMPT
    assert log.num_committed == 0


def test_a_new_attempt_continues_where_the_log_ends() -> None:
    log = make_log()
    log.append(1, 0, 0, 10)
    attempt = log.begin_attempt()
    assert log.append(attempt, 0, 1, 11) is Verdict.COMMITTED
    assert log.choices[0].token_ids == [10, 11]


@pytest.mark.parametrize(
    ("rules", "tokens", "finish"),
    [
        ({"max_tokens": 2}, [5, 6], Finish(FinishReason.LENGTH)),
        ({"eos_token_ids": frozenset({6})}, [5, 6], Finish(FinishReason.STOP)),
        ({"stop_token_ids": frozenset({6})}, [5, 6], Finish(FinishReason.STOP, 6)),
        ({"stop_token_ids": frozenset({6}), "eos_token_ids": frozenset({6})}, [6], Finish(FinishReason.STOP, 6)),
        ({"eos_token_ids": frozenset({6}), "min_tokens": 3}, [6, 6], None),
        ({"eos_token_ids": frozenset({6}), "min_tokens": 2}, [5, 6], Finish(FinishReason.STOP)),
        ({"max_tokens": 2, "eos_token_ids": frozenset({6})}, [5, 6], Finish(FinishReason.STOP)),
        ({"max_tokens": 3}, [5, 6], None),
    ],
)
def test_the_log_itself_knows_when_a_choice_is_finished(
    rules: dict[str, object], tokens: list[int], finish: Finish | None
) -> None:
    log = make_log(**rules)
    for index, token in enumerate(tokens):
        log.append(1, 0, index, token)
    assert log.choices[0].finish == finish
    assert log.is_complete is (finish is not None)


def test_tokens_after_the_finish_are_dropped() -> None:
    log = make_log(max_tokens=1)
    log.append(1, 0, 0, 10)
    assert log.append(1, 0, 1, 11) is Verdict.FINISHED


def test_the_first_reason_to_finish_stands() -> None:
    log = make_log()
    log.finish(0, Finish(FinishReason.STOP, "x"))
    log.finish(0, Finish(FinishReason.LENGTH))
    assert log.choices[0].finish == Finish(FinishReason.STOP, "x")
    assert log.num_unfinished == 0


def test_a_finished_choice_leaves_the_others_running() -> None:
    log = make_log(3)
    log.finish(1, Finish(FinishReason.STOP))
    assert log.unfinished() == [0, 2]
    assert not log.is_complete


@given(
    st.lists(
        st.one_of(
            st.just("new attempt"),
            st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 8)),
        ),
        max_size=60,
    )
)
def test_whatever_arrives_the_log_is_contiguous_and_only_grows(arrivals: list[object]) -> None:
    """T5: indices are contiguous; what was committed is never changed."""
    log = make_log(2, max_tokens=6)
    seen: list[list[int]] = [[], []]
    for number, arrival in enumerate(arrivals):
        if isinstance(arrival, tuple):
            attempt, choice, index = arrival
            try:
                log.append(attempt, choice, index, number)
            except TokenGap:
                log.begin_attempt()
        else:
            log.begin_attempt()
        for choice in range(2):
            ids = log.choices[choice].token_ids
            assert ids[: len(seen[choice])] == seen[choice]
            assert len(ids) <= 6
            seen[choice] = list(ids)
    assert log.num_committed == sum(map(len, seen))
