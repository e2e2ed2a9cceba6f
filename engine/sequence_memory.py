"""Where does a sequence's KV lie? Block tables over pool, prefix cache and host blocks; nothing else edits a table."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as AnySequence

from engine.block_pool import BlockPool
from engine.group import ScheduledSequence
from engine.prefix_cache import Link, PrefixCache
from engine.request import empty_table
from engine.swap import HostBlocks, SwappedOut


class SequenceMemory:
    """Gives sequences blocks and takes them back. What a step must copy for that is collected until `take_copies`."""

    def __init__(
        self, num_blocks: int, block_size: int, namespace: bytes, prefix_caching: bool, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size, namespace)
        self.host = HostBlocks(num_host_blocks)
        self.pool.on_evict(self._evicted)
        self._prefix_caching = prefix_caching
        self._swap_outs: list[tuple[int, int]] = []
        self._swap_ins: list[tuple[int, int]] = []

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
        """Cached blocks of the sequence's prefix, whole ones, short of the last position before `target`.

        Of a swapped-out sequence: all that the cache still holds, wherever in its table they belong.
        """
        if sequence.swapped is not None:
            return list(self._still_cached(sequence.swapped).values())
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
        """Take back every block, on the host too; what is complete stays cached until evicted."""
        if sequence.swapped is not None:
            self.host.release(sequence.swapped)
            sequence.swapped = None
        self.pool.release(sequence.block_table)
        sequence.block_table = empty_table()
        sequence.num_slots = sequence.num_computed_tokens = sequence.num_filled_blocks = 0
        sequence.is_tail_shared = False

    def num_lost_tokens(self, sequence: ScheduledSequence) -> int:
        """Tokens to compute again if the sequence is dropped: all but full blocks that others hold and it can find."""
        pool, num_full = self.pool, sequence.num_computed_tokens // self.block_size
        num_kept = 0
        if self._prefix_caching:
            while num_kept < num_full and pool.is_shared(sequence.block_table[num_kept]):
                num_kept += 1
        return sequence.num_computed_tokens - num_kept * self.block_size

    # ---------------------------------------------------------------- host memory

    def swap_out(self, sequence: ScheduledSequence) -> bool:
        """Drop a sequence's blocks and keep their content; False, and nothing done, if host memory is short.

        Call while a step is planned: the copies are part of it.
        """
        table, num_tokens = sequence.block_table, sequence.num_computed_tokens
        full = zip(range(num_tokens // self.block_size), sequence.links, strict=False)
        cached = {index: link for index, link in full if self.cache.find(link) is not None}
        others = [index for index in range(self.blocks_for(num_tokens)) if index not in cached]
        swapped = self.host.reserve(num_tokens, cached, others)
        if swapped is None:
            return False
        self._swap_outs += [(table[index], host_block) for index, host_block in swapped.copied.items()]
        self.drop(sequence)
        sequence.swapped = swapped
        return True

    def swap_in(self, sequence: ScheduledSequence) -> None:
        """Give a swapped-out sequence its blocks back. Their content is there when the step at hand has run.

        Until then they are reserved, not filled: `note_filled` is called after the step, as for computed ones.
        """
        swapped = sequence.swapped
        assert swapped is not None
        assert not sequence.block_table
        found = self._still_cached(swapped)
        self.pool.share(found.values())  # before allocating, or they could be evicted
        missing = [index for index in range(swapped.num_blocks) if index not in found]
        new = dict(zip(missing, self.pool.allocate(len(missing)), strict=True))
        self._swap_ins += [(self.host.where(swapped, index), block) for index, block in new.items()]
        sequence.block_table = array("i", [found[i] if i in found else new[i] for i in range(swapped.num_blocks)])
        sequence.num_slots = swapped.num_blocks * self.block_size
        sequence.num_computed_tokens = swapped.num_tokens
        sequence.num_filled_blocks = missing[0] if missing else swapped.num_tokens // self.block_size
        self.host.release(swapped)
        sequence.swapped = None

    def must_save_first(self, num_blocks: int) -> bool:
        """Whether allocating so many blocks could evict one that is to be copied to the host: a step must do that."""
        return self.host.num_unsaved > 0 and num_blocks > self.pool.num_free

    def take_copies(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Swap-outs (block, host block) and swap-ins (host block, block) of the step that was planned."""
        copies = self._swap_outs, self._swap_ins
        if self._swap_outs or self._swap_ins:
            self._swap_outs, self._swap_ins = [], []
        return copies

    def check(self, sequences: Iterable[ScheduledSequence], pinned: Iterable[list[int]]) -> None:
        """Assert that pool, cache, host blocks and these owners, which are all there are, agree."""
        sequences = list(sequences)
        self.pool.check()
        self.cache.check()
        self._check_host(sequences)
        requests = Counter(block for sequence in sequences for block in sequence.block_table)
        transfers = Counter(block for blocks in pinned for block in blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.owners(block) == (requests[block], transfers[block]), f"owners of block {block}"

    # ---------------------------------------------------------------- inside

    def _still_cached(self, swapped: SwappedOut) -> dict[int, int]:
        """By index, the blocks of a swapped-out sequence that need no copy."""
        found = {index: self.cache.find(link) for index, link in swapped.cached.items()}
        return {index: block for index, block in found.items() if block is not None}

    def _evicted(self, block: int) -> None:
        host_block = self.host.save(self.cache.forget(block))
        if host_block is not None:
            self._swap_outs.append((block, host_block))

    def _check_host(self, sequences: AnySequence[ScheduledSequence]) -> None:
        assert not self._swap_outs, "a copy to the host was left behind"
        assert not self._swap_ins, "a copy from the host was left behind"
        swapped = [each.swapped for each in sequences if each.swapped is not None]
        self.host.check(swapped)
        unsaved = set(self.host.unsaved())
        links = [link for each in swapped for link in each.cached.values() if link.content in unsaved]
        assert all(self.cache.find(link) is not None for link in links), "a swapped block is nowhere"
        assert not any(each.swapped is not None and each.block_table for each in sequences), "swapped, and holds blocks"

    def _must_copy(self, sequence: ScheduledSequence) -> bool:
        where = sequence.num_computed_tokens // self.block_size
        return sequence.is_tail_shared and self.pool.is_shared(sequence.block_table[where])

    def _extend_links(self, sequence: ScheduledSequence, num_blocks: int) -> None:
        if len(sequence.links) < num_blocks:
            parent = sequence.links[-1].digest if sequence.links else self.cache.root(sequence.group.request.cache_salt)
            self.cache.extend(sequence.links, parent, sequence.token_ids, num_blocks)
