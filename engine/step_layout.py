"""A step's inputs in one piece of memory: what a pinned buffer holds, and what one copy brings to a device.

Pure: numpy over memory that the caller has. Arrays begin at multiples of 256 bytes, as a device's allocations would;
their offsets follow from `StepSizes` alone, so a captured graph finds the inputs of every step of its sizes in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.kernels.native.program import StepArrays

ALIGNMENT = 256
_TABLE_COLUMNS = 16  # block tables are widened to multiples of it: rows stay aligned, and kernels see few widths


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Shapes of a step's arrays. `num_decodes` sequences come first, with one token each; prompt chunks follow."""

    num_tokens: int
    num_sequences: int
    num_decodes: int
    num_sampled: int
    max_blocks: int

    @property
    def num_prefills(self) -> int:
        return self.num_sequences - self.num_decodes


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """Where an array lies in the memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def of(self, memory: np.ndarray) -> np.ndarray:
        """The array in `memory`, which is bytes."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The places of DeviceStep's arrays.

    `prefill_starts` are `cu_seqlens_q` of the prompt chunks alone. `token_sources`: the draw of the step before that is
    a row's token; -1: it is in `token_ids`.
    """

    slot_mapping: ArrayPlace
    token_ids: ArrayPlace
    token_sources: ArrayPlace
    positions: ArrayPlace
    cu_seqlens_q: ArrayPlace
    prefill_starts: ArrayPlace
    seq_lens: ArrayPlace
    sampled_rows: ArrayPlace
    block_tables: ArrayPlace
    num_bytes: int


def sizes_of(step: StepArrays, block_size: int) -> StepSizes:
    """The sizes of a step as it is, without padding."""
    lengths = np.diff(step.query_starts)
    longer = np.flatnonzero(lengths != 1)
    num_blocks = -(-int((step.positions + lengths).max()) // block_size)
    return StepSizes(
        num_tokens=step.num_tokens,
        num_sequences=step.num_sequences,
        num_decodes=int(longer[0]) if len(longer) else step.num_sequences,
        num_sampled=step.num_sampled,
        max_blocks=-(-num_blocks // _TABLE_COLUMNS) * _TABLE_COLUMNS,
    )


def decode_sizes(num_sequences: int, max_seq_len: int, block_size: int) -> StepSizes:
    """The sizes of a step that has room for so many decodes, each of at most `max_seq_len` tokens."""
    num_blocks = -(-max_seq_len // block_size)
    return StepSizes(
        num_tokens=num_sequences,
        num_sequences=num_sequences,
        num_decodes=num_sequences,
        num_sampled=num_sequences,
        max_blocks=-(-num_blocks // _TABLE_COLUMNS) * _TABLE_COLUMNS,
    )


def lay_out(sizes: StepSizes) -> StepLayout:
    """Places one after another."""
    end = 0

    def place(dtype: str, *shape: int) -> ArrayPlace:
        nonlocal end
        found = ArrayPlace(end, shape, dtype)
        end = -(-(end + found.num_bytes) // ALIGNMENT) * ALIGNMENT
        return found

    places = {
        "slot_mapping": place("int64", sizes.num_tokens),
        "token_ids": place("int32", sizes.num_tokens),
        "token_sources": place("int32", sizes.num_tokens),
        "positions": place("int32", sizes.num_tokens),
        "cu_seqlens_q": place("int32", sizes.num_sequences + 1),
        "prefill_starts": place("int32", sizes.num_prefills + 1),
        "seq_lens": place("int32", sizes.num_sequences),
        "sampled_rows": place("int32", sizes.num_sampled),
        "block_tables": place("int32", sizes.num_sequences, sizes.max_blocks),
    }
    return StepLayout(**places, num_bytes=end)


def write_step(
    step: StepArrays,
    block_size: int,
    sizes: StepSizes,
    layout: StepLayout,
    dummy_block: int,
    memory: np.ndarray,
    sources: Sequence[int] | None = None,
) -> None:
    """Write a step's arrays into `memory`; every element of every array is written. `sources`: of all its tokens.

    `sizes` may be larger than the step's if all its sequences decode: the rest are padding sequences of one token,
    whose KV goes to the dummy block, who attend to nothing (`seq_lens` 0) and whose logits nobody reads.
    """
    lengths = np.diff(step.query_starts)
    num_tokens, num_sequences = step.num_tokens, step.num_sequences
    padding = sizes.num_tokens - num_tokens
    assert padding == sizes.num_sequences - num_sequences
    assert not padding or sizes.num_prefills == 0, "a prompt's chunk is never padded"

    sequence_of = np.repeat(np.arange(num_sequences), lengths)
    positions = np.arange(num_tokens) - step.query_starts[sequence_of] + step.positions[sequence_of]
    blocks = step.block_tables[step.table_offsets[sequence_of] + positions // block_size].astype(np.int64)
    _write(layout.slot_mapping, memory, blocks * block_size + positions % block_size)
    layout.slot_mapping.of(memory)[num_tokens:] = dummy_block * block_size + np.arange(padding) % block_size
    _write(layout.token_ids, memory, step.token_ids)
    token_sources = layout.token_sources.of(memory)
    token_sources[:] = -1
    if sources is not None:
        token_sources[:num_tokens] = sources
    _write(layout.positions, memory, positions)
    starts = layout.cu_seqlens_q.of(memory)
    starts[: num_sequences + 1] = step.query_starts
    starts[num_sequences + 1 :] = num_tokens + 1 + np.arange(padding)
    layout.prefill_starts.of(memory)[:] = starts[sizes.num_decodes :] - starts[sizes.num_decodes]
    _write(layout.seq_lens, memory, step.positions + lengths)
    sampled = layout.sampled_rows.of(memory)
    sampled[: step.num_sampled] = step.sampled_rows
    sampled[step.num_sampled :] = num_tokens  # a padding row: there are some where logits are padded
    tables = layout.block_tables.of(memory)
    tables[:] = dummy_block
    for i in range(num_sequences):
        used = -(-int(step.positions[i] + lengths[i]) // block_size)
        offset = int(step.table_offsets[i])
        tables[i, :used] = step.block_tables[offset : offset + used]


def _write(place: ArrayPlace, memory: np.ndarray, values: np.ndarray) -> None:
    """The values, and zeros behind them."""
    array = place.of(memory)
    array[: len(values)] = values
    array[len(values) :] = 0
