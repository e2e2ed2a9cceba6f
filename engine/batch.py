"""The contract between scheduler and runner: what one forward pass computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.request import SampledToken, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions [start, start + num_tokens) of `sequence`; its block table covers them and is writable there.

    `samplers` are the sequences that draw a token from the last position's logits: none while the prompt is unfinished,
    the sequence itself when decoding, every choice of the request at the end of a shared prompt (n > 1).
    The drawn token of sampler s has position `start + num_tokens`, its key is (s.sampling.seed, s.choice, position).
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samplers: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: block copies, then one forward pass without padding over all chunks. There may be no chunk.

    Order, and what a device may do at the same time:

    1. swap-outs read their blocks before anything else of this batch writes them: the swap-ins, copies and chunks that
       the blocks were freed for. When `execute` returns they are complete, because a peer may be told to write there.
    2. swap-ins follow the swap-outs (both may name one block, or one host block) and may run beside the rest of the
       batch, which does not touch their blocks. They are complete before anything of the next batch.
    3. copies (copy-on-write), then the chunks.
    """

    copies: tuple[tuple[int, int], ...]  # (source block id, destination block id)
    chunks: tuple[Chunk, ...]  # decodes first
    swap_outs: tuple[tuple[int, int], ...] = ()  # (source block id, destination host block id)
    swap_ins: tuple[tuple[int, int], ...] = ()  # (source host block id, destination block id)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Runner(Protocol):
    """Runs batches on a device. Holds weights and KV memory; knows nothing of requests beyond the batch."""

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Run the batch, write its KV, return one token per sampler, in order of chunks and samplers."""
        ...

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """Zero the slots of a block from `first_slot` on, in every layer (before a tail block is published)."""
        ...
