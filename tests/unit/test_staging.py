"""The staging ring: its size, who may have which slot, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.digest import block_digest
from kvtransfer.errors import BlockNotPublished
from kvtransfer.exposure import DirectExposure, HostExposure, StagedExposure
from kvtransfer.landing import DirectLanding, StagedLanding
from kvtransfer.prefill_events import BackendEvent, BlocksFilled, PrefillDone, PrefillGivenUp, PrefillStarting
from kvtransfer.prefill_side import ReadyBlock
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.staging import RingSize, StagingRing, StagingUnusable, size_of_ring
from kvtransfer.transport import BlockSource, DeviceBlock, SourceBlock, host_memory

BLOCK_BYTES = 16
NUM_BLOCKS = 32


class FakeDevice:
    """A DeviceBlocks of bytearrays that notes what it is asked for."""

    num_blocks = NUM_BLOCKS
    block_bytes = BLOCK_BYTES
    address = 1 << 20
    device_id = 0

    def __init__(self) -> None:
        self.blocks = [bytearray([i]) * BLOCK_BYTES for i in range(NUM_BLOCKS)]
        self.calls = list[str]()

    def wait_for_writes(self) -> None:
        self.calls.append("wait")

    def copy_out(self, block_ids: Sequence[int], into: Sequence[memoryview]) -> None:
        self.calls.append("out")
        for block_id, memory in zip(block_ids, into, strict=True):
            memory[:] = self.blocks[block_id]

    def copy_in(self, sources: Sequence[memoryview], block_ids: Sequence[int]) -> None:
        self.calls.append("in")
        for block_id, memory in zip(block_ids, sources, strict=True):
            self.blocks[block_id][:] = memory

    def digests(self, block_ids: Sequence[int]) -> list[bytes]:
        self.calls.append("digests")
        return [b"device" + bytes(self.blocks[block_id][:10]) for block_id in block_ids]


@dataclass(frozen=True)
class Filled:
    index: int
    block_id: int
    generation: int = 1
    num_tokens: int = 4


def starting(key: int, num_blocks: int) -> PrefillStarting:
    return PrefillStarting(key, num_blocks, 0)


def done(key: int, tail: Filled | None = None) -> PrefillDone:
    return PrefillDone(key, tail, (), 0.0, 0.0)


# ---------------------------------------------------------------- its size


def test_the_ring_holds_the_least_that_works_or_the_default_and_never_more_than_can_be_used() -> None:
    assert ring_of().num_slots == 10
    assert ring_of(min_slots=40).num_slots == 40
    assert ring_of(default_bytes=9000).num_slots == 50
    assert ring_of(requested_bytes=2050).num_slots == 20
    assert "/ 100 bytes per block, 4) = 10 slots" in ring_of().explanation


def test_a_ring_that_is_too_small_names_what_it_needs() -> None:
    with pytest.raises(StagingUnusable, match=r"staging_memory: .* = 3 slots, but 4 must fit: give it 400 bytes"):
        ring_of(requested_bytes=399)


def test_a_ring_that_the_host_cannot_hold_is_refused_before_it_is_made() -> None:
    with pytest.raises(StagingUnusable, match=r"= 8000 slots = 763 MiB, but 500 MiB of host memory are available, and"):
        ring_of(100_000, requested_bytes=800_000_000, max_slots=1 << 20, available_bytes=500 << 20)


def ring_of(block_bytes: int = 100, **changes: Any) -> RingSize:
    sizes: dict[str, Any] = {"min_slots": 4, "default_bytes": 1000, "max_slots": 50, "available_bytes": 1 << 30}
    return size_of_ring(block_bytes, **{**sizes, "requested_bytes": None, **changes})


# ---------------------------------------------------------------- its slots


def test_a_slot_has_one_owner_and_a_new_generation_each_time() -> None:
    ring = StagingRing(3, BLOCK_BYTES)
    first = ring.take(2)
    assert (first, ring.num_free) == ([0, 1], 1)
    before = ring.generation(first[0])
    ring.give_back(first)
    assert ring.take(3) == [2, 0, 1], "what came back last goes out last"
    assert ring.generation(first[0]) == before + 1
    with pytest.raises(AssertionError, match="1 slots asked for, 0 free"):
        ring.take(1)
    ring.give_back([0])
    with pytest.raises(AssertionError, match="slot 0 was given back twice"):
        ring.give_back([0])
    ring.close()
    ring.close()


def test_another_mapping_of_the_ring_sees_its_slots() -> None:
    ring = StagingRing(2, BLOCK_BYTES)
    with mmap.mmap(ring.fd, 2 * BLOCK_BYTES, prot=mmap.PROT_READ) as other:
        ring.block(1)[:] = b"x" * BLOCK_BYTES
        assert other[BLOCK_BYTES:] == b"x" * BLOCK_BYTES
    ring.close()


# ---------------------------------------------------------------- P


@dataclass
class Prefill:
    """A StagedExposure and what it let through."""

    num_slots: int
    device: FakeDevice = field(default_factory=FakeDevice)
    ready: list[ReadyBlock] = field(default_factory=list[ReadyBlock])

    def __post_init__(self) -> None:
        self.ring = StagingRing(self.num_slots, BLOCK_BYTES)
        self.exposure = StagedExposure(self.device, self.ring)

    def arrive(self, event: BackendEvent) -> list[BackendEvent]:
        return self._pass(self.exposure.arrive(event))

    def release(self, key: int) -> list[BackendEvent]:
        return self._pass(self.exposure.release(key))

    def _pass(self, events: list[BackendEvent]) -> list[BackendEvent]:
        for event in events:
            self.ready += self.exposure.ready(event)
        return events


def test_a_filled_block_is_published_as_a_slot_with_the_slots_generation_and_the_blocks_digest() -> None:
    p = Prefill(4)
    p.arrive(starting(1, 3))
    p.arrive(BlocksFilled(1, [Filled(0, 7), Filled(1, 9)]))
    p.arrive(done(1, Filled(2, 11, num_tokens=2)))
    assert [(b.index, b.num_tokens) for b in p.ready] == [(0, 4), (1, 4), (2, 2)]
    for block, block_id in zip(p.ready, (7, 9, 11), strict=True):
        assert bytes(p.ring.block(block.block_id)) == bytes([block_id]) * BLOCK_BYTES
        assert block.digest == block_digest(bytes([block_id]) * BLOCK_BYTES)
        assert block.generation == p.ring.generation(block.block_id)
    p.release(1)
    assert p.ring.num_free == 4
    p.arrive(starting(2, 4))
    assert p.ring.generation(p.ready[0].block_id) == p.ready[0].generation + 1, "a late reader notices"


def test_writes_under_way_end_before_a_block_is_copied_out() -> None:
    p = Prefill(4)
    p.arrive(starting(1, 2))
    assert p.device.calls == []
    p.arrive(BlocksFilled(1, [Filled(0, 7), Filled(1, 8)]))
    assert p.device.calls == ["wait", "out"]


def test_a_prompt_that_finds_the_ring_full_does_not_start_until_another_has_ended() -> None:
    p = Prefill(4)
    assert p.arrive(starting(1, 3)) == [starting(1, 3)]
    assert p.arrive(starting(2, 2)) == []
    cached = BlocksFilled(2, [Filled(0, 5)])
    assert p.arrive(cached) == [], "found in the prefix cache, told at once"
    assert p.arrive(starting(3, 1)) == [], "first come, first served: it would keep the second waiting for ever"
    assert p.exposure.num_waiting == 2
    assert p.release(1) == [starting(2, 2), cached, starting(3, 1)]
    assert [b.index for b in p.ready] == [0]
    p.release(2)
    p.release(3)
    assert p.ring.num_free == 4


def test_a_prompt_that_is_given_up_while_it_waits_leaves_the_line() -> None:
    p = Prefill(2)
    p.arrive(starting(1, 2))
    p.arrive(starting(2, 2))
    p.arrive(starting(3, 1))
    given_up = PrefillGivenUp(2, pb.PREFILL_FAILURE_DEADLINE, "too late")
    assert p.arrive(given_up) == [given_up], "D hears of it at once"
    assert p.release(2) == []
    assert p.release(1) == [starting(3, 1)]
    p.release(3)
    assert p.ring.num_free == 2


def test_a_prompt_that_no_ring_could_hold_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(ValueError, match="5 blocks for a ring of 4 slots"):
        Prefill(4).arrive(starting(1, 5))


def test_more_blocks_than_a_prompt_said_are_an_error() -> None:
    p = Prefill(4)
    p.arrive(starting(1, 1))
    with pytest.raises(AssertionError, match="more blocks than the prompt said"):
        p.arrive(BlocksFilled(1, [Filled(0, 1), Filled(1, 2)]))


def test_a_full_block_is_digested_once_a_generation_and_a_tail_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[int]()

    def counted(block: memoryview) -> bytes:
        taken.append(block[0])
        return block_digest(block)

    monkeypatch.setattr("kvtransfer.exposure.block_digest", counted)
    p = Prefill(8)
    for key in (1, 2):
        p.arrive(starting(key, 2))
        p.arrive(BlocksFilled(key, [Filled(0, 7)]))
        p.arrive(done(key, Filled(1, 8, num_tokens=1)))
    p.arrive(starting(3, 1))
    p.arrive(BlocksFilled(3, [Filled(0, 7, generation=2)]))
    assert taken == [7, 8, 8, 7]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.randoms())
def test_whatever_the_order_every_prompt_starts_and_every_slot_comes_back(sizes: list[int], rng: object) -> None:
    """Prompts run to their end or are given up at any time; those that started hold all they need."""
    p, waiting, running = Prefill(6), list[int](), dict[int, int]()
    for key, size in enumerate(sizes):
        waiting.append(key)
        running |= {event.key: 0 for event in p.arrive(starting(key, size))}
        while running and rng.random() < 0.5:  # type: ignore[attr-defined]  # random.Random
            ended = rng.choice(sorted(running | dict.fromkeys(waiting)))  # type: ignore[attr-defined]  # same
            if ended in running:
                filled = [Filled(i, i) for i in range(sizes[ended])]
                p.arrive(BlocksFilled(ended, filled))
                del running[ended]
            waiting = [key for key in waiting if key != ended]
            running |= {event.key: 0 for event in p.release(ended)}
    while running:
        ended = min(running)
        del running[ended]
        running |= {event.key: 0 for event in p.release(ended)}
    assert p.exposure.num_waiting == 0
    assert p.ring.num_free == 6


def test_blocks_that_are_read_where_they_lie_keep_their_id_and_are_digested_there() -> None:
    device = FakeDevice()
    exposure = DirectExposure(device)
    event = BlocksFilled(1, [Filled(0, 7, 3), Filled(1, 8, 4)])
    assert exposure.arrive(event) == [event]
    assert [(b.block_id, b.generation, b.digest[:7]) for b in exposure.ready(event)] == [
        (7, 3, b"device\7"),
        (8, 4, b"device\10"),
    ]
    exposure.ready(event)
    assert device.calls == ["wait", "digests"], "the second time they are known"
    assert exposure.release(1) == []


def test_a_source_without_memory_serves_no_copies_but_knows_what_is_published() -> None:
    source = BlockSource(4, BLOCK_BYTES, bytes(16))
    source.open(b"t")
    source.publish(b"t", [SourceBlock(0, 3, 7)])
    source.join(b"t", bytes(16))
    assert (source.num_blocks, source.generation_table[3]) == (4, 7)
    with pytest.raises(BlockNotPublished, match="read one-sidedly"):
        source.read_frame(b"t", 0, 0, BLOCK_BYTES)


def test_host_memory_needs_no_release() -> None:
    source = BlockSource(memoryview(bytearray(64)), BLOCK_BYTES, bytes(16))
    exposure = HostExposure(source)
    event = BlocksFilled(1, [Filled(0, 2)])
    assert exposure.arrive(event) == [event]
    assert exposure.ready(event) == [ReadyBlock(0, 2, 1, 4, block_digest(bytes(BLOCK_BYTES)))]
    assert exposure.release(1) == []


# ---------------------------------------------------------------- D


async def test_what_lands_is_digested_as_it_arrived_and_in_its_block_before_it_is_told() -> None:
    device, ring = FakeDevice(), StagingRing(2, BLOCK_BYTES)
    landing = StagedLanding(device, ring)
    await landing.settle()
    async with landing.lend([DeviceBlock(5)]) as lent:
        host_memory(lent[0])[:] = b"a" * BLOCK_BYTES
        assert landing.land(lent[0], DeviceBlock(5)) == block_digest(b"a" * BLOCK_BYTES)
        assert device.blocks[5] == b"a" * BLOCK_BYTES
    assert device.calls == ["wait", "in"]
    assert ring.num_free == 2


async def test_pulls_get_slots_in_the_order_in_which_they_asked() -> None:
    ring = StagingRing(4, BLOCK_BYTES)
    landing = StagedLanding(FakeDevice(), ring)
    order, release = list[int](), asyncio.Event()

    async def pull(number: int, count: int) -> None:
        async with landing.lend([DeviceBlock(i) for i in range(count)]):
            order.append(number)
            await release.wait()

    pulls = [asyncio.create_task(pull(number, count)) for number, count in enumerate((3, 2, 1, 4))]
    await _turns()
    assert order == [0], "the third would fit, and wait for ever if it were always so"
    release.set()
    await asyncio.gather(*pulls)
    assert order == [0, 1, 2, 3]
    assert ring.num_free == 4


async def test_a_cancel_at_any_turn_leaves_no_slot_taken() -> None:
    for num_turns in range(4):
        ring = StagingRing(2, BLOCK_BYTES)
        landing = StagedLanding(FakeDevice(), ring)

        async def pull(landing: StagedLanding = landing) -> None:
            async with landing.lend([DeviceBlock(0), DeviceBlock(1)]):
                await asyncio.sleep(0)

        first, second, third = (asyncio.create_task(pull()) for _ in range(3))
        await _turns(num_turns)
        second.cancel()
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await third
        assert ring.num_free == 2, num_turns


async def test_a_pull_never_asks_for_more_slots_than_there_are() -> None:
    assert StagedLanding(FakeDevice(), StagingRing(1, BLOCK_BYTES)).max_blocks == 1
    assert StagedLanding(FakeDevice(), StagingRing(9, BLOCK_BYTES)).max_blocks == 4


async def test_a_block_that_was_read_into_its_place_is_digested_there() -> None:
    device = FakeDevice()
    landing = DirectLanding(device)
    await landing.settle()
    async with landing.lend([DeviceBlock(5)]) as lent:
        assert list(lent) == [DeviceBlock(5)]
        assert landing.land(lent[0], DeviceBlock(5)) == b"device" + bytes([5]) * 10
    assert device.calls == ["wait", "digests"]


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
