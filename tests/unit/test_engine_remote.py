"""Two engines and the KV between them: hand-over, failures at every point, and who still holds blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import RequestUnknown
from engine.group import Phase
from engine.messages import EndReason, EngineRequest, PrefillStarting, RemotePromised, RemoteReserved, TokenEvent
from engine.request import SampledToken, SamplingParams
from tests.unit.engine_world import Client, World

SAMPLING = SamplingParams(max_tokens=5, ignore_eos=True, seed=3)


def prompt_of(length: int, start: int = 1) -> list[int]:
    return [1 + (start + position) % 9 for position in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 23, 24, 25, 40])
def test_remote_says_what_local_says(length: int):
    world = World()
    client = world.add(prompt_of(length), SAMPLING, remote=True)
    world.settle()
    assert client.logs[0] == client.expected[0]
    assert world.num_moved_blocks == -(-length // 4)
    assert world.prefill_runner.num_executed_tokens == length
    assert world.decode_runner.num_executed_tokens == 4, "D computed no prompt token, and not its last draw"


def test_all_choices_draw_their_first_token_at_the_prefill_worker():
    world = World()
    client = world.add(prompt_of(10), SAMPLING, {0: 0, 1: 0, 4: 0}, remote=True)
    world.settle()
    assert client.finished == {0, 1, 4}
    assert world.decode_runner.num_executed_tokens == 3 * 4


def test_a_replay_fetches_the_prompt_and_computes_the_logs_here():
    world = World()
    client = world.add(prompt_of(10), SAMPLING, {0: 2, 1: 0, 2: 4}, remote=True)
    world.settle()
    assert client.finished == {0, 1, 2}


def test_a_replay_whose_log_is_cached_here_still_names_prompt_blocks_only():
    world = World()
    sampling = SamplingParams(max_tokens=14, ignore_eos=True)
    world.add(prompt_of(6), sampling)
    world.settle()
    again = world.add(prompt_of(6), sampling, {0: 12}, remote=True)
    world.settle()
    assert again.finished == {0}
    assert world.num_moved_blocks == 1


def test_a_missing_first_token_is_drawn_here():
    world = World()
    client = world.add(prompt_of(8), SAMPLING, {0: 0, 1: 0}, remote=True)
    for _ in range(3):
        world.step_decode()
        world.step_prefill()
        world.grant(client, 100)
    assert client.transfer is not None
    assert client.transfer.done is not None
    client.transfer.done.first_tokens.clear()
    world.settle()
    assert client.finished == {0, 1}


def test_blocks_that_decode_has_are_not_moved_and_blocks_that_prefill_has_are_not_computed():
    world = World()
    world.add(prompt_of(16), SAMPLING, remote=True)
    world.settle()
    moved, computed = world.num_moved_blocks, world.prefill_runner.num_executed_tokens
    world.add(prompt_of(24), SAMPLING, remote=True)
    world.settle()
    assert world.num_moved_blocks - moved == 2, "both have 16 tokens cached"
    assert world.prefill_runner.num_executed_tokens - computed == 8


def test_unused_slots_of_a_tail_block_never_carry_what_was_there_before():
    world = World(prefill={"num_blocks": 4, "prefix_caching": False, "max_model_len": 16})
    world.add(prompt_of(16), SAMPLING, remote=True, salt=b"a")
    world.settle()
    world.add(prompt_of(5, 7), SAMPLING, remote=True, salt=b"b")
    world.settle()  # the world looks into the tail block
    assert world.num_moved_blocks == 6


def test_another_tenant_gets_nothing_from_either_cache():
    world = World()
    world.add(prompt_of(16), SAMPLING, remote=True, salt=b"a")
    world.settle()
    moved, computed = world.num_moved_blocks, world.prefill_runner.num_executed_tokens
    world.add(prompt_of(16), SAMPLING, remote=True, salt=b"b")
    world.settle()
    assert world.num_moved_blocks - moved == 4
    assert world.prefill_runner.num_executed_tokens - computed == 16


def test_a_promise_waits_until_its_final_size_fits_beside_the_others():
    world = World({"num_blocks": 16, "max_num_seqs": 8, "constant_estimate": 12})
    first = world.add(prompt_of(30), SamplingParams(max_tokens=12, ignore_eos=True), remote=True)
    second = world.add(prompt_of(30, 5), SamplingParams(max_tokens=12, ignore_eos=True), remote=True)
    world.step_decode()
    assert first.transfer is not None
    assert second.transfer is None, "11 of 16 blocks are promised already"
    world.settle()
    assert second.finished == {0}


def test_promises_that_share_a_cached_prefix_count_it_once():
    world = World({"num_blocks": 16})
    world.add(prompt_of(33), SamplingParams(max_tokens=1))
    world.settle()
    both = [world.add([*prompt_of(32), *[tail] * 8], SAMPLING, remote=True) for tail in (2, 3)]
    world.step_decode()
    assert all(client.transfer is not None for client in both), "8 shared blocks and twice 3, not twice 11"
    world.settle()


def test_choices_of_a_promise_take_their_seats():
    world = World({"max_num_seqs": 2})
    world.add(prompt_of(9), SAMPLING, {0: 0, 1: 0}, remote=True)
    world.step_decode()
    local = world.add(prompt_of(5), SAMPLING)
    for _ in range(3):
        world.step_decode()
    assert local.logs[0] == []
    world.settle()
    assert local.finished == {0}


def test_a_small_reservation_does_not_overtake_a_large_one_that_waits():
    world = World({"num_blocks": 12, "constant_estimate": 1, "max_model_len": 44, "prefix_caching": False})
    world.add(prompt_of(8), SamplingParams(max_tokens=30, ignore_eos=True))
    world.step_decode()
    engine = world.decode
    for key, length in ((101, 24), (102, 4)):
        engine.match(EngineRequest(key, "r", tuple(prompt_of(length, key)), SAMPLING))
        engine.promise_remote(key)
    promised = [event.key for event in engine.step().events if isinstance(event, RemotePromised)]
    assert promised == [101, 102]
    while engine.load().num_blocks_free >= 6:
        engine.step()
    assert engine.try_reserve_remote(101) is None
    assert engine.try_reserve_remote(102) is None, "there is room for it, but it came later"
    events = [event for _ in range(60) for event in engine.step().events]
    assert [event.key for event in events if isinstance(event, RemoteReserved)] == [101, 102]
    engine.check()


def test_running_sequences_that_outgrew_their_estimate_delay_a_reservation_but_never_forever():
    world = World({"num_blocks": 12, "constant_estimate": 1, "max_model_len": 44, "prefix_caching": False})
    world.add(prompt_of(8), SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(2):
        world.step_decode()
    remote = world.add(prompt_of(24, 3), SAMPLING, remote=True)
    world.step_decode()
    assert remote.transfer is not None, "promised on the strength of the estimate"
    for _ in range(20):  # meanwhile the local one grows into what was promised
        world.step_decode()
    world.step_prefill()
    assert remote.transfer.destinations is None, "nothing to reserve yet: RemoteReserved follows"
    world.settle()
    assert remote.finished == {0}


def test_a_long_running_sequence_is_preempted_for_a_promise_that_waited():
    world = World({"num_blocks": 24, "constant_estimate": 1, "max_model_len": 96, "prefix_caching": False})
    local = world.add(prompt_of(8), SamplingParams(max_tokens=80, ignore_eos=True))
    world.step_decode()
    remote = world.add(prompt_of(60, 3), SAMPLING, remote=True)
    for _ in range(36):
        world.step_decode()
    world.step_prefill()
    assert remote.transfer is not None
    assert remote.transfer.destinations is None
    for _ in range(34):
        world.step_decode()
    assert remote.transfer.destinations is not None
    assert len(local.logs[0]) < 80
    assert world.decode.counters.preemptions == 1
    world.settle()
    assert local.finished == remote.finished == {0}
    for start in (1, 2):
        world.add(prompt_of(5, start), SAMPLING)
    world.settle()
    assert world.decode.counters.preemptions == 1, "patience starts anew once the promise is kept"


def test_a_running_sequence_stalls_while_a_filling_one_holds_the_memory():
    world = World({"num_blocks": 12, "constant_estimate": 1, "max_model_len": 44, "prefix_caching": False})
    local = world.add(prompt_of(8), SamplingParams(max_tokens=30, ignore_eos=True))
    remote = world.add(prompt_of(32, 3), SAMPLING, remote=True)
    world.step_decode()
    world.step_prefill()
    assert remote.transfer is not None
    assert remote.transfer.destinations is not None
    for _ in range(24):
        world.step_decode()
    assert world.decode.counters.stalled_steps > 0
    assert world.decode.counters.preemptions == 0
    stalled_at = len(local.logs[0])
    world.settle()
    assert len(local.logs[0]) == 30 > stalled_at


@pytest.mark.parametrize(("num_rounds", "again"), list(itertools.product(range(5), (False, True))))
def test_a_broken_transfer_is_tried_again_or_done_locally(num_rounds: int, again: bool):
    world = World()
    client = world.add(prompt_of(30), SAMPLING, {0: 0, 1: 2}, remote=True)
    for _ in range(num_rounds):
        world.step_decode()
        world.step_prefill()
        world.grant(client, 1000)
        world.move(client, 2)
    world.abort(client, remote_again=again)
    world.settle()
    assert client.finished == {0, 1}


@pytest.mark.parametrize("num_rounds", range(6))
def test_cancel_during_a_transfer_releases_both_ends(num_rounds: int):
    world = World()
    client = world.add(prompt_of(30), SAMPLING, {0: 0, 1: 0}, remote=True)
    for _ in range(num_rounds):
        world.step_decode()
        world.step_prefill()
        world.grant(client, 1000)
        world.move(client, 2)
    world.cancel(client)
    world.settle()
    assert client.ended is not None
    assert client.ended.reason is EndReason.CANCELLED


def fill(world: World, length: int = 10) -> Client:
    """A request whose blocks are reserved and arriving."""
    client = world.add(prompt_of(length), SAMPLING, {0: 0, 1: 0}, remote=True)
    world.step_decode()
    world.step_prefill()
    assert world.decode._groups[client.request.key].phase is Phase.FILLING
    return client


def test_blocks_under_a_peers_hands_stay_pinned_after_a_cancel():
    world = World({"num_blocks": 8, "max_model_len": 24})
    client = fill(world)
    world.decode.cancel(client.request.key)
    world.decode.step()
    assert world.decode._memory.pool.num_quarantined == 3
    assert world.decode.load().num_blocks_free == 5
    with pytest.raises(RequestUnknown):
        world.decode.commit_remote(client.request.key, {})
    world.decode.release_transfer(client.request.key, ok=False)
    world.decode.release_transfer(client.request.key, ok=False)
    assert world.decode.load().num_blocks_free == 8
    world.decode.check()


def test_cancelling_the_leading_choice_while_filling_leaves_the_other():
    world = World()
    client = fill(world)
    world.cancel(client, (0,))
    world.settle()
    assert client.finished == {1}
    assert client.ended is not None
    assert client.ended.reason is EndReason.FINISHED


def test_a_deadline_while_handing_over_ends_the_prompt_and_pins_its_blocks():
    world = World()
    request = EngineRequest(1, "p", tuple(prompt_of(10)), SAMPLING, deadline=5.0)
    engine = world.prefill
    engine.start_prefill(request, 0, due=1.0)
    engine.grant_credit(1, 3)
    for _ in range(3):
        engine.step()
    world.clock.now = 6.0
    (end,) = engine.step().events
    assert end.reason is EndReason.DEADLINE  # pyright: ignore
    assert "handing over" in end.message  # pyright: ignore
    assert engine.load().num_held_tokens == 12
    engine.release_transfer(1, ok=True)
    assert engine.step().events == []
    assert engine.load().num_blocks_free == engine.config.num_blocks
    engine.check()


@pytest.mark.parametrize(("is_suspect", "num_cached"), [(False, 8), (True, 0)])
def test_blocks_that_a_peer_found_damaged_leave_the_prefix_cache(is_suspect: bool, num_cached: int):
    world = World()
    engine = world.prefill
    for key in (1, 2):
        engine.start_prefill(EngineRequest(key, "p", tuple(prompt_of(10)), SAMPLING), 0, due=1.0)
        engine.grant_credit(key, 3)
        events = [event for _ in range(4) for event in engine.step().events]
        (starting,) = [event for event in events if isinstance(event, PrefillStarting)]
        assert starting.num_cached_tokens == (0 if key == 1 else num_cached)
        engine.release_transfer(key, ok=False, is_suspect=is_suspect)
        engine.step()
        engine.check()


def test_kv_only_prefill_draws_nothing():
    world = World()
    engine = world.prefill
    engine.start_prefill(EngineRequest(1, "p", tuple(prompt_of(10)), SAMPLING, ()), 0, due=1.0)
    engine.grant_credit(1, 3)
    done = engine.step().events[-1]
    assert engine._memory.pool.num_quarantined == 0, "the tail is complete: nobody writes it any more"
    assert done.first_tokens == {}  # pyright: ignore
    assert done.tail.num_tokens == 2  # pyright: ignore


def test_the_first_token_is_told_as_it_came_logprobs_and_all():
    world = World()
    client = fill(world)
    for _ in range(2):
        world.step_prefill()
        world.grant(client, 100)
    assert client.transfer is not None
    assert client.transfer.done is not None
    drawn = client.transfer.done.first_tokens[0]
    given = SampledToken(99, drawn.token_id, -0.25, ((drawn.token_id, -0.25),))
    client.transfer.done.first_tokens[0] = given
    world.move(client)
    event = world.decode.step().events[0]
    assert isinstance(event, TokenEvent)
    assert event.token is given


def test_an_aborted_reservation_lets_the_next_one_in():
    world = World({"num_blocks": 12, "constant_estimate": 1, "max_model_len": 44, "prefix_caching": False})
    engine = world.decode
    for key in (1, 2):
        engine.match(EngineRequest(key, "r", tuple(prompt_of(20, key)), SAMPLING))
        engine.promise_remote(key)
    engine.match(EngineRequest(3, "r", tuple(prompt_of(4)), SamplingParams(max_tokens=30, ignore_eos=True)))
    promised = [event.key for event in engine.step().events if isinstance(event, RemotePromised)]
    assert promised == [1, 2]
    assert engine.try_reserve_remote(1) is not None
    engine.abort_remote(1)
    slots = engine.try_reserve_remote(2)
    assert slots is not None
    assert [slot.index for slot in slots] == [0, 1, 2, 3, 4]
    engine.check()


# ------------------------------------------------------------------ any order of events


class TwoEngines(RuleBasedStateMachine):
    """Requests of every kind, faults at any point, tiny pools: the world asserts what every event must be."""

    @initialize(
        num_blocks=st.integers(10, 20),
        num_prefill_blocks=st.integers(8, 16),
        prefix_caching=st.booleans(),
        chunk_size=st.sampled_from([4, 8, 16]),
        max_num_seqs=st.sampled_from([3, 8]),
        max_held_tokens=st.sampled_from([24, 1000]),
        num_host_blocks=st.sampled_from([0, 4, 64]),
        reserve_ahead=st.booleans(),
    )
    def begin(
        self,
        num_blocks: int,
        num_prefill_blocks: int,
        prefix_caching: bool,
        chunk_size: int,
        max_num_seqs: int,
        max_held_tokens: int,
        num_host_blocks: int,
        reserve_ahead: bool,
    ) -> None:
        swap = {"num_host_blocks": num_host_blocks}
        common = {"max_model_len": 32, "prefix_caching": prefix_caching, "chunk_size": chunk_size}
        common |= {"reserve_ahead": reserve_ahead}
        self.world = World(
            {**common, **swap, "num_blocks": num_blocks, "max_num_seqs": max_num_seqs, "constant_estimate": 2},
            {**common, "num_blocks": num_prefill_blocks, "max_held_tokens": max_held_tokens},
        )

    def live(self) -> list[Client]:
        return [client for client in self.world.clients.values() if client.ended is None]

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=21),
        cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
        max_tokens=st.integers(1, 9),
        remote=st.booleans(),
        salt=st.sampled_from([b"", b"x"]),
        patience=st.sampled_from([float("inf"), float("inf"), 3.0]),
    )
    def add(
        self, prompt: list[int], cuts: list[int], max_tokens: int, remote: bool, salt: bytes, patience: float
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, seed=len(prompt))
        self.world.add(prompt, sampling, dict(enumerate(cuts)), remote, salt, self.world.clock.now + patience)

    @rule()
    def step_decode(self) -> None:
        self.world.step_decode()

    @rule()
    def step_prefill(self) -> None:
        self.world.step_prefill()

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.now += seconds

    @precondition(lambda self: self.live())
    @rule(data=st.data(), num_blocks=st.sampled_from([1, 2, 100]), limit=st.sampled_from([1, 100]))
    def transfer(self, data: st.DataObject, num_blocks: int, limit: int) -> None:
        client = data.draw(st.sampled_from(self.live()))
        self.world.grant(client, num_blocks)
        self.world.move(client, limit)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), choices=st.sampled_from([(), (0,), (1,)]))
    def cancel(self, data: st.DataObject, choices: tuple[int, ...]) -> None:
        self.world.cancel(data.draw(st.sampled_from(self.live())), choices)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), again=st.booleans())
    def break_transfer(self, data: st.DataObject, again: bool) -> None:
        self.world.abort(data.draw(st.sampled_from(self.live())), again)

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "world"):
            self.world.decode.check()
            self.world.prefill.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TwoEngines.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTwoEngines = TwoEngines.TestCase


def test_waiting_behind_hand_overs_counts_as_progress():
    """The one seat is promised to a prompt that queues at P: D computes nothing, and must not be taken for dead."""
    world = World({"max_num_seqs": 1})
    first = world.add(prompt_of(10), SAMPLING, remote=True)
    world.add(prompt_of(10, 3), SAMPLING)
    world.step_decode()
    before = world.decode.load()
    world.step_decode()
    after = world.decode.load()
    assert first.transfer is not None
    assert after.num_waiting == 1
    assert after.step_counter > before.step_counter
    world.settle()
