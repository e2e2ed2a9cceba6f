"""The models at whose shapes the compile gate holds the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model its kernels' constants depend on."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    num_layers: int
    hidden: int
    ffn: int
    vocab: int
    head_norm: bool = False
    """Queries and keys are normalised per head before the rotation."""


SHIPPED = (
    ModelShape(
        name="Llama-8B", heads=32, kv_heads=8, head_dim=128, num_layers=32, hidden=4096, ffn=14336, vocab=128256
    ),
    ModelShape(
        name="Qwen3-0.6B",
        heads=16,
        kv_heads=8,
        head_dim=128,
        num_layers=28,
        hidden=1024,
        ffn=3072,
        vocab=151936,
        head_norm=True,
    ),
    ModelShape(name="SmolLM2-135M", heads=9, kv_heads=3, head_dim=64, num_layers=30, hidden=576, ffn=1536, vocab=49152),
)
