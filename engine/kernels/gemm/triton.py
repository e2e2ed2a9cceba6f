"""Batch-invariant GEMM on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm_kernel(
    x,
    weight,
    y,
    bias,
    residual,
    m,
    n,
    k,
    x_stride,
    weight_stride,
    y_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y = x weight^T (+ bias) (+ residual); K is walked in tiles of BLOCK_K from 0 up, whatever m is."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_place = x + row[:, None] * x_stride + inner[None, :]
    w_place = weight + column[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        a = tl.load(x_place + begin, (row < m)[:, None] & (inner < k - begin)[None, :], 0.0)
        b = tl.load(w_place + begin, (column < n)[None, :] & (inner < k - begin)[:, None], 0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, column < n, 0.0).to(tl.float32)[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * y_stride + column[None, :], total, mask)
