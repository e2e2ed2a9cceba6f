"""Decoder operations on the Triton kernels, on whatever device the tensors are on.

Additions to the residual stream wait for the norm that follows, which does both. Rows of decodes and of prompt chunks
differ in attention alone: decodes by split KV with tiles as small as a step's few queries, chunks by large tiles. In
deterministic mode both have the same tiles, and linears go through the batch-invariant GEMM instead of the vendor's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.activation.launch import silu_mul
from engine.kernels.attention.launch import AttentionOptions, Workspace, make_workspace, paged_attention
from engine.kernels.device_step import DeviceStep
from engine.kernels.embedding.launch import embed
from engine.kernels.gemm.launch import gemm
from engine.kernels.rms_norm.launch import add_rms_norm, rms_norm
from engine.kernels.rope.launch import rope_write
from engine.models.decoder import decode
from engine.models.rope import RopeTable
from engine.models.weights import DecoderWeights, SourceTensor, load_decoder_weights
from modelfiles.config import ModelConfig

# Rows of tokens times splits for which a step has room; beyond it a tile's splits are done by one program. At 32 heads
# of 128 they take 32 MiB.
_WORKSPACE_ROWS = 2048

DECODE_KERNEL = "paged_decode"
PREFILL_KERNEL = "chunked_prefill"


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A matrix [n, k] on the device: of a gated MLP, gate's rows and then up's."""

    weight: Tensor
    bias: Tensor | None = None


class DeviceStore:
    """A WeightStore that brings weights to a device in one type."""

    def __init__(self, weights: Mapping[str, SourceTensor], dtype: torch.dtype, device: torch.device) -> None:
        self._weights = weights
        self._dtype = dtype
        self._device = device

    def vector(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self._read(name) for name in names])

    def matrix(self, names: Sequence[str], biases: Sequence[str] = ()) -> DeviceWeight:
        return DeviceWeight(self.vector(names), self.vector(biases) if biases else None)

    def gated(self, gate: str, up: str) -> DeviceWeight:
        return self.matrix((gate, up))

    def _read(self, name: str) -> Tensor:
        source = torch.from_numpy(np.ascontiguousarray(self._weights[name].float32()))
        return source.to(self._device, self._dtype)


@dataclass(frozen=True, slots=True)
class StepPart:
    """Rows [begin, end) of a step, whose sequences one attention kernel takes."""

    kernel: str
    begin: int
    end: int
    step: DeviceStep


class TritonDecoder:
    """A decoder on the Triton kernels. Everything it launches is enqueued; nothing waits for the device."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, SourceTensor],
        cache: Tensor,
        rope: RopeTable,
        *,
        deterministic: bool,
    ) -> None:
        """Weights have the cache's type and device. `cache` as in KVMemory, or on another device."""
        device = cache.device
        rope.ensure(config.max_position_embeddings)  # whole: a captured graph holds its address
        self.config = config
        self.cache = cache
        self.cos, self.sin = rope.cos.to(device), rope.sin.to(device)
        self.deterministic = deterministic
        self.options = AttentionOptions(scale=config.head_dim**-0.5, deterministic=deterministic)
        self.workspace: Workspace = make_workspace(_WORKSPACE_ROWS, config.num_heads, config.head_dim, device)
        self.attention_calls: Counter[str] = Counter({DECODE_KERNEL: 0, PREFILL_KERNEL: 0})
        self._weights: DecoderWeights[DeviceWeight, Tensor] = load_decoder_weights(
            config, DeviceStore(weights, cache.dtype, device)
        )

    @torch.inference_mode()
    def forward(self, step: DeviceStep, parts: Sequence[StepPart], logits: Tensor | None = None) -> Tensor:
        """Logits [sampled rows, vocab], in `logits` if given, of the cache's type. `parts` cover the step's rows."""
        return decode(self.config, self._weights, _Ops(self, step, parts, logits))

    def count(self, parts: Sequence[StepPart]) -> None:
        """Note what a step ran, a replayed graph's included."""
        for part in parts:
            self.attention_calls[part.kernel] += self.config.num_layers


class _Ops:
    """DecoderOps of one step."""

    def __init__(
        self, decoder: TritonDecoder, step: DeviceStep, parts: Sequence[StepPart], logits: Tensor | None
    ) -> None:
        self._decoder = decoder
        self._step = step
        self._parts = parts
        self._logits = logits
        self._waiting: Tensor | None = None  # to be added to the residual stream by the next norm

    def embed(self, weight: DeviceWeight) -> Tensor:
        y = self._empty(len(self._step.token_ids), weight.weight.shape[1])
        embed(self._step.token_ids, weight.weight, y)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y, epsilon = torch.empty_like(x), self._decoder.config.rms_norm_eps
        if self._waiting is None:
            rms_norm(x, weight, y, epsilon)
        else:
            add_rms_norm(self._waiting, x, weight, y, epsilon)
            self._waiting = None
        return y

    def rms_norm_sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = self._step.sampled_rows
        if self._waiting is not None:
            x += self._waiting
            self._waiting = None
        y = self._empty(len(rows), x.shape[1])
        rms_norm(x, weight, y, self._decoder.config.rms_norm_eps, rows)
        return y

    def project_qkv(self, x: Tensor, weight: DeviceWeight) -> Tensor:
        return self._linear(x, weight)

    def rope_write(self, qkv: Tensor, layer: int, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        decoder, config, step = self._decoder, self._decoder.config, self._step
        rope_write(
            qkv, decoder.cos, decoder.sin, step.positions, step.slot_mapping, decoder.cache, layer, config.num_heads,
            q_norm, k_norm, config.rms_norm_eps,
        )  # fmt: skip

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        decoder, config = self._decoder, self._decoder.config
        q = qkv[:, : config.num_heads * config.head_dim].unflatten(1, (config.num_heads, config.head_dim))
        out = self._empty(*q.shape)
        for part in self._parts:
            rows = slice(part.begin, part.end)
            paged_attention(q[rows], decoder.cache, layer, part.step, out[rows], decoder.options, decoder.workspace)
        return out.flatten(1)

    def add_linear(self, residual: Tensor, x: Tensor, weight: DeviceWeight) -> None:
        assert self._waiting is None
        self._waiting = self._linear(x, weight)

    def gated_mlp(self, x: Tensor, weight: DeviceWeight) -> Tensor:
        gate_up = self._linear(x, weight)
        y = self._empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_mul(gate_up, y)
        return y

    def logits(self, x: Tensor, weight: DeviceWeight) -> Tensor:
        y = self._empty(x.shape[0], weight.weight.shape[0]) if self._logits is None else self._logits
        if self._decoder.deterministic:
            gemm(x, weight.weight, y)
        else:
            torch.mm(x, weight.weight.t(), out=y)
        return y

    def _linear(self, x: Tensor, weight: DeviceWeight) -> Tensor:
        if not self._decoder.deterministic:
            return functional.linear(x, weight.weight, weight.bias)
        y = self._empty(x.shape[0], weight.weight.shape[0])
        gemm(x, weight.weight, y, weight.bias)
        return y

    def _empty(self, *shape: int) -> Tensor:
        cache = self._decoder.cache
        return torch.empty(shape, dtype=cache.dtype, device=cache.device)
