"""xxh3-128 over blocks and over lists of block digests: against accidents, not attackers."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

DIGEST_BYTES = 16


def block_digest(block: memoryview | bytes) -> bytes:
    """Digest of a whole block, the unused (zeroed) slots of a tail included."""
    return xxhash.xxh3_128_digest(block)


def manifest_digest(block_digests: Iterable[bytes]) -> bytes:
    """Digest over the block digests in order of index, the tail's last."""
    hasher = xxhash.xxh3_128()
    for digest in block_digests:
        hasher.update(digest)
    return hasher.digest()
