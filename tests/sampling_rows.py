"""Rows that every sampler is tried with: each parameter alone, and several together."""

from __future__ import annotations

from dataclasses import replace

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
    "repetition": replace(ROW, repetition=1.7, seen=seen(*HISTORY, num_prompt=3)),
    "frequency": replace(ROW, frequency=1.2, seen=seen(*HISTORY, num_prompt=3), temperature=0),
    "presence": replace(ROW, presence=1.5, seen=seen(*HISTORY, num_prompt=3), top_k=5),
    "all-penalties": replace(
        ROW, repetition=1.1, frequency=0.3, presence=-0.4, seen=seen(*HISTORY, num_prompt=0), top_p=0.9, top_k=9
    ),
    "banned": replace(ROW, banned=(0, 1, 2, 3), top_k=30),
}
