"""Preemption by swap: who owns host blocks, what is copied and what is not, and that nothing is computed again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.messages import ChoiceStart, EndReason, EngineRequest, Event, RemoteReserved, RequestEnded
from engine.prefix_cache import Link
from engine.request import SampledToken, SamplingParams
from engine.swap import HostBlocks, is_swap_cheaper
from tests.unit.engine_world import FakeClock, World, make_engine

# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("num_lost", "num_copied", "tokens_per_s", "copy_s", "is_swap"),
    [
        pytest.param(1600, 100, 1000.0, 0.001, True, id="1.6-s-against-0.2-s"),
        pytest.param(16, 1, 100_000.0, 0.001, False, id="a-fast-model-behind-a-slow-bus"),
        pytest.param(200, 100, 1000.0, 0.001, True, id="equal-keeps-what-is-there"),
        pytest.param(0, 0, 1000.0, 0.001, True, id="nothing-to-copy"),
        pytest.param(16, 1, 0.0, 10.0, True, id="no-speed-measured"),
        pytest.param(16, 1, 1e9, 0.0, True, id="no-copy-measured"),
    ],
)
def test_swapping_is_chosen_where_two_copies_take_no_longer_than_computing_again(
    num_lost: int, num_copied: int, tokens_per_s: float, copy_s: float, is_swap: bool
):
    assert is_swap_cheaper(num_lost, num_copied, tokens_per_s, copy_s) is is_swap


# ------------------------------------------------------------------ host blocks


def link(number: int) -> Link:
    return Link(b"content %d" % number, b"digest %d" % number)


def test_a_content_that_several_wait_for_has_one_host_block_and_is_saved_once():
    host = HostBlocks(3)
    first = host.reserve(9, {0: link(1), 1: link(2)}, [2])
    assert first is not None
    assert host.num_free == 0
    assert host.reserve(5, {0: link(1)}, [1]) is None, "its partial block finds no room"
    second = host.reserve(8, {0: link(1), 1: link(2)}, [])
    assert second is not None
    assert host.num_unsaved == 2
    saved = host.save(link(1))
    assert saved is not None
    assert host.save(link(1)) is None, "it is there already"
    assert host.save(link(7)) is None, "nobody waits for it"
    host.check([first, second])
    host.release(first)
    host.settle()
    assert host.where(second, 0) == saved
    assert host.num_free == 1, "only the block that was its own"
    host.check([second])
    host.release(second)
    assert host.num_unsaved == 0
    assert host.num_free == 1, "the batch at hand may still read it"
    host.settle()
    assert host.num_free == 3
    host.check([])


def test_a_host_block_of_ones_own_rests_until_the_next_plan():
    host = HostBlocks(1)
    own = host.reserve(3, {}, [0])
    assert own is not None
    host.release(own)
    assert host.reserve(3, {}, [0]) is None
    host.settle()
    assert host.reserve(3, {}, [0]) is not None


def test_a_refused_reservation_changes_nothing():
    host = HostBlocks(2)
    assert host.reserve(9, {0: link(1), 1: link(2)}, [2]) is None
    assert (host.num_free, host.num_unsaved) == (2, 0)
    host.check([])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_host_blocks_are_conserved_whatever_happens(data: st.DataObject):
    host, waiting = HostBlocks(data.draw(st.integers(1, 8))), []
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["reserve", "save", "release", "settle"])):
            case "reserve":
                contents = data.draw(st.lists(st.integers(0, 4), max_size=3, unique=True))
                cached = {index: link(number) for index, number in enumerate(contents)}
                others = range(len(cached), len(cached) + data.draw(st.integers(0, 2)))
                swapped = host.reserve(4, cached, others)
                if swapped is not None:
                    waiting.append(swapped)
            case "save":
                host.save(link(data.draw(st.integers(0, 4))))
            case "release" if waiting:
                host.release(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            case _:
                host.settle()
        host.check(waiting)


# ------------------------------------------------------------------ engines


class Watch:
    """Records the batches that an engine's runner is given."""

    def __init__(self, engine: Engine, clock: FakeClock | None = None) -> None:
        self.batches: list[Batch] = []
        self.touched: list[set[int]] = []
        self._runner, self._clock = engine._runner, clock
        engine._runner = self

    def execute(self, batch: Batch) -> list[SampledToken]:
        self.batches.append(batch)
        self.touched.append({block for chunk in batch.chunks for block in chunk.sequence.block_table})
        if self._clock is not None:
            self._clock.now += 1.0
        return self._runner.execute(batch)

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        self._runner.zero_slots(block_id, first_slot)


TIGHT: dict[str, object] = {"num_blocks": 8, "max_model_len": 32, "constant_estimate": 1, "num_host_blocks": 16}


def submit(engine: Engine, key: int, length: int, max_tokens: int = 12, choices: int = 1, same: bool = False) -> None:
    prompt = tuple(1 + ((0 if same else key * 3) + position) % 7 for position in range(length))
    starts = tuple(ChoiceStart(choice) for choice in range(choices))
    engine.match(EngineRequest(key, f"r{key}", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), starts))
    engine.start_local(key)


def run_out(engine: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(500):
        if not engine.has_work:
            assert engine.load().num_swapped == 0
            return events
        events += engine.step().events
        engine.check()
    raise AssertionError("the engine does not come to an end")


def swapped_engine(clock: FakeClock | None = None, **changes: object) -> Engine:
    """An engine in which request 2 waits in host memory, and request 1 runs."""
    engine, _ = make_engine(clock, **{**TIGHT, **changes})
    submit(engine, 1, 14)
    submit(engine, 2, 6)
    for _ in range(50):
        if engine.load().num_swapped:
            return engine
        engine.step()
    raise AssertionError("nobody was swapped out")


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_swapped_sequence_computes_nothing_again(prefix_caching: bool):
    engine, _ = make_engine(**TIGHT, prefix_caching=prefix_caching)
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    ends = [event for event in run_out(engine) if isinstance(event, RequestEnded)]
    assert len(ends) == 5
    counters = engine.counters
    assert counters.preemptions == counters.swap_outs == counters.swap_ins > 0
    assert counters.swapped_in_blocks > 0
    assert counters.recomputed_tokens == sum(end.stats.num_recomputed_tokens for end in ends) == 0
    assert counters.prefill_tokens == sum(6 + key for key in range(1, 6)), "each prompt once"
    assert counters.decode_tokens == 5 * 11


def test_without_host_memory_the_same_pressure_computes_again():
    engine, _ = make_engine(**{**TIGHT, "num_host_blocks": 0})
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    run_out(engine)
    assert engine.counters.recomputed_tokens > 0
    assert engine.counters.swap_outs == engine.counters.swapped_out_blocks == 0


def test_full_blocks_are_copied_only_when_the_cache_evicts_them():
    engine = swapped_engine()
    load = engine.load()
    assert load.num_host_blocks_total - load.num_host_blocks_free == engine._memory.blocks_for(
        engine._groups[2].leader.swapped.num_tokens  # pyright: ignore[reportOptionalMemberAccess]
    )
    assert engine.counters.swapped_out_blocks < load.num_host_blocks_total - load.num_host_blocks_free
    engine.cancel(1)
    engine.step()
    for _ in range(9):
        engine.step()
    assert not engine.load().num_swapped
    assert engine.counters.swapped_in_blocks == engine.counters.swapped_out_blocks, "the rest was still cached"
    run_out(engine)
    assert engine.counters.recomputed_tokens == 0


def test_a_prompt_that_others_hold_is_not_copied():
    """Three choices share a prompt of 4 blocks; whoever is preempted takes only its own tail to the host."""
    engine, _ = make_engine(**{**TIGHT, "num_blocks": 9})
    watch = Watch(engine)
    submit(engine, 1, 16, choices=3)
    while not engine.counters.swapped_out_blocks:
        engine.step()
    prompt = set(next(iter(engine._scheduler.decoding.values())).block_table[:4])
    copied = {block for batch in watch.batches for block, _ in batch.swap_outs}
    assert copied
    assert not copied & prompt
    run_out(engine)
    assert engine.counters.recomputed_tokens == 0


def test_blocks_that_come_back_are_left_alone_until_the_next_step():
    """So a device may bring them while it computes."""
    engine, _ = make_engine(**TIGHT)
    watch = Watch(engine)
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    run_out(engine)
    assert any(batch.swap_ins for batch in watch.batches)
    for batch, touched in zip(watch.batches, watch.touched, strict=True):
        assert not touched & {block for _, block in batch.swap_ins}
        written = [host_block for _, host_block in batch.swap_outs]
        assert len(set(written)) == len(written), "a host block is written once"


def test_too_little_host_memory_falls_back_to_computing_again():
    engine, _ = make_engine(**{**TIGHT, "num_host_blocks": 2})
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    run_out(engine)
    assert engine.counters.preemptions > engine.counters.swap_outs
    assert engine.counters.recomputed_tokens > 0


@pytest.mark.parametrize(("host_copy_s", "is_swapped"), [(0.01, True), (1000.0, False)])
def test_measured_speeds_decide(host_copy_s: float, is_swapped: bool):
    clock = FakeClock()
    engine, _ = make_engine(clock, **TIGHT, host_copy_s=host_copy_s)
    Watch(engine, clock)
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    run_out(engine)
    assert engine.counters.preemptions > 0
    assert (engine.counters.swap_outs > 0) is is_swapped


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_whoever_ends_while_swapped_out_gives_its_host_blocks_back(how: str):
    clock = FakeClock()
    engine, _ = make_engine(clock, **TIGHT)
    prompt = tuple(1 + position % 5 for position in range(6))
    submit(engine, 1, 14)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    engine.match(EngineRequest(2, "r", prompt, sampling, deadline=5.0))
    engine.start_local(2)
    while not engine.load().num_swapped:
        engine.step()
    if how == "cancel":
        engine.cancel(2)
    else:
        clock.now = 6.0
    (ended,) = [event for event in engine.step().events if isinstance(event, RequestEnded)]
    assert ended.reason is (EndReason.CANCELLED if how == "cancel" else EndReason.DEADLINE)
    engine.check()
    engine.step()
    load = engine.load()
    assert load.num_host_blocks_free == load.num_host_blocks_total
    run_out(engine)


def test_a_drain_brings_swapped_sequences_back_and_finishes_them():
    engine = swapped_engine()
    engine.drain()
    ends = [event for event in run_out(engine) if isinstance(event, RequestEnded)]
    assert {(end.key, end.reason) for end in ends} == {(1, EndReason.FINISHED), (2, EndReason.FINISHED)}


def test_swapped_sequences_come_back_in_order_of_arrival():
    engine, _ = make_engine(**{**TIGHT, "num_blocks": 10})
    for key in range(1, 5):
        submit(engine, key, 8)
    submit(engine, 5, 8)
    ends = [event.key for event in run_out(engine) if isinstance(event, RequestEnded)]
    assert engine.counters.swap_ins > 0
    assert ends[-1] == 5, "nobody who came later overtook"


def test_waiting_tokens_do_not_count_what_is_kept():
    engine = swapped_engine()
    assert engine.load().num_waiting == 1
    assert engine.load().num_waiting_tokens == 1


def test_blocks_that_came_back_are_found_by_prompts_that_begin_alike():
    engine, runner = make_engine(**{**TIGHT, "num_blocks": 8})
    submit(engine, 1, 14)
    submit(engine, 2, 6)
    while not engine.counters.swapped_in_blocks:
        engine.step()
    sequence = engine._groups[2].leader
    assert sequence.num_filled_blocks == sequence.num_computed_tokens // 4 > 0, "from the step on that brought them"
    run_out(engine)
    runner.num_executed_tokens = 0
    prompt = tuple(1 + (6 + position) % 7 for position in range(6))
    assert engine.match(EngineRequest(3, "r", prompt, SamplingParams(max_tokens=1))).num_cached_tokens == 4
    engine.start_local(3)
    run_out(engine)  # the runner compares every earlier position's KV
    assert runner.num_executed_tokens == 2


def test_a_leader_that_goes_while_swapped_out_leaves_its_memory_to_its_fork():
    """Its prompt is half computed, and preempted for a promised one that waited too long."""
    world = World({**TIGHT, "num_blocks": 14, "max_num_batched_tokens": 16, "max_num_seqs": 8})
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    client = world.add(tuple(1 + position % 7 for position in range(26)), sampling, {0: 0, 1: 2, 2: 0})
    world.step_decode()
    group = world.decode._groups[client.request.key]
    leader, scheduler = group.leader, world.decode._scheduler
    assert leader.forks
    scheduler._reserving[99] = group  # else the only one that runs is never preempted
    assert scheduler._preempt_one()
    del scheduler._reserving[99]
    swap_outs, _ = world.decode._memory.take_copies()
    world.decode_runner.execute(Batch((), (), tuple(swap_outs)))
    kept = leader.swapped
    assert kept is not None
    assert kept.num_tokens == 16
    world.cancel(client, (0,))
    assert (group.leader.choice, group.leader.swapped, leader.swapped) == (1, kept, None)
    world.decode.check()
    world.settle()
    assert client.finished == {1, 2}
    assert world.decode.counters.swap_ins > 0
    assert world.decode.counters.recomputed_tokens == 0


def test_a_block_that_must_be_saved_is_not_given_away_between_two_steps():
    """A peer would write into it before the step that copies it."""
    engine, _ = make_engine(**{**TIGHT, "num_blocks": 10})
    watch = Watch(engine)
    submit(engine, 1, 14)
    submit(engine, 2, 6)
    engine.match(EngineRequest(3, "r", (6,) * 8, SamplingParams(max_tokens=1)))
    engine.promise_remote(3)
    while not engine.load().num_swapped:
        engine.step()
    assert engine._memory.pool.num_free < 2 <= engine._memory.pool.num_available
    assert engine._memory.host.num_unsaved > 0
    assert engine.try_reserve_remote(3) is None
    (reserved,) = [event for event in engine.step().events if isinstance(event, RemoteReserved)]
    saved = {block for block, _ in watch.batches[-1].swap_outs}
    assert saved & {slot.block_id for slot in reserved.blocks}
    engine.cancel(3)
    engine.release_transfer(3, ok=False)
    run_out(engine)
    assert engine.counters.recomputed_tokens == 0


def test_content_that_a_peer_found_corrupt_is_computed_again_by_who_waits_for_it():
    engine = swapped_engine()
    sequence = engine._groups[2].leader
    assert sequence.swapped is not None
    awaited = next(iter(sequence.swapped.cached.values()))
    block = engine._memory.cache.find(awaited)
    assert block is not None
    engine._memory.pool.share([block])  # a transfer that has the same prompt
    engine._scheduler.pinned[77] = [block]
    engine._memory.pool.pin([block])
    engine.release_transfer(77, ok=False, is_suspect=True)
    engine._memory.pool.release([block])
    assert sequence.swapped is None
    engine.check()
    run_out(engine)
    assert engine.counters.recomputed_tokens > 0


# ------------------------------------------------------------------ any schedule


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_swapping_changes_no_output_and_computes_nothing_twice(data: st.DataObject):
    world = World(
        {
            "num_blocks": data.draw(st.integers(10, 16)),
            "max_model_len": 40,
            "constant_estimate": 1,
            "num_host_blocks": 256,
            "prefix_caching": data.draw(st.booleans()),
            "chunk_size": data.draw(st.sampled_from([4, 8])),
        }
    )
    for seed in range(data.draw(st.integers(2, 6))):
        prompt = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=20))
        choices = {choice: data.draw(st.integers(0, 6)) for choice in range(data.draw(st.integers(1, 3)))}
        world.add(prompt, SamplingParams(max_tokens=9, seed=seed), choices)
        for _ in range(data.draw(st.integers(0, 3))):
            world.step_decode()
    world.settle()
    assert all(client.finished == set(client.expected) for client in world.clients.values())
    assert world.decode.counters.swap_ins == world.decode.counters.swap_outs
    assert world.decode.counters.recomputed_tokens == 0


def test_a_runner_that_forgets_to_bring_blocks_back_is_seen():
    """The oracle of all tests above: without swap-ins attention would read what others left there."""

    class Forgetful(FakeRunner):
        def execute(self, batch: Batch) -> list[SampledToken]:
            return super().execute(Batch(batch.copies, batch.chunks, batch.swap_outs))

    engine, _ = make_engine(**TIGHT)
    engine._runner = Forgetful(8, 4, 16, 16)
    for key in range(1, 6):
        submit(engine, key, 6 + key)
    with pytest.raises(AssertionError, match="KV of position"):
        run_out(engine)
