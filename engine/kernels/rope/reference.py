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
