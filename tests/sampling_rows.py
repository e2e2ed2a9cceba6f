"""Rows that every sampler is tried with: each parameter alone, and several together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.kernels.sampling.rows import SampleRow
from engine.token_counts import TokenCounts


def seen(*token_ids: int, num_prompt: int) -> TokenCounts:
    return TokenCounts().advance(token_ids, num_prompt)


ROW = SampleRow(logits_row=0, seed=1, choice=0, position=10)
HISTORY = (5, 5, 9, 0, 9, 5, 31, 30)
VARIANTS = {
    "greedy": replace(ROW, temperature=0),
    "plain": ROW,
    "cold": replace(ROW, temperature=0.1),
    "hot": replace(ROW, temperature=5.0),
    "top-1": replace(ROW, top_k=1),
    "top-7": replace(ROW, top_k=7),
    "top-all": replace(ROW, top_k=10**6),
    "top-p": replace(ROW, top_p=0.8),
    "tiny-top-p": replace(ROW, top_p=1e-9),
    "top-p-hot": replace(ROW, top_p=0.99, temperature=3.0),
    "both": replace(ROW, top_k=20, top_p=0.5),
    "min-p": replace(ROW, min_p=0.1),
    "min-p-of-top-k": replace(ROW, min_p=0.2, top_k=9),
    "min-p-1": replace(ROW, min_p=1.0),
    "all-cuts": replace(ROW, min_p=0.01, top_k=12, top_p=0.9, temperature=2.0),
    "repetition": replace(ROW, repetition=1.7, seen=seen(*HISTORY, num_prompt=3)),
    "frequency": replace(ROW, frequency=1.2, seen=seen(*HISTORY, num_prompt=3), temperature=0),
    "presence": replace(ROW, presence=1.5, seen=seen(*HISTORY, num_prompt=3), top_k=5),
    "all-penalties": replace(
        ROW, repetition=1.1, frequency=0.3, presence=-0.4, seen=seen(*HISTORY, num_prompt=0), top_p=0.9, top_k=9
    ),
    "banned": replace(ROW, banned=(0, 1, 2, 3), top_k=30),
}


def min_p_rows(logits: np.ndarray, per_row: int) -> list[SampleRow]:
    """Draws with min-p beside every other cut, `per_row` for each row of logits."""
    cuts = [
        replace(ROW, min_p=min_p, temperature=temperature, **more)
        for min_p, temperature, more in (
            (0.001, 1.0, {}), (0.05, 0.3, {}), (0.3, 4.0, {}), (0.5, 1.0, {"top_k": 5}), (0.02, 2.0, {"top_p": 0.95}),
            (1.0, 1.0, {}),
        )
    ]  # fmt: skip
    return [
        replace(row, logits_row=i, seed=1000 * i + draw, position=draw)
        for i in range(len(logits))
        for row in cuts
        for draw in range(per_row)
    ]


def assert_min_p_holds(logits: np.ndarray, rows: list[SampleRow], tokens: np.ndarray) -> None:
    """Every drawn token has at least min_p times the greatest probability at the row's temperature.

    The logits' distance to the greatest is a float32: an error of 2^-24 of the greatest logit.
    """
    for row, token in zip(rows, tokens, strict=True):
        mine = logits[row.logits_row].astype(np.float64)
        share = np.exp((mine[token] - mine.max()) / row.temperature)
        slack = np.abs(mine).max() * 2.0**-23 / row.temperature
        assert share >= row.min_p * (1 - slack), row
