"""Decoder operations that compute at once with the plain-torch references.

What a machine without a C++ compiler gets, and what the native path is tested against. Slower, and its results depend
on the batch, so deterministic mode refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.attention import reference as attention_reference
from engine.kernels.embedding import reference as embedding_reference
from engine.kernels.linear import reference as linear_reference
from engine.kernels.native.program import StepArrays
from engine.kernels.rms_norm import reference as norm_reference
from engine.kernels.rope import reference as rope_reference
from engine.models.decoder import decode
from engine.models.weights import DecoderWeights, SourceTensor
from modelfiles.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TorchWeight:
    """A weight as it is; of a gated MLP, gate with `up` beside it."""

    weight: Tensor
    bias: Tensor | None = None
    up: Tensor | None = None


class TorchStore:
    """A WeightStore that keeps weights plain."""

    def __init__(self, weights: Mapping[str, SourceTensor]) -> None:
        self._weights = weights

    def vector(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self._read(name) for name in names])

    def matrix(self, names: Sequence[str], biases: Sequence[str] = ()) -> TorchWeight:
        sources = [self._read(name) for name in names]
        weight = torch.cat(sources) if len(sources) > 1 else sources[0]
        return TorchWeight(weight, self.vector(biases) if biases else None)

    def gated(self, gate: str, up: str) -> TorchWeight:
        return TorchWeight(self._read(gate), up=self._read(up))

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._weights[name].float32()))


class TorchDecoder:
    """A decoder on the references, whose steps run operation by operation."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights[TorchWeight, Tensor], cache: Tensor) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache

    @torch.inference_mode()
    def forward(self, step: StepArrays) -> Tensor:
        """Logits [sampled rows, vocab] of a step."""
        return decode(self._config, self._weights, _Eager(self._config, self._cache, step))


class _Eager:
    def __init__(self, config: ModelConfig, cache: Tensor, step: StepArrays) -> None:
        self._config = config
        self._cache = cache
        self._step = step
        starts = step.query_starts
        self._tokens = torch.from_numpy(step.token_ids).long()
        self._tables: list[Tensor] = []
        positions, blocks = [], []
        for i in range(step.num_sequences):
            begin, length = int(step.positions[i]), int(starts[i + 1] - starts[i])
            own = torch.arange(begin, begin + length)
            used = -(-(begin + length) // cache.shape[4])
            offset = int(step.table_offsets[i])
            table = torch.from_numpy(step.block_tables[offset : offset + used]).long()
            self._tables.append(table)
            positions.append(own)
            blocks.append(table[own // cache.shape[4]])
        self._positions = torch.cat(positions)
        self._blocks = torch.cat(blocks)
        self._cos, self._sin = step.rope_cos[self._positions], step.rope_sin[self._positions]

    def embed(self, weight: TorchWeight) -> Tensor:
        return embedding_reference.embed(self._tokens, weight.weight)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm_reference.rms_norm(x, weight, self._config.rms_norm_eps)

    def rms_norm_sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(x[torch.from_numpy(self._step.sampled_rows).long()], weight)

    def project_qkv(self, x: Tensor, weight: TorchWeight) -> Tensor:
        return linear_reference.linear(x, weight.weight, weight.bias)

    def rope_write(self, qkv: Tensor, layer: int, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        q, k, v = self._split(qkv)
        if q_norm is not None and k_norm is not None:
            q, k = self.rms_norm(q, q_norm), self.rms_norm(k, k_norm)
        rotated = rope_reference.rotate(q, self._cos, self._sin)
        qkv[:, : rotated.shape[1] * rotated.shape[2]] = rotated.flatten(1)
        keys = rope_reference.rotate(k, self._cos, self._sin)
        slots = self._positions % self._cache.shape[4]
        rope_reference.write_kv(keys, v, self._cache, layer, self._blocks, slots)

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        q, _, _ = self._split(qkv)
        out = torch.empty_like(q)
        for i, table in enumerate(self._tables):
            begin, end, start = (
                int(x) for x in (self._step.query_starts[i], self._step.query_starts[i + 1], self._step.positions[i])
            )
            keys, values = attention_reference.gather_kv(self._cache, layer, table, start + end - begin)
            out[begin:end] = attention_reference.attention(
                q[begin:end], keys, values, start, self._config.head_dim**-0.5
            )
        return out.flatten(1)

    def add_linear(self, residual: Tensor, x: Tensor, weight: TorchWeight) -> None:
        residual += linear_reference.linear(x, weight.weight)

    def gated_mlp(self, x: Tensor, weight: TorchWeight) -> Tensor:
        assert weight.up is not None
        return linear_reference.linear_silu_mul(x, weight.weight, weight.up)

    def logits(self, x: Tensor, weight: TorchWeight) -> Tensor:
        return linear_reference.linear(x, weight.weight)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self._config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        return q, k, v
