"""Decodes in buckets, behind a queue, a step ahead: the same bits as one padded by nothing and waited for.

In the interpreter, where a graph is its own work done again on the same buffers. What only a GPU can show is in
docs/kernels.md.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu.step import QWEN_06B, RandomWeights, tiny
from engine.batch import Batch, Chunk
from engine.buckets import DecodeLimits
from engine.config import EngineConfig
from engine.dispatch import Kernels
from engine.engine import Engine
from engine.kv_memory import KVMemory
from engine.messages import ChoiceStart, EngineRequest, TokenEvent
from engine.request import SampledToken, SamplingParams, Sequence
from engine.runner import ModelRunner, kv_shape
from tests.kernels.triton.late_queue import LateQueue

pytestmark = pytest.mark.timeout(600)

BLOCK = 8
MODEL = replace(tiny(QWEN_06B), eos_token_ids=(2,))
NUM_BLOCKS = 24
LIMITS = DecodeLimits(max_num_seqs=6, max_model_len=64)


def make_runner(
    *, deterministic: bool = True, limits: DecodeLimits | None = LIMITS, queue: LateQueue | None = None
) -> tuple[ModelRunner, KVMemory]:
    """All KV is poisoned, the dummy block too."""
    kv = KVMemory(kv_shape(MODEL, BLOCK), NUM_BLOCKS, has_dummy=True)
    kv.tensor.fill_(float("nan"))
    runner = ModelRunner(
        MODEL, RandomWeights(MODEL), kv, kernels=Kernels.TRITON, deterministic=deterministic, limits=limits, queue=queue
    )
    return runner, kv


def sequences() -> list[Sequence]:
    """Prompts that end inside, at and behind the end of a block; their blocks lie in no order."""
    made: list[Sequence] = []
    for key, length in enumerate((1, 7, 8, 9, 17)):
        generator = torch.Generator().manual_seed(key)
        ids = torch.randint(3, MODEL.vocab_size, (length,), generator=generator).tolist()
        table = array("i", [key + 5 * block for block in (2, 0, 3, 1)])
        sampling = SamplingParams(max_tokens=40, temperature=0.9, top_k=30, top_p=0.95, seed=key, num_logprobs=0)
        made.append(Sequence(key, key, 0, sampling, ids, length, table))
    return made


def step(runner: ModelRunner, chosen: list[Sequence]) -> list[SampledToken]:
    """All known tokens that are not computed yet, and one draw for each."""
    chunks = tuple(Chunk(s, s.num_computed_tokens, s.num_tokens - s.num_computed_tokens, (s,)) for s in chosen)
    drawn = runner.execute(Batch((), chunks))
    for sequence, token in zip(chosen, drawn, strict=True):
        sequence.num_computed_tokens = sequence.num_tokens
        sequence.token_ids.append(token.token_id)
    return drawn


def run(runner: ModelRunner, kv: KVMemory) -> tuple[list[list[SampledToken]], torch.Tensor]:
    """Prompts, then decodes of 5, 3, 1 and again 5 sequences: buckets of 6, 4 and 1. Draws, and KV by position."""
    every = sequences()
    drawn = [step(runner, every)]
    for chosen in (every, every[1:4], every[4:], every, every[::-1]):
        drawn.append(step(runner, chosen))
    runner.settle()
    others = torch.ones(kv.num_blocks, BLOCK, dtype=torch.bool)
    for sequence in every:
        for position in range(sequence.num_computed_tokens + 1):  # one that is computed ahead
            others[sequence.block_table[position // BLOCK], position % BLOCK] = False
    slots = kv.tensor[: kv.num_blocks].movedim(4, 1)
    assert slots[others].isnan().all(), "written where nobody asked for it"
    return drawn, torch.cat([kv_of(kv, sequence) for sequence in every])


def kv_of(kv: KVMemory, sequence: Sequence) -> torch.Tensor:
    """[positions, kv_heads, layers, 2, head_dim] of what is computed."""
    positions = torch.arange(sequence.num_computed_tokens)
    blocks = torch.tensor(sequence.block_table)[positions // BLOCK]
    return kv.tensor[blocks, :, :, :, positions % BLOCK].clone()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_a_padded_graph_gives_the_bits_of_the_step_as_it_is(deterministic: bool) -> None:
    """Tokens, logprobs and KV; outside of the dummy block nothing is written that was not asked for.

    In fast mode the bits of a linear may follow the number of its rows, which is the vendor's choice and not ours, and
    attention's splits follow the step's bound. At these lengths a sequence has one split.
    """
    plain, kv = make_runner(deterministic=deterministic, limits=None)
    drawn, written = run(plain, kv)
    queue = LateQueue()
    runner, kv = make_runner(deterministic=deterministic, queue=queue)
    padded, padded_kv = run(runner, kv)
    assert queue.num_replays >= 8
    assert runner.num_steps_ahead > 0
    if deterministic:
        assert padded == drawn
        assert torch.equal(padded_kv, written)
    else:
        assert [[t.token_id for t in each] for each in padded] == [[t.token_id for t in each] for each in drawn]
        torch.testing.assert_close(padded_kv, written)


def test_without_a_dummy_block_decodes_run_without_graphs() -> None:
    kv = KVMemory(kv_shape(MODEL, BLOCK), NUM_BLOCKS)
    queue = LateQueue()
    runner = ModelRunner(MODEL, RandomWeights(MODEL), kv, kernels=Kernels.TRITON, limits=LIMITS, queue=queue)
    (sequence, *_) = sequences()
    step(runner, [sequence])
    step(runner, [sequence])
    assert queue.num_replays == 0


def test_choices_of_a_prompt_of_one_token_draw_from_one_row() -> None:
    """A step of one token, in a bucket of one, with more draws than that."""
    drawn: list[list[int]] = []
    for queue in (None, LateQueue()):
        runner, _ = make_runner(limits=LIMITS if queue else None, queue=queue)
        first, *_ = sequences()
        choices = tuple(replace(first, sequence_id=choice, choice=choice) for choice in range(3))
        tokens = runner.execute(Batch((), (Chunk(choices[0], 0, 1, choices),)))
        drawn.append([token.token_id for token in tokens])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


# ------------------------------------------------------------------ with an engine

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "num_logprobs": 0},
    {"num_logprobs": 2, "top_k": 9},
    {"min_tokens": 4, "stop_token_ids": tuple(range(0, 96, 3))},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
)


def serve(seed: int, *, ahead: bool) -> tuple[dict[tuple[int, int], list[SampledToken]], Engine, ModelRunner]:
    """Requests that arrive, are cancelled and are preempted at times that the seed decides."""
    runner, kv = make_runner(limits=LIMITS if ahead else None, queue=LateQueue() if ahead else None)
    config = EngineConfig(
        num_blocks=9, block_size=BLOCK, max_model_len=32, max_num_seqs=6, max_num_batched_tokens=32, chunk_size=8,
        eos_token_ids=(2,), constant_estimate=1, reserve_ahead=runner.looks_ahead,
    )  # fmt: skip
    assert kv.num_blocks >= config.num_blocks
    engine, walk, said = Engine(config, runner), random.Random(seed), dict[tuple[int, int], list[SampledToken]]()
    kinds = SAMPLINGS[:3] if seed % 2 else SAMPLINGS
    for key in range(3):
        prompt = tuple(walk.randint(3, 9) for _ in range(walk.randint(1, 12)))
        sampling = SamplingParams(max_tokens=walk.randint(4, 9), seed=key, **walk.choice(kinds))
        choices = tuple(ChoiceStart(choice) for choice in range(walk.choice((1, 1, 2))))
        engine.match(EngineRequest(key, f"r{key}", prompt, sampling, choices))
        engine.start_local(key)
        for _ in range(walk.randint(0, 5)):
            hear(engine, said)
        if walk.random() < 0.25:
            engine.cancel(walk.randrange(key + 1))
    for _ in range(200):
        if not engine.has_work:
            break
        hear(engine, said)
    assert not engine.has_work
    return said, engine, runner


def hear(engine: Engine, said: dict[tuple[int, int], list[SampledToken]]) -> None:
    for event in engine.step().events:
        if isinstance(event, TokenEvent):
            said.setdefault((event.key, event.choice), []).append(event.token)
    engine.check()


@pytest.mark.parametrize("seed", range(2))
def test_a_step_ahead_on_a_device_that_lags_changes_no_token_and_no_logprob(seed: int) -> None:
    want, _, _ = serve(seed, ahead=False)
    got, _, runner = serve(seed, ahead=True)
    assert {which: len(tokens) for which, tokens in got.items()} == {
        which: len(tokens) for which, tokens in want.items()
    }
    for which, tokens in want.items():
        assert [(t.token_id, t.logprob, t.top_logprobs) for t in got[which]] == [
            (t.token_id, t.logprob, t.top_logprobs) for t in tokens
        ]
    assert runner.num_steps_ahead > 0 or seed % 2 == 0, "penalties among the requests may keep every step from it"
