"""Counts for penalties: the same as a recount, at the price of what is new."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from engine.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 6), max_size=12)


class Watched(list[int]):
    """Tokens that remember which of them were looked at."""

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__(token_ids)
        self.seen: list[slice] = []

    def __getitem__(self, index):  # pyright: ignore  # both overloads of list, for slices only
        self.seen.append(index)
        return super().__getitem__(index)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(TOKENS, min_size=1, max_size=5))
def test_counts_brought_up_to_date_equal_a_recount(prompt: list[int], parts: list[list[int]]):
    counts, token_ids = TokenCounts(), list(prompt)
    for part in parts:
        token_ids += part
        counts.advance(token_ids, len(prompt))
        output = Counter(token_ids[len(prompt) :])
        assert list(counts.ids) == list(dict.fromkeys(token_ids))
        assert [output[token_id] for token_id in counts.ids] == list(counts.num_output)


def test_a_token_more_looks_at_that_token_alone():
    token_ids, counts = Watched([1, 2, 3] * 100), TokenCounts()
    counts.advance(token_ids, 300)
    token_ids.seen.clear()
    token_ids.append(2)
    counts.advance(token_ids, 300)
    assert [len(range(*each.indices(301))) for each in token_ids.seen] == [1]
