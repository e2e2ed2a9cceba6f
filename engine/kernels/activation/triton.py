"""Gated activations and the soft cap on the device."""

from __future__ import annotations

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU_ERF = tl.constexpr(2)


@triton.jit
def tanh(x):
    """tanh of float32 within 2 ulp: near 0 by Cephes' polynomial (tanhf), where (1 - e) / (1 + e) would cancel."""
    size = tl.abs(x)
    near = tl.minimum(size, 1.0)
    square = near * near
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    e = tl.exp(-2.0 * size)
    positive = tl.where(size < 0.625, p * square * near + near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -positive, positive)


@triton.jit
def gated_kernel(
    gate_up,
    y,
    num_rows,
    gate_up_stride,
    y_stride,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = activation(gate_up[:, :N]) * gate_up[:, N:], ROWS rows of BLOCK columns a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < N)[None, :]
    source = gate_up + row[:, None] * gate_up_stride + column[None, :]
    gate = tl.load(source, mask, 0.0).to(tl.float32)
    up = tl.load(source + N, mask, 0.0).to(tl.float32)
    if ACTIVATION == SILU:
        e = tl.exp(-tl.abs(gate))
        active = gate * tl.where(gate < 0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == GELU_TANH:
        active = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row[:, None] * y_stride + column[None, :], active * up, mask)


@triton.jit
def soft_cap_kernel(x, y, num_rows, x_stride, y_stride, cap, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = cap * tanh(x / cap), ROWS rows of BLOCK columns a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < N)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * y_stride + column[None, :], cap * tanh(values / cap), mask)
