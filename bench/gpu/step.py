"""One decode step of a whole model, as a CUDA graph, beside the time that reading its weights and KV must take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from bench.gpu.harness import Bench, Figure
from engine.kernels.device_step import DeviceStep
from engine.models.rope import RopeTable
from engine.models.triton_ops import DECODE_KERNEL, StepPart, TritonDecoder
from engine.models.weights import SourceTensor
from modelfiles.config import Architecture, ModelConfig

BLOCK_SIZE = 16
FLOOR_GOAL = 0.9
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


def decode_step(batch: int, seq_len: int, device: torch.device) -> DeviceStep:
    """Each of `batch` sequences computes its token number `seq_len`."""
    blocks = -(-seq_len // BLOCK_SIZE)
    rows = torch.arange(batch, device=device, dtype=torch.int32)
    tables = torch.randperm(batch * blocks, device=device).view(batch, blocks).to(torch.int32)
    last = seq_len - 1
    return DeviceStep(
        token_ids=rows % 64,
        positions=torch.full_like(rows, last),
        slot_mapping=tables[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
        cu_seqlens_q=torch.arange(batch + 1, device=device, dtype=torch.int32),
        seq_lens=torch.full_like(rows, seq_len),
        block_tables=tables,
        sampled_rows=rows,
        max_query_len=1,
        max_seq_len=seq_len,
    )


def steps(bench: Bench) -> None:
    """Decode steps of the two models; the smaller one first, its weights are on the device at once."""
    for name, config in (("Qwen3-0.6B", QWEN_06B), ("Llama-8B", LLAMA_8B)):
        config = tiny(config) if bench.is_rehearsal else config
        cases = [(2, 20)] if bench.is_rehearsal else [(1, 1024), (32, 1024), (128, 1024)]
        if not bench.has_time(40 if config.num_layers > 28 else 10):
            return
        _steps_of(bench, name, config, cases)


def _steps_of(bench: Bench, name: str, config: ModelConfig, cases: list[tuple[int, int]]) -> None:
    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    num_blocks = max(batch * -(-seq_len // BLOCK_SIZE) for batch, seq_len in cases)
    shape = (num_blocks, config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
    cache = torch.zeros(shape, dtype=dtype, device=bench.device)
    weights = RandomWeights(config)
    decoder = TritonDecoder(config, weights, cache, RopeTable(config), deterministic=False)
    times: dict[tuple[int, int], float] = {}
    for batch, seq_len in cases:
        if not bench.has_time(5):
            return
        step = decode_step(batch, seq_len, bench.device)
        times[batch, seq_len] = took = _time(bench, decoder, step)
        kv_bytes = 2 * batch * seq_len * config.num_kv_heads * config.head_dim * config.num_layers
        floor = (num_read_parameters(config) + kv_bytes) * cache.element_size() / bench.bandwidth
        case = f"{name}, {batch} sequences of {seq_len}"
        bench.add(Figure(part="step", case=case, unit="tokens/s", ours=batch / took))
        bench.add(Figure(part="step", case=case, unit="of the floor", ours=floor / took, goal=FLOOR_GOAL))
    if not bench.has_time(20):
        return
    del decoder  # both would not fit beside each other everywhere
    fixed = TritonDecoder(config, weights, cache, RopeTable(config), deterministic=True)
    for batch, seq_len in cases:
        if not bench.has_time(5):
            return
        ratio = times[batch, seq_len] / _time(bench, fixed, decode_step(batch, seq_len, bench.device))
        case = f"{name} step, {batch} sequences of {seq_len}"
        bench.add(Figure(part="fixed", case=case, unit="of its speed", ours=ratio, goal=0.9))


def _time(bench: Bench, decoder: TritonDecoder, step: DeviceStep) -> float:
    parts = [StepPart(DECODE_KERNEL, 0, len(step.token_ids), step)]
    return bench.seconds_of(bench.graph_of(lambda: decoder.forward(step, parts)), cold=False)
