"""A program: a model's operations recorded once, run for a step by one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.native.library import NativeContext, NativeOp, NativeStep


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A packed batch. Sequence i has rows [query_starts[i], query_starts[i + 1]), at positions from `positions[i]` on,
    and its blocks are block_tables[table_offsets[i]:]. All int32, `table_offsets` int64.

    `rope_cos`, `rope_sin`: [positions, head_dim / 2] float32, at least as long as the greatest position.
    """

    token_ids: np.ndarray
    query_starts: np.ndarray
    positions: np.ndarray
    table_offsets: np.ndarray
    block_tables: np.ndarray
    sampled_rows: np.ndarray
    rope_cos: Tensor
    rope_sin: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.positions)

    @property
    def num_sampled(self) -> int:
        return len(self.sampled_rows)


def rows_step(num_rows: int) -> StepArrays:
    """A step of rows without sequences, for operations that look at rows alone."""
    none, offsets, empty = np.zeros(0, np.int32), np.zeros(0, np.int64), torch.empty(0)
    return StepArrays(np.zeros(num_rows, np.int32), np.zeros(1, np.int32), none, offsets, none, none, empty, empty)


class Program:
    """Operations and the tensors they point at, kept alive together."""

    def __init__(self, context: NativeContext, ops: Sequence[NativeOp]) -> None:
        self._context = context
        self._ops = (NativeOp * len(ops))(*ops)
        self._tensors = [op.tensors for op in ops]

    def run(self, step: StepArrays) -> None:
        """Run all operations for the step; returns when they are done."""
        for array in (step.token_ids, step.query_starts, step.positions, step.block_tables, step.sampled_rows):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert step.table_offsets.dtype == np.int64
        assert step.rope_cos.dtype == torch.float32
        native = NativeStep(
            num_tokens=step.num_tokens,
            num_sequences=step.num_sequences,
            num_sampled=step.num_sampled,
            token_ids=step.token_ids.ctypes.data,
            query_starts=step.query_starts.ctypes.data,
            positions=step.positions.ctypes.data,
            table_offsets=step.table_offsets.ctypes.data,
            block_tables=step.block_tables.ctypes.data,
            sampled_rows=step.sampled_rows.ctypes.data,
            rope_cos=step.rope_cos.data_ptr(),
            rope_sin=step.rope_sin.data_ptr(),
        )
        self._context.run(self._ops, native)
