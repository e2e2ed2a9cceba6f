"""The 128-bit block digest in numpy: what the kernel computes, and how a host checks a device's digest.

A block is W little-endian 64-bit words of KV, followed by S words of its quantisation scales; word i of the W + S has
the key (i + 1) * GOLDEN. Two 64-bit sums are taken, modulo 2^64:

    z_i = mix(word_i + key_i)                          mix: splitmix64's finaliser (Stafford's variant 13)
    a   = sum of z_i
    b   = sum of t ^ (t >> 32),  t = (rotate(z_i, 32) + key_i) * SECOND

and the digest is (a', a' + b'), 16 bytes, little-endian, with b' = mix(b ^ (S * SECOND + GOLDEN)) and
a' = mix(a + W * GOLDEN) + b'. Sums commute, so any tree, tile size or number of programs gives the same bits.

Against accidents, not attackers. Every step from a word to its two addends is a bijection of the word, and the end is
one of (a, b) for given lengths; so a change within one word (any flipped bit, any burst inside 8 aligned bytes) always
changes the digest. Swaps, shifts and truncation change addends that depend on the position, through two rounds that
are not linear: such a change is missed if both sums happen to agree, which random functions do once in 2^128. Zeros
count too: their addends differ by position, and the lengths enter at the end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
FINAL = np.uint64(0x94D049BB133111EB)
SECOND = np.uint64(0xD6E8FEB86659FD93)


def block_digest(block: bytes | memoryview, scales: bytes | memoryview = b"") -> bytes:
    """Digest of one block's bytes and of its scales' bytes, each a multiple of 8 long."""
    words, scale_words = np.frombuffer(block, "<u8"), np.frombuffer(scales, "<u8")
    with np.errstate(over="ignore"):
        a, b = _sums(np.concatenate((words, scale_words)))
        b = _mix(b ^ (np.uint64(len(scale_words)) * SECOND + GOLDEN))
        a = _mix(a + np.uint64(len(words)) * GOLDEN) + b
        return np.array([a, a + b], "<u8").tobytes()


def _sums(words: Words) -> tuple[Words, Words]:
    keys = np.arange(1, len(words) + 1, dtype=np.uint64) * GOLDEN
    z = _mix(words + keys)
    second = (((z << np.uint64(32)) | (z >> np.uint64(32))) + keys) * SECOND
    second ^= second >> np.uint64(32)
    return z.sum(keepdims=True, dtype=np.uint64)[0], second.sum(keepdims=True, dtype=np.uint64)[0]


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * FINAL
    return z ^ (z >> np.uint64(31))
