"""The same bits however a sequence is cut, whoever is in the batch, and on any number of threads.

This is deterministic mode's promise, and it holds always: the kernels know no other way to add.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, Chunk
from engine.dispatch import Kernels
from engine.kv_memory import KVMemory
from engine.request import SampledToken, SamplingParams, Sequence
from engine.runner import ModelRunner, RunnerError, kv_shape
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

BLOCK = 8
BLOCKS_PER_SEQUENCE = 90
LENGTH = 600  # beyond one split of the attention kernel


class Rig:
    """A runner on a checkpoint, with room for a few long sequences."""

    def __init__(self, path: Path, num_threads: int = 2, block_size: int = BLOCK) -> None:
        self.config = load_config(path)
        self.block_size = block_size
        self.blocks = BLOCKS_PER_SEQUENCE * BLOCK // block_size
        self.kv = KVMemory(kv_shape(self.config, block_size), 4 * self.blocks)
        self.kv.tensor.fill_(float("nan"))
        self.runner = ModelRunner(self.config, open_weights(path), self.kv, deterministic=True, num_threads=num_threads)

    def sequence(self, length: int = LENGTH, key: int = 0, sampling: SamplingParams | None = None) -> Sequence:
        generator = torch.Generator().manual_seed(length + 1000 * key)
        ids = torch.randint(3, self.config.vocab_size, (length,), generator=generator).tolist()
        table = array("i", range(key * self.blocks, (key + 1) * self.blocks))
        return Sequence(key, key, 0, sampling or SamplingParams(temperature=0), ids, length, block_table=table)

    def prefill(self, sequence: Sequence, ends: list[int], neighbour: Sequence | None = None) -> Tensor:
        """Compute the prompt in chunks that end at `ends`, and return the last logits."""
        start, logits = 0, torch.empty(0)
        for end in ends:
            chunks = (Chunk(sequence, start, end - start, (sequence,)),)
            if neighbour is not None:
                length = min(40, neighbour.num_tokens)
                chunks = (Chunk(neighbour, length - 1, 1, (neighbour,)), *chunks, Chunk(neighbour, 0, length - 1, ()))
            logits = self.runner.logits(Batch((), chunks))[-1]
            start = end
        return logits

    def kv_of(self, sequence: Sequence, length: int) -> Tensor:
        """KV of the first `length` positions, [positions, kv_heads, layers, 2, head_dim]."""
        positions = torch.arange(length)
        blocks = torch.tensor(sequence.block_table)[positions // self.block_size]
        return self.kv.tensor[blocks, :, :, :, positions % self.block_size].clone()


@pytest.fixture(params=["tiny_llama", "tiny_qwen3"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_prefill_in_any_chunking_equals_decoding_token_by_token(checkpoint: Path) -> None:
    rig = Rig(checkpoint)
    sequence = rig.sequence()
    want = rig.prefill(sequence, [LENGTH])
    kv = rig.kv_of(sequence, LENGTH)
    for ends in (
        list(range(1, LENGTH + 1)),
        [BLOCK - 1, BLOCK, BLOCK + 1, 100, 512, 513, LENGTH],
        [*range(64, LENGTH, 64), LENGTH],
        [LENGTH - 1, LENGTH],
    ):
        rig.kv.tensor.fill_(float("nan"))
        assert torch.equal(rig.prefill(sequence, ends), want)
        assert torch.equal(rig.kv_of(sequence, LENGTH), kv)


def test_neighbours_change_nothing(checkpoint: Path) -> None:
    rig = Rig(checkpoint)
    sequence, neighbour = rig.sequence(), rig.sequence(77, key=1)
    want = rig.prefill(sequence, [LENGTH])
    rig.prefill(neighbour, [77])
    assert torch.equal(rig.prefill(sequence, [300, 301, LENGTH], neighbour), want)


def test_the_number_of_threads_changes_nothing(checkpoint: Path) -> None:
    results = []
    for num_threads in (1, 2, 3):
        rig = Rig(checkpoint, num_threads)
        sequence = rig.sequence()
        results.append((rig.prefill(sequence, [200, LENGTH]), rig.kv_of(sequence, LENGTH)))
    for logits, kv in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(kv, results[0][1])


def test_the_block_size_changes_nothing(checkpoint: Path) -> None:
    want = None
    for block_size in (1, 16, 64):
        rig = Rig(checkpoint, block_size=block_size)
        got = rig.prefill(rig.sequence(), [LENGTH])
        assert want is None or torch.equal(got, want)
        want = got


def test_kv_moved_to_another_memory_continues_with_the_same_bits(checkpoint: Path) -> None:
    """What a hand-over does: blocks copied byte by byte into other ids of another worker."""
    prefill, decode = Rig(checkpoint), Rig(checkpoint, num_threads=1)
    sequence = prefill.sequence(77)
    want = prefill.prefill(sequence, [77])
    moved = decode.sequence(77, key=2)
    moved.token_ids = list(sequence.token_ids)
    for source, destination in zip(sequence.block_table[:10], moved.block_table[:10], strict=True):
        decode.kv.block(destination)[:] = prefill.kv.block(source)
    got = decode.runner.logits(Batch((), (Chunk(moved, 76, 1, (moved,)),)))[0]
    assert torch.equal(got, want)


SAMPLED = SamplingParams(
    temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=11, repetition_penalty=1.1, presence_penalty=0.2,
    num_logprobs=3,
)  # fmt: skip


def draw(rig: Rig, sequences: list[Sequence], steps: int) -> list[list[SampledToken]]:
    """Prefill and decode all sequences together, `steps` tokens each."""
    drawn: list[list[SampledToken]] = [[] for _ in sequences]
    starts = [0] * len(sequences)
    for _ in range(steps):
        chunks = tuple(Chunk(s, at, s.num_tokens - at, (s,)) for s, at in zip(sequences, starts, strict=True))
        starts = [s.num_tokens for s in sequences]
        for sequence, tokens, token in zip(sequences, drawn, rig.runner.execute(Batch((), chunks)), strict=True):
            sequence.token_ids.append(token.token_id)
            tokens.append(token)
    return drawn


def test_seeded_draws_are_the_same_alone_and_in_a_batch(checkpoint: Path) -> None:
    rig = Rig(checkpoint)
    alone = draw(rig, [rig.sequence(50, 0, SAMPLED)], 20)[0]
    others = [rig.sequence(9, 1, SamplingParams(seed=4)), rig.sequence(120, 2, replace(SAMPLED, seed=12))]
    together = draw(rig, [others[0], rig.sequence(50, 0, SAMPLED), others[1]], 20)[1]
    assert [(t.token_id, t.logprob, t.top_logprobs) for t in alone] == [
        (t.token_id, t.logprob, t.top_logprobs) for t in together
    ]
    assert len({token.token_id for token in alone}) > 3


def test_choices_of_one_prompt_draw_independently_from_the_same_logits(tiny_llama: Path) -> None:
    rig = Rig(tiny_llama)
    prompt = rig.sequence(30, 0, SamplingParams(temperature=2.0, seed=5))
    samplers = tuple(replace(prompt, sequence_id=choice, choice=choice) for choice in range(8))
    tokens = rig.runner.execute(Batch((), (Chunk(prompt, 0, 30, samplers),)))
    assert [token.sequence_id for token in tokens] == list(range(8))
    assert len({token.token_id for token in tokens}) > 1
    last = rig.runner.execute(Batch((), (Chunk(prompt, 29, 1, samplers[3:4]),)))
    assert last[0].token_id == tokens[3].token_id


def test_min_tokens_holds_back_end_and_stop_tokens(tiny_llama: Path) -> None:
    rig = Rig(tiny_llama)
    greedy = rig.sequence(20)
    best = rig.runner.execute(Batch((), (Chunk(greedy, 0, 20, (greedy,)),)))[0].token_id
    for min_tokens, ignore_eos, held in ((0, False, False), (1, False, True), (1, True, False)):
        rig.runner._config = replace(rig.config, eos_token_ids=(best,))  # whatever this model likes best ends it
        params = SamplingParams(temperature=0, min_tokens=min_tokens, ignore_eos=ignore_eos)
        sequence = rig.sequence(20, sampling=params)
        token = rig.runner.execute(Batch((), (Chunk(sequence, 19, 1, (sequence,)),)))[0].token_id
        assert (token != best) == held
    stopped = rig.sequence(20, sampling=SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(best,)))
    assert rig.runner.execute(Batch((), (Chunk(stopped, 19, 1, (stopped,)),)))[0].token_id != best


def test_block_copies_happen_before_the_step(tiny_llama: Path) -> None:
    rig = Rig(tiny_llama)
    sequence = rig.sequence(12)
    want = rig.prefill(sequence, [12])
    fork = replace(sequence, block_table=array("i", [sequence.block_table[0], 200]))
    rig.runner.execute(Batch(((sequence.block_table[1], 200),), (Chunk(fork, 11, 1, (fork,)),)))
    assert torch.equal(rig.runner.logits(Batch((), (Chunk(fork, 11, 1, (fork,)),)))[0], want)


def test_deterministic_mode_refuses_the_reference_kernels(tiny_llama: Path) -> None:
    config = load_config(tiny_llama)
    kv = KVMemory(kv_shape(config, 16), 4)
    with pytest.raises(RunnerError, match="deterministic mode needs native or triton kernels"):
        ModelRunner(config, open_weights(tiny_llama), kv, deterministic=True, kernels=Kernels.REFERENCE)


def test_an_unknown_dtype_is_refused_by_name(tiny_llama: Path) -> None:
    config = load_config(tiny_llama)
    kv = KVMemory(kv_shape(config, 16), 4)
    with pytest.raises(RunnerError, match="float16"):
        ModelRunner(config, open_weights(tiny_llama), kv, dtype="float16")


def test_without_a_compiler_the_native_kernels_are_refused_with_the_reason(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels.native import library

    library.load_library.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    config = load_config(tiny_llama)
    kv = KVMemory(kv_shape(config, 16), 4)
    with pytest.raises(RunnerError, match="no C\\+\\+ compiler"):
        ModelRunner(config, open_weights(tiny_llama), kv)
    library.load_library.cache_clear()
