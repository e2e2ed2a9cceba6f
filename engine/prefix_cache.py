"""Which blocks already hold the KV of this prefix? A SHA-256 chain over full blocks.

A link hashes its parent's digest and the block's token ids; the first parent is keyed by the tenant's salt and the
model (and adapter), so a block can only be found by tenants whose salt made it (T9). On a hit the hashed bytes
themselves are compared again, link by link from the root, so a collision could never serve another prompt's KV.
Only complete blocks are entered, after the step that wrote them. Where two sequences computed the same block, the
first stays and the other is freed with its sequence: block tables are append-only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from engine.block_pool import BlockPool


class Link(NamedTuple):
    """One full block in a chain: what was hashed (parent digest, token ids) and the digest."""

    content: bytes
    digest: bytes


class PrefixCache:
    """Maps chains of token ids to blocks of the pool."""

    def __init__(self, pool: BlockPool, block_size: int, namespace: bytes = b"") -> None:
        self._pool = pool
        self._block_size = block_size
        self._namespace = namespace
        self._blocks: dict[bytes, int] = {}
        self._links: list[Link | None] = [None] * pool.num_blocks
        pool.on_evict(self.forget)

    def __len__(self) -> int:
        return len(self._blocks)

    def root(self, salt: bytes) -> bytes:
        """The parent of a tenant's first links; keyed with its length, so that no two pairs are alike."""
        keyed = len(salt).to_bytes(8, "little") + salt + self._namespace
        return hashlib.sha256(b"baton prefix root" + keyed).digest()

    def extend(self, links: list[Link], parent: bytes, token_ids: Sequence[int], num_blocks: int) -> None:
        """Append the links of full blocks [len(links), num_blocks) of `token_ids`, the first one below `parent`.

        About 4 us a block, half of it SHA-256. Thread-safe, like `root`: nothing here changes.
        """
        sha256 = hashlib.sha256
        first, size = len(links) * self._block_size, self._block_size
        packed = array("I", token_ids[first : num_blocks * size]).tobytes()
        width = array("I").itemsize * size
        for offset in range(0, len(packed), width):
            content = parent + packed[offset : offset + width]
            parent = sha256(content).digest()
            links.append(Link(content, parent))

    def match(self, links: Sequence[Link]) -> list[int]:
        """The blocks of the longest known prefix of the chain. Owns nothing: `share` them before allocating."""
        found: list[int] = []
        for link in links:
            block = self.find(link)
            if block is None:
                break
            found.append(block)
        return found

    def find(self, link: Link) -> int | None:
        """The block that holds this link's content, if one does. A link says its whole prefix."""
        block = self._blocks.get(link.digest)
        if block is None:
            return None
        known = self._links[block]
        return block if known is not None and known.content == link.content else None

    def insert(self, link: Link, block: int) -> None:
        """Let `block`, whose content is complete, be found by `link`; a block that is known already stays."""
        if link.digest in self._blocks or self._links[block] is not None:
            return
        self._blocks[link.digest] = block
        self._links[block] = link
        self._pool.keep(block)

    def drop(self, block: int) -> Link | None:
        """Never serve an owned block's content again, if it is known here: nobody can trust it. Returns its link."""
        if self._links[block] is None:
            return None
        self._pool.unkeep(block)
        return self.forget(block)

    def forget(self, block: int) -> Link:
        """The pool takes a known block for other content. Returns its link."""
        link = self._links[block]
        assert link is not None, f"block {block} was cached without a link"
        del self._blocks[link.digest]
        self._links[block] = None
        return link

    def check(self) -> None:
        """Assert that both directions agree and that every entry is kept by the pool."""
        for digest, block in self._blocks.items():
            link = self._links[block]
            assert link is not None
            assert link.digest == digest
        assert len(self._blocks) == sum(link is not None for link in self._links)
