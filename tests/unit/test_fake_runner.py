"""The fake runner sees memory faults: every kind of them is an assertion failure here."""

from __future__ import annotations

from array import array

import pytest

from engine.batch import Batch, Chunk
from engine.fake_runner import FakeRunner, expected_output
from engine.request import SamplingParams, Sequence


def sequence(token_ids: list[int], table: list[int], computed: int = 0, choice: int = 0) -> Sequence:
    return Sequence(choice, 1, choice, SamplingParams(seed=4), token_ids, len(token_ids), array("i", table), computed)


def run(runner: FakeRunner, each: Sequence, end: int, copies: tuple[tuple[int, int], ...] = ()) -> list[int]:
    chunk = Chunk(each, each.num_computed_tokens, end - each.num_computed_tokens, (each,))
    tokens = runner.execute(Batch(copies, (chunk,)))
    each.num_computed_tokens = end
    return [token.token_id for token in tokens]


def test_the_next_token_depends_on_tokens_seed_choice_and_position_only():
    runner = FakeRunner(8, 2)
    whole, parts = sequence([1, 2, 3, 4, 5], [0, 1, 2]), sequence([1, 2, 3, 4, 5], [7, 3, 5])
    run(runner, parts, 3)
    token = run(runner, whole, 5)
    assert run(runner, parts, 5) == token == expected_output([1, 2, 3, 4, 5], SamplingParams(max_tokens=1, seed=4))
    assert run(runner, sequence([1, 2, 3, 4, 5], [0, 1, 2], 4), 5) == token
    other = [run(runner, sequence([1, 2, 3, 4, 5], [0, 1, 2], 4, choice), 5) for choice in range(1, 5)]
    assert any(each != token for each in other)


def test_a_wrong_block_table_is_seen():
    runner = FakeRunner(8, 2)
    each = sequence([1, 2, 3, 4, 5], [0, 1, 2])
    run(runner, each, 4)
    each.block_table[1] = 5
    with pytest.raises(AssertionError, match="KV of position 2 is not in block 5 slot 0"):
        run(runner, each, 5)


def test_a_block_given_to_another_sequence_is_seen():
    runner = FakeRunner(8, 2)
    each = sequence([1, 2, 3], [0, 1])
    run(runner, each, 2)
    run(runner, sequence([9, 9], [0]), 2)
    with pytest.raises(AssertionError, match="KV of position 0"):
        run(runner, each, 3)


def test_a_missed_copy_on_write_is_seen():
    runner = FakeRunner(8, 2)
    one = sequence([1, 2, 3, 4], [0, 1], 0)
    run(runner, one, 3)
    two = sequence([1, 2, 3, 5], [0, 1], 3, choice=1)
    both = tuple(Chunk(each, 3, 1, (each,)) for each in (one, two))
    with pytest.raises(AssertionError, match="two sequences write block 1 slot 1"):
        runner.execute(Batch((), both))


def test_copies_run_before_anything_is_read():
    runner = FakeRunner(8, 2)
    run(runner, sequence([1, 2, 3], [0, 1]), 3)
    run(runner, sequence([1, 2, 3, 5], [0, 4], 3), 4, copies=((1, 4),))


def test_zeroed_slots_are_zero_and_the_rest_is_kept():
    runner = FakeRunner(2, 4)
    run(runner, sequence([1, 2, 3, 4], [1]), 4)
    before = bytes(runner.block(1))
    runner.zero_slots(1, 3)
    assert bytes(runner.block(1)) == before[:24] + bytes(8)
