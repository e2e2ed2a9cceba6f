"""What the RoPE + KV write kernel computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head. x [n, heads, dim]; cos, sin [n, dim / 2]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def write_kv(keys: Tensor, values: Tensor, cache: Tensor, layer: int, blocks: Tensor, slots: Tensor) -> None:
    """Store keys, values [n, kv_heads, dim] at (blocks[i], slots[i]) of one layer of the paged cache, in place."""
    cache[blocks, :, layer, 0, slots] = keys
    cache[blocks, :, layer, 1, slots] = values


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values of `dtype` (int8 or float8_e4m3fn) and the scales [...] float32 of x's rows: x = value * scale."""
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scales = (x.abs().amax(-1).clamp_min(1e-30) / limit).float()
    scaled = x.float() / scales.unsqueeze(-1)
    return (scaled.round() if dtype == torch.int8 else scaled.clamp(-limit, limit)).to(dtype), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """What `quantise` was given, as far as it is still known."""
    return values.float() * scales.unsqueeze(-1)
