"""The block pool: ownership, generations, eviction order, and conservation after any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool, BlockState


def cached_pool(num_blocks: int) -> BlockPool:
    """All blocks were filled, kept and released together."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    for block in blocks:
        pool.fill(block)
        pool.keep(block)
    pool.release(blocks)
    return pool


def test_fresh_blocks_are_one_contiguous_run():
    pool = BlockPool(8)
    assert pool.allocate(5) == [0, 1, 2, 3, 4]


def test_a_run_is_preferred_to_scattered_blocks():
    pool = BlockPool(8)
    blocks = pool.allocate(8)
    pool.release([blocks[1]])
    pool.release(blocks[4:7])
    assert pool.allocate(3) == [4, 5, 6]


def test_scattered_blocks_serve_when_no_run_is_long_enough():
    pool = BlockPool(8)
    pool.allocate(8)
    for block in (1, 3, 4, 6):
        pool.release([block])
    assert sorted(pool.allocate(4)) == [1, 3, 4, 6]
    pool.check()


def test_the_next_block_follows_the_last_one_if_it_is_free():
    pool = BlockPool(8)
    first = pool.allocate(2)
    pool.allocate(1, after=5)
    assert pool.allocate(1, after=first[-1]) == [2]


def test_generation_rises_on_every_reuse():
    pool = BlockPool(1)
    for expected in (1, 2, 3):
        (block,) = pool.allocate(1)
        assert pool.generation(block) == expected
        pool.release([block])


def test_the_tail_of_a_released_sequence_is_evicted_first():
    pool = cached_pool(4)
    evicted: list[int] = []
    pool.on_evict(evicted.append)
    pool.allocate(3)
    assert evicted == [3, 2, 1]


def test_free_blocks_are_used_before_cached_ones():
    pool = BlockPool(4)
    (kept,) = pool.allocate(1)
    pool.fill(kept)
    pool.keep(kept)
    pool.release([kept])
    pool.allocate(3)
    assert pool.num_cached == 1
    pool.allocate(1)
    assert pool.num_evicted == 1


def test_a_block_is_free_only_when_request_and_transfer_are_gone():
    for request_first in (True, False):
        pool = BlockPool(1)
        blocks = pool.allocate(1)
        pool.fill(0)
        pool.pin(blocks)
        lets_go = [pool.release, pool.unpin] if request_first else [pool.unpin, pool.release]
        lets_go[0](blocks)
        assert pool.num_available == 0
        lets_go[1](blocks)
        assert pool.num_free == 1


def test_an_unfilled_block_of_a_dead_request_is_quarantined_while_a_transfer_may_write_it():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.pin(blocks)
    pool.release(blocks)
    assert pool.num_quarantined == 2
    assert pool.num_available == 0
    pool.unpin(blocks)
    assert pool.num_free == 2
    pool.check()


def test_sharing_a_cached_block_takes_it_out_of_the_eviction_order():
    pool = cached_pool(3)
    pool.share([1])
    assert pool.state(1) is BlockState.FILLED
    assert sorted(pool.allocate(2)) == [0, 2]


def test_more_than_is_available_is_refused():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 available"):
        pool.allocate(3)


def test_releasing_twice_is_refused():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="has no request owner"):
        pool.release(blocks)


class BlockPoolMachine(RuleBasedStateMachine):
    """Random owners come and go; a plain model of who owns what must agree after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10)
        self.tables_alive: list[list[int]] = []
        self.pins: list[list[int]] = []
        self.kept: set[int] = set()
        self.generations = [0] * 10
        self.pool.on_evict(self._forget)

    def _forget(self, block: int) -> None:
        assert block in self.kept, "only kept blocks are evicted"
        self.kept.remove(block)

    def _owned(self) -> set[int]:
        return {block for table in (*self.tables_alive, *self.pins) for block in table}

    @rule(count=st.integers(1, 4), after=st.integers(-1, 9))
    def allocate(self, count: int, after: int) -> None:
        if count > self.pool.num_available:
            return
        owned = self._owned()
        blocks = self.pool.allocate(count, after)
        assert len(set(blocks)) == count
        assert not owned & set(blocks), "a block with an owner was handed out (T1)"
        for block in blocks:
            assert self.pool.generation(block) == self.generations[block] + 1
            self.generations[block] += 1
        self.tables_alive.append(blocks)

    @precondition(lambda self: self.tables_alive)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables_alive.pop(data.draw(st.integers(0, len(self.tables_alive) - 1)))
        self.pool.release(table)

    @precondition(lambda self: self.tables_alive)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables_alive))
        self.pool.share(table)
        self.tables_alive.append(list(table))

    @precondition(lambda self: self.tables_alive)
    @rule(data=st.data())
    def fill_and_keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables_alive))))
        self.pool.fill(block)
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.pool.num_cached)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept - self._owned())))
        self.pool.share([block])
        self.tables_alive.append([block])

    @precondition(lambda self: self.tables_alive)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables_alive))
        self.pool.pin(table)
        self.pins.append(list(table))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pool.unpin(self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))))

    @invariant()
    def model_agrees(self) -> None:
        self.pool.check()
        requests = [block for table in self.tables_alive for block in table]
        transfers = [block for table in self.pins for block in table]
        for block in range(10):
            assert self.pool.owners(block) == (requests.count(block), transfers.count(block))
        assert self.pool.num_cached == len(self.kept - self._owned())
        assert self.pool.num_available == 10 - len(self._owned())


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPoolMachine = BlockPoolMachine.TestCase
