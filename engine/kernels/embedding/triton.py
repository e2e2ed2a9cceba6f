"""Embedding lookup on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_kernel(
    token_ids, weight, y, num_tokens, weight_stride, y_stride, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y[i] = weight[token_ids[i]], ROWS rows of BLOCK columns a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_tokens)[:, None] & (column < N)[None, :]
    token = tl.load(token_ids + row, row < num_tokens, 0).to(tl.int64)
    values = tl.load(weight + token[:, None] * weight_stride + column[None, :], mask, 0.0)
    tl.store(y + row[:, None] * y_stride + column[None, :], values, mask)
