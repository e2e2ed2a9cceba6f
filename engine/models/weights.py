"""A decoder's weights in the form that the operations want: QKV and gate/up side by side, embeddings once if tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelfiles.config import ModelConfig

Packed = TypeVar("Packed")
PackedOut = TypeVar("PackedOut", covariant=True)


class SourceTensor(Protocol):
    """One tensor of a checkpoint (modelfiles.weights.StoredTensor)."""

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32."""
        ...


class WeightPacker(Protocol[PackedOut]):
    """Turns weight matrices into what its own linear operations read."""

    def pack(self, sources: list[Tensor], bias: Tensor | None = None) -> PackedOut:
        """Matrices [n_i, k] one after another."""
        ...

    def pack_gated(self, gate: Tensor, up: Tensor) -> PackedOut:
        """The two halves of a gated MLP's input side."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Packed]):
    """One decoder layer; norms are plain tensors."""

    input_norm: Tensor
    qkv: Packed
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Packed
    post_norm: Tensor
    gate_up: Packed
    down: Packed


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[Packed]):
    """All weights. `lm_head` is `embedding` where they are tied."""

    embedding: Packed
    layers: tuple[LayerWeights[Packed], ...]
    final_norm: Tensor
    lm_head: Packed


def load_decoder_weights(
    config: ModelConfig, weights: Mapping[str, SourceTensor], packer: WeightPacker[Packed]
) -> DecoderWeights[Packed]:
    """Read tensors by their Hugging Face names, each once, and pack them."""

    def read(name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(weights[name].float32()))

    embedding = packer.pack([read("model.embed_tokens.weight")])
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(config, f"model.layers.{i}", read, packer) for i in range(config.num_layers)),
        final_norm=read("model.norm.weight").clone(),
        lm_head=embedding if config.tie_word_embeddings else packer.pack([read("lm_head.weight")]),
    )


class _Read(Protocol):
    def __call__(self, name: str) -> Tensor: ...


def _layer(config: ModelConfig, prefix: str, read: _Read, packer: WeightPacker[Packed]) -> LayerWeights[Packed]:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    bias = torch.cat([read(f"{attention}.{x}_proj.bias") for x in "qkv"]) if config.attention_bias else None
    norms = [read(f"{attention}.{x}_norm.weight").clone() if config.qk_norm else None for x in "qk"]
    return LayerWeights(
        input_norm=read(f"{prefix}.input_layernorm.weight").clone(),
        qkv=packer.pack([read(f"{attention}.{x}_proj.weight") for x in "qkv"], bias),
        q_norm=norms[0],
        k_norm=norms[1],
        output=packer.pack([read(f"{attention}.o_proj.weight")]),
        post_norm=read(f"{prefix}.post_attention_layernorm.weight").clone(),
        gate_up=packer.pack_gated(read(f"{mlp}.gate_proj.weight"), read(f"{mlp}.up_proj.weight")),
        down=packer.pack([read(f"{mlp}.down_proj.weight")]),
    )
