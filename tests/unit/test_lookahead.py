"""A step ahead: what is predicted, what counts as predicted, and that it changes no token whatever happens between.

`tests/unit/test_engine_remote.py` walks two engines at random; in half of the walks their runners look ahead.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from engine.batch import Chunk
from engine.lookahead import MAX_PAUSE_STEPS, Backoff, Lookahead, Row, predict
from engine.request import SampledToken, SamplingParams
from engine.request import Sequence as Tokens
from tests.unit.engine_world import World
from tests.unit.late_runner import LateRunner

BLOCK = 4
LIMIT = 64


def decoding(num_tokens: int = 7, key: int = 0, num_blocks: int = 4, **sampling: object) -> Tokens:
    """Five prompt tokens; all known tokens but the last are computed."""
    params = SamplingParams(**{"max_tokens": 20, **sampling})  # pyright: ignore[reportArgumentType]
    table = array("i", range(10 * key, 10 * key + num_blocks))
    return Tokens(key, key, 0, params, list(range(num_tokens)), 5, table, num_tokens - 1)


def chunk_of(sequence: Tokens) -> Chunk:
    return Chunk(sequence, sequence.num_tokens - 1, 1, (sequence,))


def predicted(*sequences: Tokens) -> tuple[Row, ...]:
    return predict([chunk_of(each) for each in sequences], range(len(sequences)), BLOCK, LIMIT)


def test_the_next_token_of_each_is_predicted_with_its_draw_and_its_block() -> None:
    first, second = decoding(7), decoding(9, key=1)
    assert predicted(first, second) == (
        Row(Chunk(first, 7, 1, (first,)), 0, first.block_table, 1),
        Row(Chunk(second, 9, 1, (second,)), 1, second.block_table, 12),
    )


def test_who_ends_by_its_length_is_left_out_and_the_others_are_not() -> None:
    one, other = decoding(7, max_tokens=3), decoding(7, key=1)
    assert [row.chunk.sequence for row in predicted(one, other)] == [other]
    assert [row.source for row in predicted(one, other)] == [1]
    assert len(predicted(decoding(7, max_tokens=4))) == 1


def test_nothing_is_predicted_beyond_the_models_length() -> None:
    chunks = [chunk_of(decoding(7))]
    assert predict(chunks, [0], BLOCK, 8) == ()
    assert len(predict(chunks, [0], BLOCK, 9)) == 1


@pytest.mark.parametrize(
    "hindrance",
    [
        pytest.param(decoding(8, num_blocks=2), id="no-slot"),
        pytest.param(decoding(7, presence_penalty=0.1), id="penalties"),
        pytest.param(decoding(5), id="last-of-a-prompt"),
    ],
)
def test_one_that_cannot_be_predicted_stops_the_prediction_for_all(hindrance: Tokens) -> None:
    assert predicted(decoding(7, key=1), hindrance) == ()


def test_a_step_with_a_prompts_chunk_or_with_forks_is_not_followed_by_a_prediction() -> None:
    own, fork = decoding(7), decoding(7, key=1)
    for chunk in (Chunk(own, 5, 2, (own,)), Chunk(own, 6, 1, ()), Chunk(own, 6, 1, (own, fork))):
        assert predict([chunk], [0], BLOCK, LIMIT) == ()


def test_after_each_miss_in_a_row_it_waits_twice_as_long_and_a_hit_forgives() -> None:
    backoff = Backoff()
    waited: list[int] = []
    for _ in range(6):
        backoff.note(hit=False)
        waited.append(next(i for i in range(100) if backoff.may_predict()))
    assert waited == [1, 2, 4, MAX_PAUSE_STEPS, MAX_PAUSE_STEPS, MAX_PAUSE_STEPS]
    backoff.note(hit=True)
    assert backoff.may_predict()
    backoff.note(hit=False)
    assert [backoff.may_predict(), backoff.may_predict()] == [False, True]


# ------------------------------------------------------------------ what counts as predicted


@dataclass
class Log:
    """Launches, each drawing 100 for its first chunk, 101 for its second, ..."""

    launches: list[tuple[list[tuple[int, int]], list[int] | None]]

    def __call__(self, chunks: tuple[Chunk, ...], sources: Sequence[int] | None) -> Log.Drawn:
        drawn = [SampledToken(chunk.sequence.sequence_id, 100 + i) for i, chunk in enumerate(chunks)]
        where = [(chunk.sequence.sequence_id, chunk.start) for chunk in chunks]
        self.launches.append((where, None if sources is None else list(sources)))
        return Log.Drawn(drawn)

    @dataclass
    class Drawn:
        drawn: list[SampledToken]

        def tokens(self) -> list[SampledToken]:
            return self.drawn


def go_on(*sequences: Tokens) -> tuple[Chunk, ...]:
    """The next batch, if nothing came between."""
    for i, sequence in enumerate(sequences):
        sequence.token_ids.append(100 + i)
        sequence.num_computed_tokens += 1
    return tuple(chunk_of(each) for each in sequences)


def test_a_batch_as_predicted_launches_nothing_but_the_step_after_it() -> None:
    log = Log([])
    lookahead = Lookahead(log, BLOCK, LIMIT)
    first, second = decoding(7), decoding(7, key=1)
    lookahead.execute((chunk_of(first), chunk_of(second)))
    chunks = go_on(first, second)
    assert [token.sequence_id for token in lookahead.execute((chunks[1], chunks[0]))] == [1, 0]
    assert log.launches == [
        ([(0, 6), (1, 6)], None),
        ([(0, 7), (1, 7)], [0, 1]),
        ([(1, 8), (0, 8)], [1, 0]),
    ]
    assert (lookahead.num_hits, lookahead.num_misses) == (1, 0)


def moved(sequence: Tokens) -> None:
    sequence.block_table = array("i", sequence.block_table)  # the same blocks, given anew


def copied(sequence: Tokens) -> None:
    sequence.block_table[1] = 99


def told_otherwise(sequence: Tokens) -> None:
    sequence.token_ids[-1] = 55


@pytest.mark.parametrize("change", [moved, copied, told_otherwise])
def test_a_row_whose_memory_or_token_changed_is_computed_anew(change: Callable[[Tokens], None]) -> None:
    log = Log([])
    lookahead = Lookahead(log, BLOCK, LIMIT)
    changed, other = decoding(6), decoding(6, key=1)
    lookahead.execute((chunk_of(changed), chunk_of(other)))
    chunks = go_on(changed, other)
    change(changed)
    tokens = lookahead.execute(chunks)
    assert log.launches[2:] == [([(0, 6)], None)]
    assert [(token.sequence_id, token.token_id) for token in tokens] == [(0, 100), (1, 101)]
    assert (lookahead.num_hits, lookahead.num_misses) == (0, 1)


def test_another_sequence_with_the_same_blocks_is_not_the_predicted_one() -> None:
    log = Log([])
    lookahead = Lookahead(log, BLOCK, LIMIT)
    sequence = decoding(7)
    lookahead.execute((chunk_of(sequence),))
    (chunk,) = go_on(sequence)
    twin = replace(sequence)
    lookahead.execute((replace(chunk, sequence=twin, samplers=(twin,)),))
    assert log.launches[2:] == [([(0, 7)], None)]


def test_a_newcomer_runs_beside_the_rows_in_flight_and_nothing_is_predicted_after_it() -> None:
    log = Log([])
    lookahead = Lookahead(log, BLOCK, LIMIT)
    sequence, newcomer = decoding(7), decoding(7, key=1)
    lookahead.execute((chunk_of(sequence),))
    tokens = lookahead.execute((*go_on(sequence), chunk_of(newcomer)))
    assert [token.sequence_id for token in tokens] == [0, 1]
    assert log.launches[2:] == [([(1, 6)], None)]


# ------------------------------------------------------------------ with an engine, on a device that lags behind


def test_decodes_come_as_predicted_across_block_borders() -> None:
    world = World({"reserve_ahead": True})
    for seed in range(3):
        world.add([3, 1, 2], SamplingParams(max_tokens=21, seed=seed, ignore_eos=True))
    world.settle()
    runner = world.decode_runner
    assert isinstance(runner, LateRunner)
    assert runner.lookahead.num_misses == 0
    assert runner.lookahead.num_hits >= 18, "21 tokens: one of the prompt, one decode before the first prediction"


@pytest.mark.parametrize("seed", range(40))
def test_arrivals_cancels_preemptions_and_forks_change_no_token(seed: int) -> None:
    """The world compares each token with what the model says, and the runner each slot that attention would read."""
    walk = random.Random(seed)
    world = World(
        {"reserve_ahead": True, "num_blocks": walk.randint(10, 24), "constant_estimate": 1, "max_model_len": 40}
    )
    for _ in range(walk.randint(4, 12)):
        live = [client for client in world.clients.values() if client.ended is None]
        if live and walk.random() < 0.3:
            world.cancel(walk.choice(live), walk.choice([(), (0,), (1,)]))
        prompt = [walk.randint(1, 2) for _ in range(walk.randint(1, 20))]
        penalty = walk.choice([0.0, 0.0, 0.0, 0.5])
        sampling = SamplingParams(max_tokens=walk.randint(1, 12), seed=seed, frequency_penalty=penalty)
        world.add(prompt, sampling, {choice: walk.randint(0, 4) for choice in range(walk.randint(1, 3))})
        for _ in range(walk.randint(0, 6)):
            world.step_decode()
    world.settle()


def test_blocks_are_reserved_ahead_only_where_they_are_left_over() -> None:
    """Two sequences fill the pool exactly: neither a block reserved early nor a dropped row costs the other one."""
    world = World({"reserve_ahead": True, "num_blocks": 5, "max_model_len": 16, "prefix_caching": False})
    world.add([3, 1, 2], SamplingParams(max_tokens=13, ignore_eos=True))
    world.add([3, 1], SamplingParams(max_tokens=3, seed=1, ignore_eos=True))
    world.settle()
    assert world.decode.counters.preemptions == world.decode.counters.stalled_steps == 0


def test_the_last_token_of_a_sequence_reserves_nothing_ahead() -> None:
    """Eight positions are computed, in two blocks: a third one would be for a token that is never fed."""
    world = World({"reserve_ahead": True, "num_blocks": 3, "max_model_len": 12, "prefix_caching": False})
    world.add([3, 1, 2], SamplingParams(max_tokens=6, ignore_eos=True))
    world.settle()
    pool = world.decode._memory.pool
    assert sum(pool.generation(block) for block in range(3)) == 2, "how often any block was handed out"
