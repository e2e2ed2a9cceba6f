"""The decoder of Llama, Qwen2 and Qwen3, as a sequence of operations.

Written once, for two kinds of operations: those that compute at once in plain torch (`engine/models/torch_ops.py`) and
those that record a native program (`engine/models/native_ops.py`).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from engine.models.weights import DecoderWeights
from modelfiles.config import ModelConfig

Packed = TypeVar("Packed")
PackedIn = TypeVar("PackedIn", contravariant=True)


class DecoderOps(Protocol[PackedIn]):
    """What a decoder is made of. Rows are the step's tokens, packed without padding."""

    def embed(self, weight: PackedIn) -> Tensor:
        """Embeddings of the step's tokens: the residual stream."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalised rows."""
        ...

    def rms_norm_sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalised rows of those tokens alone whose logits are wanted."""
        ...

    def project_qkv(self, x: Tensor, weight: PackedIn) -> Tensor:
        """Queries, keys and values side by side."""
        ...

    def rope_write(self, qkv: Tensor, layer: int, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        """Rotate queries in place; rotate keys and write them and the values into the paged KV."""
        ...

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        """Attend over the paged KV."""
        ...

    def add_linear(self, residual: Tensor, x: Tensor, weight: PackedIn) -> None:
        """residual += x weight^T, in place."""
        ...

    def gated_mlp(self, x: Tensor, weight: PackedIn) -> Tensor:
        """silu(gate) * up."""
        ...

    def logits(self, x: Tensor, weight: PackedIn) -> Tensor:
        """Logits of the sampled rows."""
        ...


def decode(config: ModelConfig, weights: DecoderWeights[Packed, Tensor], ops: DecoderOps[Packed]) -> Tensor:
    """One forward pass: logits [sampled rows, vocab]."""
    residual = ops.embed(weights.embedding)
    for index, layer in enumerate(weights.layers):
        qkv = ops.project_qkv(ops.rms_norm(residual, layer.input_norm), layer.qkv)
        ops.rope_write(qkv, index, layer.q_norm, layer.k_norm)
        ops.add_linear(residual, ops.attention(qkv, index), layer.output)
        ops.add_linear(residual, ops.gated_mlp(ops.rms_norm(residual, layer.post_norm), layer.gate_up), layer.down)
    return ops.logits(ops.rms_norm_sampled(residual, weights.final_norm), weights.lm_head)
