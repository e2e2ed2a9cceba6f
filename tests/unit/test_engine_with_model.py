"""The engine on a real, tiny model in deterministic mode: no schedule changes a token or a bit of a logprob."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_memory import KVMemory
from engine.messages import (
    BlocksFilled,
    BlockSlot,
    ChoiceStart,
    EngineRequest,
    Event,
    PrefillDone,
    PrefillStarting,
    RemotePromised,
    RequestEnded,
    TokenEvent,
)
from engine.request import SamplingParams
from engine.runner import ModelRunner, kv_shape
from engine.swap_memory import SwapMemory
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

Outputs = dict[tuple[int, int], list[tuple[int, float]]]

SAMPLINGS = (
    SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, num_logprobs=2),
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, min_p=0.02, seed=5, ignore_eos=True, num_logprobs=0),
    SamplingParams(
        max_tokens=18, seed=9, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.3, num_logprobs=0
    ),
)


def requests() -> list[EngineRequest]:
    """Prompts of awkward lengths, some sharing a prefix, some with several choices."""
    shared = [3 + (7 * position) % 250 for position in range(45)]
    made = []
    for key, length in enumerate((1, 15, 16, 17, 40, 45), 1):
        prompt = (*shared[:length], key + 40)
        choices = tuple(ChoiceStart(choice) for choice in range(1 + key % 3))
        made.append(EngineRequest(key, f"r{key}", prompt, SAMPLINGS[key % 3], choices))
    return made


class Rig:
    """An engine on the checkpoint."""

    def __init__(self, path: Path, num_blocks: int = 256, **changes: object) -> None:
        config = load_config(path)
        values: dict[str, object] = {
            "block_size": 8,
            "max_model_len": 96,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 64,
            "chunk_size": 16,
        }
        settings = EngineConfig(num_blocks=num_blocks, **{**values, **changes})  # pyright: ignore[reportArgumentType]
        self.kv = KVMemory(kv_shape(config, settings.block_size), num_blocks)
        self.kv.tensor.fill_(float("nan"))
        swap = SwapMemory(self.kv.tensor, settings.num_host_blocks) if settings.num_host_blocks else None
        runner = ModelRunner(config, open_weights(path), self.kv, deterministic=True, num_threads=1, swap=swap)
        self.engine = Engine(settings, runner)
        self.destinations: dict[int, dict[int, BlockSlot]] = {}

    def serve(self, wanted: list[EngineRequest]) -> Outputs:
        """All of them, locally."""
        for request in wanted:
            self.engine.match(request)
            self.engine.start_local(request.key)
        return heard(self.run())

    def run(self) -> list[Event]:
        events: list[Event] = []
        for _ in itertools.takewhile(lambda _: self.engine.has_work, range(2000)):
            events += self.engine.step().events
        self.engine.check()
        return events


def heard(events: list[Event]) -> Outputs:
    outputs: Outputs = {}
    for event in events:
        if isinstance(event, TokenEvent):
            output = outputs.setdefault((event.key, event.choice), [])
            output.append((event.token.token_id, event.token.logprob))
    return outputs


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> Outputs:
    """Every request by itself on an engine that lacks nothing, without prefix cache."""
    rig = Rig(tiny_llama, prefix_caching=False, max_num_batched_tokens=128, chunk_size=64)
    outputs: Outputs = {}
    for request in requests():
        outputs |= rig.serve([request])
    return outputs


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="together"),
        pytest.param({"chunk_size": 8, "max_num_batched_tokens": 24}, id="small-chunks"),
        pytest.param({"num_blocks": 20, "constant_estimate": 1}, id="preempted"),
        pytest.param({"num_blocks": 20, "constant_estimate": 1, "prefix_caching": False}, id="preempted-uncached"),
        pytest.param({"block_size": 32}, id="big-blocks"),
    ],
)
def test_no_schedule_changes_a_token_or_a_logprob(tiny_llama: Path, alone: Outputs, changes: dict[str, object]):
    rig = Rig(tiny_llama, **changes)  # pyright: ignore[reportArgumentType]
    assert rig.serve(requests()) == alone
    if "num_blocks" in changes:
        assert rig.engine.counters.preemptions > 0
    assert rig.engine.counters.copied_blocks > 0
    if changes.get("prefix_caching", True):
        again = rig.serve(requests())
        assert again == alone, "the second time most of it comes from the prefix cache"
        assert rig.engine.counters.cached_tokens > 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_swapping_to_host_memory_changes_no_bit_and_computes_nothing_again(
    tiny_llama: Path, alone: Outputs, prefix_caching: bool
):
    rig = Rig(tiny_llama, 20, constant_estimate=1, prefix_caching=prefix_caching, num_host_blocks=200)
    for _ in range(2):  # the second time the cache, if there is one, knows the prompts
        assert rig.serve(requests()) == alone
    counters = rig.engine.counters
    assert counters.swap_outs == counters.swap_ins > 0
    assert counters.swapped_in_blocks > 0
    assert counters.recomputed_tokens == 0


@pytest.mark.parametrize("cut", [1, 7, 8, 17])
def test_a_replay_after_a_cut_goes_on_with_the_same_tokens(tiny_llama: Path, alone: Outputs, cut: int):
    replays = []
    for request in requests():
        logs = {start.choice: alone[request.key, start.choice][:cut] for start in request.choices}
        starts = tuple(ChoiceStart(choice, tuple(token for token, _ in log)) for choice, log in logs.items())
        replays.append(EngineRequest(request.key, "r", request.prompt_token_ids, request.sampling, starts))
    rest = Rig(tiny_llama).serve(replays)
    assert rest == {which: output[cut:] for which, output in alone.items()}


def test_prefill_on_another_engine_changes_nothing(tiny_llama: Path, alone: Outputs):
    prefill, decode = Rig(tiny_llama, chunk_size=8), Rig(tiny_llama, block_size=8)
    wanted = {request.key: request for request in requests()}
    for request in wanted.values():
        decode.engine.match(request)
        decode.engine.promise_remote(request.key)
    events: list[Event] = []
    for _ in range(400):
        for event in (news := decode.engine.step().events):
            if isinstance(event, RemotePromised):
                prefill.engine.start_prefill(wanted[event.key], event.match.num_cached_blocks, due=0.0)
        events += news
        for event in prefill.engine.step().events:
            hand_over(prefill, decode, event)
        if sum(isinstance(event, RequestEnded) for event in events) == len(wanted):
            break
    assert heard(events) == alone
    assert decode.engine.counters.prefill_tokens == 0
    decode.engine.check()
    prefill.engine.check()


def hand_over(prefill: Rig, decode: Rig, event: Event) -> None:
    """Do what the two services do, in one process."""
    match event:
        case PrefillStarting():
            slots = decode.engine.try_reserve_remote(event.key)
            assert slots is not None
            decode.destinations[event.key] = {slot.index: slot for slot in slots}
            prefill.engine.grant_credit(event.key, event.num_blocks)
        case BlocksFilled():
            copy_blocks(prefill, decode, event.key, event.blocks)
        case PrefillDone():
            copy_blocks(prefill, decode, event.key, (event.tail,) if event.tail else ())
            prefill.engine.release_transfer(event.key, ok=True)
            decode.engine.commit_remote(event.key, event.first_tokens)
        case _:
            pass


def copy_blocks(prefill: Rig, decode: Rig, key: int, slots: tuple[BlockSlot, ...]) -> None:
    for slot in slots:
        destination = decode.destinations[key][slot.index]
        decode.kv.block(destination.block_id)[:] = prefill.kv.block(slot.block_id)


@pytest.mark.parametrize("stop_token_id", [256, 2**31, 2**32 - 1])
def test_a_stop_token_id_beyond_the_vocabulary_is_harmless(tiny_llama: Path, stop_token_id: int):
    """Clients may send any; with min_tokens it reaches the sampler's mask."""
    sampling = SamplingParams(max_tokens=3, min_tokens=2, ignore_eos=True, stop_token_ids=(stop_token_id,))
    outputs = Rig(tiny_llama).serve([EngineRequest(1, "r", (5, 6, 7), sampling)])
    assert len(outputs[1, 0]) == 3
