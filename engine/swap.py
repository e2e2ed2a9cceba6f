"""What of preempted sequences is kept in host memory, and when is that worth it? Decides and accounts; copies nothing.

A host block holds the KV of one block. A sequence that is swapped out gives back every block and waits with a
`SwappedOut` in place of a block table. Of its blocks

- a full one that the prefix cache knows is not copied: it stays where it is, cached or shared. A host block is reserved
  for its content, and the copy made only if the pool evicts it (`save`). All who wait for one content share that host
  block, so a prompt's beginning that many have is copied at most once, and not at all while it stays cached.
- any other (the partial last one; all of them without a prefix cache) is copied at once.

So coming back never computes anything again: each block is in the prefix cache or on the host.

    FREE ──reserve──> RESERVED ──save──> HELD ──last owner gone──> LEAVING ──settle──> FREE

A host block rests until the plan after the one in which its last owner let go: that step's batch may still read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.prefix_cache import Link


def is_swap_cheaper(
    num_lost_tokens: int, num_copied_blocks: int, prefill_tokens_per_s: float, host_copy_s: float
) -> bool:
    """Whether copying blocks to the host and back takes no longer than computing their tokens again.

    `host_copy_s` is for one block one way. A speed that nobody has measured yet (0) speaks for swapping: copying the
    KV of a token moves less memory than computing it.
    """
    if prefill_tokens_per_s <= 0:
        return True
    return 2 * num_copied_blocks * host_copy_s <= num_lost_tokens / prefill_tokens_per_s


@dataclass(frozen=True, slots=True)
class SwappedOut:
    """Where the KV of a waiting sequence's first `num_tokens` tokens is, by index in its block table."""

    num_tokens: int
    cached: Mapping[int, Link]  # in the prefix cache, or saved when it was evicted from there
    copied: Mapping[int, int]  # in this host block of its own

    @property
    def num_blocks(self) -> int:
        return len(self.cached) + len(self.copied)


@dataclass(slots=True)
class _Content:
    """A content that the prefix cache knew: who waits for it, and whether it was evicted and copied meanwhile."""

    host_block: int
    num_owners: int = 0
    is_saved: bool = False


class HostBlocks:
    """The only place that gives out host blocks and takes them back."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_unsaved = 0  # contents that must be copied before the prefix cache forgets them
        self._free = list(range(num_blocks - 1, -1, -1))
        self._leaving: list[int] = []
        self._contents: dict[bytes, _Content] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def reserve(self, num_tokens: int, cached: Mapping[int, Link], others: Iterable[int]) -> SwappedOut | None:
        """Host blocks for a sequence with these blocks, by index in its table; None if there are too few.

        The caller copies `others` at once to the host blocks that the answer names.
        """
        others = tuple(others)
        num_new = sum(link.content not in self._contents for link in cached.values())
        if num_new + len(others) > len(self._free):
            return None
        for link in cached.values():
            content = self._contents.get(link.content)
            if content is None:
                content = self._contents[link.content] = _Content(self._free.pop())
                self.num_unsaved += 1
            content.num_owners += 1
        return SwappedOut(num_tokens, dict(cached), {index: self._free.pop() for index in others})

    def save(self, link: Link) -> int | None:
        """The host block to which a block must be copied whose content the prefix cache forgets; None: nobody waits."""
        content = self._contents.get(link.content)
        if content is None or content.is_saved:
            return None
        content.is_saved = True
        self.num_unsaved -= 1
        return content.host_block

    def where(self, swapped: SwappedOut, index: int) -> int:
        """The host block that holds a block of a sequence, which the prefix cache does not hold."""
        if index in swapped.copied:
            return swapped.copied[index]
        content = self._contents[swapped.cached[index].content]
        assert content.is_saved, f"block {index} of a swapped sequence is lost"
        return content.host_block

    def release(self, swapped: SwappedOut) -> None:
        """The sequence came back, or will not. Its host blocks are free from the next `settle` on."""
        self._leaving += swapped.copied.values()
        for link in swapped.cached.values():
            content = self._contents[link.content]
            content.num_owners -= 1
            if not content.num_owners:
                del self._contents[link.content]
                self.num_unsaved -= not content.is_saved
                self._leaving.append(content.host_block)

    def settle(self) -> None:
        """A new plan begins: what the one before read is free to be written."""
        if self._leaving:
            self._free += self._leaving
            self._leaving.clear()

    def unsaved(self) -> list[bytes]:
        """The contents that only the prefix cache holds."""
        return [each for each, content in self._contents.items() if not content.is_saved]

    def check(self, swapped: Iterable[SwappedOut]) -> None:
        """Assert conservation (T8), and that these sequences, which are all that wait, are the owners."""
        owners, own = Counter[bytes](), list[int]()
        for each in swapped:
            owners.update(link.content for link in each.cached.values())
            own += each.copied.values()
        assert owners == {content: each.num_owners for content, each in self._contents.items()}
        shared = [each.host_block for each in self._contents.values()]
        everything = [*self._free, *self._leaving, *own, *shared]
        assert sorted(everything) == list(range(self.num_blocks)), "a host block is lost or has two owners"
        assert self.num_unsaved == len(self.unsaved())
