"""A decoder's weights in the form that the operations want: QKV and gate/up side by side, embeddings once if tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from modelfiles.config import ModelConfig

Matrix = TypeVar("Matrix")
Vector = TypeVar("Vector")
MatrixOut = TypeVar("MatrixOut", covariant=True)
VectorOut = TypeVar("VectorOut", covariant=True)


class SourceTensor(Protocol):
    """One tensor of a checkpoint (modelfiles.weights.StoredTensor)."""

    def float32(self, begin: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
        """Rows [begin, end) as float32."""
        ...


class WeightStore(Protocol[MatrixOut, VectorOut]):
    """Gives weights by the Hugging Face names of their tensors, in what its own linear operations read."""

    def vector(self, names: Sequence[str]) -> VectorOut:
        """Vectors one after another: a norm, a bias."""
        ...

    def matrix(self, names: Sequence[str], biases: Sequence[str] = ()) -> MatrixOut:
        """Matrices [n_i, k] one after another."""
        ...

    def gated(self, gate: str, up: str) -> MatrixOut:
        """The two halves of a gated MLP's input side."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Matrix, Vector]):
    """One decoder layer."""

    input_norm: Vector
    qkv: Matrix
    q_norm: Vector | None
    k_norm: Vector | None
    output: Matrix
    post_norm: Vector
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[Matrix, Vector]):
    """All weights. `lm_head` is `embedding` where they are tied."""

    embedding: Matrix
    layers: tuple[LayerWeights[Matrix, Vector], ...]
    final_norm: Vector
    lm_head: Matrix


def load_decoder_weights(config: ModelConfig, store: WeightStore[Matrix, Vector]) -> DecoderWeights[Matrix, Vector]:
    """Ask for every weight once, in the order of a forward pass."""
    embedding = store.matrix(["model.embed_tokens.weight"])
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(config, f"model.layers.{i}", store) for i in range(config.num_layers)),
        final_norm=store.vector(["model.norm.weight"]),
        lm_head=embedding if config.tie_word_embeddings else store.matrix(["lm_head.weight"]),
    )


def _layer(config: ModelConfig, prefix: str, store: WeightStore[Matrix, Vector]) -> LayerWeights[Matrix, Vector]:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    biases = [f"{attention}.{x}_proj.bias" for x in "qkv"] if config.attention_bias else []
    return LayerWeights(
        input_norm=store.vector([f"{prefix}.input_layernorm.weight"]),
        qkv=store.matrix([f"{attention}.{x}_proj.weight" for x in "qkv"], biases),
        q_norm=store.vector([f"{attention}.q_norm.weight"]) if config.qk_norm else None,
        k_norm=store.vector([f"{attention}.k_norm.weight"]) if config.qk_norm else None,
        output=store.matrix([f"{attention}.o_proj.weight"]),
        post_norm=store.vector([f"{prefix}.post_attention_layernorm.weight"]),
        gate_up=store.gated(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        down=store.matrix([f"{mlp}.down_proj.weight"]),
    )
