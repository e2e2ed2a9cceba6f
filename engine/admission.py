"""Will everything that runs fit until it ends? The exact future peak, and how long sequences are guessed to run.

A running sequence that holds KV of a tokens after its next step and lives b steps beyond it holds ceil((a + t) /
block_size) blocks t steps later, for t <= b, then nothing. Memory grows until someone ends, so the peak lies at one
of those moments: sorted by b, descending, it is max_i sum_{j<=i} ceil((a_j + b_i) / block_size). A block that several
sequences hold counts once, with the holder that lives longest. What fills or is promised counts its final total
throughout (`fixed_blocks`). After LightLLM's admission (token granularity) and "Past-Future" (Gong et al., ASPLOS
2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def future_peak(
    num_tokens: Integers,
    remaining: Integers,
    tables: Sequence[Sequence[int]] | None,
    block_size: int,
    fixed_blocks: int = 0,
    fixed_tables: Iterable[Sequence[int]] = (),
) -> int:
    """Most blocks in use at any time from now, if every sequence lives exactly `remaining` steps more.

    Shapes: num_tokens, remaining [n] int64; tables: n block tables, or None if no block is shared.
    O(n * block_size + blocks in tables): remainders modulo the block size are counted instead of n * n ceilings taken.
    """
    if not len(num_tokens):
        return fixed_blocks
    order = np.argsort(-remaining, kind="stable")
    held, left = num_tokens[order] + (block_size - 1), remaining[order]
    whole, remainder = np.divmod(held, block_size)
    left_whole, left_remainder = np.divmod(left, block_size)
    # carries[i, t]: how many j <= i have a remainder >= t: block_size - t more tokens take them into one more block.
    carries = np.cumsum(remainder[:, None] >= np.arange(block_size + 1)[None, :], axis=0)
    rank = np.arange(len(held))
    total = np.cumsum(whole) + (rank + 1) * left_whole + carries[rank, block_size - left_remainder]
    if tables is not None:
        total = total - np.cumsum(_already_counted(order, tables, fixed_tables))
    return fixed_blocks + int(total.max())


def _already_counted(
    order: Integers, tables: Sequence[Sequence[int]], fixed_tables: Iterable[Sequence[int]]
) -> Integers:
    """Per sequence in `order`: how many of its blocks an earlier (longer living) holder has counted."""
    seen: set[int] = set()
    for table in fixed_tables:
        seen.update(table)
    counted = np.zeros(len(tables), dtype=np.int64)
    for position, which in enumerate(order):
        table = tables[int(which)]
        counted[position] = len(seen.intersection(table))
        seen.update(table)
    return counted


class LengthEstimator(Protocol):
    """Guesses how many tokens sequences will still draw."""

    def remaining(self, drawn: Integers, maxima: Integers, quantiles: Floats) -> Integers:
        """Tokens still to come, at least 1, per sequence: `drawn` so far, at most `maxima` in all.

        `quantiles` in [0, 1) is each sequence's own draw, made once, so that asking again does not roll the dice again.
        """
        ...

    def observe(self, num_output_tokens: int) -> None:
        """A sequence finished by itself after this many tokens."""
        ...


class MaximumLength:
    """Every sequence runs to its limit: never a preemption, most queueing."""

    def remaining(self, drawn: Integers, maxima: Integers, quantiles: Floats) -> Integers:
        return np.maximum(maxima - drawn, 1)

    def observe(self, num_output_tokens: int) -> None:
        """The limit does not depend on what others did."""


class ConstantLength:
    """Every sequence draws `length` tokens; one that is longer is guessed to end at the next multiple."""

    def __init__(self, length: int) -> None:
        self._length = length

    def remaining(self, drawn: Integers, maxima: Integers, quantiles: Floats) -> Integers:
        guess = (drawn // self._length + 1) * self._length
        return np.maximum(np.minimum(guess, maxima) - drawn, 1)

    def observe(self, num_output_tokens: int) -> None:
        """The constant does not depend on what others did."""


class HistoryLength:
    """Drawn from the lengths of finished sequences that were longer than this one is already.

    A sequence longer than all of them is guessed to run to its limit. Until `min_samples` have finished, a constant
    is used.
    """

    def __init__(self, fallback: ConstantLength, max_samples: int = 1000, min_samples: int = 32) -> None:
        self._fallback = fallback
        self._min_samples = min_samples
        self._lengths: deque[int] = deque(maxlen=max_samples)
        self._sorted: Integers | None = None

    def remaining(self, drawn: Integers, maxima: Integers, quantiles: Floats) -> Integers:
        if len(self._lengths) < self._min_samples:
            return self._fallback.remaining(drawn, maxima, quantiles)
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self._lengths, dtype=np.int64))
        known = self._sorted
        first = np.searchsorted(known, drawn, side="right")
        num_longer = len(known) - first
        pick = np.minimum(first + (quantiles * num_longer).astype(np.int64), len(known) - 1)
        guess = np.where(num_longer > 0, np.minimum(known[pick], maxima), maxima)
        return np.maximum(guess - drawn, 1)

    def observe(self, num_output_tokens: int) -> None:
        self._lengths.append(num_output_tokens)
        self._sorted = None
