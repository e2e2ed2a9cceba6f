"""One engine, local requests: outputs, finish conditions, ends, replays, errors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.config import LengthEstimate, PolicyName
from engine.engine import Engine
from engine.errors import EngineDraining, PhaseConflict, RequestInvalid, RequestUnknown
from engine.fake_runner import expected_output
from engine.messages import ChoiceStart, EndReason, EngineRequest, Event, RequestEnded, TokenEvent
from engine.request import FinishReason, SampledToken, SamplingParams
from tests.unit.engine_world import VOCAB_SIZE, FakeClock, World, make_engine

PROMPT = (5, 3, 5, 8, 9, 7, 9, 3, 2)


def request(key: int = 1, prompt: tuple[int, ...] = PROMPT, **sampling: object) -> EngineRequest:
    return EngineRequest(key, f"r{key}", prompt, SamplingParams(**sampling))  # pyright: ignore[reportArgumentType]


def run(engine: Engine) -> list[Event]:
    """Step until idle."""
    events: list[Event] = []
    for _ in itertools.takewhile(lambda _: engine.has_work, range(1000)):
        events += engine.step().events
        engine.check()
    assert not engine.has_work
    return events


def serve(engine: Engine, *requests: EngineRequest) -> list[Event]:
    """Start them locally and step until idle."""
    for each in requests:
        engine.match(each)
        engine.start_local(each.key)
    return run(engine)


def said(events: list[Event], key: int = 1, choice: int = 0) -> list[int]:
    return [
        event.token.token_id
        for event in events
        if isinstance(event, TokenEvent) and (event.key, event.choice) == (key, choice)
    ]


def ends(events: list[Event]) -> list[RequestEnded]:
    return [event for event in events if isinstance(event, RequestEnded)]


# ------------------------------------------------------------------ finish conditions


def oracle(**sampling: object) -> list[int]:
    return expected_output(PROMPT, SamplingParams(**sampling), vocab_size=VOCAB_SIZE)  # pyright: ignore[reportArgumentType]


def test_max_tokens_ends_with_length():
    engine, _ = make_engine()
    events = serve(engine, request(max_tokens=7, ignore_eos=True))
    assert said(events) == oracle(max_tokens=7)
    assert [event.finish for event in events if isinstance(event, TokenEvent)] == [None] * 6 + [FinishReason.LENGTH]
    assert ends(events)[0].reason is EndReason.FINISHED


def test_eos_ends_with_stop_unless_ignored():
    output = oracle(max_tokens=20, ignore_eos=True)
    eos = output[4]
    first = output.index(eos)
    for ignore, length in ((False, first + 1), (True, 20)):
        engine, _ = make_engine(eos_token_ids=(eos,))
        events = serve(engine, request(max_tokens=20, ignore_eos=ignore))
        assert len(said(events)) == length
        last = events[-2]
        assert isinstance(last, TokenEvent)
        assert last.finish is (FinishReason.LENGTH if ignore else FinishReason.STOP)


def test_a_stop_token_ends_even_when_eos_is_ignored():
    output = oracle(max_tokens=20, ignore_eos=True)
    engine, _ = make_engine()
    events = serve(engine, request(max_tokens=20, ignore_eos=True, stop_token_ids=(output[3],)))
    assert said(events) == output[: output.index(output[3]) + 1]


def test_min_tokens_lets_early_stops_pass():
    output = oracle(max_tokens=20, ignore_eos=True)
    engine, _ = make_engine()
    events = serve(engine, request(max_tokens=20, ignore_eos=True, stop_token_ids=(output[0],), min_tokens=2))
    assert len(said(events)) > 1
    assert said(events) == output[: len(said(events))]


@pytest.mark.parametrize("min_tokens", [3, 5, 9])
def test_min_tokens_lets_a_stop_pass_while_decoding(min_tokens: int):
    vocabulary = tuple(range(VOCAB_SIZE))  # every token is a stop token
    engine, _ = make_engine()
    events = serve(engine, request(max_tokens=20, stop_token_ids=vocabulary, min_tokens=min_tokens))
    assert len(said(events)) == min_tokens


def test_stop_wins_over_length_on_the_last_token():
    output = oracle(max_tokens=20, ignore_eos=True)
    engine, _ = make_engine(eos_token_ids=())
    length = output.index(output[6]) + 1
    events = serve(engine, request(max_tokens=length, stop_token_ids=(output[6],)))
    assert events[-2].finish is FinishReason.STOP  # pyright: ignore


def test_the_model_length_ends_a_sequence():
    engine, _ = make_engine(max_model_len=16)
    assert len(said(serve(engine, request(max_tokens=1000, ignore_eos=True)))) == 16 - len(PROMPT)


# ------------------------------------------------------------------ ends


def test_every_choice_ends_and_the_request_ends_once():
    engine, _ = make_engine()
    starts = tuple(ChoiceStart(choice) for choice in (0, 2, 5))
    events = serve(engine, EngineRequest(1, "r", PROMPT, SamplingParams(max_tokens=4, ignore_eos=True), starts))
    for choice in (0, 2, 5):
        assert said(events, choice=choice) == expected_output(PROMPT, SamplingParams(max_tokens=4), choice, VOCAB_SIZE)
    (end,) = ends(events)
    assert end.stats.num_output_tokens == 12
    assert end.stats.num_prompt_tokens == len(PROMPT)
    assert events[-1] is end


def test_choices_are_counted_by_how_they_ended():
    """One stops, one runs to its length, one is cancelled alone."""
    lengths = {
        choice: expected_output(PROMPT, SamplingParams(max_tokens=9), choice, VOCAB_SIZE, (0,)) for choice in range(40)
    }
    stops = next(choice for choice, output in lengths.items() if output[-1] == 0)
    runs = next(choice for choice, output in lengths.items() if output[-1] != 0)
    engine, _ = make_engine()
    starts = (ChoiceStart(stops), ChoiceStart(runs), ChoiceStart(99))
    engine.match(EngineRequest(1, "r", PROMPT, SamplingParams(max_tokens=9), starts))
    engine.start_local(1)
    engine.cancel(1, (99,))
    (ended,) = ends(run(engine))
    assert (ended.stats.num_stop, ended.stats.num_length, ended.stats.num_abort) == (1, 1, 1)


def test_a_cancelled_request_aborts_every_choice_that_is_left():
    engine, _ = make_engine()
    engine.match(EngineRequest(1, "r", PROMPT, SamplingParams(), tuple(ChoiceStart(choice) for choice in range(3))))
    engine.cancel(1)
    (ended,) = ends(run(engine))
    assert (ended.stats.num_stop, ended.stats.num_length, ended.stats.num_abort) == (0, 0, 3)


@pytest.mark.parametrize(("is_ok", "counts"), [(True, (1, 0)), (False, (0, 1))])
def test_a_prompt_for_another_worker_is_one_choice_however_many_draw_from_it(is_ok: bool, counts: tuple[int, int]):
    engine, _ = make_engine()
    engine.start_prefill(EngineRequest(1, "r", PROMPT, SamplingParams(), (ChoiceStart(0), ChoiceStart(1))), 0, due=1.0)
    engine.grant_credit(1, 9)
    engine.step()
    engine.release_transfer(1, ok=is_ok)
    (ended,) = ends(run(engine))
    assert (ended.stats.num_length, ended.stats.num_abort) == counts


def test_cancel_stops_within_a_step_and_frees_everything():
    engine, _ = make_engine()
    engine.match(request(max_tokens=30, ignore_eos=True))
    engine.start_local(1)
    engine.step()
    engine.step()
    engine.cancel(1)
    engine.cancel(1)
    result = engine.step()
    assert [type(event) for event in result.events] == [RequestEnded]
    assert result.num_decode_tokens == 0
    assert ends(result.events)[0].reason is EndReason.CANCELLED
    assert ends(result.events)[0].stats.num_output_tokens == 2
    assert engine.load().num_blocks_free == engine.config.num_blocks


@pytest.mark.parametrize("steps_before", range(4))
@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1), (2,)])
def test_cancelled_choices_go_and_the_others_are_unharmed(steps_before: int, gone: tuple[int, ...]):
    world = World({"max_num_batched_tokens": 16, "num_blocks": 20})
    prompt = tuple(1 + position % 7 for position in range(26))
    client = world.add(prompt, SamplingParams(max_tokens=9, ignore_eos=True), {0: 0, 1: 2, 2: 0})
    for _ in range(steps_before):
        world.step_decode()
    world.cancel(client, gone)
    world.settle()
    assert client.ended is not None
    assert client.ended.reason is EndReason.FINISHED
    assert client.finished == {0, 1, 2} - set(gone)


def test_a_deadline_ends_a_request_in_any_phase():
    clock = FakeClock()
    engine, _ = make_engine(clock)
    for key in range(1, 4):
        engine.match(
            EngineRequest(key, "r", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True), deadline=float(key))
        )
    engine.start_local(1)
    engine.promise_remote(2)
    engine.step()
    assert engine.next_deadline() == 1.0
    clock.now = 2.5
    reasons = {end.key: end for end in ends(engine.step().events)}
    assert {key: end.reason for key, end in reasons.items()} == {1: EndReason.DEADLINE, 2: EndReason.DEADLINE}
    assert reasons[1].message == "deadline passed after 2.500 s while running"
    assert reasons[2].message == "deadline passed after 2.500 s while promised"
    assert engine.next_deadline() == 3.0
    clock.now = 3.0
    assert [end.key for end in ends(engine.step().events)] == [3]
    assert engine.next_deadline() == float("inf")
    assert engine.load().num_blocks_free == engine.config.num_blocks


def test_draining_refuses_new_requests_and_finishes_the_old():
    engine, _ = make_engine()
    engine.match(request(max_tokens=3, ignore_eos=True))
    engine.start_local(1)
    engine.drain()
    with pytest.raises(EngineDraining):
        engine.match(request(2))
    with pytest.raises(EngineDraining):
        engine.start_prefill(request(2), 0, due=0.0)
    assert len(said(run(engine))) == 3


# ------------------------------------------------------------------ refusals name value and limit


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(prompt=()), "prompt_token_ids is empty, the limit is 1"),
        (request(prompt=(1,) * 64), "prompt_token_ids is 64 tokens, the limit is 63: that is max_model_len less one"),
        (request(max_tokens=0), "sampling.max_tokens is 0, the limit is 1"),
        (request(prompt=(1,) * 30, max_tokens=20), "KV blocks needed is 13, the limit is 12: 49 tokens"),
        (EngineRequest(1, "r", PROMPT, SamplingParams(), ()), "choices is 0, the limit is 1"),
        (EngineRequest(1, "r", PROMPT, SamplingParams(), tuple(map(ChoiceStart, range(9)))), "choices is 9, the limit"),
        (EngineRequest(1, "r", PROMPT, SamplingParams(), (ChoiceStart(1), ChoiceStart(1))), "a choice is listed twice"),
        (
            EngineRequest(1, "r", PROMPT, SamplingParams(max_tokens=2), (ChoiceStart(3, (1, 2)),)),
            r"choices\[3\].committed_token_ids is 2, the limit is 1: nothing is left to draw",
        ),
    ],
)  # fmt: skip
def test_a_request_that_can_never_run_is_refused(bad: EngineRequest, message: str):
    engine, _ = make_engine(num_blocks=12)
    with pytest.raises(RequestInvalid, match=message):
        engine.match(bad)
    assert engine.num_requests == 0


def test_a_token_that_the_model_does_not_have_ends_its_request_and_not_the_engine():
    engine, _ = make_engine(vocab_size=16)
    with pytest.raises(RequestInvalid, match="prompt_token_ids is 16, the limit is 15"):
        engine.match(request(prompt=(1, 16)))
    with pytest.raises(RequestInvalid, match="prompt_token_ids is 16, the limit is 15"):
        engine.start_prefill(request(prompt=(16,)), 0, due=0.0)
    log = (ChoiceStart(0, (3, 99)),)
    with pytest.raises(RequestInvalid, match=r"choices\[0\].committed_token_ids is 99, the limit is 15"):
        engine.match(EngineRequest(1, "r", PROMPT, SamplingParams(), log))


def test_a_request_that_just_fits_runs():
    engine, _ = make_engine(num_blocks=12)
    assert len(said(serve(engine, request(prompt=(1,) * 30, max_tokens=19, ignore_eos=True)))) == 19


def test_a_prefill_that_can_never_run_is_refused():
    engine, _ = make_engine(num_blocks=4)
    with pytest.raises(RequestInvalid, match="num_blocks_held is 3, the limit is 2"):
        engine.start_prefill(request(), 3, due=0.0)
    with pytest.raises(RequestInvalid, match="KV blocks needed is 5, the limit is 4"):
        engine.start_prefill(request(prompt=(1,) * 17), 0, due=0.0)


def test_calls_in_the_wrong_order_are_refused_by_name():
    engine, _ = make_engine()
    with pytest.raises(RequestUnknown, match="request 7 has ended or was never started"):
        engine.start_local(7)
    engine.match(request())
    with pytest.raises(PhaseConflict, match="commit_remote for request 1, which is matched"):
        engine.commit_remote(1, {})
    with pytest.raises(PhaseConflict, match="a second start for request 1"):
        engine.match(request())
    engine.start_local(1)
    with pytest.raises(PhaseConflict, match="start_local for request 1, which is queued"):
        engine.start_local(1)


# ------------------------------------------------------------------ what a match says


def test_match_says_what_is_cached_for_this_tenant_and_leaves_the_last_position():
    engine, _ = make_engine()
    prompt = tuple(range(1, 13))
    serve(engine, EngineRequest(1, "r", prompt, SamplingParams(max_tokens=1), cache_salt=b"a"))
    for key, salt, tokens in ((2, b"a", 8), (3, b"b", 0)):
        match = engine.match(EngineRequest(key, "r", prompt, SamplingParams(), cache_salt=salt))
        assert match.num_cached_tokens == tokens
    longer = engine.match(EngineRequest(4, "r", (*prompt, 9), SamplingParams(), cache_salt=b"a"))
    assert longer.num_cached_blocks == 3


def test_a_conversation_goes_on_from_the_blocks_of_its_last_answer():
    engine, runner = make_engine()
    events = serve(engine, request(max_tokens=12, ignore_eos=True))
    runner.num_executed_tokens = 0
    history = (*PROMPT, *said(events))  # 9 + 12 tokens, of which the last was drawn but not computed
    assert engine.match(request(2, (*history, 5))).num_cached_tokens == 20
    engine.start_local(2)
    engine.step()
    assert runner.num_executed_tokens == 2


def test_load_tells_what_waits_and_runs():
    engine, _ = make_engine(max_num_seqs=2)
    for key in range(1, 5):
        engine.match(request(key, max_tokens=9, ignore_eos=True))
        engine.start_local(key)
    engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (2, 2, 18)
    assert load.step_counter == 1
    run(engine)


# ------------------------------------------------------------------ outputs depend on nothing but the request

VARIANTS: dict[str, dict[str, object]] = {
    "tiny pool": {"num_blocks": 12, "constant_estimate": 1},
    "tiny pool, swapped": {"num_blocks": 12, "constant_estimate": 1, "num_host_blocks": 64},
    "tiny pool, some swapped": {"num_blocks": 12, "constant_estimate": 1, "num_host_blocks": 5},
    "tiny pool, swapped uncached": {
        "num_blocks": 12,
        "constant_estimate": 1,
        "num_host_blocks": 64,
        "prefix_caching": False,
    },
    "small chunks": {"chunk_size": 4},
    "big chunks": {"chunk_size": 16},
    "no prefix cache": {"prefix_caching": False},
    "block of one token": {"block_size": 1, "num_blocks": 256},
    "block of sixteen": {"block_size": 16},
    "fcfs": {"policy": PolicyName.FCFS},
    "maximum estimate": {"length_estimate": LengthEstimate.MAXIMUM},
    "two at a time": {"max_num_seqs": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_do_not_depend_on(name: str):
    world = World({"max_model_len": 40, **VARIANTS[name]})
    for seed in range(6):
        prompt = [1 + (seed % 3 + position) % 5 for position in range(7 + 3 * seed)]
        world.add(prompt, SamplingParams(max_tokens=10, seed=seed), dict.fromkeys(range(1 + seed % 3), 0))
    world.settle()
    assert all(client.finished == set(client.expected) for client in world.clients.values())
    counters = world.decode.counters
    if name.startswith("tiny pool"):
        assert counters.preemptions > 0
        assert counters.copied_blocks > 0
        assert (counters.swapped_in_blocks > 0) == ("swapped" in name)


@pytest.mark.parametrize("cut", range(10))
def test_a_replay_after_any_token_continues_the_same_output(cut: int):
    world = World({"num_blocks": 16})
    prompt = (4, 4, 2, 1, 4, 4, 2, 1, 3)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True, seed=cut)
    world.add(prompt, sampling, {0: cut})
    world.add(prompt, sampling, {0: cut, 1: 0, 2: 9 - cut})
    world.settle()
    assert all(client.finished == set(client.expected) for client in world.clients.values())


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_preemption_and_sharing_change_no_output(data: st.DataObject):
    world = World({"num_blocks": data.draw(st.integers(10, 16)), "max_model_len": 40, "constant_estimate": 1})
    for seed in range(data.draw(st.integers(2, 6))):
        prompt = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=20))
        choices = {choice: data.draw(st.integers(0, 6)) for choice in range(data.draw(st.integers(1, 3)))}
        world.add(prompt, SamplingParams(max_tokens=9, seed=seed), choices)
        for _ in range(data.draw(st.integers(0, 3))):
            world.step_decode()
    world.settle()
    assert all(client.finished == set(client.expected) for client in world.clients.values())


class TimedRunner:
    """Takes a given time for each step."""

    def __init__(self, engine: Engine, clock: FakeClock) -> None:
        self.step_s = 1.0
        self._runner, self._clock = engine._runner, clock
        engine._runner = self

    def execute(self, batch: Batch) -> list[SampledToken]:
        self._clock.now += self.step_s
        return self._runner.execute(batch)


def test_prefill_speed_follows_steps_by_their_tokens_and_starts_anew_after_the_warm_up():
    clock = FakeClock()
    engine, _ = make_engine(clock)
    runner = TimedRunner(engine, clock)

    def speed_after(key: int, num_tokens: int, step_s: float) -> float:
        runner.step_s = step_s
        serve(engine, request(key, tuple(1 + (key + i) % 9 for i in range(num_tokens)), max_tokens=1))
        return engine.load().prefill_tokens_per_s

    assert speed_after(1, 16, step_s=16.0) == 1.0, "the first measurement stands alone"
    engine.forget_speeds()
    assert engine.load().prefill_tokens_per_s == 0.0
    assert speed_after(2, 16, step_s=0.16) == pytest.approx(100.0)
    assert speed_after(3, 1, step_s=1.0) == pytest.approx(100.0, rel=0.01), "one token beside others says little"
    assert speed_after(4, 16, step_s=0.32) < 99.5
