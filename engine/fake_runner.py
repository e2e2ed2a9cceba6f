"""A model without a model: tests, and services under test, run it in microseconds, and it sees every memory fault.

Its "KV" of a position is a hash of all token ids up to it. Before it computes a chunk it asserts that every earlier
position of the sequence really lies in the slots that the block table names, as attention would need it: a wrong block
table, a missed copy-on-write, a block lost to another sequence or a hand-over of stale bytes is an assertion failure.
The next token is a hash of all token ids, the seed, the choice and the position, so it depends on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from engine.batch import Batch, Chunk
from engine.request import SampledToken, SamplingParams, Sequence

_SLOT_BYTES = 8


class FakeRunner:
    """A Runner whose KV memory is one 8-byte hash per slot, laid out block after block like the real one."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 64, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.block_bytes = block_size * _SLOT_BYTES
        self.vocab_size = vocab_size
        self.slots = np.zeros((num_blocks, block_size), dtype=np.uint64)
        self.host_slots = np.zeros((num_host_blocks, block_size), dtype=np.uint64)
        self.num_executed_tokens = 0

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block, writable, as kvtransfer sees them."""
        return memoryview(self.slots[block_id]).cast("B")

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Copy, check, write, draw. Swap-ins come as late as a device may bring them: when the chunks have run."""
        for block, host_block in batch.swap_outs:
            self.host_slots[host_block] = self.slots[block]
        for source, destination in batch.copies:
            self.slots[destination] = self.slots[source]
        hashes = [self._check(chunk) for chunk in batch.chunks]
        self._write(batch, hashes)
        for host_block, block in batch.swap_ins:
            self.slots[block] = self.host_slots[host_block]
        self.num_executed_tokens += batch.num_tokens
        return [
            self._draw(sampler, prefixes[-1])
            for chunk, prefixes in zip(batch.chunks, hashes, strict=True)
            for sampler in chunk.samplers
        ]

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots of a block from `first_slot` on."""
        self.slots[block_id, first_slot:] = 0

    def _check(self, chunk: Chunk) -> list[int]:
        """Assert that the KV of earlier positions is there; return the hashes up to the chunk's end."""
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        assert chunk.num_tokens > 0
        assert end <= len(sequence.token_ids), "a chunk reaches beyond the known tokens"
        assert chunk.start == sequence.num_computed_tokens, "a chunk leaves a gap or computes again"
        assert len(sequence.block_table) * self.block_size >= end, "the block table does not cover the chunk"
        hashes = prefix_hashes(sequence.token_ids[:end])
        for position in range(chunk.start):
            block, slot = self._slot(sequence, position)
            found = self.slots[block, slot] == hashes[position]
            assert found, f"KV of position {position} is not in block {block} slot {slot}"
        return hashes

    def _write(self, batch: Batch, hashes: list[list[int]]) -> None:
        """Write every chunk's KV; two that write one slot missed a copy-on-write."""
        written: set[tuple[int, int]] = set()
        for chunk, prefixes in zip(batch.chunks, hashes, strict=True):
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                where = self._slot(chunk.sequence, position)
                assert where not in written, f"two sequences write block {where[0]} slot {where[1]}"
                written.add(where)
                self.slots[where] = prefixes[position]

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def _draw(self, sampler: Sequence, prefix: int) -> SampledToken:
        drawn = _hash_of(prefix, sampler.sampling.seed, sampler.choice, len(sampler.token_ids))
        token_id = drawn % self.vocab_size
        logprob = -1.0 - (drawn >> 32) / 2**32
        num_top = max(sampler.sampling.num_logprobs, 0)
        top = tuple(((token_id + rank) % self.vocab_size, logprob - rank) for rank in range(num_top))
        return SampledToken(sampler.sequence_id, token_id, logprob, top)


def expected_output(
    prompt_token_ids: Iterable[int], sampling: SamplingParams, choice: int = 0, vocab_size: int = 64,
    eos_token_ids: Iterable[int] = (), max_model_len: int = 2**31,
) -> list[int]:  # fmt: skip
    """What a choice must say on any engine with a FakeRunner, computed without an engine: the oracle of the tests."""
    token_ids, output = list(prompt_token_ids), list[int]()
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    max_output = min(sampling.max_tokens, max_model_len - len(token_ids))
    hashes = prefix_hashes(token_ids)
    while len(output) < max_output:
        token_id = _hash_of(hashes[-1], sampling.seed, choice, len(token_ids)) % vocab_size
        token_ids.append(token_id)
        output.append(token_id)
        if token_id in stops and len(output) >= sampling.min_tokens:
            break
        hashes = prefix_hashes(token_ids)
    return output


def prefix_hashes(token_ids: Iterable[int]) -> list[int]:
    """Per position a hash, never zero, of all token ids up to and including it."""
    hashes, digest = list[int](), b""
    for token_id in token_ids:
        digest = hashlib.blake2b(digest + token_id.to_bytes(4, "little"), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little") | 1)
    return hashes


def _hash_of(prefix: int, seed: int, choice: int, position: int) -> int:
    key = f"{prefix} {seed} {choice} {position}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
