"""Rotary embedding, the norm of each head before it, and the write of keys and values into the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl

AS_IS = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
SMALLEST_AMAX = tl.constexpr(1e-30)


@triton.jit
def _normed(low, high, weight, half, mask, epsilon, HALF: tl.constexpr):
    """RMSNorm of each row, whose halves are `low` and `high`."""
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + epsilon)[:, None]
    low_weight = tl.load(weight + half, mask, 0.0).to(tl.float32)[None, :]
    high_weight = tl.load(weight + HALF + half, mask, 0.0).to(tl.float32)[None, :]
    return low * inverse * low_weight, high * inverse * high_weight


@triton.jit
def _fp8_bits(x):
    """The byte of float8 e4m3 nearest to x, |x| <= 448, ties to even: made of integers, so that sm_80 can, too.

    From 2^-6 up, half of the last bit that is kept rounds, and the exponent's bias falls from 127 to 7. Below, e4m3 is
    subnormal: multiples of 2^-9, which is what float32 has room for above 2^14.
    """
    size = tl.abs(x)
    bits = tl.maximum(size, 0.015625).to(tl.uint32, bitcast=True)
    normal = (bits - 0x3C000000 + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    sign = tl.where(x < 0, 128, 0).to(tl.uint32)
    return (tl.where(size < 0.015625, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def _quantised(x, scale, FORMAT: tl.constexpr):
    """x / scale in the cache's format."""
    if FORMAT == INT8:
        # Adding 1.5 * 2^23 leaves no room for a fraction: rounds to the nearest, ties to even.
        return ((x / scale + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        return _fp8_bits(x / scale)


@triton.jit
def _store_row(
    place,
    kv_scales,
    scale_offset,
    low,
    high,
    half,
    row_mask,
    mask,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Write rows to the cache; in a quantised one with the scale that makes the largest magnitude LIMIT."""
    if FORMAT != AS_IS:
        amax = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.maximum(amax, SMALLEST_AMAX) / LIMIT
        tl.store(kv_scales + scale_offset, scale, row_mask)
        low = _quantised(low, scale[:, None], FORMAT)
        high = _quantised(high, scale[:, None], FORMAT)
    target = place[:, None] + half[None, :]
    tl.store(target, low, mask)
    tl.store(target + HALF, high, mask)


@triton.jit(do_not_specialize=["layer"])
def rope_write_kernel(
    qkv,
    cos,
    sin,
    positions,
    slot_mapping,
    q_norm,
    k_norm,
    cache,
    kv_scales,
    num_tokens,
    layer,
    qkv_stride,
    block_stride,
    head_stride,
    layer_stride,
    kind_stride,
    slot_stride,
    scale_block_stride,
    scale_head_stride,
    scale_layer_stride,
    scale_kind_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """The first cdiv(num_tokens * HEADS, ROWS) programs rotate ROWS query heads in place; the others write KV heads."""
    half = tl.arange(0, HALF_BLOCK)
    inside = half < HALF
    program = tl.program_id(0)
    q_programs = tl.cdiv(num_tokens * HEADS, ROWS)
    if program < q_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_tokens * HEADS
        mask = row_mask[:, None] & inside[None, :]
        token = row // HEADS
        place = qkv + token.to(tl.int64)[:, None] * qkv_stride + (row % HEADS)[:, None] * (2 * HALF) + half[None, :]
    else:
        row = (program - q_programs) * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_tokens * KV_HEADS
        mask = row_mask[:, None] & inside[None, :]
        token = row // KV_HEADS
        head = row % KV_HEADS
        place = qkv + token.to(tl.int64)[:, None] * qkv_stride + (HEADS + head)[:, None] * (2 * HALF) + half[None, :]

    low = tl.load(place, mask, 0.0).to(tl.float32)
    high = tl.load(place + HALF, mask, 0.0).to(tl.float32)
    if NORM:
        norm = k_norm
        if program < q_programs:
            norm = q_norm
        low, high = _normed(low, high, norm, half, inside, epsilon, HALF)
    angle = tl.load(positions + token, row_mask, 0).to(tl.int64)[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle, mask, 0.0)
    s = tl.load(sin + angle, mask, 0.0)
    turned_low = low * c - high * s
    turned_high = high * c + low * s

    if program < q_programs:
        tl.store(place, turned_low, mask)
        tl.store(place + HALF, turned_high, mask)
    else:
        head = (row % KV_HEADS).to(tl.int64)
        slot = tl.load(slot_mapping + token, row_mask, 0)
        block = slot // BLOCK_SIZE
        slot = slot % BLOCK_SIZE
        target = cache + block * block_stride + head * head_stride + layer.to(tl.int64) * layer_stride
        target += slot * slot_stride
        scale = block * scale_block_stride + head * scale_head_stride + layer.to(tl.int64) * scale_layer_stride + slot
        _store_row(target, kv_scales, scale, turned_low, turned_high, half, row_mask, mask, HALF, FORMAT, LIMIT)
        values = place + KV_HEADS * 2 * HALF
        low = tl.load(values, mask, 0.0).to(tl.float32)
        high = tl.load(values + HALF, mask, 0.0).to(tl.float32)
        target += kind_stride
        scale += scale_kind_stride
        _store_row(target, kv_scales, scale, low, high, half, row_mask, mask, HALF, FORMAT, LIMIT)
