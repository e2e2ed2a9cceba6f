"""RMSNorm on the device, and its fusion with the addition of the residual before it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    y,
    rows,
    num_rows,
    x_stride,
    y_stride,
    epsilon,
    N: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[i] = rms_norm(x[i]), or of x[rows[i]] with GATHER. One program normalises ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < N)[None, :]
    source = row
    if GATHER:
        source = tl.load(rows + row, row < num_rows, 0).to(tl.int64)
    values = tl.load(x + source[:, None] * x_stride + column[None, :], mask, 0.0).to(tl.float32)
    scale = tl.load(weight + column, column < N, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / N + epsilon)
    tl.store(y + row[:, None] * y_stride + column[None, :], values * inverse[:, None] * scale[None, :], mask)


@triton.jit
def add_rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    num_rows,
    x_stride,
    residual_stride,
    y_stride,
    epsilon,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual += x, then y = rms_norm(residual) of the sum as it was stored: the same bits as two kernels give."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < N)[None, :]
    added = tl.load(x + row[:, None] * x_stride + column[None, :], mask, 0.0).to(tl.float32)
    place = residual + row[:, None] * residual_stride + column[None, :]
    stored = (tl.load(place, mask, 0.0).to(tl.float32) + added).to(residual.dtype.element_ty)
    tl.store(place, stored, mask)
    values = stored.to(tl.float32)
    scale = tl.load(weight + column, column < N, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / N + epsilon)
    tl.store(y + row[:, None] * y_stride + column[None, :], values * inverse[:, None] * scale[None, :], mask)
