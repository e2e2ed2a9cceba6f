"""Parameters of rows as the Triton sampler reads them, and its results: one copy to the device, one copy back.

A `RowLayout` says where in a piece of memory they lie. It follows from the room alone, so that a captured graph, whose
memory stays, draws whatever rows were written there last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.sampling.rows import Draws, SampleRow

ROW = np.dtype(
    [
        ("logits_row", np.int64),  # -1: padding, of which nothing is read or written
        ("seed", np.uint64),
        ("choice", np.int64),
        ("position", np.int64),
        ("top_k", np.int64),
        ("top_p", np.uint64),  # in units of 2^-64; 0 is off
        ("tail", np.float64),  # what top-p surely cuts off, less a margin for rounding; 0 without top-p
        ("num_logprobs", np.int64),
        ("scale", np.float64),  # 1 / temperature; 0 is greedy
        ("margin", np.float64),
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("edited_row", np.int64),  # where penalties and bans are applied to a copy of the logits; -1: nowhere
        ("lists", np.int64),  # offset of ids seen, then how often each was output, then ids banned
        ("num_seen", np.int64),
        ("num_banned", np.int64),
    ]
)
"""One row; every field has 8 bytes, so that the kernels index it by the field's number."""

_NO_ROW = np.zeros((), ROW)
_NO_ROW["logits_row"] = -1
_TAIL_MARGIN = 1 - 2.0**-10


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKinds:
    """Which kernels have anything to do; all of them when a graph is captured."""

    num_edited: int
    """Rows with penalties or bans."""
    max_top: int
    weighs: bool
    """Whether any row draws by weight, so is not greedy."""
    selects: bool
    """Whether any row has top-k or top-p."""


PLAIN = RowKinds(num_edited=0, max_top=0, weighs=True, selects=True)
"""What a graph is captured for: any plain rows."""


def are_plain(rows: list[SampleRow]) -> bool:
    """Nothing but numbers, in and out, no lists of any length: a graph can draw such rows."""
    return all(row.num_logprobs <= 0 and not row.banned and row.seen is None for row in rows)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One step's rows on the device: `fields` [slots, number of fields] int64; `lists` int32."""

    fields: Tensor
    lists: Tensor
    kinds: RowKinds

    @property
    def num_slots(self) -> int:
        return self.fields.shape[0]


def results_bytes(num_slots: int, max_top: int) -> int:
    """Of the results of so many rows."""
    return 4 * num_slots * (2 + 2 * max_top)


@dataclass(frozen=True, slots=True)
class Results:
    """What the kernels write: int32 in one tensor, read through views. Logprobs only where a row asked for them."""

    flat: Tensor
    num_slots: int
    max_top: int

    @classmethod
    def empty(cls, num_slots: int, max_top: int, device: torch.device) -> Results:
        flat = torch.zeros(results_bytes(num_slots, max_top) // 4, dtype=torch.int32, device=device)
        return cls(flat, num_slots, max_top)

    @property
    def tokens(self) -> Tensor:
        """[slots] int32: what the next step's embedding reads without a look from the host."""
        return self.flat[: self.num_slots]

    @property
    def logprobs(self) -> Tensor:
        return self.flat[self.num_slots : 2 * self.num_slots].view(torch.float32)

    @property
    def top_ids(self) -> Tensor:
        start = 2 * self.num_slots
        return self.flat[start : start + self.num_slots * self.max_top].view(self.num_slots, self.max_top)

    @property
    def top_logprobs(self) -> Tensor:
        start = (2 + self.max_top) * self.num_slots
        return self.flat[start:].view(torch.float32).view(self.num_slots, self.max_top)

    def draws(self, num_rows: int) -> Draws:
        """The first rows on the host. Waits for the device."""
        host = Results(self.flat.cpu(), self.num_slots, self.max_top)
        parts = (host.tokens, host.logprobs, host.top_ids, host.top_logprobs)
        return Draws(*(part[:num_rows].numpy() for part in parts))


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Room for `num_slots` rows and `num_listed` ids in lists."""

    num_slots: int
    num_listed: int = 0

    @classmethod
    def of(cls, rows: list[SampleRow]) -> RowLayout:
        """As much as these rows need."""
        return cls(len(rows), sum(map(_num_listed, rows)))

    @property
    def _lists_offset(self) -> int:
        return self.num_slots * ROW.itemsize

    @property
    def num_bytes(self) -> int:
        return self._lists_offset + 8 * ((self.num_listed + 1) // 2)

    def write(self, rows: list[SampleRow], vocab: int, memory: np.ndarray) -> RowKinds:
        """Write rows into host memory, which is bytes; slots behind them are padding.

        Raises: ValueError if the rows have no room or name ids outside the vocabulary.
        """
        num_listed = sum(map(_num_listed, rows))
        if len(rows) > self.num_slots or num_listed > self.num_listed:
            raise ValueError(
                f"{len(rows)} rows with {num_listed} ids in lists exceed the room for "
                f"{self.num_slots} and {self.num_listed}"
            )
        split = self._lists_offset
        num_edited = _pack(rows, vocab, memory[:split].view(ROW), memory[split:].view(np.int32))
        return RowKinds(
            num_edited=num_edited,
            max_top=max([0, *(min(row.num_logprobs, vocab) for row in rows)]),
            weighs=any(row.temperature > 0 for row in rows),
            selects=any(row.temperature > 0 and (0 < row.top_k < vocab or row.top_p < 1) for row in rows),
        )

    def rows_in(self, memory: Tensor, kinds: RowKinds) -> PackedRows:
        """The rows in device memory to which what was written is copied."""
        split = self._lists_offset
        fields = memory[:split].view(torch.int64).view(self.num_slots, -1)
        return PackedRows(fields, memory[split : self.num_bytes].view(torch.int32), kinds)


def pack_rows(rows: list[SampleRow], vocab: int, device: torch.device) -> PackedRows:
    """The rows in memory of their own. Raises: ValueError, as RowLayout.write."""
    layout = RowLayout.of(rows)
    memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
    kinds = layout.write(rows, vocab, memory.numpy())
    return layout.rows_in(memory.to(device), kinds)


def _num_listed(row: SampleRow) -> int:
    return (2 * len(row.seen.ids) if row.seen else 0) + len(row.banned)


def _pack(rows: list[SampleRow], vocab: int, fields: np.ndarray, lists: np.ndarray) -> int:
    """Write rows and lists; returns how many rows have edits."""
    fields[:] = _NO_ROW
    end = num_edited = 0
    for i, row in enumerate(rows):
        start, num_seen = end, len(row.seen.ids) if row.seen else 0
        if row.seen:
            ids = np.asarray(row.seen.ids)
            if num_seen and not 0 <= ids.min() <= ids.max() < vocab:
                raise ValueError(f"a sequence holds token ids outside [0, {vocab})")
            lists[end : end + num_seen] = ids
            lists[end + num_seen : end + 2 * num_seen] = row.seen.num_output
        end += 2 * num_seen
        lists[end : end + len(row.banned)] = row.banned
        end += len(row.banned)
        edited = num_seen > 0 or bool(row.banned)
        fields[i] = (
            *(row.logits_row, row.seed & 0xFFFFFFFFFFFFFFFF, row.choice, row.position),
            *(row.top_k if row.top_k < vocab else 0, *_top_p(row.top_p), min(row.num_logprobs, vocab)),
            *(1 / row.temperature if row.temperature > 0 else 0.0, row.min_p_margin),
            *(row.repetition, row.frequency, row.presence),
            *(num_edited if edited else -1, start, num_seen, len(row.banned)),
        )
        num_edited += edited
    return num_edited


def _top_p(top_p: float) -> tuple[int, float]:
    """The nucleus in units of 2^-64, and the share that surely lies outside it."""
    if top_p >= 1:
        return 0, 0.0
    return max(1, math.floor(top_p * 2.0**64)), (1 - top_p) * _TAIL_MARGIN
