"""What one plan contains: order, budget, chunk boundaries, queues, and who is preempted."""

from __future__ import annotations

import pytest

from engine.batch import Batch
from engine.config import EngineConfig, LengthEstimate, PolicyName
from engine.engine import Engine
from engine.errors import ConfigInvalid
from engine.messages import (
    BlocksFilled,
    ChoiceStart,
    EngineRequest,
    Event,
    PrefillDone,
    PrefillStarting,
    RemotePromised,
    RequestEnded,
    TokenEvent,
)
from engine.policy import ChunkedPolicy, FcfsPolicy
from engine.request import SamplingParams
from engine.scheduler import RETRY_STEPS
from tests.unit.engine_world import FakeClock, make_config, make_engine


class Watch:
    """Records the batches an engine's runner is given."""

    def __init__(self, engine: Engine) -> None:
        self.batches: list[Batch] = []
        self._runner = engine._runner
        engine._runner = self

    def execute(self, batch: Batch):
        self.batches.append(batch)
        self.spans = [
            [(c.sequence.request_key, c.start, c.start + c.num_tokens) for c in b.chunks] for b in self.batches
        ]
        return self._runner.execute(batch)

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        self._runner.zero_slots(block_id, first_slot)


def submit(engine: Engine, key: int, num_prompt_tokens: int, max_tokens: int = 4, choices: int = 1) -> None:
    prompt = tuple(1 + (key + position) % 7 for position in range(num_prompt_tokens))
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    starts = tuple(ChoiceStart(choice) for choice in range(choices))
    engine.match(EngineRequest(key, f"r{key}", prompt, sampling, starts))
    engine.start_local(key)


def run_out(engine: Engine) -> list[TokenEvent]:
    return [event for event in all_events(engine) if isinstance(event, TokenEvent)]


def all_events(engine: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(500):
        if not engine.has_work:
            return events
        events += engine.step().events
        engine.check()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize(
    ("start", "target", "budget", "end"),
    [
        (0, 20, 8, 8),
        (0, 20, 15, 8),
        (0, 20, 16, 16),
        (0, 20, 20, 20),
        (0, 20, 7, 0),
        (4, 20, 8, 8),
        (4, 20, 3, 4),
        (16, 20, 4, 20),
        (16, 20, 3, 16),
    ],
)
def test_chunks_end_at_absolute_multiples_or_the_end(start: int, target: int, budget: int, end: int):
    assert ChunkedPolicy(8).chunk_end(start, target, budget) == end


def test_fcfs_never_splits_a_prompt():
    assert FcfsPolicy().chunk_end(0, 1000, 1) == 1000
    assert FcfsPolicy().chunk_end(0, 1000, 0) == 0


def test_decodes_come_first_then_begun_prompts_then_new_ones():
    engine, _ = make_engine()
    watch = Watch(engine)
    submit(engine, 1, 4, max_tokens=8)
    engine.step()
    submit(engine, 2, 30)
    submit(engine, 3, 8)
    engine.step()
    engine.step()
    assert watch.spans[1] == [(1, 4, 5), (2, 0, 16)]  # 23 tokens of budget: two whole chunks of 8
    assert watch.spans[2] == [(1, 5, 6), (2, 16, 30), (3, 0, 8)]


def test_a_step_never_exceeds_its_budget_and_no_decode_waits_for_a_prompt():
    engine, _ = make_engine()
    watch = Watch(engine)
    for key in range(1, 9):
        submit(engine, key, 5 * key, max_tokens=6)
    run_out(engine)
    for spans in watch.spans:
        assert sum(end - start for _, start, end in spans) <= engine.config.max_num_batched_tokens
    for key in range(1, 9):
        decoding = [index for index, spans in enumerate(watch.spans) if (key, 5 * key) in [span[:2] for span in spans]]
        steps = [index for index, spans in enumerate(watch.spans) for span in spans if span[0] == key]
        first = steps.index(decoding[0])
        assert steps[first:] == list(range(decoding[0], decoding[0] + 5)), "one token in every step from the first on"


def test_a_late_request_joins_the_running_batch_in_the_next_step():
    engine, _ = make_engine()
    watch = Watch(engine)
    submit(engine, 1, 4, max_tokens=9)
    engine.step()
    engine.step()
    submit(engine, 2, 3)
    engine.step()
    assert watch.spans[-1] == [(1, 5, 6), (2, 0, 3)]


def test_fcfs_runs_a_whole_prompt_over_budget():
    engine, _ = make_engine(policy=PolicyName.FCFS)
    watch = Watch(engine)
    submit(engine, 1, 50)
    run_out(engine)
    assert watch.spans[0] == [(1, 0, 50)]


def test_no_more_sequences_run_than_allowed_choices_counted():
    engine, _ = make_engine(max_num_seqs=3)
    watch = Watch(engine)
    submit(engine, 1, 3, choices=2)
    submit(engine, 2, 3, choices=2)
    submit(engine, 3, 3)
    run_out(engine)
    assert max(len(batch.chunks) for batch in watch.batches) <= 3
    assert {span[0] for spans in watch.spans[:3] for span in spans} == {1}, "nobody overtakes the one that waits"


def test_one_prompt_is_computed_once_for_all_choices():
    engine, _ = make_engine(prefix_caching=False)
    watch = Watch(engine)
    submit(engine, 1, 14, max_tokens=3, choices=3)
    tokens = run_out(engine)
    prompt_tokens = sum(end - start for spans in watch.spans for _, start, end in spans if start < 14)
    assert prompt_tokens == 14
    assert len(tokens) == 9
    assert engine.counters.copied_blocks == 2, "the last writer of a shared tail needs no copy"


def test_a_cached_prefix_is_not_computed_again_but_its_last_position_is():
    engine, _ = make_engine()
    submit(engine, 1, 16, max_tokens=1)
    run_out(engine)
    watch = Watch(engine)
    submit(engine, 1, 16, max_tokens=1)
    run_out(engine)
    assert watch.spans == [[(1, 12, 16)]]
    assert engine.counters.cached_tokens == 12


@pytest.mark.parametrize(("first", "second"), [(18, 6), (6, 18)])
def test_the_sequence_that_loses_least_is_preempted(first: int, second: int):
    engine, _ = make_engine(num_blocks=8, prefix_caching=False, constant_estimate=1, max_model_len=32)
    submit(engine, 1, first, max_tokens=12)
    submit(engine, 2, second, max_tokens=12)
    ends = [event for event in all_events(engine) if isinstance(event, RequestEnded)]
    lost = {end.stats.num_prompt_tokens: end.stats.num_recomputed_tokens for end in ends}
    assert lost[18] == 0
    assert 6 < lost[6] <= 16


def test_maximum_estimate_never_preempts():
    engine, _ = make_engine(num_blocks=8, length_estimate=LengthEstimate.MAXIMUM, max_model_len=32)
    for key in range(1, 6):
        submit(engine, key, 10, max_tokens=12)
    run_out(engine)
    assert engine.counters.preemptions == 0


def test_the_only_running_sequence_is_never_preempted_for_itself():
    engine, _ = make_engine(num_blocks=8, max_model_len=32, constant_estimate=1)
    submit(engine, 1, 10, max_tokens=22)
    assert len(run_out(engine)) == 22
    assert engine.counters.preemptions == 0


@pytest.mark.parametrize("num_host_blocks", [0, 16])
def test_logs_of_forks_that_wait_for_each_others_blocks_come_free(num_host_blocks: int):
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "chunk_size": 4, "num_blocks": 5, "max_model_len": 20}
    engine, _ = make_engine(prefix_caching=False, num_host_blocks=num_host_blocks, **limits)
    starts = tuple(ChoiceStart(choice, tuple([3] * 12)) for choice in range(3))
    engine.match(EngineRequest(1, "r", (1, 2, 3, 4, 5, 6), SamplingParams(max_tokens=13, ignore_eos=True), starts))
    engine.start_local(1)
    assert len(run_out(engine)) == 3
    assert engine.counters.preemptions > 0
    assert (engine.counters.recomputed_tokens == 0) == (num_host_blocks > 0)


def test_a_promise_does_not_overtake_an_older_request_that_waits_for_memory():
    engine, _ = make_engine(max_num_seqs=2)
    submit(engine, 1, 4, max_tokens=6)
    engine.step()
    submit(engine, 2, 4, choices=2)
    engine.match(EngineRequest(3, "r3", (1, 2, 3), SamplingParams()))
    engine.promise_remote(3)
    kinds = [(type(event), event.key) for event in all_events(engine)]
    assert kinds.index((RequestEnded, 1)) < kinds.index((TokenEvent, 2)) < kinds.index((RemotePromised, 3))


# ------------------------------------------------------------------ the prefill queue


def prefill(engine: Engine, key: int, num_prompt_tokens: int, due: float, credit: int = 1000) -> None:
    prompt = tuple(1 + (key * 3 + position) % 11 for position in range(num_prompt_tokens))
    engine.start_prefill(EngineRequest(key, f"r{key}", prompt, SamplingParams()), 0, due)
    engine.grant_credit(key, credit)


def started(engine: Engine, num_steps: int = 1) -> list[int]:
    events = [event for _ in range(num_steps) for event in engine.step().events]
    return [event.key for event in events if isinstance(event, PrefillStarting)]


def test_prompts_start_by_deadline():
    engine, _ = make_engine()
    for key, due in ((1, 9.0), (2, 1.0), (3, 5.0)):
        prefill(engine, key, 8, due)
    assert started(engine) == [2, 3, 1]


def test_ageing_lets_an_old_prompt_pass_a_more_urgent_newcomer():
    clock = FakeClock()
    engine, _ = make_engine(clock, prefill_ageing=1.0, max_held_tokens=16)
    prefill(engine, 1, 16, due=0.5)
    prefill(engine, 2, 16, due=10.0)
    assert started(engine) == [1]
    clock.now = 6.0
    prefill(engine, 3, 16, due=8.0)
    engine.release_transfer(1, ok=True)
    assert started(engine, 2) == [2], "10 + 0 waited from the start, 8 + 6 came late"


def test_a_prompt_without_credit_is_skipped_and_another_runs():
    engine, _ = make_engine()
    watch = Watch(engine)
    prefill(engine, 1, 16, due=1.0, credit=0)
    prefill(engine, 2, 16, due=2.0)
    engine.step()
    assert watch.spans == [[(2, 0, 16)]]


def test_chunks_stop_where_credit_ends():
    engine, _ = make_engine()
    watch = Watch(engine)
    prefill(engine, 1, 22, due=1.0, credit=2)
    engine.step()
    engine.step()
    assert watch.spans == [[(1, 0, 8)]], "two blocks of four"
    engine.grant_credit(1, 3)
    engine.step()
    assert watch.spans[1] == [(1, 8, 16)], "20 is no multiple of the chunk size"
    engine.grant_credit(1, 1)
    events = engine.step().events
    assert watch.spans[2] == [(1, 16, 22)]
    assert [type(event) for event in events] == [BlocksFilled, PrefillDone]


def test_a_policy_that_never_splits_waits_for_the_whole_credit():
    engine, _ = make_engine(policy=PolicyName.FCFS)
    watch = Watch(engine)
    prefill(engine, 1, 22, due=1.0, credit=5)
    engine.step()
    assert watch.batches == []
    engine.grant_credit(1, 1)
    engine.step()
    assert watch.spans == [[(1, 0, 22)]]


def test_only_a_few_prompts_are_reserved_before_their_decode_worker_answers():
    engine, _ = make_engine()
    for key in range(1, 12):
        prefill(engine, key, 4, due=float(key), credit=0)
    assert started(engine, 3) == list(range(1, 9))
    engine.grant_credit(1, 1)
    assert started(engine) == [9]


def test_prompts_are_reserved_only_a_little_ahead_of_what_is_computed():
    engine, _ = make_engine()
    for key in range(1, 6):
        prefill(engine, key, 24, due=float(key))
    assert started(engine) == [1, 2], "two steps' worth"
    assert started(engine) == [3]


@pytest.mark.parametrize("policy", list(PolicyName))
def test_a_long_prompt_that_waits_for_credit_lets_others_start(policy: PolicyName):
    """Its decode worker grants a window at a time and is slow: the engine would stand idle."""
    engine, _ = make_engine(policy=policy)
    prefill(engine, 1, 60, due=1.0, credit=2)
    prefill(engine, 2, 8, due=2.0)
    assert started(engine, 3) == [1, 2]
    assert engine.counters.prefill_tokens == (16 if policy is PolicyName.CHUNKED else 8), (
        "two blocks of four are a chunk"
    )


def test_a_more_urgent_prompt_overtakes_a_long_one_in_progress():
    engine, _ = make_engine(num_blocks=64, max_model_len=128)
    watch = Watch(engine)
    prefill(engine, 1, 96, due=9.0)  # 72 left after a step, more than two steps hold
    engine.step()
    prefill(engine, 2, 8, due=1.0)
    assert started(engine) == [2], "however much of the long one is left"
    engine.step()
    assert watch.spans == [[(1, 0, 24)], [(2, 0, 8)], [(1, 24, 48)]], (
        "and a step ends with the prompt that it completes"
    )


@pytest.mark.parametrize(("due", "num_later", "computed_before"), [(1.0, 0, 24), (20.0, 0, 120), (20.0, 3, 144)])
def test_waiting_tokens_bound_the_queue_of_an_urgent_prompt_and_miss_those_that_pass_a_patient_one(
    due: float, num_later: int, computed_before: int
):
    """120 tokens wait when the prompt comes: what the gateway predicts its queue from."""
    engine, _ = make_engine(num_blocks=64, max_model_len=128)
    watch = Watch(engine)
    prefill(engine, 1, 120, due=9.0)
    assert engine.load().num_waiting_tokens == 120
    engine.step()
    prefill(engine, 2, 8, due=due)
    for key in range(3, 3 + num_later):
        prefill(engine, key, 8, due=2.0)
    all_events(engine)
    before = next(index for index, spans in enumerate(watch.spans) if any(key == 2 for key, *_ in spans))
    spans = [span for step in watch.spans[: before + 1] for span in step]
    ahead = spans[: next(index for index, (key, *_) in enumerate(spans) if key == 2)]
    assert sum(end - start for _, start, end in ahead) == computed_before


def test_prompts_shorter_than_a_chunk_share_a_step():
    engine, _ = make_engine()
    watch = Watch(engine)
    for key in (1, 2, 3):
        prefill(engine, key, 4, due=float(key))
    engine.step()
    assert watch.spans == [[(1, 0, 4), (2, 0, 4)]]


def test_a_long_prompt_is_overtaken_only_until_newcomers_are_due_after_it():
    clock = FakeClock()
    engine, _ = make_engine(clock, num_blocks=64)
    watch = Watch(engine)
    prefill(engine, 1, 64, due=10.0)
    for key in range(2, 40):
        clock.now = float(key)
        prefill(engine, key, 8, due=clock.now + 1.0)
        engine.step()
        engine.release_transfer(key, ok=True)
        if any(spans[0][0] == 1 for spans in watch.spans):
            break
    assert key <= 7, "7 + 1 + 7 / 2 is later than 10"


def test_published_and_unreleased_tokens_are_capped():
    engine, _ = make_engine(max_held_tokens=24)
    for key in (1, 2):
        prefill(engine, key, 16, due=float(key))
    assert started(engine, 4) == [1]
    engine.release_transfer(1, ok=True)
    assert started(engine) == [2]


def test_prompts_that_wait_for_memory_are_not_looked_up_in_every_step(monkeypatch: pytest.MonkeyPatch):
    engine, _ = make_engine(num_blocks=7, max_model_len=28)
    prefill(engine, 1, 16, due=1.0)
    for key in range(2, 50):
        prefill(engine, key, 16, due=float(key))
    engine.step()
    looked_up: list[int] = []
    match = engine._memory.match
    monkeypatch.setattr(
        engine._memory, "match", lambda each, target: looked_up.append(each.request_key) or match(each, target)
    )
    for _ in range(3 * (RETRY_STEPS + 1)):
        engine.step()
    assert 1 <= len(looked_up) <= 3
    assert set(looked_up) == {2}, "the most urgent alone"
    engine.release_transfer(1, ok=True)
    assert started(engine) == [2], "and at once when memory comes back"


def test_a_more_urgent_prompt_that_fits_does_not_wait_for_the_next_look():
    engine, _ = make_engine(num_blocks=7, max_model_len=28)
    prefill(engine, 1, 16, due=1.0)
    prefill(engine, 2, 16, due=2.0)
    assert started(engine, 2) == [1]
    prefill(engine, 3, 4, due=1.5)
    assert started(engine) == [3]


def test_a_prompt_starts_only_with_its_whole_need_reserved():
    engine, _ = make_engine(num_blocks=7, max_model_len=28)
    prefill(engine, 1, 16, due=1.0)
    prefill(engine, 2, 16, due=2.0)
    assert started(engine, 5) == [1]
    engine.release_transfer(1, ok=False)
    assert started(engine) == [2]


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_size": 12}, "block_size"),
        ({"max_num_batched_tokens": 15}, "max_num_batched_tokens"),
        ({"prefill_ageing": -1.0}, "prefill_ageing"),
        ({"max_held_tokens": 0}, "max_held_tokens"),
    ],
)
def test_a_configuration_that_cannot_make_progress_is_refused_by_field(changes: dict[str, object], field: str):
    with pytest.raises(ConfigInvalid) as caught:
        make_config(**changes)
    assert caught.value.field == field


def test_defaults_are_valid():
    assert EngineConfig(num_blocks=1).chunk_size == 64
