"""The CPU runner computes what transformers computes, for every family and every rope scaling.

Checkpoints are random, tiny and written by transformers; logits may differ by 1e-4 (float32), greedy tokens not at all.
Measured over two seeds, all lengths, native and reference kernels: at most 1.3e-5 of logits up to 7 (Llama 1.3e-5,
Qwen2 1.0e-5, Qwen3 0.7e-5; rope scalings 1.0e-5; bfloat16 weights 1.5e-5), 4.1e-5 of logits up to 10 (tied Llama).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, Chunk
from engine.dispatch import Kernels
from engine.kv_memory import KVMemory
from engine.request import SamplingParams, Sequence
from engine.runner import ModelRunner, kv_shape
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

MAX_ABS_ERROR = 1e-4
BLOCK = 16
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        **{"beta_fast": 16.0, "beta_slow": 2.0},
    },
    "yarn-mscale": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
        **{"mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
    },
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "longrope": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64},
        **{"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
    },
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint in both implementations."""

    theirs: Any
    ours: ModelRunner
    kv: KVMemory
    vocab: int

    def sequence(self, length: int, key: int = 0, blocks: int = 20) -> Sequence:
        """A random prompt whose blocks lie in no order."""
        generator = torch.Generator().manual_seed(length + 1000 * key)
        ids = torch.randint(3, self.vocab, (length,), generator=generator).tolist()
        table = array("i", [key * blocks + i for i in torch.randperm(blocks, generator=generator).tolist()])
        greedy = SamplingParams(temperature=0, max_tokens=64)
        return Sequence(key, key, 0, greedy, ids, length, block_table=table)

    @torch.inference_mode()
    def reference(self, ids: list[int]) -> Tensor:
        return self.theirs(torch.tensor([ids])).logits[0]


def make_pair(folder: Path, family: str, seed: int = 0, kernels: Kernels = Kernels.NATIVE, **overrides: Any) -> Pair:
    """Write a random checkpoint with transformers, open it with both."""
    import transformers

    sizes: dict[str, Any] = {
        **{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512},
        **{"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    theirs.save_pretrained(folder)
    ours = load_config(folder)
    kv = KVMemory(kv_shape(ours, BLOCK), 64)
    kv.tensor.fill_(float("nan"))
    runner = ModelRunner(ours, open_weights(folder), kv, num_threads=2, kernels=kernels)
    return Pair(theirs, runner, kv, ours.vocab_size)


def check_lengths(pair: Pair, lengths: tuple[int, ...] = (1, BLOCK - 1, BLOCK, BLOCK + 1, 75, 200)) -> None:
    for length in lengths:
        sequence = pair.sequence(length)
        got = pair.ours.logits(Batch((), (Chunk(sequence, 0, length, (sequence,)),)))
        assert (got[0] - pair.reference(sequence.token_ids)[-1]).abs().max() < MAX_ABS_ERROR, length


def generate(pair: Pair, sequence: Sequence, count: int) -> list[int]:
    """Greedy, the prompt in one chunk and then token by token."""
    start = 0
    for _ in range(count):
        chunk = Chunk(sequence, start, sequence.num_tokens - start, (sequence,))
        token = pair.ours.execute(Batch((), (chunk,)))[0]
        start = sequence.num_tokens
        sequence.token_ids.append(token.token_id)
    return sequence.token_ids[-count:]


def check_greedy(pair: Pair, length: int, count: int = 24) -> None:
    sequence = pair.sequence(length)
    got = generate(pair, sequence, count)
    everything = pair.reference(sequence.token_ids[:-1])
    assert got == everything[length - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.REFERENCE])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("Llama", {}),
        (
            "Llama",
            {
                "tie_word_embeddings": True,
                "hidden_size": 180,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 20,
            },
        ),
        ("Qwen2", {"head_dim": None}),
        ("Qwen3", {"head_dim": 32}),
        ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
    ids=["llama", "llama-tied-gqa3", "qwen2", "qwen3", "qwen3-tied-mqa"],
)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, family: str, overrides: dict[str, Any], kernels: Kernels
) -> None:
    overrides = {name: value for name, value in overrides.items() if value is not None}
    pair = make_pair(tmp_path, family, kernels=kernels, **overrides)
    check_lengths(pair)
    for length in (1, BLOCK - 1, BLOCK, 40):
        check_greedy(pair, length)


@pytest.mark.parametrize("name", [name for name in ROPE if name not in ("dynamic", "longrope")])
def test_rope_scalings_equal_transformers(tmp_path: Path, name: str) -> None:
    pair = make_pair(tmp_path, "Llama", rope_parameters=ROPE[name])
    check_lengths(pair)
    check_greedy(pair, 100)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rope_that_depends_on_length_equals_transformers_token_by_token(tmp_path: Path, name: str) -> None:
    """Beyond the trained length transformers rotates each new key for the length it has then; so do we, always."""
    limits = {"max_position_embeddings": 64 if name == "dynamic" else 128}
    pair = make_pair(tmp_path, "Llama", rope_parameters=ROPE[name], **limits)
    check_lengths(pair, (1, 17, 64))
    sequence = pair.sequence(100)
    with torch.inference_mode():
        cache = pair.theirs(torch.tensor([sequence.token_ids[:64]]), use_cache=True).cache
        for position in range(64, 100):
            want = pair.theirs(torch.tensor([[sequence.token_ids[position]]]), cache=cache).logits[0, -1]
    got = pair.ours.logits(Batch((), (Chunk(sequence, 0, 100, (sequence,)),)))[0]
    assert (got - want).abs().max() < MAX_ABS_ERROR


def test_mixed_batch_equals_transformers(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Llama")
    first, second, third = (pair.sequence(length, key) for key, length in enumerate((90, 33, 16)))
    pair.ours.execute(Batch((), (Chunk(first, 0, 89, ()), Chunk(second, 0, 20, ()))))
    chunks = (Chunk(first, 89, 1, (first,)), Chunk(second, 20, 13, (second,)), Chunk(third, 0, 16, (third,)))
    got = pair.ours.logits(Batch((), chunks))
    for row, sequence in zip(got, (first, second, third), strict=True):
        assert (row - pair.reference(sequence.token_ids)[-1]).abs().max() < MAX_ABS_ERROR


def test_bfloat16_weights_equal_transformers_with_rounded_weights(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Llama")
    for name, parameter in pair.theirs.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.bfloat16().float()
    config = load_config(tmp_path)
    rounded = ModelRunner(config, open_weights(tmp_path), pair.kv, num_threads=2, dtype="bfloat16")
    check_lengths(Pair(pair.theirs, rounded, pair.kv, pair.vocab))
