"""Batch-invariant GEMM on the device.

K is cut into pieces, whose sums are added in order: by one program that takes them in turn, or by one program for each
piece and a second kernel. Both add the same numbers in the same order, so both give the same bits.
"""

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
    piece,
    x_stride,
    weight_stride,
    y_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IN_PIECES: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y = x weight^T (+ bias) (+ residual)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if IN_PIECES:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, k, piece):
            end = tl.minimum(begin + piece, k)
            total += _sum_of_piece(
                x, weight, row, column, m, n, k, begin, end, x_stride, weight_stride, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
            )
    else:
        total = _sum_of_piece(
            x, weight, row, column, m, n, k, 0, k, x_stride, weight_stride, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
        )
    if HAS_BIAS:
        total += tl.load(bias + column, column < n, 0.0).to(tl.float32)[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * y_stride + column[None, :], total, mask)


@triton.jit
def gemm_piece_kernel(
    x,
    weight,
    sums,
    m,
    n,
    k,
    piece,
    x_stride,
    weight_stride,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one piece of x weight^T; `sums` [pieces, m, n], float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.program_id(2)
    begin = number * piece
    end = tl.minimum(begin + piece, k)
    total = _sum_of_piece(
        x, weight, row, column, m, n, k, begin, end, x_stride, weight_stride, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    place = sums + (number.to(tl.int64) * m + row)[:, None] * n + column[None, :]
    tl.store(place, total, (row < m)[:, None] & (column < n)[None, :])


@triton.jit
def gemm_join_kernel(
    sums,
    y,
    bias,
    residual,
    m,
    n,
    num_pieces,
    y_stride,
    residual_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Part of a row of y: its pieces in order, then as `gemm_kernel` ends."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < n
    total = tl.zeros((BLOCK_N,), tl.float32)
    for number in range(0, num_pieces):
        total += tl.load(sums + (number * m + row) * n + column, mask, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + row * residual_stride + column, mask, 0.0).to(tl.float32)
    tl.store(y + row * y_stride + column, total, mask)


@triton.jit
def _sum_of_piece(
    x,
    weight,
    row,
    column,
    m,
    n,
    k,
    begin,
    end,
    x_stride,
    weight_stride,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile of x weight^T over [begin, end) of K, in tiles of BLOCK_K from `begin` up, whatever m is.

    Every piece but the last is of whole tiles, so only the end of K needs a mask.
    """
    inner = tl.arange(0, BLOCK_K)
    x_place = x + row[:, None] * x_stride + inner[None, :]
    w_place = weight + column[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(begin, end, BLOCK_K):
        a = tl.load(x_place + at, (row < m)[:, None] & (inner < k - at)[None, :], 0.0)
        b = tl.load(w_place + at, (column < n)[None, :] & (inner < k - at)[:, None], 0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total
