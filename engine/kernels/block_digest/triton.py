"""The block digest on the device; reference.py says what it is and why."""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
FINAL = tl.constexpr(0x94D049BB133111EB)
SECOND = tl.constexpr(0xD6E8FEB86659FD93)


@triton.jit
def _mix(z):
    """splitmix64's finaliser, a bijection of 64 bits."""
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * FINAL
    return z ^ (z >> 31)


@triton.jit
def partial_digest_kernel(
    words,
    scale_words,
    block_ids,
    partials,
    block_stride,
    scale_stride,
    NUM_WORDS: tl.constexpr,
    NUM_SCALE_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Both sums over one chunk of one block's words; the last chunks of a block are its scales. Strides in words."""
    chunk = tl.program_id(0)
    which = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids + which).to(tl.int64)
    if chunk < tl.cdiv(NUM_WORDS, CHUNK):
        begin = chunk * CHUNK
        count = NUM_WORDS - begin
        source = words + block * block_stride + begin
    else:
        skipped = (chunk - tl.cdiv(NUM_WORDS, CHUNK)) * CHUNK
        begin = NUM_WORDS + skipped
        count = NUM_SCALE_WORDS - skipped
        source = scale_words + block * scale_stride + skipped
    lane = tl.arange(0, TILE)
    first = tl.zeros((TILE,), tl.uint64)
    second = tl.zeros((TILE,), tl.uint64)
    for offset in range(0, CHUNK, TILE):
        mask = lane < count - offset
        word = tl.load(source + offset + lane, mask, 0).to(tl.uint64, bitcast=True)
        key = (begin + offset + lane + 1).to(tl.uint64) * GOLDEN
        z = _mix(word + key)
        t = (((z << 32) | (z >> 32)) + key) * SECOND
        first += tl.where(mask, z, 0)
        second += tl.where(mask, t ^ (t >> 32), 0)
    place = partials + (which * tl.num_programs(0) + chunk) * 2
    tl.store(place, tl.sum(first, 0).to(tl.int64, bitcast=True))
    tl.store(place + 1, tl.sum(second, 0).to(tl.int64, bitcast=True))


@triton.jit
def finish_digest_kernel(
    partials,
    digests,
    num_chunks,
    NUM_WORDS: tl.constexpr,
    NUM_SCALE_WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add one block's chunks and bind the lengths."""
    which = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    first = tl.zeros((TILE,), tl.uint64)
    second = tl.zeros((TILE,), tl.uint64)
    for begin in range(0, num_chunks, TILE):
        chunk = begin + lane
        place = partials + (which * num_chunks + chunk) * 2
        first += tl.load(place, chunk < num_chunks, 0).to(tl.uint64, bitcast=True)
        second += tl.load(place + 1, chunk < num_chunks, 0).to(tl.uint64, bitcast=True)
    b = tl.sum(second, 0) ^ (tl.full((), NUM_SCALE_WORDS, tl.uint64) * SECOND + GOLDEN)
    b = _mix(b)
    a = _mix(tl.sum(first, 0) + tl.full((), NUM_WORDS, tl.uint64) * GOLDEN) + b
    tl.store(digests + which * 2, a.to(tl.int64, bitcast=True))
    tl.store(digests + which * 2 + 1, (a + b).to(tl.int64, bitcast=True))
