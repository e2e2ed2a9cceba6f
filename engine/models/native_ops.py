"""Decoder operations that record a native program instead of computing.

Buffers are made once for a number of tokens and used again by every layer; a larger step makes larger ones and records
the program anew (about 2 ms).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.attention.native import attention
from engine.kernels.embedding.native import embed
from engine.kernels.linear.native import Epilogue, PackedWeight, linear
from engine.kernels.native.library import NativeContext, NativeOp, Rows
from engine.kernels.native.program import Program, StepArrays
from engine.kernels.rms_norm.native import rms_norm
from engine.kernels.rope.native import rope_write
from engine.models.decoder import decode
from engine.models.weights import DecoderWeights
from modelfiles.config import ModelConfig


class NativeDecoder:
    """A decoder whose steps run as one native call."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights[PackedWeight, Tensor], cache: Tensor, context: NativeContext
    ) -> None:
        self._config = config
        self._weights = weights
        self._cache = cache
        self._context = context
        self._room = (0, 0)
        self._record(64, 16)

    def forward(self, step: StepArrays) -> Tensor:
        """Logits [sampled rows, vocab] of a step; the tensor is used again by the next one."""
        tokens, sampled = self._room
        if step.num_tokens > tokens or step.num_sampled > sampled:
            self._record(_at_least(tokens, step.num_tokens), _at_least(sampled, step.num_sampled))
        self._program.run(step)
        return self._logits[: step.num_sampled]

    def _record(self, tokens: int, sampled: int) -> None:
        recorder = _Recorder(self._config, self._cache, tokens, sampled)
        self._logits = decode(self._config, self._weights, recorder)
        self._program = Program(self._context, recorder.ops)
        self._room = (tokens, sampled)


class _Recorder:
    """DecoderOps that append to `ops`. Layers share buffers: an operation's result is read before the next layer's."""

    def __init__(self, config: ModelConfig, cache: Tensor, tokens: int, sampled: int) -> None:
        self._config = config
        self._cache = cache
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._residual = _buffer(tokens, config.hidden_size)
        self._normed = _buffer(tokens, config.hidden_size)
        self._qkv = _buffer(tokens, (heads + 2 * kv_heads) * dim)
        self._attended = _buffer(tokens, heads * dim)
        self._gated = _buffer(tokens, config.intermediate_size)
        self._sampled = _buffer(sampled, config.hidden_size)
        self._logits = _buffer(sampled, config.vocab_size)
        self.ops: list[NativeOp] = []

    def embed(self, weight: PackedWeight) -> Tensor:
        return self._add(embed(weight, self._residual), self._residual)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._add(rms_norm(x, weight, self._normed, self._config.rms_norm_eps), self._normed)

    def rms_norm_sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        op = rms_norm(x, weight, self._sampled, self._config.rms_norm_eps, Rows.SAMPLED)
        return self._add(op, self._sampled)

    def project_qkv(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._add(linear(x, weight, self._qkv), self._qkv)

    def rope_write(self, qkv: Tensor, layer: int, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        config = self._config
        self.ops.append(rope_write(qkv, self._cache, layer, config.num_heads, q_norm, k_norm, config.rms_norm_eps))

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        scale = self._config.head_dim**-0.5
        op = attention(qkv, self._cache, layer, self._config.num_heads, self._attended, scale)
        return self._add(op, self._attended)

    def add_linear(self, residual: Tensor, x: Tensor, weight: PackedWeight) -> None:
        self.ops.append(linear(x, weight, residual, Epilogue.ADD))

    def gated_mlp(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._add(linear(x, weight, self._gated, Epilogue.SILU_MUL), self._gated)

    def logits(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self._add(linear(x, weight, self._logits, rows=Rows.SAMPLED), self._logits)

    def _add(self, op: NativeOp, result: Tensor) -> Tensor:
        self.ops.append(op)
        return result


def _buffer(rows: int, width: int) -> Tensor:
    """Rows one cache line more than a multiple of lines apart, so that rows of a tile do not share cache sets."""
    stride = -(-width // 16) * 16 + 16
    return torch.empty(rows, stride)[:, :width]


def _at_least(present: int, wanted: int) -> int:
    return present if wanted <= present else 1 << (wanted - 1).bit_length()
