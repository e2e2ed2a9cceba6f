"""Parameters of rows as the Triton sampler reads them, and its results: one copy to the device, one copy back.

`RowBuffer` keeps its addresses, so a CUDA graph that was captured with it replays on whatever it was filled with last.
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


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One step's rows on the device.

    `fields` [slots, number of fields] int64; `lists` int32. The rest says which kernels have anything to do: all of
    them when a graph is captured.
    """

    fields: Tensor
    lists: Tensor
    num_edited: int
    max_top: int
    weighs: bool
    """Whether any row draws by weight, so is not greedy."""
    selects: bool
    """Whether any row has top-k or top-p."""

    @property
    def num_slots(self) -> int:
        return self.fields.shape[0]


@dataclass(frozen=True, slots=True)
class Results:
    """What the kernels write: int32 in one tensor, read through views. Logprobs only where a row asked for them."""

    flat: Tensor
    num_slots: int
    max_top: int

    @classmethod
    def empty(cls, num_slots: int, max_top: int, device: torch.device) -> Results:
        flat = torch.zeros(num_slots * (2 + 2 * max_top), dtype=torch.int32, device=device)
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


class RowBuffer:
    """Room for `num_slots` rows and `num_listed` ids in lists, pinned on the host and on the device.

    Whoever fills it again before the device has read it must own a second one.
    """

    def __init__(self, num_slots: int, num_listed: int, device: torch.device) -> None:
        words = num_slots * len(ROW.fields or ()) + (num_listed + 1) // 2
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        self._num_slots, self._num_listed = num_slots, num_listed

    def fill(self, rows: list[SampleRow], vocab: int) -> PackedRows:
        """Enqueue one copy of `rows` to the device; slots behind them are padding. Does not wait for it.

        Raises: ValueError if the rows have no room or name ids outside the vocabulary.
        """
        num_listed = sum(_num_listed(row) for row in rows)
        if len(rows) > self._num_slots or num_listed > self._num_listed:
            raise ValueError(
                f"{len(rows)} rows with {num_listed} ids in lists exceed the room for "
                f"{self._num_slots} and {self._num_listed}"
            )
        split = self._num_slots * len(ROW.fields or ())
        words = self._host.numpy()
        num_edited = _pack(rows, vocab, words[:split].view(ROW), words[split:].view(np.int32))
        self._device.copy_(self._host, non_blocking=True)
        return PackedRows(
            fields=self._device[:split].view(self._num_slots, -1),
            lists=self._device[split:].view(torch.int32),
            num_edited=num_edited,
            max_top=max([0, *(min(row.num_logprobs, vocab) for row in rows)]),
            weighs=any(row.temperature > 0 for row in rows),
            selects=any(row.temperature > 0 and (0 < row.top_k < vocab or row.top_p < 1) for row in rows),
        )


def pack_rows(rows: list[SampleRow], vocab: int, device: torch.device) -> PackedRows:
    """The rows in a buffer of their own size. Raises: ValueError, as RowBuffer.fill."""
    return RowBuffer(len(rows), sum(map(_num_listed, rows)), device).fill(rows, vocab)


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
