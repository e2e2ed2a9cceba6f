"""The decoder on the Triton kernels computes what the decoder on the references computes, in mixed batches too.

In the interpreter, over the checkpoints and steps below, logits differ by at most MAX_ABS_ERROR in float32.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Batch, Chunk
from engine.dispatch import Kernels
from engine.kv_memory import KVMemory
from engine.request import SampledToken, SamplingParams, Sequence
from engine.runner import ModelRunner, kv_shape
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

MAX_ABS_ERROR = 1e-4
BLOCK = 8
BLOCKS_EACH = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"num_key_value_heads": 1},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights written by transformers, norms and biases included."""
    import transformers

    sizes: dict[str, Any] = {
        **{"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"initializer_range": 0.25, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    }
    torch.manual_seed(3)
    config = getattr(transformers, f"{request.param}Config")(**sizes | FAMILIES[request.param])
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@dataclass
class Rig:
    """A runner whose KV memory is poisoned where nothing was written."""

    runner: ModelRunner
    kv: KVMemory
    vocab: int

    @classmethod
    def make(cls, checkpoint: Path, kernels: Kernels, *, deterministic: bool = False, dtype: str = "float32") -> Rig:
        config = load_config(checkpoint)
        kv = KVMemory(kv_shape(config, BLOCK, dtype), 4 * BLOCKS_EACH)
        kv.tensor.fill_(float("nan"))
        weights = open_weights(checkpoint)
        runner = ModelRunner(config, weights, kv, kernels=kernels, deterministic=deterministic, dtype=dtype)
        return cls(runner, kv, config.vocab_size)

    def sequence(self, key: int, length: int, **sampling: Any) -> Sequence:
        """A random prompt whose blocks lie in no order."""
        generator = torch.Generator().manual_seed(key)
        ids = torch.randint(3, self.vocab, (length,), generator=generator).tolist()
        blocks = torch.randperm(BLOCKS_EACH, generator=generator).tolist()
        table = array("i", [key * BLOCKS_EACH + block for block in blocks])
        return Sequence(key, key, 0, SamplingParams(**{"temperature": 0, **sampling}), ids, length, block_table=table)

    def logits(self, *chunks: tuple[Sequence, int, int]) -> Tensor:
        made = tuple(Chunk(sequence, start, end - start, (sequence,)) for sequence, start, end in chunks)
        return self.runner.logits(Batch((), made))


def mixed_steps(rig: Rig) -> Iterator[Tensor]:
    """A prompt alone, then decodes beside chunks that begin and end inside blocks, then decodes alone."""
    first, second, third = rig.sequence(0, 42), rig.sequence(1, 30), rig.sequence(2, 9)
    yield rig.logits((first, 0, 40))
    yield rig.logits((first, 40, 41), (second, 0, 13), (third, 0, 8))
    yield rig.logits((first, 41, 42), (third, 8, 9), (second, 13, 29))
    yield rig.logits((second, 29, 30))


def test_logits_equal_the_reference_decoders_in_mixed_batches(checkpoint: Path) -> None:
    rig = Rig.make(checkpoint, Kernels.TRITON)
    for got, want in zip(mixed_steps(rig), mixed_steps(Rig.make(checkpoint, Kernels.REFERENCE)), strict=True):
        error = (got - want).abs().max()
        assert error < MAX_ABS_ERROR, f"{error} of logits up to {want.abs().max()}"
    assert rig.runner.attention_calls == {"paged_decode": 6, "chunked_prefill": 6}  # two layers, three steps with each


def test_bfloat16_stays_near_the_references(checkpoint: Path) -> None:
    """Weights, activations and KV are rounded some 20 times on the way, each time by at most half an epsilon."""
    wanted = mixed_steps(Rig.make(checkpoint, Kernels.REFERENCE))
    for got, want in zip(mixed_steps(Rig.make(checkpoint, Kernels.TRITON, dtype="bfloat16")), wanted, strict=True):
        error = (got - want).norm() / want.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps, error


def test_deterministic_mode_knows_no_batch_no_chunks_and_no_decode(checkpoint: Path) -> None:
    rig = Rig.make(checkpoint, Kernels.TRITON, deterministic=True)
    sequence, neighbour = rig.sequence(0, 37), rig.sequence(1, 20)
    want = rig.logits((sequence, 0, 37))[0]
    kv = kv_of(rig, sequence)
    for ends in ([16, 36, 37], [1, 33, 34, 35, 36, 37], [7, 37]):
        rig.kv.tensor.fill_(float("nan"))
        for start, end in zip([0, *ends], ends, strict=False):
            got = rig.logits((sequence, start, end), (neighbour, 0, 5 + end % 13))[0]
        assert torch.equal(got, want), ends
        assert torch.equal(kv_of(rig, sequence), kv), ends


def kv_of(rig: Rig, sequence: Sequence) -> Tensor:
    positions = torch.arange(sequence.num_tokens)
    blocks = torch.tensor(sequence.block_table)[positions // BLOCK]
    return rig.kv.tensor[blocks, :, :, :, positions % BLOCK].clone()


@pytest.mark.parametrize(
    "sampling",
    [
        {"num_logprobs": 3},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "seed": 5, "num_logprobs": 0},
        {
            "temperature": 1.2,
            "seed": 2**63 + 1,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
        },
        {"min_tokens": 50, "stop_token_ids": tuple(range(0, 131, 2))},
    ],
    ids=["greedy", "nucleus", "penalties", "banned"],
)
def test_draws_equal_the_native_samplers(tiny_llama: Path, sampling: dict[str, Any]) -> None:
    drawn = [draw_some(Rig.make(tiny_llama, kernels), sampling) for kernels in (Kernels.TRITON, Kernels.NATIVE)]
    for ours, native in zip(*drawn, strict=True):
        assert ours.token_id == native.token_id
        assert ours.logprob == pytest.approx(native.logprob, abs=1e-4)
        assert [token_id for token_id, _ in ours.top_logprobs] == [token_id for token_id, _ in native.top_logprobs]


def draw_some(rig: Rig, sampling: dict[str, Any]) -> list[SampledToken]:
    sequence, start = rig.sequence(0, 10, **{"max_tokens": 60, **sampling}), 0
    drawn: list[SampledToken] = []
    for _ in range(5):
        chunk = Chunk(sequence, start, sequence.num_tokens - start, (sequence,))
        drawn += rig.runner.execute(Batch((), (chunk,)))
        start = sequence.num_tokens
        sequence.token_ids.append(drawn[-1].token_id)
    return drawn
