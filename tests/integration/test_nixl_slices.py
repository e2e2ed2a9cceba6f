"""Pools of different tensor parallelism: ranks read their own heads out of blocks that hold more, or fewer.

At the seam, with synthetic memory: a block is [kv_heads, layers, 2, block_size, head_dim], so one head of it is one
region, and a list of descriptors as long as a head addresses any slice. No model runs in more than one rank yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import numpy as np
import pytest

from kvtransfer import nixl_agent
from kvtransfer.nixl_agent import NixlAgent, ReadState, Region, open_agent

pytestmark = pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")

NUM_BLOCKS, NUM_HEADS, HEAD_WORDS = 6, 8, 1024
HEAD_BYTES = HEAD_WORDS * 8
PATIENCE_S = 20.0


class Rank:
    """One rank's memory: blocks with some of the heads."""

    def __init__(self, name: str, first_head: int, num_heads: int) -> None:
        self.first_head, self.num_heads = first_head, num_heads
        self.memory = np.zeros((NUM_BLOCKS, num_heads, HEAD_WORDS), np.uint64)
        self.agent: NixlAgent = open_agent(name, [Region(self.address, self.memory.nbytes)])

    @property
    def address(self) -> int:
        return self.memory.ctypes.data

    def descriptors(self, reader: NixlAgent, peer: str | None) -> int:
        return reader.prepare(peer, self.address, HEAD_BYTES, NUM_BLOCKS * self.num_heads)

    def ids(self, block_id: int, heads: range) -> list[int]:
        return [block_id * self.num_heads + head - self.first_head for head in heads]

    @property
    def heads(self) -> range:
        return range(self.first_head, self.first_head + self.num_heads)


@contextlib.contextmanager
def pool(name: str, num_ranks: int) -> Generator[list[Rank]]:
    size = NUM_HEADS // num_ranks
    ranks = [Rank(f"{name}-{rank}", rank * size, size) for rank in range(num_ranks)]
    yield ranks
    for rank in ranks:
        rank.agent.close()


def read(prefill: Rank, decode: Rank, blocks: list[tuple[int, int]]) -> None:
    """D's rank reads the heads that both have, of (P's block, D's block)."""
    heads = range(max(prefill.heads.start, decode.heads.start), min(prefill.heads.stop, decode.heads.stop))
    if not heads:
        return
    peer = decode.agent.add_peer(prefill.agent.metadata)
    ours, theirs = decode.descriptors(decode.agent, None), prefill.descriptors(decode.agent, peer)
    to = [index for _, block_id in blocks for index in decode.ids(block_id, heads)]
    source = [index for block_id, _ in blocks for index in prefill.ids(block_id, heads)]
    posted = decode.agent.post_read(ours, to, theirs, source)
    deadline = time.monotonic() + PATIENCE_S
    while (state := decode.agent.state(posted)) is ReadState.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    decode.agent.release(posted)
    assert state is ReadState.DONE
    decode.agent.drop(ours)
    decode.agent.drop(theirs)
    decode.agent.remove_peer(peer)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 2), (2, 1), (2, 4), (4, 2), (2, 2)])
def test_each_rank_reads_its_heads_and_no_other(num_prefill: int, num_decode: int) -> None:
    whole = np.random.default_rng(3).integers(1, 1 << 60, (NUM_BLOCKS, NUM_HEADS, HEAD_WORDS), np.uint64)
    blocks = [(0, 4), (3, 1), (4, 2)]  # scattered, and two neighbours at both ends
    with pool("p", num_prefill) as prefill, pool("d", num_decode) as decode:
        for rank in prefill:
            rank.memory[:] = whole[:, rank.heads.start : rank.heads.stop]
        for theirs in prefill:
            for ours in decode:
                read(theirs, ours, blocks)
        for rank in decode:
            expected = np.zeros_like(rank.memory)
            for source, to in blocks:
                expected[to] = whole[source, rank.heads.start : rank.heads.stop]
            assert np.array_equal(rank.memory, expected), f"rank with heads {rank.heads}"
