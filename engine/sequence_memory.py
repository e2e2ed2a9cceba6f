"""Where does a sequence's KV lie? Block tables over pool and prefix cache; nothing else edits a block table."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as AnySequence

from engine.block_pool import BlockPool
from engine.group import ScheduledSequence
from engine.prefix_cache import Link, PrefixCache
from engine.request import empty_table


class SequenceMemory:
    """Gives sequences blocks and takes them back."""

    def __init__(self, num_blocks: int, block_size: int, namespace: bytes, prefix_caching: bool) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size, namespace)
        self._prefix_caching = prefix_caching

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def hash_prompt(self, token_ids: AnySequence[int], salt: bytes) -> list[Link]:
        """The links of all full blocks of a prompt. Thread-safe: it reads nothing that changes."""
        links: list[Link] = []
        if self._prefix_caching:
            self.cache.extend(links, self.cache.root(salt), token_ids, len(token_ids) // self.block_size)
        return links

    def match(self, sequence: ScheduledSequence, target: int) -> list[int]:
        """Cached blocks of the sequence's prefix, whole ones, short of the last position before `target`."""
        if not self._prefix_caching:
            return []
        limit = (target - 1) // self.block_size
        self._extend_links(sequence, limit)
        return self.cache.match(sequence.links[:limit])

    def num_missing(self, matched: list[int], num_blocks: int) -> int:
        """Of the available blocks, how many a table starting with `matched` takes: new ones, and revived ones."""
        owners = self.pool.is_owned
        return num_blocks - sum(owners(block) for block in matched)

    def take_prefix(self, sequence: ScheduledSequence, matched: list[int]) -> None:
        """Start the empty block table with cached blocks."""
        assert not sequence.block_table
        self.pool.share(matched)
        sequence.block_table = array("i", matched)
        sequence.num_filled_blocks = len(matched)
        sequence.num_slots = sequence.num_computed_tokens = len(matched) * self.block_size

    def num_needed(self, sequence: ScheduledSequence, end: int) -> int:
        """Blocks to allocate before positions up to `end` can be written."""
        missing = self.blocks_for(end) - len(sequence.block_table)
        return (missing if missing > 0 else 0) + (1 if self._must_copy(sequence) else 0)

    def grow(self, sequence: ScheduledSequence, end: int) -> tuple[int, int] | None:
        """Make positions up to `end` writable. Returns the copy (source, destination) that must run first, if any."""
        table, copy = sequence.block_table, None
        if sequence.is_tail_shared:
            if self._must_copy(sequence):
                where = sequence.num_computed_tokens // self.block_size
                source, (destination,) = table[where], self.pool.allocate(1)
                self.pool.release([source])
                table[where] = destination
                copy = source, destination
            sequence.is_tail_shared = False
        missing = self.blocks_for(end) - len(table)
        if missing > 0:
            table.extend(self.pool.allocate(missing, after=table[-1] if table else -1))
            sequence.num_slots = len(table) * self.block_size
        return copy

    def fork(self, parent: ScheduledSequence, child: ScheduledSequence) -> None:
        """Let `child` share all that `parent` computed; a partial last block is copied by whoever writes it first."""
        num_blocks = self.blocks_for(parent.num_computed_tokens)
        child.block_table = parent.block_table[:num_blocks]
        self.pool.share(child.block_table)
        child.num_slots = num_blocks * self.block_size
        child.num_computed_tokens = parent.num_computed_tokens
        child.links = parent.links[: parent.num_filled_blocks]
        child.num_filled_blocks = parent.num_filled_blocks
        if parent.num_computed_tokens % self.block_size:
            parent.is_tail_shared = child.is_tail_shared = True

    def note_filled(self, sequence: ScheduledSequence) -> None:
        """Blocks complete by now become filled, and known to the prefix cache. Call after the step that wrote them."""
        first, end = sequence.num_filled_blocks, sequence.num_computed_tokens // self.block_size
        if first >= end:
            return
        if self._prefix_caching:
            self._extend_links(sequence, end)
        for index in range(first, end):
            block = sequence.block_table[index]
            self.pool.fill(block)
            if self._prefix_caching:
                self.cache.insert(sequence.links[index], block)
        sequence.num_filled_blocks = end

    def drop(self, sequence: ScheduledSequence) -> None:
        """Take back every block; what is complete stays cached until evicted."""
        self.pool.release(sequence.block_table)
        sequence.block_table = empty_table()
        sequence.num_slots = sequence.num_computed_tokens = sequence.num_filled_blocks = 0
        sequence.is_tail_shared = False

    def num_lost_tokens(self, sequence: ScheduledSequence) -> int:
        """Tokens to compute again if the sequence is dropped: those in blocks that nobody else holds."""
        pool, kept = self.pool, 0
        for block in sequence.block_table:
            if not pool.is_shared(block):
                break
            kept += self.block_size
        return max(sequence.num_computed_tokens - kept, 0)

    def check(self, sequences: Iterable[ScheduledSequence], pinned: Iterable[list[int]]) -> None:
        """Assert that pool, cache and these owners, which are all there are, agree."""
        self.pool.check()
        self.cache.check()
        requests = Counter(block for sequence in sequences for block in sequence.block_table)
        transfers = Counter(block for blocks in pinned for block in blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.owners(block) == (requests[block], transfers[block]), f"owners of block {block}"

    def _must_copy(self, sequence: ScheduledSequence) -> bool:
        where = sequence.num_computed_tokens // self.block_size
        return sequence.is_tail_shared and self.pool.is_shared(sequence.block_table[where])

    def _extend_links(self, sequence: ScheduledSequence, num_blocks: int) -> None:
        if len(sequence.links) < num_blocks:
            parent = sequence.links[-1].digest if sequence.links else self.cache.root(sequence.group.request.cache_salt)
            self.cache.extend(sequence.links, parent, sequence.token_ids, num_blocks)
