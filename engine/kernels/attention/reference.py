"""What the attention kernel computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(cache: Tensor, layer: int, block_table: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Keys and values of positions [0, num_positions), each [kv_heads, num_positions, head_dim]."""
    blocks = cache[block_table, :, layer]  # [blocks, kv_heads, 2, block_size, head_dim]
    flat = blocks.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :num_positions]
    return flat[0], flat[1]


def attention(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """q [n, heads, dim] at positions start.. over keys, values [kv_heads, start + n, dim] -> [n, heads, dim]."""
    n, heads, _ = q.shape
    group = heads // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("nhd,hsd->hns", q, keys) * scale
    hidden = torch.arange(start + n) > torch.arange(start, start + n).unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,hsd->nhd", weights, values)
