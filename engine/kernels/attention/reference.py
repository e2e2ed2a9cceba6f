"""What the attention kernel computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(
    cache: Tensor, layer: int, block_table: Tensor, num_positions: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of positions [0, num_positions), each [kv_heads, num_positions, head_dim].

    scales [num_blocks, kv_heads, num_layers, 2, block_size]: what an int8 or fp8 number is worth.
    """
    blocks = cache[block_table, :, layer]  # [blocks, kv_heads, 2, block_size, head_dim]
    if scales is not None:
        blocks = blocks.float() * scales[block_table, :, layer].unsqueeze(-1)
    flat = blocks.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :num_positions]
    return flat[0], flat[1]


def tree_ends(parents: list[int]) -> list[int]:
    """For nodes in depth-first order, the index behind each one's last descendant; a root's parent is -1."""
    ends = list(range(1, len(parents) + 1))
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return ends


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    parents: list[int] | None = None,
) -> Tensor:
    """q [n, heads, dim] at positions start.. over keys, values [kv_heads, start + n, dim] -> [n, heads, dim].

    window: how many keys a query sees, itself the last; 0: all. soft_cap: scores become cap * tanh(score / cap).
    parents: the n queries are nodes of a tree, which see the context, themselves and their ancestors.
    """
    n, heads, _ = q.shape
    group = heads // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("nhd,hsd->hns", q, keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = torch.arange(start, start + n).unsqueeze(1) - torch.arange(start + n)
    hidden = distance < 0
    if window:
        hidden = hidden | (distance >= window)
    for node, parent in enumerate(parents or ()):
        hidden[node, start:] = True if parent < 0 else hidden[parent, start:]
        hidden[node, start + node] = False
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,hsd->nhd", weights, values)
