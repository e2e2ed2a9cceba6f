"""Faults of a prefill worker on demand, for chaos tests (servicekit/failpoints.py)."""

from __future__ import annotations

from collections.abc import Iterable

from kvtransfer.transport import BlockSource, SourceBlock
from servicekit.failpoints import Failpoints


class FaultyBlockSource(BlockSource):
    """Flips a bit of a block, or raises its generation, right after it was published (so after its digest was taken),
    or dies then.
    """

    def __init__(self, memory: memoryview, block_bytes: int, boot_id: bytes, failpoints: Failpoints) -> None:
        super().__init__(memory, block_bytes, boot_id)
        self._failpoints = failpoints

    def publish(self, ticket: bytes, blocks: Iterable[SourceBlock]) -> None:
        blocks = list(blocks)
        super().publish(ticket, blocks)
        for block in blocks:
            if self._failpoints.due("corrupt-published-block"):
                self.block(block.block_id)[self.block_bytes // 2] ^= 1
            if self._failpoints.due("stale-published-block"):
                self.generation_table[block.block_id] = block.generation + 1
            self._failpoints.kill_if_due("kill-after-block-published")
