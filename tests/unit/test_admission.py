"""The future peak against a brute-force simulation, and what the length estimates promise."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.admission import ConstantLength, HistoryLength, MaximumLength, future_peak


def simulate(num_tokens: list[int], remaining: list[int], tables: list[list[int]], size: int) -> int:
    """Let every sequence grow token by token and count distinct blocks; new blocks get names of their own."""
    peak = 0
    for step in range(max(remaining, default=-1) + 1):
        used: set[object] = set()
        for which, (tokens, left) in enumerate(zip(num_tokens, remaining, strict=True)):
            if left >= step:
                needed = -(-(tokens + step) // size)
                named = tables[which][:needed]
                used |= {*named, *((which, index) for index in range(len(named), needed))}
        peak = max(peak, len(used))
    return peak


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]], int]:
    """Sequences of which some share leading blocks, as a prefix cache or a fork makes them share."""
    size = draw(st.sampled_from([1, 2, 4, 16]))
    count = draw(st.integers(1, 7))
    remaining = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    trunks = [[100 * trunk + index for index in range(6)] for trunk in range(2)]
    tokens, tables = [], []
    for which in range(count):
        length = draw(st.integers(1, 60))
        num_held = -(-length // size)
        num_shared = draw(st.integers(0, min(6, num_held)))
        trunk = trunks[draw(st.integers(0, 1))]
        own = [1000 * (which + 1) + index for index in range(num_held - num_shared)]
        tables.append([*trunk[:num_shared], *own])
        tokens.append(length)
    return tokens, remaining, tables, size


@given(workloads())
@settings(max_examples=300, deadline=None)
def test_peak_equals_brute_force_simulation(workload: tuple[list[int], list[int], list[list[int]], int]):
    tokens, remaining, tables, size = workload
    expected = simulate(tokens, remaining, tables, size)
    assert future_peak(np.array(tokens), np.array(remaining), tables, size) == expected


@given(workloads(), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_fixed_blocks_count_throughout_and_once(
    workload: tuple[list[int], list[int], list[list[int]], int], fixed: int
):
    tokens, remaining, tables, size = workload
    alone = future_peak(np.array(tokens), np.array(remaining), tables, size)
    assert future_peak(np.array(tokens), np.array(remaining), tables, size, fixed) == alone + fixed
    # A fixed holder of the longest sequence's whole table adds nothing for those blocks while it lives.
    with_table = future_peak(np.array(tokens), np.array(remaining), tables, size, 6, [list(range(6))])
    shared = len({block for table in tables for block in table if block < 6})
    assert alone + 6 - shared <= with_table <= alone + 6


def test_without_sequences_only_fixed_blocks_count():
    nothing = np.array([], dtype=np.int64)
    assert future_peak(nothing, nothing, None, 16, fixed_blocks=5) == 5


def test_tokens_are_blocks_when_a_block_is_one_token():
    # LightLLM's formula: sorted by b descending, max over i of sum a_j + i * b_i.
    assert future_peak(np.array([3, 5, 2]), np.array([10, 4, 1]), None, 1) == max(3 + 10, 8 + 2 * 4, 10 + 3 * 1)


def ask(estimator: object, drawn: list[int], maxima: list[int], quantiles: list[float]) -> list[int]:
    remaining = estimator.remaining(np.array(drawn), np.array(maxima), np.array(quantiles))  # pyright: ignore
    return remaining.tolist()


def test_maximum_runs_to_the_limit():
    assert ask(MaximumLength(), [0, 5], [10, 6], [0.0, 0.9]) == [10, 1]


def test_constant_moves_to_the_next_multiple_and_never_past_the_limit():
    assert ask(ConstantLength(8), [0, 7, 8, 9], [100, 100, 100, 10], [0.5] * 4) == [8, 1, 8, 1]


def taught(lengths: list[int]) -> HistoryLength:
    history = HistoryLength(ConstantLength(8), max_samples=100, min_samples=4)
    for length in lengths:
        history.observe(length)
    return history


def test_history_uses_the_constant_until_it_knows_enough():
    assert ask(taught([1, 1, 1]), [0], [100], [0.0]) == [8]


def test_history_draws_only_lengths_longer_than_now():
    history = taught([2, 4, 6, 20])
    assert ask(history, [4, 4, 6], [100] * 3, [0.0, 0.99, 0.0]) == [2, 16, 14]


def test_history_takes_the_limit_when_all_were_shorter():
    assert ask(taught([2, 4, 6, 8]), [8], [30], [0.5]) == [22]


def test_history_forgets_the_oldest():
    history = taught([50] * 100 + [3] * 100)
    assert ask(history, [0], [100], [0.99]) == [3]


@given(
    st.lists(st.integers(1, 50), min_size=4, max_size=40),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60), st.floats(0, 0.999)), min_size=1, max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_every_estimate_is_at_least_one_and_within_the_limit(lengths: list[int], asked: list[tuple[int, int, float]]):
    drawn = [min(now, limit - 1) for now, limit, _ in asked]
    maxima = [limit for _, limit, _ in asked]
    quantiles = [quantile for *_, quantile in asked]
    for estimator in (taught(lengths), MaximumLength(), ConstantLength(7)):
        first = ask(estimator, drawn, maxima, quantiles)
        assert first == ask(estimator, drawn, maxima, quantiles), "asking again rolls the dice again"
        assert all(1 <= left <= limit - now for left, now, limit in zip(first, drawn, maxima, strict=True))
