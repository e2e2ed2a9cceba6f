"""A step's inputs in one piece of memory say what the step says; padding rows touch the dummy block alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from engine.kernels.native.program import StepArrays
from engine.step_layout import ALIGNMENT, StepLayout, StepSizes, lay_out, sizes_of, write_step

BLOCK = 4
DUMMY = 99


def step(*sequences: tuple[int, int, list[int]]) -> StepArrays:
    """From (first position, tokens, block table) of each sequence; the last row of each is sampled."""
    lengths = [length for _, length, _ in sequences]
    tables = [table for _, _, table in sequences]
    ends = np.cumsum(lengths)
    return StepArrays(
        token_ids=np.arange(100, 100 + sum(lengths), dtype=np.int32),
        query_starts=np.array([0, *ends], np.int32),
        positions=np.array([start for start, _, _ in sequences], np.int32),
        table_offsets=np.cumsum([0, *map(len, tables[:-1])], dtype=np.int64),
        block_tables=np.array([block for table in tables for block in table], np.int32),
        sampled_rows=(ends - 1).astype(np.int32),
        rope_cos=torch.empty(0),
        rope_sin=torch.empty(0),
    )


def written(made: StepArrays, sizes: StepSizes) -> dict[str, list[int]]:
    """Every array, from memory that was poisoned before."""
    layout = lay_out(sizes)
    memory = np.full(layout.num_bytes, 0x7F, np.uint8)
    write_step(made, BLOCK, sizes, layout, DUMMY, memory)
    names = [field.name for field in dataclasses.fields(StepLayout) if field.name != "num_bytes"]
    return {name: getattr(layout, name).of(memory).tolist() for name in names}


def test_decodes_and_chunks_are_told_apart_and_slots_follow_the_block_tables() -> None:
    made = step((6, 1, [5, 2]), (0, 1, [8]), (3, 3, [7, 1, 30]))
    sizes = sizes_of(made, BLOCK)
    assert sizes == StepSizes(num_tokens=5, num_sequences=3, num_decodes=2, num_sampled=3, max_blocks=16)
    found = written(made, sizes)
    tables = found.pop("block_tables")
    assert found == {
        "slot_mapping": [2 * BLOCK + 2, 8 * BLOCK, 7 * BLOCK + 3, 1 * BLOCK, 1 * BLOCK + 1],
        "token_ids": [100, 101, 102, 103, 104],
        "token_sources": [-1] * 5,
        "positions": [6, 0, 3, 4, 5],
        "cu_seqlens_q": [0, 1, 2, 5],
        "prefill_starts": [0, 3],
        "seq_lens": [7, 1, 6],
        "sampled_rows": [0, 1, 4],
    }
    assert tables == [[5, 2, *[DUMMY] * 14], [8, *[DUMMY] * 15], [7, 1, *[DUMMY] * 14]]


def test_padding_rows_write_to_the_dummy_block_and_attend_to_nothing() -> None:
    made = step((6, 1, [5, 2]), (2, 1, [8]))
    sizes = dataclasses.replace(sizes_of(made, BLOCK), num_tokens=4, num_sequences=4, num_decodes=4, num_sampled=4)
    found = written(made, sizes)
    assert found["slot_mapping"] == [2 * BLOCK + 2, 8 * BLOCK + 2, DUMMY * BLOCK, DUMMY * BLOCK + 1]
    assert found["seq_lens"] == [7, 3, 0, 0]
    assert found["cu_seqlens_q"] == [0, 1, 2, 3, 4]
    assert found["prefill_starts"] == [0]
    assert found["sampled_rows"] == [0, 1, 2, 2]
    assert found["token_ids"] == [100, 101, 0, 0]
    assert found["block_tables"][2:] == [[DUMMY] * 16] * 2


def test_offsets_are_aligned_and_follow_from_the_sizes_alone() -> None:
    sizes = StepSizes(num_tokens=33, num_sequences=7, num_decodes=6, num_sampled=5, max_blocks=16)
    layout = lay_out(sizes)
    places = [getattr(layout, field.name) for field in dataclasses.fields(StepLayout) if field.name != "num_bytes"]
    ends = [place.offset + place.num_bytes for place in places]
    assert all(place.offset % ALIGNMENT == 0 for place in places)
    assert all(end <= following.offset for end, following in zip(ends, places[1:], strict=False))
    assert ends[-1] <= layout.num_bytes
    assert lay_out(sizes) == layout
