"""When a process that ended is started again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.local.restarts import (
    CRASH_LOOP_ENDS,
    FIRST_S,
    JITTER,
    MAX_S,
    STABLE_S,
    RestartHistory,
    after_end,
    is_hopeless,
)


def test_the_first_end_is_followed_by_a_quick_restart() -> None:
    restart = after_end(RestartHistory(), uptime_s=2.0, chance=0.5)
    assert restart.delay_s == pytest.approx(FIRST_S)
    assert not restart.is_crash_loop


def test_quick_ends_double_the_wait_up_to_its_limit_and_show_as_a_crash_loop() -> None:
    history, delays, loops = RestartHistory(), list[float](), list[bool]()
    for _ in range(12):
        restart = after_end(history, uptime_s=0.1, chance=0.5)
        history = restart.history
        delays.append(restart.delay_s)
        loops.append(restart.is_crash_loop)
    assert delays[1] == pytest.approx(2 * delays[0])
    assert delays == sorted(delays)
    assert delays[-1] == pytest.approx(MAX_S)
    assert loops.index(True) == CRASH_LOOP_ENDS - 1
    assert history.num_restarts == 12


def test_a_stable_time_starts_over() -> None:
    restart = after_end(RestartHistory(num_quick_ends=9, num_restarts=9), uptime_s=STABLE_S, chance=0.5)
    assert restart.delay_s == pytest.approx(FIRST_S)
    assert not restart.is_crash_loop
    assert restart.history.num_restarts == 10


@given(
    num_quick_ends=st.integers(0, 5000),
    uptime_s=st.floats(0, 1e6),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_the_wait_is_always_positive_and_bounded(num_quick_ends: int, uptime_s: float, chance: float) -> None:
    restart = after_end(RestartHistory(num_quick_ends=num_quick_ends), uptime_s=uptime_s, chance=chance)
    assert FIRST_S * (1 - JITTER) <= restart.delay_s <= MAX_S * (1 + JITTER)


def test_processes_killed_together_come_back_apart() -> None:
    delays = {after_end(RestartHistory(), uptime_s=1.0, chance=chance / 8).delay_s for chance in range(8)}
    assert len(delays) == 8


@pytest.mark.parametrize(
    ("num_restarts", "exit_code", "expected"),
    [(0, 2, True), (0, 78, True), (0, 1, False), (0, -9, False), (1, 1, False), (2, 1, True), (2, -9, True)],
)
def test_a_refused_setting_or_a_third_end_leaves_no_hope_for_the_start(
    num_restarts: int, exit_code: int, expected: bool
) -> None:
    assert is_hopeless(RestartHistory(num_restarts=num_restarts), exit_code) is expected
