"""Who owns each KV block? States, two lifetimes, generations, and what dies first when memory is short.

    FREE ──allocate──> RESERVED ──fill──> FILLED ──last owner gone, kept──> CACHED ──share──> FILLED
     ^                    │                  │                                │
     │<──last owner gone──┘<──not kept───────┘<───────────evicted─────────────┘
     │
     └── QUARANTINED: the request is gone while a transfer may still write; left when the transfer lets go

A block has two kinds of owners, counted apart: requests (sequences whose table names it) and transfers (a peer reads or
writes it). It is free only when both counts are zero (T1). Its generation rises whenever it is handed out anew, so that
a reader who remembers an old one notices. A block is *kept* while the prefix cache can find it.

All operations are O(1) per block: parallel lists, one intrusive list for the eviction order, and a byte map of free
blocks in which `bytearray.find` looks for contiguous runs at memory speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum


class BlockState(IntEnum):
    """Where a block is in its life."""

    FREE = 0
    RESERVED = 1
    FILLED = 2
    CACHED = 3
    QUARANTINED = 4


def _forget_nothing(block: int) -> None:
    """Stand in for a prefix cache where there is none."""


class BlockPool:
    """The only place that assigns block states, counts and generations."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self.num_shared = 0  # blocks that more than one request owns
        self._on_evict: Callable[[int], object] = _forget_nothing
        self._state = [BlockState.FREE] * num_blocks
        self._generation = [0] * num_blocks
        self._request_owners = [0] * num_blocks
        self._transfer_owners = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._counts = [num_blocks, 0, 0, 0, 0]
        self._free_map = bytearray(b"\x01") * num_blocks
        self._cursor = 0
        # Eviction order of cached blocks, oldest first: a ring through the extra element `num_blocks`.
        self._newer = list(range(num_blocks + 1))
        self._older = list(range(num_blocks + 1))

    def on_evict(self, forget: Callable[[int], object]) -> None:
        """Have `forget(block)` called when a cached block is about to be reused, in place of what was called before."""
        self._on_evict = forget

    # ---------------------------------------------------------------- what there is

    @property
    def num_free(self) -> int:
        return self._counts[BlockState.FREE]

    @property
    def num_cached(self) -> int:
        return self._counts[BlockState.CACHED]

    @property
    def num_quarantined(self) -> int:
        return self._counts[BlockState.QUARANTINED]

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and evictable ones."""
        counts = self._counts
        return counts[BlockState.FREE] + counts[BlockState.CACHED]

    def count(self, state: BlockState) -> int:
        """How many blocks are in `state`."""
        return self._counts[state]

    def state(self, block: int) -> BlockState:
        """Where `block` is in its life."""
        return self._state[block]

    def generation(self, block: int) -> int:
        """How often `block` has been handed out."""
        return self._generation[block]

    def is_shared(self, block: int) -> bool:
        """A writer must copy it first: another request owns it too, or a transfer does."""
        return self._request_owners[block] > 1 or self._transfer_owners[block] > 0

    def is_owned(self, block: int) -> bool:
        """A request or a transfer owns it, so it cannot be evicted."""
        return self._request_owners[block] > 0 or self._transfer_owners[block] > 0

    def owners(self, block: int) -> tuple[int, int]:
        """How many requests and how many transfers own it."""
        return self._request_owners[block], self._transfer_owners[block]

    # ---------------------------------------------------------------- request owners

    def allocate(self, count: int, after: int = -1) -> list[int]:
        """Hand out `count` blocks to a request, contiguous where that is cheap, the first one behind `after` if free.

        The caller has checked `num_available`. Cached blocks are evicted, oldest first, only where free ones do not
        suffice.
        """
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} available"
        if count > self.num_free:
            self._evict(count - self.num_free)
        blocks = [self._find_one(after)] if count == 1 else self._find_runs(count)
        generation, owners, state = self._generation, self._request_owners, self._state
        for block in blocks:
            generation[block] += 1
            owners[block] = 1
            state[block] = BlockState.RESERVED
        self._counts[BlockState.FREE] -= count
        self._counts[BlockState.RESERVED] += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more request owns these blocks; a cached one leaves the eviction order."""
        owners = self._request_owners
        for block in blocks:
            if self._state[block] is BlockState.CACHED:
                self._unlink(block)
                self._move(block, BlockState.FILLED)
            assert self._state[block] in (BlockState.FILLED, BlockState.RESERVED), f"block {block} has no content"
            owners[block] += 1
            if owners[block] == 2:
                self.num_shared += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A request lets go of its blocks, given in table order: the tail becomes the first to be evicted."""
        owners = self._request_owners
        for block in reversed(blocks):
            left = owners[block] - 1
            assert left >= 0, f"block {block} has no request owner"
            owners[block] = left
            if left == 1:
                self.num_shared -= 1
            elif left == 0:
                self._settle(block)

    # ---------------------------------------------------------------- transfer owners

    def pin(self, blocks: Iterable[int]) -> None:
        """A transfer owns these blocks too, until `unpin`."""
        for block in blocks:
            assert self._request_owners[block] > 0, f"block {block} is pinned without a request"
            self._transfer_owners[block] += 1

    def unpin(self, blocks: Sequence[int]) -> None:
        """The transfer lets go: no peer reads or writes these blocks any more."""
        owners = self._transfer_owners
        for block in reversed(blocks):
            owners[block] -= 1
            assert owners[block] >= 0, f"block {block} has no transfer owner"
            if owners[block] == 0 and self._request_owners[block] == 0:
                self._settle(block)

    # ---------------------------------------------------------------- content

    def fill(self, block: int) -> None:
        """Its content is complete; nobody writes it any more."""
        if self._state[block] is BlockState.RESERVED:
            self._move(block, BlockState.FILLED)
        assert self._state[block] is BlockState.FILLED

    def keep(self, block: int) -> None:
        """The prefix cache can find it: without owners it is cached instead of freed."""
        assert self._state[block] is BlockState.FILLED
        self._kept[block] = 1

    def unkeep(self, block: int) -> None:
        """The prefix cache can find it no more: without owners it is freed. It has owners now."""
        assert self._state[block] is BlockState.FILLED
        self._kept[block] = 0

    def check(self) -> None:
        """Assert conservation (T8), ownership (T1) and the eviction order against a full recount."""
        for state in BlockState:
            assert self._counts[state] == self._state.count(state), f"count of {state.name} is wrong"
        assert sum(self._counts) == self.num_blocks
        assert self.num_shared == sum(owners > 1 for owners in self._request_owners)
        for block, state in enumerate(self._state):
            self._check_block(block, state)
        ring: list[int] = []
        block = self._newer[self.num_blocks]
        while block != self.num_blocks:
            ring.append(block)
            assert self._older[self._newer[block]] == block
            block = self._newer[block]
        assert len(ring) == self.num_cached
        assert all(self._state[block] is BlockState.CACHED for block in ring)

    def _check_block(self, block: int, state: BlockState) -> None:
        requests, transfers, kept = self._request_owners[block], self._transfer_owners[block], self._kept[block]
        assert requests >= 0
        assert transfers >= 0
        assert self._free_map[block] == (state is BlockState.FREE)
        match state:
            case BlockState.FREE:
                assert requests == transfers == kept == 0, f"free block {block} is owned or kept"
            case BlockState.CACHED:
                assert requests == transfers == 0, f"cached block {block} is owned"
                assert kept
            case BlockState.QUARANTINED:
                assert requests == 0
                assert transfers > 0
                assert not kept
            case BlockState.RESERVED:
                assert requests > 0
                assert not kept
            case BlockState.FILLED:
                assert requests + transfers > 0

    # ---------------------------------------------------------------- inside

    def _move(self, block: int, state: BlockState) -> None:
        counts = self._counts
        counts[self._state[block]] -= 1
        counts[state] += 1
        self._state[block] = state

    def _settle(self, block: int) -> None:
        """A kind of owner is gone from `block`: decide what becomes of it."""
        state = self._state[block]
        if self._transfer_owners[block]:
            if state is BlockState.RESERVED:
                self._move(block, BlockState.QUARANTINED)
        elif self._kept[block]:
            self._move(block, BlockState.CACHED)
            self._link_newest(block)
        else:
            self._move(block, BlockState.FREE)
            self._free_map[block] = 1

    def _find_one(self, after: int) -> int:
        free = self._free_map
        block = after + 1
        if after < 0 or block >= self.num_blocks or not free[block]:
            block = free.find(1, self._cursor)
            if block < 0:
                block = free.find(1)
            self._cursor = block
        free[block] = 0
        return block

    def _find_runs(self, count: int) -> list[int]:
        """The first run that is long enough; failing that, halves, quarters, ... of what is missing."""
        free, blocks, size, begin = self._free_map, list[int](), count, 0
        while len(blocks) < count:
            if size > count - len(blocks):
                size, begin = count - len(blocks), 0  # shorter runs may lie before
            start = free.find(b"\x01" * size, begin)
            if start < 0:
                size, begin = (size + 1) // 2, 0
                continue
            begin = start + size  # no run of this size is left before
            free[start:begin] = bytes(size)
            blocks.extend(range(start, begin))
        return blocks

    def _evict(self, count: int) -> None:
        for _ in range(count):
            block = self._newer[self.num_blocks]
            self._unlink(block)
            self._on_evict(block)
            self._kept[block] = 0
            self._move(block, BlockState.FREE)
            self._free_map[block] = 1
        self.num_evicted += count

    def _link_newest(self, block: int) -> None:
        ring = self.num_blocks
        newest = self._older[ring]
        self._newer[newest] = self._older[ring] = block
        self._older[block], self._newer[block] = newest, ring

    def _unlink(self, block: int) -> None:
        older, newer = self._older[block], self._newer[block]
        self._newer[older], self._older[newer] = newer, older
