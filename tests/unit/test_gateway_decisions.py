"""Admission, failover policy and outliers: pure decisions, as tables."""

from __future__ import annotations

import random

import pytest

from gateway.admission import Admission, AdmissionLimits
from gateway.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    GatewayError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Quarantined,
    TooManyRequests,
)
from gateway.failover import MAX_ATTEMPTS, AttemptEnd, EndKind, History, Retry, after
from gateway.worker_pool import Outliers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock, **limits: object) -> Admission:
    defaults = {"max_requests": 2, "max_tokens": 1000}
    return Admission(AdmissionLimits(**(defaults | limits)), clock, random.Random(1))  # type: ignore[arg-type]


def test_a_full_queue_refuses_with_value_limit_and_when_to_return() -> None:
    queue = admission(Clock())
    queue.admit(10, "")
    queue.admit(10, "")
    with pytest.raises(Overloaded, match=r"queued requests: 3 would exceed the limit of 2") as refused:
        queue.admit(10, "")
    assert refused.value.retry_after_s > 0
    assert queue.num_requests == 2


def test_queued_tokens_are_bounded_but_a_lone_long_prompt_may_run() -> None:
    queue = admission(Clock())
    place = queue.admit(5000, "")
    with pytest.raises(Overloaded, match="queued prompt tokens: 5010 would exceed the limit of 1000"):
        queue.admit(10, "")
    queue.leave(place)
    queue.leave(place)
    assert (queue.num_requests, queue.num_tokens) == (0, 0)


def test_one_key_cannot_take_the_whole_queue() -> None:
    queue = admission(Clock(), max_requests=4, max_key_share=0.5)
    queue.admit(1, "alice")
    queue.admit(1, "alice")
    with pytest.raises(TooManyRequests, match="share of queued requests: 3 would exceed the limit of 2"):
        queue.admit(1, "alice")
    queue.admit(1, "bob")


def test_the_time_to_return_follows_the_measured_drain() -> None:
    clock = Clock()
    queue = admission(clock, max_requests=100, max_tokens=10**9)
    for _ in range(20):
        place = queue.admit(100, "")
        clock.now += 1.0
        queue.leave(place)
    queue.admit(4000, "")  # a quarter of it leaves in 10 s at 100 tokens/s
    assert 10.0 <= queue.retry_after_s() <= 15.1


def end(kind: EndKind, committed: int = 0, accepted: bool = True) -> AttemptEnd:
    return AttemptEnd(kind, "w", committed, accepted, "why")


@pytest.mark.parametrize(
    ("history", "ended", "expected"),
    [
        (History(), end(EndKind.DRAINING), History(avoid=frozenset("w"))),
        (History(2), end(EndKind.DRAINING), History(2, avoid=frozenset("w"))),
        (History(), end(EndKind.INTERNAL), History(1, avoid=frozenset("w"))),
        (History(2), end(EndKind.INTERNAL, committed=1), History(2, avoid=frozenset("w"))),
        (History(), end(EndKind.WORKER_LOST), History(1, 1, 1, frozenset("w"))),
        (History(), end(EndKind.WORKER_SILENT), History(1, 1, 1, frozenset("w"))),
        (History(2, 0, 5), end(EndKind.WORKER_LOST, committed=3), History(2, 0, 6, frozenset("w"))),
        (History(), end(EndKind.WORKER_LOST, accepted=False), History(1, 0, 0, frozenset("w"))),
        (History(), end(EndKind.TOKEN_GAP), History(1, avoid=frozenset("w"))),
    ],
)
def test_what_an_end_costs(history: History, ended: AttemptEnd, expected: History) -> None:
    decision = after(history, ended)
    assert isinstance(decision, Retry)
    assert decision.history == expected


@pytest.mark.parametrize(
    ("history", "ended", "error"),
    [
        (History(), end(EndKind.DEADLINE), DeadlineExceeded),
        (History(), end(EndKind.INVALID), InvalidRequest),
        (History(), end(EndKind.GATEWAY_FAULT), InternalError),
        (History(MAX_ATTEMPTS - 1), end(EndKind.INTERNAL), AttemptsExhausted),
        (History(MAX_ATTEMPTS - 1), end(EndKind.OVERLOADED), Overloaded),
        (History(2, 2, 2), end(EndKind.WORKER_LOST), Quarantined),
        (History(0, 0, 64), end(EndKind.WORKER_LOST, committed=1), Quarantined),
    ],
)
def test_when_a_request_is_given_up(history: History, ended: AttemptEnd, error: type[GatewayError]) -> None:
    assert type(after(history, ended)) is error


def test_after_two_deaths_a_request_runs_alone() -> None:
    first = after(History(), end(EndKind.WORKER_LOST))
    assert isinstance(first, Retry)
    assert not first.history.must_run_alone
    second = after(first.history, end(EndKind.WORKER_LOST))
    assert isinstance(second, Retry)
    assert second.history.must_run_alone


def test_a_worker_that_refused_gets_a_moment() -> None:
    decision = after(History(), end(EndKind.OVERLOADED))
    assert isinstance(decision, Retry)
    assert decision.pause_s > 0


def test_three_failures_in_a_row_make_a_suspect_for_a_while() -> None:
    clock = Clock()
    outliers = Outliers(clock)
    for _ in range(2):
        outliers.failed("w")
    assert not outliers.is_suspect("w")
    outliers.failed("w")
    assert outliers.is_suspect("w")
    clock.now += 2.1
    assert not outliers.is_suspect("w")
    outliers.failed("w")
    clock.now += 3.9
    assert outliers.is_suspect("w")
    outliers.succeeded("w")
    assert not outliers.is_suspect("w")
