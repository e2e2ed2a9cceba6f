"""Decode steps of a whole model as the engine runs them, beside the time that reading weights and KV must take."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.gpu.harness import Bench, Figure
from engine.batch import Batch, Chunk
from engine.buckets import DecodeLimits
from engine.device_kv import DeviceKVMemory
from engine.dispatch import Kernels
from engine.models.weights import SourceTensor
from engine.request import SamplingParams, Sequence
from engine.runner import ModelRunner, kv_shape
from modelfiles.config import Architecture, ModelConfig

BLOCK_SIZE = 16
FLOOR_GOAL = 0.9
WARM_UP_STEPS = 5
STEPS = 50
LLAMA_8B = ModelConfig(
    architecture=Architecture.LLAMA, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None,
    max_position_embeddings=8192, tie_word_embeddings=False, attention_bias=False, qk_norm=False, eos_token_ids=(),
    bos_token_id=None,
)  # fmt: skip
QWEN_06B = ModelConfig(
    architecture=Architecture.QWEN3, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28,
    num_heads=16, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1000000.0, rope_scaling=None,
    max_position_embeddings=4096, tie_word_embeddings=True, attention_bias=False, qk_norm=True, eos_token_ids=(),
    bos_token_id=None,
)  # fmt: skip
_TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip


def tiny(config: ModelConfig) -> ModelConfig:
    """The same model at a size for the interpreter."""
    return replace(config, **_TINY)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A SourceTensor of random numbers, small enough for nothing to overflow. Drawing all of 8B would take minutes."""

    shape: tuple[int, ...]

    def float32(self, begin: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
        rows = self.shape[0] if end is None else end
        return np.resize(_POOL, (rows - begin, *self.shape[1:]))


_POOL = np.random.default_rng(0).standard_normal(1048573).astype(np.float32) * np.float32(0.02)


class RandomWeights(Mapping[str, SourceTensor]):
    """Weights of a model by their names in a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        c, q, kv = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (c.vocab_size, c.hidden_size), "model.norm.weight": (c.hidden_size,),
            "lm_head.weight": (c.vocab_size, c.hidden_size),
        }  # fmt: skip
        for i in range(c.num_layers):
            layer = {
                "input_layernorm": (c.hidden_size,), "post_attention_layernorm": (c.hidden_size,),
                "self_attn.q_proj": (q, c.hidden_size), "self_attn.k_proj": (kv, c.hidden_size),
                "self_attn.v_proj": (kv, c.hidden_size), "self_attn.o_proj": (c.hidden_size, q),
                "self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,),
                "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
                "mlp.up_proj": (c.intermediate_size, c.hidden_size),
                "mlp.down_proj": (c.hidden_size, c.intermediate_size),
            }  # fmt: skip
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        self._shapes = shapes

    def __getitem__(self, name: str) -> SourceTensor:
        return RandomTensor(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def num_read_parameters(config: ModelConfig) -> int:
    """Of the weights that one step reads whole: all but the embedding's, of which it reads a row per token."""
    c = config
    layer = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.hidden_size * c.intermediate_size
    return c.num_layers * layer + c.vocab_size * c.hidden_size


def make_runner(
    bench: Bench, config: ModelConfig, num_blocks: int, max_num_seqs: int, max_model_len: int, *, deterministic: bool
) -> ModelRunner:
    """The product's runner on the device, with its graphs and a step ahead. Weights and KV are random and zero."""
    dtype = "float32" if bench.is_rehearsal else "bfloat16"
    kv = DeviceKVMemory(kv_shape(config, BLOCK_SIZE, dtype), num_blocks, bench.device)
    limits = DecodeLimits(max_num_seqs, max_model_len)
    weights = RandomWeights(config)
    return ModelRunner(
        config, weights, kv, kernels=Kernels.TRITON, dtype=dtype, deterministic=deterministic, limits=limits
    )


def decoding(batch: int, seq_len: int) -> list[Sequence]:
    """Sequences that have computed all but the last of `seq_len` tokens, and whose blocks lie in no order."""
    num_blocks = blocks_each(seq_len)
    order = np.random.default_rng(0).permutation(batch * num_blocks).astype(np.int32).reshape(batch, num_blocks)
    sampling = SamplingParams(max_tokens=1 << 20, temperature=0.0)
    return [
        Sequence(i, i, 0, sampling, [3 + (i + j) % 64 for j in range(seq_len)], 1, array("i", order[i].tobytes()))
        for i in range(batch)
    ]


def blocks_each(seq_len: int) -> int:
    """With room for the steps that are measured, and the step ahead of the last."""
    return -(-(seq_len + WARM_UP_STEPS + STEPS + 2) // BLOCK_SIZE)


def steps(bench: Bench) -> None:
    """Decode steps of the two models; the smaller one first, its weights are on the device at once."""
    for name, config in (("Qwen3-0.6B", QWEN_06B), ("Llama-8B", LLAMA_8B)):
        config = tiny(config) if bench.is_rehearsal else config
        cases = [(2, 20)] if bench.is_rehearsal else [(1, 1024), (32, 1024), (128, 1024)]
        if not bench.has_time(40 if config.num_layers > 28 else 10):
            return
        _steps_of(bench, name, config, cases)


def _steps_of(bench: Bench, name: str, config: ModelConfig, cases: list[tuple[int, int]]) -> None:
    num_blocks = max(batch * blocks_each(seq_len) for batch, seq_len in cases)
    most, longest = max(batch for batch, _ in cases), max(seq_len for _, seq_len in cases) + 128
    times: dict[tuple[int, int], float] = {}
    for deterministic in (False, True):
        if not bench.has_time(20):
            return
        runner = make_runner(bench, config, num_blocks, most, longest, deterministic=deterministic)
        for batch, seq_len in cases:
            if not bench.has_time(5):
                return
            took, case = _seconds_per_step(bench, runner, batch, seq_len), f"{name}, {batch} sequences of {seq_len}"
            if deterministic:
                ratio = times[batch, seq_len] / took
                bench.add(Figure(part="fixed", case=f"{case}, a step", unit="of its speed", ours=ratio, goal=0.9))
                continue
            times[batch, seq_len] = took
            kv_numbers = 2 * batch * seq_len * config.num_kv_heads * config.head_dim * config.num_layers
            item_bytes = 4 if bench.is_rehearsal else 2
            floor = (num_read_parameters(config) + kv_numbers) * item_bytes / bench.bandwidth
            bench.add(Figure(part="step", case=case, unit="tokens/s", ours=batch / took))
            bench.add(Figure(part="step", case=case, unit="of the floor", ours=floor / took, goal=FLOOR_GOAL))
        runner.close()
        del runner  # both would not fit beside each other everywhere


def _seconds_per_step(bench: Bench, runner: ModelRunner, batch: int, seq_len: int) -> float:
    """What the engine would wait: packing, copies, graph, draws and tokens on the host, a step ahead."""
    sequences = decoding(batch, seq_len)
    warm_up, measured = (2, 2) if bench.is_rehearsal else (WARM_UP_STEPS, STEPS)
    for _ in range(warm_up):
        _go_on(runner, sequences)
    started = time.perf_counter()
    for _ in range(measured):
        _go_on(runner, sequences)
    return (time.perf_counter() - started) / measured


def _go_on(runner: ModelRunner, sequences: list[Sequence]) -> None:
    chunks = tuple(Chunk(each, each.num_tokens - 1, 1, (each,)) for each in sequences)
    for sequence, token in zip(sequences, runner.execute(Batch((), chunks)), strict=True):
        sequence.token_ids.append(token.token_id)
